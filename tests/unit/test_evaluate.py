"""The evaluation step on a workspace with made-up vectors: what it finds, refuses, writes and repeats."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray import schemas
from htcl_ray.artifacts import StepResult
from htcl_ray.config import Config, resolve
from htcl_ray.errors import ConfigError, MismatchError, WorkspaceError
from htcl_ray.evaluation import report as reports
from htcl_ray.pipelines import evaluate as step
from htcl_ray.retrieval.vectors import Vectors
from htcl_ray.storage import Workspace, build_manifest

pytestmark = pytest.mark.unit

GENRES = ("rock", "jazz", "folk", "ambient")
DIM = 8


class World:
    """Songs with a direction for each genre in semantic space, and one for each taste, hidden from text, in preference space."""

    def __init__(self, songs: int = 120) -> None:
        generator = np.random.default_rng(0)
        self.ids = [f"s{i:03}" for i in range(songs)]
        self.genre = generator.integers(0, 4, songs)
        self.taste = generator.integers(0, 4, songs)
        self.split = np.array([("train", "validation", "test", "test")[i % 4] for i in range(songs)])
        self.texts = [f"{GENRES[g]} <b>{i // 8}" for i, g in enumerate(self.genre)]  # some songs share their text
        noise = 0.3 * generator.normal(size=(2, songs, DIM))
        self.semantic = _unit(np.eye(DIM)[self.genre] + noise[0])
        self.preference = _unit(np.eye(DIM)[self.genre] + np.eye(DIM)[4 + self.taste] + noise[1])

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.eye(DIM, dtype=np.float32)[[GENRES.index(text.split()[0]) for text in texts]]

    def events(self) -> pa.Table:
        generator = np.random.default_rng(1)
        rows = []
        for user in range(40):
            liked = generator.integers(0, 4)
            for song in generator.choice(len(self.ids), 40, replace=False):
                late = self.split[song] == "test"
                rows.append(
                    {
                        "user_id": f"u{user}",
                        "song_id": self.ids[song],
                        "value": 1.0 if self.taste[song] == liked else -1.0,
                        "timestamp": 9.0 if late else 1.0,
                        "held_out_user": user % 2 == 0,
                        "period": "test" if late else "train",
                    }
                )
        return pa.Table.from_pylist([{"trigger_song_id": None, **row} for row in rows], schema=schemas.EVENTS)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    def load(semantic: object, preference: object | None) -> SimpleNamespace:
        def encode_texts(texts: list[str]) -> SimpleNamespace:
            vectors = made.encode(texts)
            return Vectors(vectors, vectors if preference else None)

        return SimpleNamespace(encode_texts=encode_texts)

    monkeypatch.setattr(step, "SongEncoder", SimpleNamespace(load=load))
    return made


def write(world: World, folder: object, *, stage_two: bool = True, log: bool = True) -> Config:
    """A workspace as the other steps leave it, without the sound."""
    config = resolve("demo", assignments=[f"workspace={folder}"])
    workspace = Workspace(str(folder))

    def finish(path: str, **inputs: object) -> None:
        workspace.finish(path, build_manifest("test", config=config.model_dump(mode="json"), inputs=inputs))

    columns = {
        "song_id": world.ids,
        "text": world.texts,
        "split": world.split.tolist(),
        **{name: pa.nulls(len(world.ids), schemas.METADATA.field(name).type) for name in schemas.METADATA.names},
        "genre": pa.array([[GENRES[g], "other"] for g in world.genre], schemas.METADATA.field("genre").type),
        "artist": [f"{split} artist {i % 12}" for i, split in enumerate(world.split)],
    }
    workspace.write_table("features/f/shard-00000.parquet", pa.table(columns))
    finish("features/f")
    finish("models/semantic/m1", features="f")
    if stage_two:
        finish("models/preference/m2", model="m1")
    vectors = {"song_id": world.ids, "semantic": world.semantic.tolist(), "preference": world.preference.tolist() if stage_two else None}
    order = np.random.default_rng(0).permutation(len(world.ids))
    rows = [{key: column[i] if column else None for key, column in vectors.items()} for i in order]
    workspace.write_table("embeddings/e/part-0.parquet", pa.Table.from_pylist(rows, schema=schemas.embeddings_schema(DIM)))
    finish("embeddings/e", features="f", semantic="m1", preference="m2" if stage_two else None)
    if log:
        workspace.write_table("events/v/part-0.parquet", world.events())
        finish("events/v", features="f")
    return config


def read(result: StepResult) -> dict:
    return json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8"))


def test_both_stages_and_controls_side_by_side(world: World, tmp_path, capsys):
    config = write(world, tmp_path)
    result = step.evaluate(config)
    report = read(result)
    assert report["spaces"] == ["semantic", "preference", "blend_0.5"]
    assert report["data"] == {
        "split": "test",
        "songs": 60,
        "unique_texts": len({world.texts[i] for i in range(120) if i % 4 > 1}),
        "artists": 6,
        "artists_also_in_training": 0,
        "training_songs": 30,
    }
    semantic = report["semantic"]["semantic"]
    assert semantic["text_to_audio"]["gallery"] == 60
    assert semantic["probe"]["accuracy"] > 0.9 > 0.5 > semantic["probe"]["chance"]
    methods = report["recommendation"]["methods"]
    assert list(methods) == ["semantic", "preference", "blend_0.5", "random", "popularity", "shuffled"]
    assert methods["preference"]["ndcg@10"] > 1.5 * methods["semantic"]["ndcg@10"]
    assert methods["random"]["auc"] == 0.5
    assert methods["shuffled"]["auc"] == pytest.approx(0.5, abs=0.06)
    assert report["inputs"] == {"features": "f", "semantic": "m1", "preference": "m2", "embeddings": "e", "events": "v"}
    assert resolve(assignments=[]).model_validate(report["config"]) == config
    task = report["recommendation"]["task"]
    assert task["users"] + task["users_with_short_history"] + task["users_without_target"] == 20
    assert task["cold_songs"] == 60
    printed = capsys.readouterr().out
    assert "stage 2" in printed
    assert "popularity" in printed
    match = r"text→audio median rank [\d.]+ of 60, genre probe 0\.\d\d \(stage 1: .*\), cold NDCG@10 0\.\d\d \(stage 1: 0\.\d\d\)"
    assert re.fullmatch(match, result.summary)


def test_a_second_run_is_skipped_and_says_the_same(world: World, tmp_path, monkeypatch, capsys):
    config = write(world, tmp_path)
    first = step.evaluate(config)
    table = capsys.readouterr().out
    monkeypatch.setattr(step, "SongEncoder", None)  # nothing is encoded again
    second = step.evaluate(config)
    assert (first.skipped, second.skipped) == (False, True)
    assert (second.location, second.summary) == (first.location, first.summary)
    assert capsys.readouterr().out == table
    other = write(world, tmp_path).with_overrides({"evaluate.split": "validation"})
    with pytest.raises(AttributeError):
        step.evaluate(other)  # other settings are another run


def test_the_same_run_twice_gives_the_same_figures(world: World, tmp_path):
    found = [read(step.evaluate(config)) for config in (write(world, tmp_path / "a"), write(world, tmp_path / "b"))]
    for key in ("run", "data", "semantic", "recommendation"):
        assert found[0][key] == found[1][key]


def test_an_unfinished_report_is_made_again(world: World, tmp_path):
    config = write(world, tmp_path)
    result = step.evaluate(config)
    (Path(result.location) / "manifest.json").unlink()
    assert not step.evaluate(config).skipped


def test_without_logs_only_semantic_tasks(world: World, tmp_path):
    config = write(world, tmp_path, log=False, stage_two=False)
    result = step.evaluate(config)
    report = read(result)
    assert report["spaces"] == ["semantic"]
    assert report["recommendation"] is None
    assert report["inputs"]["events"] is None
    assert "NDCG" not in result.summary
    assert "popularity" not in reports.html(report).split("What the figures mean")[0]


def test_a_named_semantic_model_is_measured_alone(world: World, tmp_path):
    config = write(world, tmp_path)
    with pytest.raises(WorkspaceError, match=r"no embeddings of the features f by semantic model m1; run 'htcl embed'"):
        step.evaluate(config, "m1")
    assert step.evaluate(config, "m2").skipped is False


def test_wrong_input_is_one_sentence(world: World, tmp_path):
    config = write(world, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'genre'"):
        step.evaluate(config.with_overrides({"evaluate.probe_column": "genres"}))
    with pytest.raises(WorkspaceError, match="run 'htcl preprocess' first"):
        step.evaluate(config.with_overrides({"workspace": str(tmp_path / "empty")}))
    workspace = Workspace(config.workspace)
    table = workspace.read_tables("embeddings/e")
    workspace.write_table("embeddings/e/part-0.parquet", table.slice(1))
    with pytest.raises(MismatchError, match="hold 119 songs, but the features f hold 120"):
        step.evaluate(config)
    world.split[:] = "train"
    with pytest.raises(WorkspaceError, match="no song of the catalogue is in the test split"):
        step.evaluate(write(world, tmp_path / "no_test"))


class Page(HTMLParser):
    """What a browser would fetch, and whether every element closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped(world: World, tmp_path):
    config = write(world, tmp_path).with_overrides({"data.text_columns": ["<script>alert(1)</script>"]})
    result = step.evaluate(config)
    text = (Path(result.location) / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    report = read(result)
    for row in reports.rows(report):
        for value in row.values.values():
            assert reports.number(value, row.figure) in text
    assert "prefers-color-scheme: dark" in text
    assert json.dumps(report, allow_nan=False)
