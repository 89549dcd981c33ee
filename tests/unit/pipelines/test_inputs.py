"""Input artifacts of a step: those with the fingerprints that the configuration determines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import soundfile

from htcl_ray.config import Config, resolve
from htcl_ray.config.sections import AudioRecipe, Require
from htcl_ray.errors import ConfigError, GateError, InputError, MismatchError, WorkspaceError
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.embed import plan
from htcl_ray.pipelines.events import plan_log
from htcl_ray.pipelines.index import determined_index, index_version
from htcl_ray.pipelines.make_features import plan_features
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import TINY, write_models

pytestmark = pytest.mark.unit

CATALOG = "song_id,audio_path,title,genre\na,audio/a.wav,One,jazz\nb,audio/b.wav,Two,rock\n"
LOG = "user_id,trigger_song_id,song_id,feedback,timestamp\nu,a,b,like,1\nu,b,a,skip,2\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two songs and a log."""
    folder = tmp_path / "data"
    (folder / "audio").mkdir(parents=True)
    for name in "ab":
        soundfile.write(folder / f"audio/{name}.wav", np.zeros(8000), 16000)
    (folder / "songs.csv").write_text(CATALOG)
    (folder / "log.csv").write_text(LOG)
    monkeypatch.chdir(folder)
    return folder


def configured(catalog: str = "songs.csv", log: str | None = "log.csv", **keys: Any) -> Config:
    tables = {"data.catalog": catalog, **({"data.interactions": log} if log else {})}
    return resolve("demo").with_overrides({**tables, **{key.replace("__", "."): value for key, value in keys.items()}})


def fingerprints(config: Config) -> tuple[str, str, str]:
    """Of features, events and pairs."""
    features = plan_features(config).version
    log = plan_log(config, features)
    return features, log.events_version, log.pairs_version


def spellings(folder: Path, name: str) -> dict[str, str]:
    """Spellings of one path, with the links that they need."""
    (folder / f"link-to-{name}").symlink_to(folder / name)
    linked = folder.parent / "linked"
    if not linked.exists():
        linked.symlink_to(folder)
    (folder / "below").mkdir(exist_ok=True)
    return {
        "dotted": f"./{name}",
        "absolute": str(folder / name),
        "up and down": f"below/../{name}",
        "link": f"link-to-{name}",
        "folder by a link": str(linked / name),
        "uri": f"file://{folder}/{name}",
        "uri with escapes": f"file://{folder}/{name.replace('s', '%73')}",
    }


@pytest.mark.parametrize(
    "prepared", [lambda config: config, Config.with_absolute_paths], ids=["as given", "by the command"]
)
def test_a_table_is_the_same_however_its_path_is_spelled(folder: Path, prepared: Callable[[Config], Config]):
    expected = fingerprints(configured())
    logs = spellings(folder, "log.csv")
    for way, catalog in spellings(folder, "songs.csv").items():
        if prepared is Config.with_absolute_paths or "%" not in catalog:
            assert fingerprints(prepared(configured(catalog, logs[way]))) == expected, way


def test_a_catalogue_is_identified_by_its_content(folder: Path):
    """Not by its format or the order of its rows."""
    expected = plan_features(configured()).version
    header, one, two = CATALOG.splitlines()
    (folder / "turned.csv").write_text(f"{header}\n{two}\n{one}\n")
    assert plan_features(configured("turned.csv")).version == expected
    pq.write_table(pa.csv.read_csv("songs.csv"), "songs.parquet")
    assert plan_features(configured("songs.parquet")).version == expected
    (folder / "in-parts").mkdir()
    (folder / "in-parts/1.csv").write_text(f"{header}\n{one.replace('audio/', '../audio/')}\n")
    (folder / "in-parts/2.csv").write_text(f"{header}\n{two.replace('audio/', str(folder / 'audio') + '/')}\n")
    assert plan_features(configured("in-parts")).version == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda: Path("songs.csv").write_text(CATALOG.replace("One", "Eins")),
        lambda: Path("songs.csv").write_text(CATALOG.replace("jazz", "folk")),
        lambda: Path("songs.csv").write_text(CATALOG + ",audio/a.wav,Nameless,jazz\n"),
        lambda: soundfile.write("audio/a.wav", np.zeros(9000), 16000),
        lambda: os.utime("audio/b.wav", ns=(1, 1)),
    ],
    ids=["text", "metadata", "a row that is rejected", "audio", "time of audio"],
)
def test_other_contents_are_another_catalogue(folder: Path, change: Callable[[], object]):
    config = configured(data__max_rejected_share=0.5)
    before = plan_features(config).version
    change()
    assert plan_features(config).version != before


