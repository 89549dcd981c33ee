"""How a search is put into words: short names of parameters, values, states, and the best trial of each objective.

Shared by the live table and the report, so that a person meets the same words in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from htcl_ray.tuning.trials import Trial, winners

STARTING = "starting"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key → its last part, or, where two keys share that, as many parts from the end as tell them apart."""
    parts = {key: key.split(".") for key in keys}
    found = {}
    for key, mine in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        found[key] = ".".join(mine[-length:])
    return found


def value_text(value: Any) -> str:
    """A parameter's value: four significant digits, and true, false and null as a configuration file has them."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def state_text(trial: Trial) -> str:
    """The state; one that has measured nothing yet waits for a node, or for its workers to start."""
    if trial.state == "running":
        return "running" if trial.attempts else STARTING
    return "stopped early" if trial.state == "stopped" else trial.state


def objective_titles(objectives: Sequence[str], metric: str | None) -> dict[str, str]:
    """Objective → with what it is measured by."""
    return {name: f"{name} {metric}" if metric else name for name in objectives}


def best_so_far(trials: Iterable[Trial], objective: str) -> Trial | None:
    """The best finished trial; before any has finished, the one of highest newest value; None before any
    measurement.
    """
    measured = [trial for trial in trials if trial.history and trial.state != "failed"]
    finished = winners(measured, [objective])
    return (
        finished[0]
        if finished
        else max(measured, key=lambda trial: (trial.last[objective], -trial.number), default=None)
    )
