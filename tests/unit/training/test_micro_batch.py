"""`micro_batch_size: auto`: what it finds, and what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from htcl_ray.errors import StepError
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training import micro_batch
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.batches import AHEAD, Batch, BatchLoader, encode
from htcl_ray.training.micro_batch import most_rows, probe_micro_batch_size
from htcl_ray.training.optimization import build_optimizer
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
CONFIG = tiny_config("unused").with_overrides({"model.layers": 2})
TEXTS = ["calm piano at night", "fast techno"]


@pytest.fixture
def model() -> HTCL:
    torch.manual_seed(0)
    return HTCL.untrained(CONFIG, train_wordpiece(TEXTS, 60))


def song(model: HTCL, frames: int = 32) -> Batch:
    mel = torch.from_numpy(np.random.default_rng(0).normal(-40, 12, (1, frames, 16)).astype(np.float16))
    return Batch(
        mel, torch.tensor([frames]), model.text_encoder.tokenize(TEXTS[:1]), torch.zeros(1, 3, dtype=torch.int64)
    )


def kept(model: HTCL, songs: int) -> int:
    return micro_batch.kept_bytes(model.train(), micro_batch.repeat_song(song(model), songs))


@pytest.mark.parametrize("local_rows", [1, 2, 3, 8, 12, 100])
def test_largest_size_that_fits(local_rows: int):
    allowed = sorted({2**power for power in range(7) if 2**power <= local_rows} | {local_rows})
    for fitting in range(110):
        tried: list[int] = []

        def rows_as_bytes(rows: int, tried: list[int] = tried) -> float:
            tried.append(rows)
            return rows

        most = most_rows(local_rows, rows_as_bytes, fitting)
        assert most == max((size for size in allowed if size <= fitting), default=0)
        assert tried == allowed[: len(tried)], "nothing above the first that is too large is tried"


@pytest.mark.parametrize("songs_per_row", [1, 2])
@pytest.mark.parametrize("rows_that_fit", [1, 5, 16, 99])
def test_cpu_finds_what_the_graph_of_so_many_songs_keeps(
    model: HTCL, monkeypatch: pytest.MonkeyPatch, songs_per_row: int, rows_that_fit: int
):
    """Memory is set to what that many rows keep, counted on a graph of that many, and what does not depend on them."""
    fixed = (
        3 * sum(parameter.nbytes for parameter in model.parameters())
        + (1 + AHEAD) * 16 * songs_per_row * song(model).features.nbytes
    )
    monkeypatch.setattr(
        micro_batch, "available_bytes", lambda device: 2 * (fixed + kept(model, rows_that_fit * songs_per_row) + 1)
    )
    most = probe_micro_batch_size(model, song(model), songs_per_row, 16, CPU)
    assert most == {1: 1, 5: 4, 16: 16, 99: 16}[rows_that_fit]


def test_kept_bytes_of_a_closed_form():
    """(x · p)² · p keeps x, x · p (which the square needs twice), its square and p; what is not differentiated is not
    kept."""

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))

    product = Product()
    product.encode_audio = lambda mel, valid: (y := mel * product.factor) * y * product.factor  # type: ignore[assignment]
    product.encode_text = lambda tokens: tokens["x"] * 2  # type: ignore[assignment]
    tokens = {"x": torch.ones(3, 10), "attention_mask": torch.ones(3, 10)}
    inputs = Batch(torch.ones(3, 10, dtype=torch.float64), torch.ones(3), tokens, torch.ones(3, 3))
    assert micro_batch.kept_bytes(product, inputs) == (3 * 10 + 3 * 10 + 3 * 10 + 10) * 8  # type: ignore[arg-type]


def test_nothing_is_touched(model: HTCL):
    """Parameters, gradients, optimizer and random numbers, bit by bit; the mode as well."""
    optimizer = build_optimizer(model, CONFIG.pretrain)
    audio, text = encode(model.train(), song(model))
    (audio.sum() + text.sum()).backward()
    optimizer.step()
    model.logit_scale["text"].grad = None
    model.eval()

    def state() -> list[torch.Tensor]:
        optimizer_state = [value for values in optimizer.state_dict()["state"].values() for value in values.values()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [
            tensor.clone()
            for tensor in (*model.state_dict().values(), *gradients, *optimizer_state, torch.get_rng_state())
        ]

    before = state()
    addresses = [None if parameter.grad is None else parameter.grad.data_ptr() for parameter in model.parameters()]
    assert probe_micro_batch_size(model, song(model), 1, 8, CPU) == 8
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    assert [
        None if parameter.grad is None else parameter.grad.data_ptr() for parameter in model.parameters()
    ] == addresses
    assert not model.training


def test_not_even_one_row_stops_the_run(model: HTCL, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(micro_batch, "available_bytes", lambda device: 1000)
    with pytest.raises(StepError, match=r"not one row with a clip of 32 frames fits .* set model\.window_seconds"):
        probe_micro_batch_size(model, song(model), 1, 8, CPU)


def test_frozen_parts_need_less(model: HTCL):
    everything = kept(model, 4)
    model.text_encoder.requires_grad_(False)
    assert kept(model, 4) < 0.8 * everything


def test_gpu_out_of_memory_counts_as_infinite(model: HTCL, monkeypatch: pytest.MonkeyPatch):
    """The part that runs on a GPU, with the device's counters replaced: a size that fails is too large, and leaves no
    gradient."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def encode_or_fail(model: HTCL, batch: Batch) -> Any:
        encoded = encode(model, batch)
        if len(batch) > 4:
            encoded[0].sum().backward(retain_graph=True)
            raise torch.cuda.OutOfMemoryError
        return encoded

    monkeypatch.setattr(micro_batch, "encode", encode_or_fail)
    assert [micro_batch.measure_peak(model, song(model), CPU, songs) for songs in (1, 4, 8)] == [600, 600, math.inf]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_free_memory_is_the_machines_or_the_containers(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684092 kB\nMemFree:        1000 kB\nMemAvailable:   4000 kB\n")
    free = lambda: micro_batch.free_memory(tmp_path / "cgroup", meminfo)  # noqa: E731
    assert free() == 4000 * 1024
    second = tmp_path / "cgroup"
    second.mkdir()
    for name, text in (
        ("memory.max", "max\n"),
        ("memory.current", "900000\n"),
        ("memory.stat", "anon 1\ninactive_file 100000\n"),
    ):
        (second / name).write_text(text)
    assert free() == 4000 * 1024
    (second / "memory.max").write_text("1000000\n")
    assert free() == 1_000_000 - 800_000
    first = second / "memory"
    first.mkdir()
    (first / "memory.limit_in_bytes").write_text("950000")
    (first / "memory.usage_in_bytes").write_text("900000")
    (first / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 50000\n")
    assert free() == 100_000
    (first / "memory.limit_in_bytes").write_text("10")
    assert free() == 0


def test_the_longest_song_has_the_longest_clip_and_the_most_tokens(model: HTCL):
    songs = SimpleNamespace(
        texts=["techno", "calm piano at night " * 2, "x" * 30],
        train=np.array([0, 1, 2]),
        ids=np.zeros((3, 3), dtype=int),
    )
    clips = [np.full((frames, 16), frames, dtype=np.float16) for frames in (9, 20, 31)]

    class Frames:
        def lengths(self, rows: np.ndarray) -> np.ndarray:
            return np.array([len(clips[row]) for row in rows])

        def batch(self, rows: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            (row,), ((start, stop),) = rows, parts
            return clips[row][None, start:stop], np.array([stop - start])

    loader = BatchLoader(songs, Frames(), model.text_encoder, None)  # type: ignore[arg-type]
    longest = loader.longest()
    assert (longest.features.shape, longest.valid_frames.tolist()) == ((1, 31, 16), [31])
    assert longest.tokens["input_ids"].shape[1] == max(
        len(model.text_encoder.tokenize([text])["input_ids"][0]) for text in songs.texts
    )
    cropping = BatchLoader(songs, Frames(), model.text_encoder, Augmentation(CONFIG.pretrain, 11))  # type: ignore[arg-type]
    assert cropping.longest().features.shape == (1, 11, 16)
