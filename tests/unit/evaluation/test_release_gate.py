"""Verdicts beside models and indexes: what is believed, what is refused, and which artifact is the newest accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from htcl_ray.cli import main
from htcl_ray.config import Config
from htcl_ray.config.sections import Require
from htcl_ray.errors import GateError, MismatchError, WorkspaceError
from htcl_ray.evaluation.gate import Bound, Gate, GateVerdict, judge
from htcl_ray.evaluation.release_gate import check_gates, check_verdict, record_verdict, record_verdicts
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.index.folder import read_manifest
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors, unit_norm
from htcl_ray.models import weights_fingerprint
from htcl_ray.search.service import SearchService
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Models
from htcl_ray.workspace.manifest import file_sha256
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import small_config, song_id, write_models

pytestmark = pytest.mark.unit

SEMANTIC, PREFERENCE, INDEX = "models/semantic/semantic-0", "models/preference/preference-0", "index/index-0"


def verdict(value: float) -> GateVerdict:
    """Passed from 0.5 up."""
    bounds = (
        Bound(figure="cold.preference.ndcg@10", at_least=0.5),
        Bound(figure="cold.preference.item_auc", at_least=0, optional=True),
    )
    return judge(Gate(bounds=bounds), {("cold", "preference", "ndcg@10"): Estimate(value, 9)})


def write_index(config: Config, tmp: Path, version: str = "index-0", models: str = "0") -> None:
    workspace = Workspace(config.workspace)
    inputs = {"semantic": f"semantic-{models}", "preference": f"preference-{models}"}
    rng = np.random.default_rng(0)
    vectors = Vectors(*(unit_norm(rng.normal(size=(9, config.model.dim))).astype(np.float32) for _ in range(2)))
    versions = {stage: weights_fingerprint(workspace.full(f"models/{stage}/{name}")) for stage, name in inputs.items()}
    index = SongIndex.build([song_id(i) for i in range(9)], vectors, model_versions=versions)
    index.save(tmp / version, inputs=inputs)
    workspace.publish(tmp / version, f"index/{version}", index.manifest)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = small_config(folder / "workspace")
    write_models(config, folder)
    write_index(config, folder)
    return folder / "workspace"


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Config:
    shutil.copytree(made, tmp_path / "workspace")
    return small_config(tmp_path / "workspace")


@pytest.fixture
def workspace(config: Config) -> Workspace:
    return Workspace(config.workspace)


def chosen(workspace: Workspace, version: str | None = None, require: Require = "failed") -> Models:
    """As a step chooses, without a configuration."""
    if version is not None:
        return artifacts.named_models(workspace, version)
    semantic = artifacts.newest_semantic(workspace, require)
    return Models(semantic, artifacts.newest_preference(workspace, semantic, require))


def judged(workspace: Workspace, value: float, version: str | None = None) -> tuple[Models, artifacts.Artifact]:
    models, index = chosen(workspace, version, "off"), artifacts.index(workspace, require="off")
    record_verdicts(workspace, models, index, verdict(value), "report-1")
    return artifacts.models_of(workspace, index), artifacts.index(workspace, index.version)


def check(workspace: Workspace, path: str) -> bool | None:
    return check_verdict(workspace, path, workspace.manifest(path) or {})


@pytest.mark.parametrize(("value", "passed"), [(0.6, True), (0.4, False)])
def test_a_verdict_is_kept_with_its_evidence(workspace: Workspace, value: float, passed: bool):
    before = weights_fingerprint(workspace.full(PREFERENCE))
    assert check(workspace, PREFERENCE) is None
    judged(workspace, value)
    for path in (PREFERENCE, INDEX):
        assert check(workspace, path) is passed
        manifest = workspace.manifest(path)
        assert manifest["gate"] == {"passed": passed, "report": "report-1"}
        assert manifest["files"]["gate.json"] == file_sha256(workspace.full(f"{path}/gate.json"))
        evidence = workspace.read_json(f"{path}/gate.json")
        assert (evidence["passed"], evidence["report"]) == (passed, "report-1")
        assert evidence["judged_together"] == {
            "semantic": "semantic-0",
            "preference": "preference-0",
            "index": "index-0",
        }
        assert [bound["passed"] for bound in evidence["bounds"]] == [passed, True]
        assert evidence["bounds"][0]["asked"] == "cold.preference.ndcg@10: at least 0.5"
        assert evidence["bounds"][0]["value"] == value
    assert check(workspace, SEMANTIC) is None, "stage 2 was judged"
    assert weights_fingerprint(workspace.full(PREFERENCE)) == before
    assert read_manifest(workspace.full(INDEX))["gate"]["passed"] is passed


def test_a_later_verdict_replaces_the_earlier_one(workspace: Workspace):
    judged(workspace, 0.4)
    judged(workspace, 0.6)
    assert check(workspace, PREFERENCE) is check(workspace, INDEX) is True


def test_a_semantic_model_alone_is_judged(workspace: Workspace):
    record_verdicts(workspace, artifacts.named_models(workspace, "semantic-0"), None, verdict(0.4), "report-1")
    assert (check(workspace, SEMANTIC), check(workspace, PREFERENCE), check(workspace, INDEX)) == (False, None, None)
    with pytest.raises(WorkspaceError, match="cannot be judged"):
        record_verdict(workspace, "models/semantic/none", verdict(1), "report-1", {})


def edit(workspace: Workspace, name: str, change: Any) -> None:
    tree = workspace.read_json(f"{PREFERENCE}/{name}")
    change(tree)
    workspace.write_json(f"{PREFERENCE}/{name}", tree)


def rehash(workspace: Workspace, name: str) -> None:
    digest = file_sha256(workspace.full(f"{PREFERENCE}/{name}"))
    edit(workspace, "manifest.json", lambda manifest: manifest["files"].update({name: digest}))


def flip_manifest(workspace: Workspace) -> None:
    edit(workspace, "manifest.json", lambda manifest: manifest["gate"].update(passed=True))


def drop_from_manifest(workspace: Workspace) -> None:
    edit(workspace, "manifest.json", lambda manifest: manifest.pop("gate"))


def edit_value(workspace: Workspace) -> None:
    edit(workspace, "gate.json", lambda evidence: evidence["bounds"][0].update(value=0.9))


def edit_value_and_hash(workspace: Workspace) -> None:
    edit_value(workspace)
    rehash(workspace, "gate.json")


def flip_everywhere_but_the_value(workspace: Workspace) -> None:
    edit(
        workspace,
        "gate.json",
        lambda evidence: (evidence.update(passed=True), evidence["bounds"][0].update(passed=True)),
    )
    rehash(workspace, "gate.json")
    flip_manifest(workspace)


def no_bounds(workspace: Workspace) -> None:
    edit(workspace, "gate.json", lambda evidence: evidence.update(bounds=[]))
    rehash(workspace, "gate.json")
    flip_manifest(workspace)


def edit_weights(workspace: Workspace) -> None:
    with open(workspace.full(f"{PREFERENCE}/model.safetensors"), "ab") as file:
        file.write(b"x")


def edit_weights_and_hash(workspace: Workspace) -> None:
    edit_weights(workspace)
    rehash(workspace, "model.safetensors")


def remove_evidence(workspace: Workspace) -> None:
    Path(workspace.full(f"{PREFERENCE}/gate.json")).unlink()


def evidence_of_something_else(workspace: Workspace) -> None:
    workspace.write_json(f"{PREFERENCE}/gate.json", {"passed": True})
    rehash(workspace, "gate.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_manifest, "says that its gate gave passed, but the values in gate.json give failed"),
        (drop_from_manifest, "holds gate.json, but its manifest names no verdict"),
        (edit_value, r"gate\.json has SHA-256 \w{64}, but its manifest says \w{64}"),
        (edit_value_and_hash, "gave failed, but the values in gate.json give passed"),
        (flip_everywhere_but_the_value, "gave passed, but the values in gate.json give failed"),
        (no_bounds, "gave passed, but the values in gate.json give"),
        (edit_weights, r"model\.safetensors has SHA-256 \w{64}, but its manifest says \w{64}"),
        (edit_weights_and_hash, r"gate\.json judged model\.safetensors with SHA-256 \w{64}, but it is \w{64}"),
        (remove_evidence, "gave failed, but gate.json is missing"),
        (evidence_of_something_else, "gate.json is not what a gate writes"),
    ],
)
def test_what_was_edited_is_refused(workspace: Workspace, change: Any, message: str):
    judged(workspace, 0.4)
    change(workspace)
    with pytest.raises(MismatchError, match=message) as caught:
        check(workspace, PREFERENCE)
    assert "\n" not in str(caught.value)
    index = artifacts.index(workspace, "index-0")
    with pytest.raises(MismatchError):
        check_gates(workspace, artifacts.models_of(workspace, index), index, "off")


def test_an_index_whose_evidence_was_edited_does_not_load(workspace: Workspace):
    judged(workspace, 0.6)
    path = Path(workspace.full(f"{INDEX}/gate.json"))
    path.write_text(path.read_text().replace("0.6", "0.7"))
    with pytest.raises(MismatchError, match=r"gate\.json has SHA-256"):
        SongIndex.load(workspace.full(INDEX))


def test_a_failed_gate_is_refused_unless_told_otherwise(config: Config, workspace: Workspace):
    models, index = judged(workspace, 0.4)
    with pytest.raises(GateError) as caught:
        check_gates(workspace, models, index, "failed")
    assert str(caught.value) == (
        "the gate of index index-0 failed: cold.preference.ndcg@10: at least 0.5, measured 0.4; use another, or this one all the same "
        "with --set gate.require=off"
    )
    assert caught.value.exit_code == 2
    check_gates(workspace, models, index, "off")
    for version in (None, "index-0"):
        with pytest.raises(GateError, match="index-0"):
            SearchService.open(config, version, encoder=False)
    told = config.with_overrides({"gate.require": "off"})
    assert len(SearchService.open(told).search_songs([song_id(0)], k=3).hits) == 3


def test_a_failed_model_is_refused_though_its_index_was_not_judged(config: Config, workspace: Workspace):
    record_verdict(workspace, SEMANTIC, verdict(0.4), "report-1", {})
    with pytest.raises(GateError, match="the gate of semantic model semantic-0 failed"):
        SearchService.open(config, "index-0", encoder=False)
    with pytest.raises(GateError, match=r"allows no index .* \(index-0 unjudged\)"):
        artifacts.index(workspace)


def test_what_passed_is_served(config: Config, workspace: Workspace):
    judged(workspace, 0.6)
    assert len(SearchService.open(config).search_text("rock", k=3).hits) == 3


def test_the_application_refuses_before_anything_is_loaded(config: Config, workspace: Workspace):
    from htcl_ray.serving.application import create

    judged(workspace, 0.4)
    with pytest.raises(GateError, match="gate of index index-0 failed"):
        create(config, "index-0")
    assert create(config.with_overrides({"gate.require": "off"})).__class__.__name__ == "Application"


def test_search_says_why_it_does_not_answer(config: Config, workspace: Workspace, capsys: pytest.CaptureFixture[str]):
    judged(workspace, 0.4)
    file = Path(config.workspace).parent / "config.yaml"
    file.write_text(config.as_yaml())
    command = ["search", "--config", str(file), "--song-id", song_id(0), "--index", "index-0"]
    assert main(command) == 2
    assert "htcl: error: the gate of index index-0 failed" in capsys.readouterr().err
    assert main([*command, "--set", "gate.require=off"]) == 0


def test_the_newest_accepted_is_the_default(
    config: Config, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_models(config, tmp_path, seed=1)
    write_index(config, tmp_path, "index-1", models="1")
    assert artifacts.index(workspace).version == "index-1"
    assert chosen(workspace).semantic.version == "semantic-1"
    record_verdict(workspace, "models/preference/preference-1", verdict(0.4), "report-1", {})
    assert chosen(workspace) == Models(artifacts.named_models(workspace, "semantic-1").semantic, None)
    assert capsys.readouterr().err.splitlines()[0] == (
        "models/preference/preference-1, the newest, is passed over: its gate failed; no other exists"
    )
    assert artifacts.index(workspace).version == "index-0", "the one of a failed model is passed over"
    record_verdict(workspace, "models/semantic/semantic-1", verdict(0.4), "report-1", {})
    found = chosen(workspace)
    assert (found.semantic.version, found.preference and found.preference.version) == ("semantic-0", "preference-0")
    every = chosen(workspace, require="off")
    assert (every.semantic.version, every.preference and every.preference.version) == ("semantic-1", "preference-1")
    assert artifacts.index(workspace, require="off").version == "index-1"
    assert artifacts.named_models(workspace, "preference-1").preference is not None, "who names one gets it"
    record_verdict(workspace, SEMANTIC, verdict(0.4), "report-1", {})
    with pytest.raises(
        GateError, match=r"gate.require=failed allows no semantic model .*\(semantic-0 failed, semantic-1 failed\)"
    ):
        chosen(workspace)


def test_unjudged_asks_for_a_verdict(
    config: Config, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of the index and of the model of the last stage; the semantic model behind it was judged with it."""
    index, models = artifacts.index(workspace, "index-0"), chosen(workspace)
    check_gates(workspace, models, index, "failed")
    for asked, made in ((models, index), (models, None), (Models(models.semantic, None), None)):
        with pytest.raises(GateError, match=r"no gate has judged .* and gate.require is unjudged"):
            check_gates(workspace, asked, made, "unjudged")
    for choose in (
        lambda: artifacts.newest_semantic(workspace, "unjudged"),
        lambda: artifacts.index(workspace, require="unjudged"),
    ):
        with pytest.raises(GateError, match=r"gate\.require=unjudged allows no .*-0 unjudged"):
            choose()
    judged(workspace, 0.6)
    write_models(config, tmp_path, seed=1)
    capsys.readouterr()
    found = chosen(workspace, require="unjudged")
    assert (found.semantic.version, found.preference and found.preference.version) == ("semantic-0", "preference-0")
    assert capsys.readouterr().err.startswith(
        "models/semantic/semantic-1, the newest, is passed over: no gate has judged it; using models/"
    )
    check_gates(workspace, found, artifacts.index(workspace, require="unjudged"), "unjudged")
    assert (
        len(SearchService.open(config.with_overrides({"gate.require": "unjudged"})).search_text("rock", k=3).hits) == 3
    )


def test_a_later_index_of_unjudged_models_is_passed_over(config: Config, workspace: Workspace, tmp_path: Path):
    judged(workspace, 0.6)
    write_models(config, tmp_path, seed=1)
    write_index(config, tmp_path, "index-1", models="1")
    assert artifacts.index(workspace).version == "index-1"
    assert artifacts.index(workspace, require="unjudged").version == "index-0"


def test_evidence_is_plain_json(workspace: Workspace):
    judged(workspace, 0.6)
    json.loads(workspace.read_bytes(f"{INDEX}/gate.json"), parse_constant=lambda name: pytest.fail(name))


def test_a_workspace_on_object_storage_is_judged_and_checked(
    config: Config, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Workspace, "is_local", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    judged(workspace, 0.6)
    assert check(workspace, PREFERENCE) is check(workspace, INDEX) is True
    assert len(SearchService.open(config).search_songs([song_id(0)], k=3).hits) == 3
    judged(workspace, 0.4)
    with pytest.raises(GateError, match="gate of index index-0 failed"):
        SearchService.open(config, "index-0")
    flip_manifest(workspace)
    with pytest.raises(MismatchError, match="gave passed, but the values"):
        check(workspace, PREFERENCE)
