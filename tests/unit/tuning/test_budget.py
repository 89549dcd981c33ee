"""The budget of a trial: equal for every batch size, and near the configured number of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from htcl_ray.config import Config, resolve
from htcl_ray.errors import ConfigError
from htcl_ray.training.order import global_batch, song_order, steps_per_epoch
from htcl_ray.tuning.budget import EPOCH_LENGTH, Budget, batch_sizes, stage_budget, trial_config
from htcl_ray.tuning.space import search_space

pytestmark = pytest.mark.unit
DEMO = resolve("demo")


def searched(stage: str, sizes: list[int], **tune: Any) -> Config:
    chosen = {f"tune.{name}": value for name, value in tune.items()}
    return DEMO.with_overrides(
        {"tune.stage": stage, "tune.space": {f"{stage}.batch_size": sizes}, f"{stage}.num_workers": 1, **chosen}
    )


def rows_seen(config: Config, stage: str, training_rows: int) -> tuple[int, int]:
    """Rows of a trial and of an epoch, counted in batches as in the training loop."""
    settings = getattr(config, stage)
    length = getattr(settings, EPOCH_LENGTH[stage]) or training_rows
    batch = global_batch(length, settings.batch_size, settings.num_workers)
    return settings.epochs * steps_per_epoch(length, batch) * batch, steps_per_epoch(length, batch) * batch


@settings(deadline=None, derandomize=True)
@given(
    stage=some.sampled_from(["pretrain", "finetune"]),
    sizes=some.lists(some.integers(1, 64).map(lambda half: 2 * half), min_size=2, max_size=5, unique=True),
    samples=some.integers(2, 200_000),
    reports=some.integers(1, 40),
)
def test_every_batch_size_sees_equally_many_rows_near_the_configured_number(
    stage: str, sizes: list[int], samples: int, reports: int
):
    unit = math.lcm(*sizes)
    assume(unit <= samples)
    config = searched(stage, sizes, samples=samples, reports=reports)
    budget = stage_budget(config, search_space(config, {stage: 128}), stage, 128)
    assert all(budget.rows_per_report % size == 0 for size in sizes)
    assert abs(budget.rows - samples) <= min(budget.rows_per_report, unit * reports) / 2
    assert budget.reports <= 1.5 * reports
    for size in sizes:
        trial = trial_config(config, {f"{stage}.batch_size": size}, {stage: budget})
        assert rows_seen(trial, stage, 128) == (budget.rows, budget.rows_per_report)


@pytest.mark.parametrize(
    ("samples", "reports", "expected"),
    [
        (6400, 10, Budget(640, 10)),
        (6410, 10, Budget(640, 10)),
        (64, 10, Budget(64, 1)),
        (96, 10, Budget(64, 2)),
        (640, 1, Budget(640, 1)),
        (700, 3, Budget(256, 3)),
    ],
)
def test_budgets_equal_those_computed_by_hand(samples: int, reports: int, expected: Budget):
    config = searched("pretrain", [16, 32, 64], samples=samples, reports=reports)
    budget = stage_budget(config, search_space(config, {"pretrain": 100}), "pretrain", 100)
    assert budget.rows == round(samples / budget.rows_per_report) * budget.rows_per_report
    assert budget == expected


def test_without_samples_a_trial_is_as_long_as_the_configured_run():
    config = searched("pretrain", [32, 64], reports=4).with_overrides({"pretrain.epochs": 8})
    assert stage_budget(config, search_space(config, {"pretrain": 320}), "pretrain", 320).rows == 8 * 320
    short = config.with_overrides({"pretrain.songs_per_epoch": 160})
    assert stage_budget(short, search_space(short, {"pretrain": 320}), "pretrain", 320).rows == 8 * 160
    pairs = searched("finetune", [32, 64], reports=4).with_overrides(
        {"finetune.epochs": 8, "finetune.pairs_per_epoch": None}
    )
    assert stage_budget(pairs, search_space(pairs, {"finetune": 640}), "finetune", 640).rows == 8 * 640
    drawn = pairs.with_overrides({"finetune.pairs_per_epoch": 128})
    assert stage_budget(drawn, search_space(drawn, {"finetune": 128}), "finetune", 640).rows == 8 * 128


def test_songs_of_a_trial_come_in_the_same_order_for_every_batch_size():
    """Also where an epoch ends within a pass over the catalogue."""
    config = searched("pretrain", [16, 32, 64], samples=500, reports=5)
    budget = stage_budget(config, search_space(config, {"pretrain": 150}), "pretrain", 150)
    seen = []
    for size in (16, 32, 64):
        stage = trial_config(config, {"pretrain.batch_size": size}, {"pretrain": budget}).pretrain
        assert stage.songs_per_epoch is not None
        assert stage.songs_per_epoch % size == 0
        epochs = [
            song_order(stage.seed, epoch, np.arange(150), stage.songs_per_epoch)[:, 0] for epoch in range(stage.epochs)
        ]
        seen.append(np.concatenate(epochs))
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])
    assert sorted(seen[0][:150]) == sorted(seen[0][150:300]) == list(range(150))


def test_a_trial_keeps_one_checkpoint_and_no_best_model():
    config = searched("pretrain", [32, 64]).with_overrides(
        {"pretrain.best_metric": "loss", "pretrain.keep_checkpoints": 5, "pretrain.checkpoint_every_steps": 7}
    )
    trial = trial_config(config, {"pretrain.batch_size": 64}, {"pretrain": Budget(128, 3)})
    assert (trial.pretrain.best_metric, trial.pretrain.keep_checkpoints, trial.pretrain.checkpoint_every_steps) == (
        None,
        1,
        None,
    )
    assert (trial.pretrain.songs_per_epoch, trial.pretrain.epochs, trial.pretrain.batch_size) == (128, 3, 64)
    assert trial.finetune == config.finetune


def test_both_stages_have_budgets_of_their_own():
    config = DEMO.with_overrides(
        {"tune.stage": "both", "tune.samples": 1000, "tune.reports": 2, "pretrain.batch_size": 50}
    )
    space = search_space(
        config.with_overrides({"tune.space": {"finetune.batch_size": [32, 64]}}), {"pretrain": 100, "finetune": 100}
    )
    budgets = {name: stage_budget(config, space, name, 100) for name in ("pretrain", "finetune")}
    assert budgets == {"pretrain": Budget(500, 2), "finetune": Budget(512, 2)}
    assert [batch_sizes(config, space, name) for name in budgets] == [(50,), (32, 64)]
    trial = trial_config(config, {"finetune.batch_size": 32}, budgets)
    assert (trial.pretrain.songs_per_epoch, trial.finetune.pairs_per_epoch) == (500, 512)
    assert [rows_seen(trial, name, 100)[0] for name in budgets] == [1000, 1024]


def test_impossible_budgets_are_refused_in_one_sentence():
    config = searched("pretrain", [30, 32, 34], samples=5000)
    space = search_space(config, {"pretrain": 100})
    with pytest.raises(ConfigError) as caught:
        stage_budget(config, space, "pretrain", 100)
    assert str(caught.value) == (
        "a trial of pretrain sees 5000 rows, but batches of 30, 32, 34 first end together after 8160; raise "
        "tune.samples, or choose values of pretrain.batch_size with a smaller common multiple, such as powers of two"
    )
    with pytest.raises(
        ConfigError,
        match=r"^tune\.space\.pretrain\.batch_size goes up to 34, but training has 33 songs; expected at",
    ):
        stage_budget(config, space, "pretrain", 33)
    with pytest.raises(
        ConfigError, match=r"^finetune\.batch_size goes up to 64, but training has 33 pairs; expected at"
    ):
        stage_budget(config, space, "finetune", 33)
