"""Progress lines of a stage in training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from htcl_ray.losses.collectives import world_size
from htcl_ray.models.htcl import HTCL
from htcl_ray.progress import Pace, Throttle
from htcl_ray.training.stage_tasks import Task

Metrics = dict[str, float]
SECONDS_BETWEEN_LINES = 5.0


class ProgressLines:
    """Lines about one run: every few seconds, and at its end."""

    def __init__(
        self, task: Task, batch: int, epochs: int, steps: int, *, start: int, say: Callable[[str], None]
    ) -> None:
        self.task, self.batch, self.epochs, self.steps, self.say = task, batch, epochs, steps, say
        self.pace, self.throttle = Pace(epochs * steps, done=start), Throttle(SECONDS_BETWEEN_LINES)
        if start:
            say(f"{task.name}  continues after step {start}/{epochs * steps} (epoch {start // steps + 1} of {epochs})")

    def songs_per_second(self, step: int) -> float:
        """Songs per second of all workers since this process started."""
        return self.pace.rate(step) * self.batch * self.task.songs_per_row

    def step(self, epoch: int, step: int, sums: dict[str, Tensor], model: HTCL) -> None:
        """Print a line every few seconds; within an epoch, terms are estimated from this worker's rows."""
        if not self.throttle.is_due():
            return
        done = step - epoch * self.steps
        terms = {name: sums[name].item() * world_size() / done for name in self.task.weights}
        self._line(epoch + 1, step, terms, model.temperatures(), "")

    def epoch(self, metrics: Metrics) -> None:
        """Print a line at the end of an epoch, if the last one is some time ago or training ends."""
        if metrics["epoch"] < self.epochs and not self.throttle.is_due(0.5):
            return
        terms = {name: metrics[f"loss_{name}"] for name in self.task.weights}
        temperatures = {name: metrics[f"temperature_{name}"] for name in self.task.weights}
        recall = metrics.get("validation_recall@10")
        self._line(
            int(metrics["epoch"]),
            int(metrics["step"]),
            terms,
            temperatures,
            "" if recall is None else f"  recall@10 {recall:.2f}",
        )

    def _line(self, epoch: int, step: int, terms: dict[str, float], temperatures: dict[str, float], more: str) -> None:
        self.throttle.restart()
        left = self.pace.seconds_left(step) or 0.0
        losses = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        heat = "/".join(f"{value:.3f}" for value in temperatures.values())
        self.say(
            f"{self.task.name}  epoch {epoch}/{self.epochs}  step {step}/{self.epochs * self.steps}  loss {losses}  "
            f"temperature {heat}{more}  {self.songs_per_second(step):.0f} songs/s  {left:.0f} s left"
        )
