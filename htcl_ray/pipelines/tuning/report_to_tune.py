"""From Ray Train to Ray Tune: the epochs of a trial's last stage; Ray Train's controller imports this for each trial,
so it is light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.tune.integration.ray_train import TuneReportCallback

CONTROLLER = "controller"
"""In a result: the actor that runs the trial's training."""


class ReportToTune(TuneReportCallback):
    """Hands the epochs of a trial's last stage to Ray Tune, with what its earlier stages cost."""

    def __init__(self, earlier_work: Sequence[Mapping[str, float]]) -> None:
        super().__init__()
        self._earlier_work = list(earlier_work)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train with what each worker reported; the first one knows all."""
        told = {"earlier_work": self._earlier_work, CONTROLLER: ray.get_runtime_context().current_actor}
        super().after_report(run_context, [{**metrics[0], **told}], checkpoint)
