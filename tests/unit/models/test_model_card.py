"""The metrics of a model card, read back with the hub client's own parser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from htcl_ray.config import Config
from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.evaluation.gate import Bound, Gate, judge
from htcl_ray.evaluation.release_gate import check_verdict, record_verdict
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.models.folder import HUB_FILES, write_evaluation
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.manifest import file_sha256
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import small_config, write_models

pytestmark = pytest.mark.unit

SEMANTIC, PREFERENCE = "models/semantic/semantic-0", "models/preference/preference-0"
DATA = {"split": "test", "songs": 40}
RECALL = bootstrap.mean(np.linspace(0, 1, 40), bootstrap.draw([str(i % 8) for i in range(40)], 200, seed=0))


def tasks() -> list[TaskResult]:
    def methods(semantic: dict[str, Estimate], preference: dict[str, Estimate]) -> dict[str, dict[str, Estimate]]:
        return {
            "semantic": semantic,
            "preference": preference,
            "random": {name: Estimate(0.01, 40) for name in semantic},
        }

    retrieval = {"recall@10": RECALL, "median_rank": Estimate(3.0, 40), "recall@1": Estimate(0.1, 40)}
    probe, other = {"accuracy": Estimate(0.75, 30)}, {"accuracy": Estimate(0.7, 30)}
    return [
        TaskResult(
            "text_to_audio",
            "text → audio",
            "texts",
            "artists",
            "random",
            methods(retrieval, {"recall@10": Estimate(0.4, 40)}),
        ),
        TaskResult("probe_genre", "genre probe", "songs", "artists", "random", methods(probe, other)),
        TaskResult("probe_language", "language probe", "songs", "artists", "random", methods(other, probe)),
        TaskResult(
            "cold",
            "cold songs",
            "users",
            "users",
            "random",
            methods({}, {"ndcg@10": Estimate(0.2, 9), "item_auc": Estimate(np.nan, 0)}),
        ),
    ]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = small_config(tmp_path / "workspace")
    write_models(config, tmp_path)
    return config


@pytest.fixture
def workspace(config: Config) -> Workspace:
    return Workspace(config.workspace)


def read(folder: Path | str) -> dict[tuple[str, str], tuple[float, int]]:
    """Dataset configuration and metric → value and n, by the hub client."""
    results = ModelCard.load(Path(folder) / "README.md").data.eval_results or []
    assert {(result.dataset_split, result.dataset_revision) for result in results} <= {("test", "report-1")}
    return {
        (result.dataset_config, result.metric_type): (result.metric_value, result.metric_args["n"])
        for result in results
    }


EXPECTED = {
    SEMANTIC: {
        ("text_to_audio", "recall@10"): (RECALL.value, 40),
        ("text_to_audio", "median_rank"): (3.0, 40),
        ("probe_genre", "accuracy"): (0.75, 30),
        ("probe_language", "accuracy"): (0.7, 30),
    },
    PREFERENCE: {
        ("text_to_audio", "recall@10"): (0.4, 40),
        ("probe_genre", "accuracy"): (0.7, 30),
        ("probe_language", "accuracy"): (0.75, 30),
        ("cold", "ndcg@10"): (0.2, 9),
    },
}


@pytest.mark.parametrize("path", [SEMANTIC, PREFERENCE])
def test_card_shows_the_headline_metrics_of_its_own_space(workspace: Workspace, tmp_path: Path, path: str):
    folder = Path(workspace.full(path))
    before = weights_fingerprint(folder)
    parameters = next(
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| Parameters")
    )
    assert read(folder) == {}
    write_evaluation(workspace, path, tasks(), "report-1", DATA)
    assert read(folder) == EXPECTED[path]
    text = (folder / "README.md").read_text()
    assert parameters in text.splitlines()
    assert "Measured on 40 held-out songs of its catalogue (report report-1)" in text
    assert "| genre probe | accuracy | 0.7" in text
    manifest = workspace.manifest(path)
    for name in ("README.md", "evaluation.json"):
        assert manifest["files"][name] == file_sha256(folder / name)
    assert weights_fingerprint(folder) == before
    kept = json.loads((folder / "evaluation.json").read_text())
    assert {(item["task"], item["method"], item["figure"]) for item in kept["figures"]} >= {
        ("text_to_audio", "random", "recall@1")
    }
    low, high = RECALL.interval
    (recall,) = [item for item in kept["figures"] if (item["method"], item["figure"]) == ("semantic", "recall@10")]
    assert (recall["low"], recall["high"]) == pytest.approx((low, high))

    HTCL.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == text
    assert (tmp_path / "again" / "evaluation.json").read_text() == (folder / "evaluation.json").read_text()


def test_metrics_of_other_weights_are_not_written(workspace: Workspace, tmp_path: Path):
    write_evaluation(workspace, SEMANTIC, tasks(), "report-1", DATA)
    model = HTCL.from_pretrained(workspace.full(SEMANTIC))
    with torch.no_grad():
        model.audio_head[-1].bias += 1
    model.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "evaluation.json").exists()
    assert read(tmp_path / "trained") == {}
    assert HTCL.from_pretrained(workspace.full(SEMANTIC)).to_stage_2(0.1, seed=0).evaluation is None


def test_a_verdict_outlives_a_new_card(workspace: Workspace):
    gate = Gate(bounds=(Bound(figure="text_to_audio.semantic.recall@10", at_least=0.1),))
    figures = {("text_to_audio", "semantic", "recall@10"): RECALL}
    write_evaluation(workspace, SEMANTIC, tasks(), "report-1", DATA)
    record_verdict(workspace, SEMANTIC, judge(gate, figures), "report-1", {})
    write_evaluation(workspace, SEMANTIC, tasks(), "report-1", DATA | {"songs": 41})
    assert check_verdict(workspace, SEMANTIC, workspace.manifest(SEMANTIC)) is True
    assert artifacts.newest_semantic(workspace, "failed").manifest["gate"]["passed"] is True


def test_an_evaluation_that_is_something_else_is_refused(workspace: Workspace):
    workspace.write_json(f"{SEMANTIC}/evaluation.json", {"figures": 3})
    with pytest.raises(MismatchError, match=r"evaluation\.json is not an evaluation"):
        HTCL.from_pretrained(workspace.full(SEMANTIC))
    with pytest.raises(WorkspaceError, match="nothing was written"):
        write_evaluation(workspace, "models/semantic/none", tasks(), "report-1", DATA)


def test_download_from_the_hub_includes_the_evaluation():
    assert "evaluation.json" in HUB_FILES
