"""Recipes of docs/extending.md, applied to a copy of the package, and one check of each in a process that imports the
copy.

    python -m tests.worlds.extended_package FOLDER       # FOLDER first in PYTHONPATH; prints JSON, recipe → error or null
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "extending.md"
COPIED = ("htcl_ray", "jobs")
BLOCK = re.compile(r"^`(\S+)`( \(new\))?[^\n]*:\n\n```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Change(NamedTuple):
    """A code block of a recipe: the content of a new file, or hunks of a difference."""

    path: str
    is_new: bool
    code: str


def recipes() -> dict[str, list[Change]]:
    """The code blocks below each heading of the page, without headings that have none."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    changes = {
        title: [Change(match[1], bool(match[2]), match[4]) for match in BLOCK.finditer(body)]
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }
    return {title: blocks for title, blocks in changes.items() if blocks}


def write_extended(folder: Path) -> None:
    """Copy the package to `folder` and apply every recipe to the copy."""
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for changes in recipes().values():
        for change in changes:
            _apply(folder / change.path, change)


def _apply(path: Path, change: Change) -> None:
    if change.is_new:
        assert not path.exists(), f"{change.path} exists already"
        path.write_text(change.code, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    for hunk in change.code.split("@@\n"):
        lines = hunk.splitlines()
        assert all(line[:1] in (" ", "+", "-") for line in lines), f"{change.path}: a line without + - or space"
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert _lines(text, old) == 1, f"{change.path} has {_lines(text, old)} times, expected once:\n{old}"
        text = f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:]
    path.write_text(text, encoding="utf-8")


def _lines(text: str, part: str) -> int:
    """Occurrences of whole lines."""
    return f"\n{text}".count(f"\n{part}")


def check_loss(scratch: Path) -> None:
    import torch

    from htcl_ray.config import resolve
    from htcl_ray.losses.registry import loss_class
    from htcl_ray.models.record import ModelRecord

    config = resolve("demo", None, ["pretrain.loss=decoupled"])
    assert config.pretrain.loss == "decoupled"
    record = ModelRecord(stage=1, loss="decoupled", audio=config.audio, model=config.model, text=None)
    assert ModelRecord.model_validate_json(record.model_dump_json()).loss == "decoupled"
    rows = torch.nn.functional.normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=-1).requires_grad_()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    loss = loss_class("decoupled")(scale)(rows[0], rows[1], chunk_rows=2)
    loss.backward()
    logits = (rows[0] @ rows[1].T).detach() * scale.detach().exp()
    negatives = logits.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    expected = (negatives.logsumexp(1) + negatives.logsumexp(0) - 2 * logits.diagonal()).mean() / 2
    assert torch.allclose(loss, expected)
    assert rows.grad is not None
    assert scale.grad is not None


def check_audio_tower(scratch: Path) -> None:
    import torch

    from htcl_ray.config import resolve
    from htcl_ray.config.sections import StageSettings
    from htcl_ray.models import HTCL
    from htcl_ray.models.towers.vocabulary import train_wordpiece
    from htcl_ray.training.optimization import freeze

    model = HTCL.untrained(resolve("demo", None, ["audio.tower=convolutional"]), train_wordpiece(["calm piano"], 50))
    model.eval()
    mel, frames = torch.randn(2, 80, model.recipe.n_mels), torch.tensor([80, 33])
    with torch.no_grad():
        both, alone = model.encode_audio(mel, frames), model.encode_audio(mel[1:, :33], frames[1:])
    assert both.shape == (2, model.dim)
    assert torch.allclose(both[1:], alone, atol=1e-5)
    freeze(model, StageSettings(freeze_audio_layers=1))
    trained = [name for name, weight in model.audio_encoder.named_parameters() if weight.requires_grad]
    assert trained == ["layers.1.weight", "layers.1.bias"]


def check_log_shape(scratch: Path) -> None:
    import pyarrow as pa

    from htcl_ray.config.sections import PairSettings
    from htcl_ray.interactions import logs

    table = pa.table({"user_id": ["u", "u", "v"], "song_id": ["a", "b", "a"], "liked": [True, False, None]})
    shape = logs.detect_shape(table.column_names, "log.parquet")
    assert shape is logs.LogShape.THUMBS
    events, rejected = logs.normalise(table, shape, pa.array(["a", "b"]), PairSettings(), "log.parquet", 0)
    assert events["value"].to_pylist() == [1.0, -1.0]
    assert rejected["reason"].to_pylist() == ["bad_feedback"]


