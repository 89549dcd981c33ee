"""Metrics of each epoch: `metrics.jsonl`, TensorBoard events, and trackers. Written by the first worker."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow.fs as pafs

from htcl_ray.training.progress_lines import Metrics
from htcl_ray.training.trackers import Trackers
from htcl_ray.workspace.storage import Workspace

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """The log of one run, continued when the run is resumed. Closes the trackers that it is given."""

    def __init__(self, workspace: Workspace, run: str, steps_done: int, trackers: Trackers | None = None) -> None:
        from tensorboardX import SummaryWriter

        self.workspace, self.run, self.trackers = workspace, run, trackers
        self.lines: list[Metrics] = []
        if steps_done and workspace.exists(f"{run}/{METRICS}"):
            lines = [json.loads(line) for line in workspace.read_bytes(f"{run}/{METRICS}").decode().splitlines()]
            self.lines = [line for line in lines if line["step"] <= steps_done]
        self.remote = None if workspace.is_local else tempfile.TemporaryDirectory()
        self.folder = Path(self.remote.name if self.remote else workspace.full(f"{run}/{TENSORBOARD}"))
        self.events = SummaryWriter(str(self.folder), purge_step=steps_done or None)

    def write(self, metrics: Metrics) -> None:
        """Append the metrics of one epoch."""
        self.lines.append(metrics)
        self.workspace.write_bytes(
            f"{self.run}/{METRICS}", "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        )
        for name, value in metrics.items():
            if name not in ("epoch", "step"):
                self.events.add_scalar(name, value, int(metrics["step"]))
        self.events.flush()
        if self.remote:
            target = self.workspace.full(f"{self.run}/{TENSORBOARD}")
            pafs.copy_files(
                str(self.folder),
                target,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=self.workspace.fs,
            )
        if self.trackers:
            self.trackers.catch_up(self.lines)

    def close(self, finished: bool = True) -> None:
        """End the log; `finished`: the run is complete, else it is to be resumed."""
        if self.trackers:
            self.trackers.close(finished)
        self.events.close()
        if self.remote:
            self.remote.cleanup()