def test_a_changed_log_gives_other_events_of_the_same_features(folder: Path):
    before = fingerprints(configured())
    Path("log.csv").write_text(LOG + "v,a,b,like,3\n")
    after = fingerprints(configured())
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def finish(config: Config) -> tuple[str, str, str]:
    """Write the manifests that `htcl preprocess` writes."""
    workspace, (features, events, pairs) = Workspace(config.workspace), fingerprints(config)
    tree, of = config.model_dump(mode="json"), {"features": features}
    if workspace.manifest(f"features/{features}") is None:
        workspace.finish(f"features/{features}", build_manifest("features", config=tree, inputs={}))
    workspace.finish(f"events/{events}", build_manifest("events", config=tree, inputs=of))
    workspace.finish(f"pairs/{pairs}", build_manifest("pairs", config=tree, inputs={**of, "events": events}))
    return features, events, pairs


def chosen(config: Config) -> tuple[str | None, ...]:
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config).version
    of_log = (inputs.events(workspace, config, features), inputs.pairs(workspace, config, features))
    return features, *(item and item.version for item in of_log)


def test_a_step_reads_the_artifacts_of_its_configuration_not_the_newest(folder: Path):
    """Configuration A, then B, then A again, for each section that determines features, events or pairs."""
    first = configured()
    made = finish(first)
    others = [
        configured(data__text_columns=["genre"]),
        configured(data__split_shares=[0.61, 0.19, 0.2]),
        configured(audio__clip_seconds=3.3),
        configured(pairs__min_played_ratio=0.27),
        configured(pairs__min_support=7),
        configured(pairs__popularity_exponent=0.123),
        configured(data__held_out_user_share=0.31),
    ]
    for other in others:
        with pytest.raises(
            WorkspaceError, match=r"holds no (features|events|pairs) of .*run 'htcl preprocess' with this configuration"
        ):
            chosen(other)
    for other in others:
        assert finish(other) != made
    for config in (first, *others):
        assert chosen(config) == fingerprints(config)


def test_changed_tables_are_preprocessed_first(folder: Path):
    config = configured()
    finish(config)
    Path("log.csv").write_text(LOG + "v,a,b,like,3\n")
    with pytest.raises(WorkspaceError, match=r"no events of log\.csv"):
        chosen(config)
    Path("songs.csv").write_text(CATALOG.replace("One", "Eins"))
    with pytest.raises(WorkspaceError, match=r"no features of songs\.csv with its present content"):
        chosen(config)


def test_features_of_a_machine_with_other_decoders_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch):
    made = finish(configured())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan_features(configured()).version != made[0]
    assert inputs.features(Workspace("workspace"), configured()).version == made[0]


def test_without_a_catalogue_the_workspace_must_hold_one_artifact(folder: Path):
    """A later job need not name the tables again unless the workspace holds several artifacts."""
    unnamed = resolve("demo")
    with pytest.raises(WorkspaceError, match="holds no features; run 'htcl preprocess' first"):
        chosen(unnamed)
    made = finish(configured())
    assert chosen(unnamed) == made
    with pytest.raises(MismatchError, match=r"audio\.sample_rate=16000, but the configuration says 8000"):
        chosen(unnamed.with_overrides({"audio.sample_rate": 8000}))
    with pytest.raises(MismatchError, match=r"pairs\.min_support=\d, but the configuration says 7"):
        chosen(unnamed.with_overrides({"pairs.min_support": 7}))
    finish(configured(pairs__min_support=7))
    assert chosen(unnamed) == made
    shutil.copy("log.csv", "other.csv")
    finish(configured(log="other.csv"))
    with pytest.raises(
        ConfigError, match=r"holds several (pairs|events) .*log\.csv; .*other\.csv.*say which by data\.interactions"
    ):
        chosen(unnamed)
    finish(configured(data__text_columns=["genre"]))
    with pytest.raises(ConfigError, match=r"holds several features .*say which by data\.catalog"):
        chosen(unnamed)


