"""Collapse and plateau: closed forms of the metrics, and the warnings and errors of the watch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from htcl_ray.config.sections import HealthSettings
from htcl_ray.errors import StepError
from htcl_ray.evaluation.stats.collapse import effective_rank, mean_cosine
from htcl_ray.training.batches import encode
from htcl_ray.training.health import HealthWatch, probe_rows
from tests.unit.training.test_training import CPU, World, run

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        return World(folder)


def test_mean_cosine_by_pairs():
    torch.manual_seed(0)
    vectors = torch.randn(7, 5)
    pairs = [F.cosine_similarity(vectors[a], vectors[b], dim=0).item() for a in range(7) for b in range(7) if a != b]
    assert mean_cosine(vectors) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert mean_cosine(torch.ones(4, 3) * torch.tensor([[1.0], [2], [3], [4]])) == pytest.approx(1)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(6, 4)) == 1
    line = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    assert effective_rank(line) == pytest.approx(1)
    cross = torch.cat([torch.eye(5), -torch.eye(5)])  # five equal singular values
    assert effective_rank(cross) == pytest.approx(5)
    stretched = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])  # values 2 and √2
    share = torch.tensor([2, math.sqrt(2)]) / (2 + math.sqrt(2))
    assert effective_rank(stretched) == pytest.approx(math.exp(-(share * share.log()).sum()))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_plateau_is_the_mean_log_of_the_unmasked_candidates(world: World, stage: int):
    model, task = world.model(stage), world.task(stage)
    watch = HealthWatch(task, world.loader(model), world.config.finetune, CPU, step=0, say=print)
    metrics = watch.measure(model)
    ids = watch.batch.ids.tolist()
    known = {frozenset(pair) for pair in world.pairs.train.tolist()} if stage == 2 else set()

    def candidates(row: int, columns: range, own: int) -> int:
        return sum(
            column == own
            or not (
                any(a == b for a, b in zip(ids[row], ids[column], strict=True))
                or frozenset((ids[row][0], ids[column][0])) in known
            )
            for column in columns
        )

    every = range(len(ids))
    expected = sum(math.log(candidates(row, every, row)) for row in every) / len(ids)
    assert metrics["plateau_loss_text"] == pytest.approx(expected, rel=1e-5)
    if stage == 2:
        half = len(ids) // task.songs_per_row
        forward = [math.log(candidates(row, range(half, 2 * half), row + half)) for row in range(half)]
        backward = [math.log(candidates(row + half, range(half), row)) for row in range(half)]
        first = sorted({of_song: row for row, (of_song, *_) in reversed(list(enumerate(ids)))}.values())
        assert len(first) < len(ids), "songs stand in the probe more than once"
        with torch.no_grad():
            audio, _ = encode(model.eval(), watch.batch)
        model.train()
        assert metrics["mean_cosine_audio"] == pytest.approx(mean_cosine(audio[first]), abs=1e-5)
        assert metrics["plateau_loss_preference"] == pytest.approx(
            (sum(forward) + sum(backward)) / (2 * half), rel=1e-5
        )
    assert watch.measure(model) == metrics
    assert model.training


def fault_after(watch: HealthWatch, metrics: dict[str, float], steps: list[int]) -> list[bool]:
    return [bool(watch.check(metrics, step)) for step in steps]


def test_a_fault_counts_when_it_lasts(world: World):
    model = world.model(1)
    lines: list[str] = []
    health = HealthSettings(patience_steps=20, min_effective_rank=2, plateau_margin=0.005)
    settings = world.config.pretrain.model_copy(update={"health": health})
    watch = HealthWatch(world.task(1), world.loader(model), settings, CPU, step=0, say=lines.append)
    well = {
        "mean_cosine_audio": 0.1,
        "effective_rank_audio": 9.0,
        "mean_cosine_text": 0.1,
        "probe_loss_text": 1.0,
        "plateau_loss_text": 3.0,
    }
    stuck = well | {"probe_loss_text": 2.99}
    assert fault_after(watch, stuck, [10, 19, 20]) == [False, False, True]
    assert fault_after(watch, well, [30]) == [False]
    assert fault_after(watch, stuck, [40, 50]) == [False, True]
    assert fault_after(watch, well | {"mean_cosine_audio": 0.97}, [60, 69, 71]) == [False, False, True]
    assert fault_after(watch, well | {"effective_rank_audio": 1.5}, [80, 100]) == [False, True]
    assert [line.split(";")[0] for line in lines] == [
        "pretrain  WARNING at step 20: the text loss of the probe is 2.990, what equal vectors for all songs would have (plateau)",
        "pretrain  WARNING at step 50: the text loss of the probe is 2.990, what equal vectors for all songs would have (plateau)",
        "pretrain  WARNING at step 71: the mean cosine of audio vectors is 0.970 (collapse)",
        "pretrain  WARNING at step 100: the effective rank of audio vectors is 1.5 (collapse)",
    ]
    assert "raise pretrain.learning_rate" in lines[0]


def test_a_collapsed_run_stops_and_says_why(world: World, tmp_path: Path):
    """The audio head gives every song one vector: its weights are zero and nothing moves them."""
    config = world.config.with_overrides(
        {
            "pretrain.epochs": 9,
            "pretrain.learning_rate": 1e-12,
            "pretrain.health": {"action": "stop", "patience_steps": 5},
        }
    )
    model = world.model(1, config)
    with torch.no_grad():
        model.audio_head[-1].weight.zero_()
    with pytest.raises(
        StepError, match=r"^pretrain stopped at step 6: the mean cosine of audio vectors is 1\.000 \(collapse\); lower"
    ):
        run(world, 1, config, model=model)
    off = config.with_overrides({"pretrain.health.action": "off", "pretrain.epochs": 4})
    _, epochs = run(world, 1, off, model=world.model(1, off))
    assert not any(name.startswith(("probe", "mean_cosine")) for name in epochs[-1])


@pytest.mark.parametrize(
    ("rows", "workers", "expected"), [(1000, 1, 128), (1000, 3, 126), (60, 7, 56), (1000, 129, 129), (300, 250, 250)]
)
def test_the_probe_has_rows_for_every_worker(rows: int, workers: int, expected: int):
    chosen = probe_rows(rows, workers)
    assert len(chosen) == len(set(chosen.tolist())) == expected
    assert expected % workers == 0
    assert chosen.max() < rows
    assert np.array_equal(chosen, probe_rows(rows, workers))


def test_the_last_of_129_workers_has_a_probe(world: World):
    """The process group is torch's fake one: this worker's part is made in earnest, and collectives return at once."""
    config = world.config.with_overrides({"finetune.pairs_per_epoch": 500})
    model = world.model(2)
    dist.init_process_group("fake", store=FakeStore(), rank=128, world_size=129)
    try:
        watch = HealthWatch(world.task(2, config), world.loader(model), config.finetune, CPU, step=0, say=print)
        assert len(watch.batch) == 3, "one pair and the song that it rehearses"
        assert "probe_loss_preference" in watch.measure(model)
    finally:
        dist.destroy_process_group()
