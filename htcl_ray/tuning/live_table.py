"""Terminal output of a running search: a table with one row for each trial, and one line of progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from htcl_ray.tuning.labels import STARTING, objective_titles, short_names, state_text, value_text
from htcl_ray.tuning.trials import Trial, best_so_far, winners

MAX_ROWS = 30
"""Rows of the table at most."""
STYLES = {"failed": "red", "stopped early": "dim", STARTING: "dim"}


def live_table(
    trials: Sequence[Trial], objectives: Sequence[str], total: int, rows: int, *, metric: str | None = None
) -> Table:
    """One row for each trial, by number: state, parameters, rows seen of the last stage, newest values, samples/s.

    `total`: trials of the study; `rows`: of a whole trial, in the last stage. Of more than `MAX_ROWS` trials the
    winners, the running trials and the best of the others have a row; a caption counts the rest.
    """
    titles = objective_titles(objectives, metric)
    names = short_names(dict.fromkeys(key for trial in trials for key in trial.parameters))
    best = {trial.number for trial in winners(trials, objectives)}
    shown = sorted(trials, key=lambda trial: _priority(trial, objectives, best))[:MAX_ROWS]
    table = Table(title=f"{len(trials)} of {total} trials", title_justify="left", caption_justify="left")
    table.add_column("trial", justify="right")
    table.add_column("state")
    table.add_column("parameters", overflow="fold")
    table.add_column("rows", justify="right")
    for title in titles.values():
        table.add_column(Text(title), justify="right")
    table.add_column("samples/s", justify="right")
    for trial in sorted(shown, key=lambda trial: trial.number):
        state = state_text(trial)
        values = trial.values(objectives) or (None,) * len(objectives)
        cells = (
            str(trial.number),
            f"{state}, best" if trial.number in best else state,
            "  ".join(f"{names[key]} {value_text(value)}" for key, value in trial.parameters.items()),
            f"{trial.last.get('rows', 0):,.0f} / {rows:,}",
            *("–" if value is None else f"{value:.3f}" for value in values),
            f"{trial.last['songs_per_second']:,.1f}" if "songs_per_second" in trial.last else "–",
        )
        # Text, since rich would read a value in square brackets as markup.
        table.add_row(*map(Text, cells), style="bold green" if trial.number in best else STYLES.get(state))
    numbers = {trial.number for trial in shown}
    hidden = [trial for trial in trials if trial.number not in numbers]
    if hidden:
        table.caption = Text(f"{len(hidden)} more without a row: {_counted(state_text(trial) for trial in hidden)}")
    return table


def progress_line(
    trials: Sequence[Trial],
    objectives: Sequence[str],
    total: int,
    rows: int,
    seconds: float,
    *,
    metric: str | None = None,
    rows_before: float = 0,
) -> str:
    """One line: trials that ended, run and start, the best value of each objective, and the time left.

    `seconds`: since this process started or resumed the search; `rows_before`: rows that the trials had seen by then.
    """
    states: Counter[str] = Counter(trial.state for trial in trials)
    ended = sum(trial.ended for trial in trials)
    starting = sum(state_text(trial) == STARTING for trial in trials)
    notes = [
        f"{states[state]} {word}"
        for state, word in (("stopped", "stopped early"), ("failed", "failed"))
        if states[state]
    ]
    head = f"{ended} of {total} trials ended" + (f" ({', '.join(notes)})" if notes else "")
    if states["running"] > starting:
        head += f", {states['running'] - starting} running"
    if starting:
        head += f", {starting} starting"
    parts = [f"tune  {head}"]
    best = [(title, name, best_so_far(trials, name)) for name, title in objective_titles(objectives, metric).items()]
    values = [
        f"best {title} {trial.last[name]:.3f} (trial {trial.number})"
        for title, name, trial in best
        if trial is not None
    ]
    if values:
        parts.append(", ".join(values))
    left = seconds_left(trials, total, rows, seconds, rows_before)
    if left:
        parts.append(f"about {_duration(left)} left")
    return "; ".join(parts)


def seconds_left(
    trials: Sequence[Trial], total: int, rows: int, seconds: float, rows_before: float = 0
) -> float | None:
    """Time for the remaining rows at the rate of this process; None before the first measurement.

    An upper bound, since trials that are stopped early leave rows out. Arguments as for `progress_line`.
    """
    done = sum(trial.last.get("rows", 0) for trial in trials) - rows_before
    if done <= 0 or seconds <= 0:
        return None
    running = sum(max(rows - trial.last.get("rows", 0), 0) for trial in trials if not trial.ended)
    return (running + max(total - len(trials), 0) * rows) * seconds / done


def _priority(trial: Trial, objectives: Sequence[str], best: set[int]) -> tuple[int, float, int]:
    """Sort key of the trials that get a row: winners, running, finished or stopped, starting, failed; best first."""
    value = sum(trial.values(objectives) or ())
    if trial.number in best:
        return 0, -value, trial.number
    if not trial.ended:
        return (1 if trial.attempts else 3), -value, trial.number
    return (4 if trial.state == "failed" else 2), -value, trial.number


def _counted(states: Iterable[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(states).most_common())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
