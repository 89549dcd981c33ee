"""Texts for trials: short parameter names, values, states and objectives, shared by the live table and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from htcl_ray.tuning.trials import Trial

STARTING = "starting"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each dotted key to its shortest suffix that no other key shares."""
    parts = {key: key.split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[key] = ".".join(own[-length:])
    return names


def value_text(value: Any) -> str:
    """Format a parameter's value: four significant digits; true, false and null as in a configuration file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def state_text(trial: Trial) -> str:
    """Format the state. A running trial without attempts waits for a node or for its workers: it is starting."""
    if trial.state == "running":
        return "running" if trial.attempts else STARTING
    return "stopped early" if trial.state == "stopped" else trial.state


def objective_titles(objectives: Sequence[str], metric: str | None) -> dict[str, str]:
    """Map each objective to its name with the metric, such as `semantic recall@10`."""
    return {name: f"{name} {metric}" if metric else name for name in objectives}
