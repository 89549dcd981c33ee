"""mteb runs an untrained model on local tasks made from ESC-10 clips, offline, and sees the vectors that the model
gives."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from htcl_ray.errors import ConfigError
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from tests.worlds.small_workspace import small_config

pytestmark = pytest.mark.unit

LABELS = ("dog bark", "rain", "rooster", "sea waves")


@pytest.fixture(scope="module")
def worlds() -> Any:
    """The module `tests.worlds.mteb_tasks`, which takes seconds to import."""
    pytest.importorskip("mteb", reason="the extra mteb is not installed")
    return importlib.import_module("tests.worlds.mteb_tasks")


@pytest.fixture(scope="module")
def clips(shared_data: Path) -> dict[str, list[dict[str, Any]]]:
    """One second of ten clips of each of four labels: five to train, five to test."""
    with (shared_data / "esc10.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, label in enumerate(LABELS):
        for place, row in enumerate([row for row in rows if row["label"] == label][:10]):
            wave, rate = soundfile.read(shared_data / row["audio_path"], frames=22050, dtype="float32")
            audio = {"array": wave.tolist(), "sampling_rate": rate}
            splits["train" if place < 5 else "test"].append({"audio": audio, "label": number})
    return splits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HTCL:
    vocabulary = train_wordpiece([f"{label} recorded outside" for label in LABELS] * 5, 120)
    return HTCL.untrained(small_config(tmp_path_factory.mktemp("none")), vocabulary).eval()


def embedded(model: HTCL, rows: list[dict[str, Any]]) -> np.ndarray:
    embed = (
        model.embed_audio(np.array(row["audio"]["array"], dtype=np.float32), row["audio"]["sampling_rate"])
        for row in rows
    )
    return torch.stack(list(embed)).numpy()


def test_mteb_classifies_the_vectors_of_embed_audio(worlds: Any, clips: dict[str, list[dict[str, Any]]], model: HTCL):
    task, encoder = worlds.LocalClassification(), worlds.Recorder(model, "1")
    task.dataset = worlds.DatasetDict({split: worlds.Dataset.from_list(rows) for split, rows in clips.items()})
    scores = worlds.run(task, encoder)
    train, test = encoder.given
    np.testing.assert_allclose(train, embedded(model, clips["train"]), atol=1e-6)
    np.testing.assert_allclose(test, embedded(model, clips["test"]), atol=1e-6)
    assert np.linalg.norm(test, axis=1) == pytest.approx(np.ones(20), abs=1e-5)
    assert 0 <= scores["accuracy"] <= 1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_mteb_classifies_audio_by_label_text(worlds: Any, clips: dict[str, list[dict[str, Any]]], model: HTCL):
    task, encoder = worlds.LocalZeroShot(), worlds.Recorder(model, "1")
    task.labels = LABELS
    task.dataset = worlds.DatasetDict({"test": worlds.Dataset.from_list(clips["test"])})
    scores = worlds.run(task, encoder)
    text_vectors, audio_vectors = encoder.given
    np.testing.assert_allclose(text_vectors, model.embed_text(list(LABELS)).numpy(), atol=1e-6)
    predicted = (audio_vectors @ text_vectors.T).argmax(axis=1)
    assert scores["accuracy"] == pytest.approx(np.mean(predicted == [row["label"] for row in clips["test"]]))


def test_mteb_retrieves_audio_for_text(worlds: Any, clips: dict[str, list[dict[str, Any]]], model: HTCL):
    task, encoder = worlds.LocalRetrieval(), worlds.Recorder(model, "1")
    corpus = [{"id": f"clip {i}", "audio": row["audio"]} for i, row in enumerate(clips["test"])]
    task.corpus = worlds.DatasetDict({"test": worlds.Dataset.from_list(corpus)})
    task.queries = worlds.DatasetDict(
        {"test": worlds.Dataset.from_list([{"id": label, "text": label} for label in LABELS])}
    )
    relevant = {
        label: {f"clip {i}": 1 for i, row in enumerate(clips["test"]) if row["label"] == n}
        for n, label in enumerate(LABELS)
    }
    task.relevant_docs = {"test": relevant}
    scores = worlds.run(task, encoder)
    best = (model.embed_text(list(LABELS)).numpy() @ embedded(model, clips["test"]).T).argmax(axis=1)
    right = [clips["test"][place]["label"] == n for n, place in enumerate(best)]
    assert scores["hit_rate_at_1"] == pytest.approx(np.mean(right))


def test_row_with_audio_and_text_is_their_normalised_sum(worlds: Any, model: HTCL):
    wave = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    row = {"audio": [{"array": wave, "sampling_rate": 16000}], "text": ["rain"]}
    both = worlds.MtebModel(model, "1").encode([row])[0]
    expected = model.embed_audio(wave, 16000).numpy() + model.embed_text(["rain"]).numpy()[0]
    np.testing.assert_allclose(both, expected / np.linalg.norm(expected), atol=1e-6)
    assert worlds.MtebModel(model, "1").encode([]).shape == (0, model.dim)


def test_without_mteb_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "htcl_ray.integrations.mteb", raising=False)
    monkeypatch.setitem(sys.modules, "mteb.models.abs_encoder", None)
    with pytest.raises(ConfigError, match=r"htcl-ray\[mteb\]"):
        importlib.import_module("htcl_ray.integrations.mteb")


def test_the_model_of_a_folder_names_its_weights(worlds: Any, model: HTCL, tmp_path: Path):
    model.save_pretrained(tmp_path / "semantic-1")
    loaded = worlds.mteb_model(tmp_path / "semantic-1")
    meta = loaded.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.modalities) == ("htcl-ray/semantic-1", model.dim, ["audio", "text"])
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "semantic-2")
    assert worlds.mteb_model(tmp_path / "semantic-2").mteb_model_meta.revision != meta.revision
