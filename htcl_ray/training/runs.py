"""Bookkeeping of a run, without Ray and torch: the epoch to publish, and lists of checkpoints that can be resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from htcl_ray.evaluation.metrics import lower_is_better

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's record of its checkpoints, in the folder of the run."""
Checkpoint = TypeVar("Checkpoint")
MetricsOf = TypeVar("MetricsOf", bound=Mapping[str, float])


def score_order(metric: str) -> Literal["min", "max"]:
    """Whether the best epoch has the lowest or the highest value of a metric."""
    return "min" if lower_is_better(metric) else "max"


def best_epoch(reported: Sequence[tuple[Checkpoint, MetricsOf]], metric: str) -> tuple[Checkpoint, MetricsOf]:
    """The checkpoint and the metrics of the best epoch; of equals, the first epoch.

    Checkpoints within an epoch have no metrics, or only `worst_score`, and are never chosen.
    """
    epochs = [(checkpoint, metrics) for checkpoint, metrics in reported if "epoch" in metrics]
    sign = 1 if score_order(metric) == "min" else -1
    return min(epochs, key=lambda item: (sign * item[1][metric], item[1]["epoch"]))


def worst_score(metric: str) -> float:
    """A value of `metric` that Ray Train ranks below that of every epoch.

    It is finite: Ray Train writes NaN and infinity to its record of checkpoints as null, and fails on a null when a run
    is resumed.
    """
    return sys.float_info.max if score_order(metric) == "min" else -sys.float_info.max


def is_resumable(checkpoint_list: bytes, exists: Callable[[str], bool]) -> bool:
    """Whether Ray Train can resume from its record of checkpoints: it is whole, and `exists` for each folder in it.

    Ray Train fails on a record that a kill has cut short, or whose folders were removed.
    """
    try:
        return all(exists(item["checkpoint_dir_name"]) for item in json.loads(checkpoint_list)["checkpoint_results"])
    except (ValueError, KeyError, TypeError):
        return False