def train(config: Config) -> tuple[str, str]:
    """Write the manifests that `htcl pretrain` and `htcl finetune` write; returns the versions of both models."""
    workspace, (features, _, pairs) = Workspace(config.workspace), fingerprints(config)
    semantic = inputs.semantic_version(config, features)
    preference = inputs.preference_version(config, features, pairs, semantic)
    tree = config.model_dump(mode="json")
    if workspace.manifest(f"models/semantic/{semantic}") is None:
        workspace.finish(
            f"models/semantic/{semantic}", build_manifest("semantic", config=tree, inputs={"features": features})
        )
    made_from = {"features": features, "pairs": pairs, "model": semantic}
    workspace.finish(f"models/preference/{preference}", build_manifest("preference", config=tree, inputs=made_from))
    return semantic, preference


def models(config: Config, version: str | None = None, require: Require | None = None) -> tuple[str, str | None]:
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config).version
    pair = inputs.models(workspace, config, features, version, require=require)
    return pair.semantic.version, pair.preference and pair.preference.version


def test_models_are_those_that_the_configuration_trains(folder: Path, capsys: pytest.CaptureFixture[str]):
    first, longer, colder = configured(), configured(pretrain__epochs=33), configured(finetune__temperature=0.111)
    finish(first)
    with pytest.raises(WorkspaceError, match="holds no model; run 'htcl pretrain' first"):
        models(first)
    made = [train(config) for config in (first, longer, colder)]
    assert len(set(made)) == 3
    capsys.readouterr()
    assert [models(config) for config in (first, longer, colder)] == made
    said = capsys.readouterr().err
    assert (
        f"models/semantic/{made[1][0]} is newer, but this configuration produces models/semantic/{made[0][0]}" in said
    )
    assert models(first, made[1][1]) == made[1], "a named version is used"
    where_it_runs = first.with_overrides(
        {"pretrain.num_workers": 1, "finetune.cpus_per_worker": 0.5, "pretrain.micro_batch_size": 4}
    )
    assert models(where_it_runs) == made[0]


def test_without_such_a_model_the_newest_accepted_is_used_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    finish(configured())
    train(configured())
    newest = train(configured(pretrain__epochs=33))
    other = configured(pretrain__epochs=5)
    assert models(other) == newest
    assert (
        f"using semantic model {newest[0]}, the newest accepted: the workspace does not hold" in capsys.readouterr().err
    )
    workspace = Workspace(other.workspace)
    assert inputs.parent(workspace, other, fingerprints(other)[0]).version == newest[0]


def test_a_model_that_its_gate_rejected_is_passed_over_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]):
    """By `htcl embed`, and by `htcl finetune` for its parent, also when the configuration trains that model."""
    finish(configured())
    older, newer = configured(), configured(pretrain__epochs=33)
    made = [train(config) for config in (older, newer)]
    workspace = Workspace(newer.workspace)
    rejected = f"models/semantic/{made[1][0]}"
    workspace.finish(rejected, {**(workspace.manifest(rejected) or {}), "gate": {"passed": False, "report": "r"}})
    capsys.readouterr()
    said = f"{rejected}, the newest, is passed over: its gate failed; using models/semantic/{made[0][0]}"
    assert models(newer) == made[0]
    assert said in capsys.readouterr().err
    assert inputs.parent(workspace, newer, fingerprints(newer)[0]).version == made[0][0]
    assert said in capsys.readouterr().err


def test_a_text_model_in_a_folder_is_identified_by_its_content(folder: Path):
    for name in ("bert", "copy", "other"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}" if name != "other" else "{ }")
    version = {
        name: inputs.semantic_version(configured(text__name_or_path=name), "features")
        for name in ("bert", "copy", "other", "org/bert")
    }
    assert (
        version["bert"]
        == version["copy"]
        == inputs.semantic_version(configured(text__name_or_path=f"{folder}/bert"), "features")
    )
    assert len(set(version.values())) == 3


def test_a_named_log_that_cannot_be_read_determines_no_model(folder: Path):
    """The newest preference model is used, since the pairs of this configuration are unknown."""
    config = configured()
    finish(config)
    made = train(config)
    assert models(configured(log="absent.csv")) == made, "the newest of this parent"
    with pytest.raises(InputError, match=r"absent\.csv does not exist"):
        chosen(configured(log="absent.csv"))


def test_a_configuration_without_a_catalogue_determines_no_index(folder: Path):
    finish(configured())
    for config in (resolve("demo"), configured(), configured("absent.csv")):
        assert determined_index(Workspace(config.workspace), config) is None


