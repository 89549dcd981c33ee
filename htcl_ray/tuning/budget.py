"""Budget of a trial: the rows that it sees and its reports, equal for every batch size so that trials compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError
from htcl_ray.tuning.space import Parameters, Space, with_parameters

EPOCH_LENGTH = {"pretrain": "songs_per_epoch", "finetune": "pairs_per_epoch"}


@dataclass(frozen=True)
class Budget:
    """Budget of every trial in one stage."""

    rows_per_report: int
    """Songs or pairs between two measurements: a multiple of every batch size."""
    reports: int
    """Measurements of a whole trial."""

    @property
    def rows(self) -> int:
        """Songs or pairs of a whole trial."""
        return self.rows_per_report * self.reports


def batch_sizes(config: Config, space: Space, stage: str) -> tuple[int, ...]:
    """Global batch sizes that the trials of a stage may have."""
    dimension = space.get(f"{stage}.batch_size")
    values = (getattr(config, stage).global_batch_size,) if dimension is None else dimension.values or ()
    return tuple(int(value) for value in values if value is not None)


def stage_budget(config: Config, space: Space, stage: str, training_rows: int) -> Budget:
    """Compute the budget of a stage, as near to `tune.samples` as the batch sizes allow.

    `training_rows`: training songs or pairs. Raises ConfigError for batch sizes that do not fit.
    """
    sizes = batch_sizes(config, space, stage)
    if max(sizes) > training_rows:
        key = f"{stage}.batch_size"
        raise ConfigError(
            f"{'tune.space.' if key in space else ''}{key} goes up to {max(sizes)}, but training has {training_rows} "
            f"{'songs' if stage == 'pretrain' else 'pairs'}; expected at most that many"
        )
    settings = getattr(config, stage)
    wanted = config.tune.samples or settings.epochs * (getattr(settings, EPOCH_LENGTH[stage]) or training_rows)
    unit = math.lcm(*sizes)
    if unit > wanted:
        raise ConfigError(
            f"a trial of {stage} sees {wanted} rows, but batches of {', '.join(map(str, sizes))} first end together "
            f"after {unit}; raise tune.samples, or choose values of {stage}.batch_size with a smaller common multiple, "
            "such as powers of two"
        )
    units_per_report = max(1, round(wanted / (unit * config.tune.reports)))
    return Budget(units_per_report * unit, max(1, round(wanted / (units_per_report * unit))))


def trial_config(config: Config, parameters: Parameters, budgets: Mapping[str, Budget]) -> Config:
    """The configuration of one trial: its parameters, the budgets, and no checkpoint but the last."""
    changes: Parameters = {}
    for stage, budget in budgets.items():
        changes |= {
            f"{stage}.{EPOCH_LENGTH[stage]}": budget.rows_per_report,
            f"{stage}.epochs": budget.reports,
            f"{stage}.best_metric": None,
            f"{stage}.checkpoint_every_steps": None,
            f"{stage}.keep_checkpoints": 1,
        }
    return with_parameters(config.with_overrides(changes), parameters)
