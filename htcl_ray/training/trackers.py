"""Experiment trackers, MLflow and Weights & Biases, which get the lines of `metrics.jsonl`. Both are optional extras.

`metrics.jsonl` is authoritative and trackers follow it: `trackers.json` next to it records the tracker's run and the
last step that was sent. So a resumed run continues in the same run of the tracker, no line is sent twice, lines that
could not be sent are sent later, and a tracker that is added to an interrupted run gets the earlier epochs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from htcl_ray.config.sections import TrackingSettings
from htcl_ray.errors import ConfigError
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.local_copies import private_folder
from htcl_ray.workspace.paths import absolute_sqlite
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.training.progress_lines import Metrics

TRACKED = "trackers.json"


class Tracker(Protocol):
    """An experiment tracker."""

    name: str
    target: str
    """Which server and project, as one string: a run is continued only where it began."""

    def open(self, run_id: str | None) -> str:
        """Begin a run, or continue the one called `run_id`; returns its id."""

    def write(self, metrics: Metrics) -> None:
        """Add the metrics of one epoch at `metrics["step"]`; steps rise."""

    def close(self, finished: bool) -> None:
        """End the run; `finished`: it is complete, else it is to be resumed."""


def check_tracking(settings: TrackingSettings) -> TrackingSettings:
    """Resolve the settings for workers in other folders. Raises ConfigError for a missing package or MLflow address."""
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers names {name}, which is not installed here; run: pip install 'htcl-ray[{name}]'"
            )
    if "mlflow" not in settings.trackers:
        return settings
    uri = settings.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(
            "tracking.trackers names mlflow, but neither tracking.mlflow_uri nor MLFLOW_TRACKING_URI is set; "
            "expected a server such as http://host:5000, or a file such as sqlite:///mlflow.db"
        )
    return settings.model_copy(update={"mlflow_uri": absolute_sqlite(uri)})


def open_trackers(
    settings: TrackingSettings,
    workspace: Workspace,
    run: str,
    parameters: Mapping[str, Any],
    say: Callable[[str], None],
) -> Trackers:
    """Open the configured trackers of the run in folder `run`, runs/<step>/<version>.

    `parameters`: sections of the configuration.
    """
    settings = check_tracking(settings)
    step, version = run.split("/")[-2:]
    folder = Path(workspace.full(run)) if workspace.is_local else None
    kinds: dict[str, Callable[[], Tracker]] = {
        "mlflow": lambda: MlflowTracker(settings, step, version, parameters),
        "wandb": lambda: WandbTracker(settings, step, version, parameters, folder),
    }
    return Trackers(workspace, run, [kinds[name]() for name in settings.trackers], say)


class Trackers:
    """The trackers of one run. Raises ConfigError when one of them cannot be opened."""

    def __init__(self, workspace: Workspace, run: str, trackers: Sequence[Tracker], say: Callable[[str], None]) -> None:
        self.workspace, self.path, self.trackers, self.say = workspace, f"{run}/{TRACKED}", trackers, say
        self.sent: dict[str, dict[str, Any]] = {}
        """By target: `run`, the tracker's id, and `step`, the last one sent."""
        if trackers and workspace.exists(self.path):
            self.sent = workspace.read_json(self.path)
        for tracker in trackers:
            before = self.sent.get(tracker.target)
            try:
                run_id = tracker.open(None if before is None else before["run"])
            except Exception as error:  # errors of the tracker's client and its HTTP library  # noqa: BLE001
                raise ConfigError(
                    f"{tracker.name} cannot be opened at {tracker.target} ({_reason(error)}); "
                    f"correct the tracking section, or take {tracker.name} out of tracking.trackers"
                ) from None  # the client's own error shows its address whole
            if before is None:
                self.sent[tracker.target] = {"run": run_id, "step": 0}
                self._save()

    def catch_up(self, lines: Sequence[Metrics]) -> None:
        """Send the lines that a tracker does not have yet; on failure, print a line and try again at the next call."""
        for tracker in self.trackers:
            sent = self.sent[tracker.target]
            try:
                for line in lines:
                    if line["step"] > sent["step"]:
                        tracker.write(line)
                        sent["step"] = line["step"]
            except Exception as error:  # as in __init__; training continues  # noqa: BLE001
                self.say(f"{tracker.name} cannot be reached ({_reason(error)}); its metrics wait in metrics.jsonl")
        if self.trackers:
            self._save()

    def close(self, finished: bool) -> None:
        """End the trackers' runs; failures are printed, not raised."""
        for tracker in self.trackers:
            try:
                tracker.close(finished)
            except Exception as error:  # as in __init__; training continues  # noqa: BLE001
                self.say(f"{tracker.name} could not close its run ({_reason(error)})")

    def _save(self) -> None:
        self.workspace.write_bytes(self.path, (json.dumps(self.sent, indent=2) + "\n").encode())


