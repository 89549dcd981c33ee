"""Reports the epochs of a trial from Ray Train to Ray Tune.

A module of its own, since Ray Train's controller imports it for each trial: the rest of a trial would cost it 0.4 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.tune.integration.ray_train import TuneReportCallback

CONTROLLER = "controller"
"""Key of a result: handle of the actor that controls the trial's training."""


class ReportToTune(TuneReportCallback):  # type: ignore[misc]  # the library has no types
    """Callback of Ray Train that reports a trial's last stage to Ray Tune, with the cost of its earlier stages."""

    def __init__(self, earlier_work: Sequence[Mapping[str, float]]) -> None:
        super().__init__()
        self._earlier_work = list(earlier_work)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Report the metrics of rank 0, which cover all workers. Called by Ray Train after each epoch."""
        more = {"earlier_work": self._earlier_work, CONTROLLER: ray.get_runtime_context().current_actor}
        super().after_report(run_context, [{**metrics[0], **more}], checkpoint)