def check_metadata_column(scratch: Path) -> None:
    import pyarrow as pa
    from fastapi.testclient import TestClient

    from htcl_ray.api.responses import SearchResponse
    from htcl_ray.config.sections import ServeSettings
    from htcl_ray.schemas import CATALOG_COLUMNS
    from htcl_ray.serving.http_app import create_app
    from tests.worlds.page_world import PageBackend, write_world

    assert "instruments" in CATALOG_COLUMNS
    settings = ServeSettings()
    backend = PageBackend(write_world(scratch, songs=16), settings)
    index = backend.live.active.service.index
    index.upsert(
        ["song-0001"],
        index.vectors_of(["song-0001"]),
        metadata=pa.table({"instruments": pa.array([["piano", "bass"]])}),
    )
    client = TestClient(create_app(backend, settings), base_url="http://127.0.0.1:8000")
    response = client.post("/v1/search", json={"song_id": "song-0002", "filter": {"instruments": ["Piano"]}})
    (result,) = SearchResponse.model_validate_json(response.content).results
    assert (result.song_id, result.instruments) == ("song-0001", ["piano", "bass"])
    assert "Instruments of the recording." in client.get("/openapi.json").text


def check_index_engine(scratch: Path) -> None:
    import numpy as np

    from htcl_ray.config.sections import IndexSettings
    from htcl_ray.index.song_index import SongIndex
    from htcl_ray.index.vectors import ModelVersions, Vectors, unit_norm

    vectors = Vectors(unit_norm(np.random.default_rng(0).normal(size=(300, 24))).astype(np.float32))
    versions = ModelVersions(semantic="s", preference=None)
    index = SongIndex.build(
        [f"{i:03d}" for i in range(300)], vectors, settings=IndexSettings(kind="sq8"), model_versions=versions
    )
    assert index.kind == "sq8"
    index.save(scratch / "index", inputs={}, quality={})
    loaded = SongIndex.load(scratch / "index")
    exact = vectors.semantic @ vectors.semantic.T
    for row, hits in enumerate(loaded.search(vectors, 5)):
        assert [hit.song_id for hit in hits] == [f"{i:03d}" for i in np.argsort(-exact[row])[:5]]


def check_metric(scratch: Path) -> None:
    import numpy as np

    from htcl_ray.evaluation.metrics import expected_metrics, lower_is_better, metric_label

    scores, relevant = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[True, False, True, False]])
    assert expected_metrics(scores, relevant, ks=[2])["precision@2"].tolist() == [0.5]
    assert expected_metrics(np.zeros((1, 4)), relevant, ks=[2])["precision@2"].tolist() == [0.5]
    assert metric_label("precision@2") == "precision@2"
    assert not lower_is_better("precision@2")


def check_route(scratch: Path) -> None:
    from fastapi.testclient import TestClient

    from htcl_ray.config.sections import ServeSettings
    from htcl_ray.serving.http_app import create_app
    from tests.worlds.page_world import GENRES, PageBackend, write_world

    settings = ServeSettings()
    app = create_app(PageBackend(write_world(scratch, songs=16), settings), settings)
    client = TestClient(app, base_url="http://127.0.0.1:8000")
    genres = client.get("/v1/genres").json()
    assert {entry["genre"] for entry in genres} == set(GENRES)
    assert all(entry["songs"] == 2 for entry in genres)
    assert "/v1/genres" in client.get("/openapi.json").json()["paths"]


def check_step(scratch: Path) -> None:
    import contextlib
    import io

    from htcl_ray import cli
    from htcl_ray.workspace.manifest import build_manifest
    from htcl_ray.workspace.storage import Workspace

    workspace = Workspace(str(scratch / "artifacts"))
    workspace.finish("index/v1", build_manifest("index", config={}, inputs={}))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["artifacts", "--workspace", str(scratch / "artifacts")]) == 0
    assert "index/v1" in printed.getvalue()
    assert "1 artifacts" in printed.getvalue()
    job = importlib.import_module("jobs.artifacts")
    assert callable(job.main)


def check_tracker(scratch: Path) -> None:
    from htcl_ray.config import resolve
    from htcl_ray.training.trackers import open_trackers
    from htcl_ray.workspace.storage import Workspace

    settings = resolve("demo", None, ["tracking.trackers=csv"]).tracking
    trackers = open_trackers(settings, Workspace(str(scratch / "tracked")), "runs/pretrain/r1", {}, print)
    trackers.catch_up([{"step": 4, "loss": 2.5}, {"step": 8, "loss": 1.5}])
    trackers.catch_up([{"step": 8, "loss": 1.5}, {"step": 12, "loss": 1.0}])
    lines = (scratch / "tracked/runs/pretrain/r1/metrics.csv").read_text(encoding="utf-8").split()
    assert lines == ["4,loss,2.5", "8,loss,1.5", "12,loss,1.0"]


CHECKS: dict[str, Callable[[Path], None]] = {
    "A loss": check_loss,
    "An audio tower": check_audio_tower,
    "A log shape": check_log_shape,
    "A metadata column": check_metadata_column,
    "An index engine": check_index_engine,
    "A metric": check_metric,
    "A route": check_route,
    "A step": check_step,
    "A tracker": check_tracker,
}
"""Check of each recipe, by its heading."""


def main(scratch: Path) -> None:
    """Run every check and print its error, or null."""
    errors: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        (folder := scratch / check.__name__).mkdir()
        try:
            check(folder)
            errors[name] = None
        except Exception:  # noqa: BLE001
            errors[name] = traceback.format_exc()
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
