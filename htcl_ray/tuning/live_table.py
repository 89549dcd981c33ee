"""What a person sees while a search runs: a line that says how far it is, and a table of its trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.trials import Trial, winners

MOST_ROWS = 30


def state_of(trial: Trial) -> str:
    """The trial's state; one whose workers have measured nothing yet waits for a node, or for them to start."""
    return "starting" if trial.state == "running" and not trial.history else trial.state


def progress_line(trials: Sequence[Trial], objectives: Sequence[str], total: int, rows: int, seconds: float, rows_before: float = 0) -> str:
    """How far the search is. `rows`: of a whole trial; `seconds`: that this search has run; `rows_before`: seen before it began."""
    states = Counter(state_of(trial) for trial in trials)
    ended = sum(trial.ended for trial in trials)
    early = ", ".join(f"{states[state]} {named}" for state, named in (("stopped", "stopped early"), ("failed", "failed")) if states[state])
    line = f"tune  {ended} of {total} trials ended{f' ({early})' if early else ''}"
    line += "".join(f", {states[state]} {state}" for state in ("running", "starting") if states[state])
    best = winners(trials, objectives)
    if best:
        figures = ", ".join(f"{name} {best[0].last[name]:.4f}" for name in objectives)
        line += f"; best {figures} (trial {best[0].number})"
    done = sum(trial.last.get("rows", 0) for trial in trials) - rows_before
    open_rows = sum(rows - trial.last.get("rows", 0) for trial in trials if not trial.ended) + max(0, total - len(trials)) * rows
    return line + (f"; at most {duration(open_rows * seconds / done)} left" if done > 0 and open_rows > 0 else "")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted key → its last part, or the whole key where two end alike."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in keys}


def shown(value: object) -> str:
    """A parameter's value as a person writes it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def in_words(parameters: Parameters) -> str:
    """Every parameter with its value."""
    names = short_names(list(parameters))
    return ", ".join(f"{names[key]} {shown(value)}" for key, value in parameters.items())


def live_table(trials: Sequence[Trial], objectives: Sequence[str], total: int, rows: int) -> Table:
    """A row a trial: those that run, then the best, then the rest; at most 30."""
    best = [trial.number for trial in winners(trials, objectives)]
    order = {"running": 0, "starting": 0, "finished": 1, "stopped": 2, "failed": 3}
    ranked = sorted(trials, key=lambda trial: (order[state_of(trial)], -sum(trial.values(objectives) or (0.0,)), trial.number))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    left_out = len(ranked) - MOST_ROWS
    table = Table(title=f"{sum(trial.ended for trial in trials)} of {total} trials ended", caption_justify="left")
    table.caption = f"{left_out} more are in trials.jsonl" if left_out > 0 else None
    for name in ("trial", "state", *short_names(keys).values(), "rows", *objectives, "songs/s"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for trial in ranked[:MOST_ROWS]:
        last = trial.last
        table.add_row(
            f"{'* ' if trial.number in best else ''}{trial.number}",
            state_of(trial),
            *(shown(trial.parameters.get(key, "")) for key in keys),
            f"{last.get('rows', 0):,.0f} of {rows:,}",
            *(f"{last[name]:.4f}" if name in last else "" for name in objectives),
            f"{last['songs_per_second']:.0f}" if last else "",
        )
    return table