def test_the_index_of_the_configuration_is_used_not_the_newest(folder: Path, tmp_path: Path):
    """Another kind of index, or one that its gate rejected, is not used."""
    flat = configured(**{key.replace(".", "__"): value for key, value in TINY.items()}, index__kind="flat")
    hnsw = flat.with_overrides({"index.kind": "hnsw"})
    finish(flat)
    write_models(flat, tmp_path)
    workspace = Workspace(flat.workspace)
    assert determined_index(workspace, flat) is None, "no index is built yet"
    versions = {}
    for config in (flat, hnsw):
        versions[config.index.kind] = index_version(config, plan(workspace, config))
        workspace.finish(f"index/{versions[config.index.kind]}", build_manifest("index", config={}, inputs={}))
    assert len(set(versions.values())) == 2
    assert [determined_index(workspace, config) for config in (flat, hnsw)] == list(versions.values())
    assert (
        determined_index(workspace, hnsw.with_overrides({"data.catalog": f"file://{folder}/songs.csv"}))
        == versions["hnsw"]
    )
    assert determined_index(workspace, resolve("demo")) is None
    failed = build_manifest("index", config={}, inputs={}, gate={"passed": False, "report": "r"})
    workspace.finish(f"index/{versions['flat']}", failed)
    assert determined_index(workspace, flat) is None
    assert determined_index(workspace, flat.with_overrides({"gate.require": "off"})) == versions["flat"]


def test_gates_of_named_models_are_checked(folder: Path):
    """By `inputs.models` and `inputs.parent`, as `gate.require` says; `htcl evaluate` passes `off`."""
    config = configured(gate__require="unjudged")
    finish(config)
    semantic, preference = train(config)
    workspace, features = Workspace(config.workspace), fingerprints(config)[0]
    for version in (None, semantic, preference):
        with pytest.raises(GateError, match="unjudged"):
            models(config, version)
    for version in (None, semantic):
        with pytest.raises(GateError, match="unjudged"):
            inputs.parent(workspace, config, features, version)
    assert models(config, require="off") == (semantic, preference)
    assert models(config.with_overrides({"gate.require": "failed"})) == (semantic, preference)


def test_the_tower_changes_the_model_and_not_the_features(folder: Path):
    """Features made with one tower are the input of another; a tower that is named as the default is the default."""
    default, cnn, transformer = (configured(audio__tower=tower) for tower in (None, "cnn", "transformer"))
    assert fingerprints(cnn) == fingerprints(transformer) == fingerprints(default)
    versions = [inputs.semantic_version(config, "features") for config in (default, cnn, transformer)]
    assert versions[0] == versions[2] != versions[1]
    workspace = Workspace(default.workspace)
    workspace.finish("features/v1", build_manifest("features", config=cnn.model_dump(mode="json"), inputs={}))
    without_catalog = transformer.with_overrides({"data.catalog": []})
    assert inputs.features(workspace, without_catalog).version == "v1"
    with pytest.raises(MismatchError, match=r"were made with audio\.n_mels=64, but the configuration says 128"):
        inputs.features(workspace, without_catalog.with_overrides({"audio.n_mels": 128}))


def test_settings_of_other_extractors_do_not_change_features(folder: Path):
    """Neither those of given vectors nor their fingerprint know of mel bands; those of log-mel frames do."""
    (folder / "songs.csv").write_text('song_id,title,genre,vector\na,One,jazz,"[1, 2]"\nb,Two,rock,"[3, 1]"\n')
    mel = {"audio.n_mels": 40, "audio.n_fft": 1024, "audio.clip_seconds": 7.0, "audio.sample_rate": 8000}
    vectors = configured(audio__extractor="vectors")
    other = vectors.with_overrides({**mel, "audio.hop_seconds": 3.0})
    assert other.audio.determining == {"extractor": "vectors"}
    assert plan_features(vectors).versions == plan_features(other).versions
    workspace = Workspace(vectors.workspace)
    workspace.finish("features/v1", build_manifest("features", config=vectors.model_dump(mode="json"), inputs={}))
    assert inputs.features(workspace, other.with_overrides({"data.catalog": []})).version == "v1"

    encoder = AudioRecipe(extractor="pretrained", name_or_path="some/encoder", n_mels=40).determining
    assert set(encoder) == {"extractor", "clip_seconds", "min_seconds", "name_or_path", "window_seconds", "hop_seconds"}
    log_mel = AudioRecipe().determining
    assert set(AudioRecipe.model_fields) - set(log_mel) == {"name_or_path", "window_seconds", "hop_seconds"}