class MlflowTracker:
    """A run of an MLflow experiment, on a server or in an SQLite file."""

    name = "mlflow"

    def __init__(self, settings: TrackingSettings, step: str, version: str, parameters: Mapping[str, Any]) -> None:
        self.project, self.uri, self.step, self.version, self.parameters = (
            settings.project,
            settings.mlflow_uri,
            step,
            version,
            parameters,
        )
        self.target = f"mlflow {without_credentials(self.uri or '')} {self.project}"

    def open(self, run_id: str | None) -> str:
        """Open or resume the run; parameters are written once, since MLflow takes no second value."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=self.uri)
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return run_id
        experiment = self.client.get_experiment_by_name(self.project)
        experiment_id = self.client.create_experiment(self.project) if experiment is None else experiment.experiment_id
        self.run_id = self.client.create_run(
            experiment_id, run_name=self.version, tags={"htcl.step": self.step}
        ).info.run_id
        self.client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in _flat(self.parameters)])
        return self.run_id

    def write(self, metrics: Metrics) -> None:
        """MLflow's names have no `@`: `validation_recall@10` goes by `validation_recall_at_10`."""
        from mlflow.entities import Metric

        now, step = round(time.time() * 1000), int(metrics["step"])
        named = [
            Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items() if name != "step"
        ]
        self.client.log_batch(self.run_id, metrics=named)

    def close(self, finished: bool) -> None:
        """End the run as FINISHED or FAILED."""
        self.client.set_terminated(self.run_id, status="FINISHED" if finished else "FAILED")


class WandbTracker:
    """A run of a Weights & Biases project."""

    name = "wandb"

    def __init__(
        self, settings: TrackingSettings, step: str, version: str, parameters: Mapping[str, Any], folder: Path | None
    ) -> None:
        """`folder`: the run's, when it is on this machine; W&B keeps its files in its `wandb/`."""
        self.project, self.step, self.version, self.parameters, self.folder = (
            settings.project,
            step,
            version,
            parameters,
            folder,
        )
        self.target = f"wandb {self.project}"

    def open(self, run_id: str | None) -> str:
        """Open or resume the run; refuse an offline run whose files would be lost with the worker's disk."""
        import wandb

        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.project,
            id=run_id,
            name=self.version,
            job_type=self.step,
            resume="allow",
            dir=self.folder or private_folder(),
            config=dict(_flat(self.parameters)),
            settings=wandb.Settings(console="off", silent=True),
        )
        if self.run.offline and self.folder is None:
            self.run.finish(exit_code=1)
            raise ConfigError("W&B is offline and the workspace is not on this machine")
        return str(self.run.id)

    def write(self, metrics: Metrics) -> None:
        """One row of the run's history."""
        self.run.log(
            {name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"]), commit=True
        )

    def close(self, finished: bool) -> None:
        """Waits until everything is sent; offline, W&B's own process may write the end a moment later."""
        self.run.finish(exit_code=0 if finished else 1)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _reason(error: Exception) -> str:
    return without_credentials((str(error).strip().splitlines() or [type(error).__name__])[0])[:200].rstrip(".")
