"""The report of a search as one page that opens offline: the winner, what it beat, the plots, every trial and what it
cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from optuna.distributions import BaseDistribution

from htcl_ray.config.sections import Dimension
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.search_plots import study_plots
from htcl_ray.tuning.trials import Trial, winners
from htcl_ray.tuning.wording import objective_titles, short_names, state_text, value_text

ROWS = {"pretrain": "songs", "finetune": "pairs"}
OPTIMISTIC = (
    "Both were measured on the validation gallery that chose the winner, each trained once: the winner's figure, and with it the "
    "difference, is optimistic. Only songs that no trial was judged by can tell what it is worth: train it in full, then htcl evaluate."
)
OPTIMISTIC_ALONE = (
    "It was measured on the validation gallery that chose it, trained once: its figure is optimistic. Only songs that "
    "no trial was judged by can tell what it is worth: train it in full, then htcl evaluate."
)


@dataclass(frozen=True)
class StudyReport:
    """All that the page shows."""

    name: str
    """Of the study."""
    stage: str
    """pretrain, finetune or both."""
    objectives: tuple[str, ...]
    """One or two; keys of the trials' measurements."""
    metric: str
    """Of the objectives, such as recall@10."""
    trials: list[Trial]
    space: dict[str, Dimension]
    """By dotted configuration key."""
    distributions: dict[str, BaseDistribution]
    """The space as Optuna has it."""
    budgets: dict[str, Budget]
    """What every trial sees, by stage in order."""
    gallery: dict[str, Any]
    """songs, pairs, fingerprint of what the trials were judged by."""
    configured: int | None
    """Number of the trial that ran the configuration as it was; None: it lies outside the space."""
    command: str
    """Trains the winner in full."""
    created: str
    config: dict[str, Any]
    """The configuration that the trials change, nested."""
    inputs: dict[str, Any]
    """Versions."""
    libraries: dict[str, Any]
    """Versions."""


def report_html(report: StudyReport) -> str:
    """The page; a plot that cannot be drawn is a sentence that says why."""
    titles = _titles(report)
    trials = sorted(report.trials, key=lambda trial: trial.number)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(value=value_text, state=state_text, rows=lambda count: f"{count:,.0f}", figure=_figure)
    template = environment.from_string(
        resources.files("htcl_ray.tuning").joinpath("report.html").read_text(encoding="utf-8")
    )
    best = winners(trials, report.objectives)
    plots = {
        heading: [
            (plot, None if plot.svg is None else Markup(plot.svg)) for plot in drawn
        ]  # Texts were escaped by matplotlib.
        for heading, drawn in study_plots(trials, report.distributions, titles).items()
    }
    return template.render(
        report=report,
        titles=titles,
        names=short_names(report.space),
        trials=trials,
        winner=best[0] if best else None,
        front=best,
        summary=summary(report),
        beside=_beside(report, best[0] if best else None),
        plots=plots,
        stopped=sum(trial.state == "stopped" for trial in trials),
        rows=list(report.budgets.values())[-1].rows,
        same=_same(report),
        config=yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True),
    )


def summary(report: StudyReport) -> str:
    """One paragraph: who won, by how much, against what, and how far that can be believed."""
    states = Counter(state_text(trial) for trial in report.trials)
    counts = (
        f"{len(report.trials)} trials: {', '.join(f'{count} {state}' for state, count in states.most_common())}."
        if states
        else "No trial."
    )
    best = winners(report.trials, report.objectives)
    if not best:
        return f"{counts} No trial finished, so there is no winner; the table of trials holds the errors."
    winner = best[0]
    head = f"{counts} Trial {winner.number} is best: {_values(report, winner)}."
    if len(report.objectives) > 1:
        head = f"{counts} {_front(len(best))} Of these, trial {winner.number} has the highest sum: {_values(report, winner)}."
    if winner.number == report.configured:
        return f"{head} It ran the configuration as it was, which no trial beat. {OPTIMISTIC_ALONE}"
    configured = next((trial for trial in report.trials if trial.number == report.configured), None)
    if configured is None:
        return f"{head} No trial ran the configuration as it was, so that there is nothing to compare with. {OPTIMISTIC_ALONE}"
    name = f"The configuration as it was, trial {configured.number},"
    if configured.state != "finished" or not configured.history:
        seen = (
            f", after {configured.last['rows']:,.0f} rows at {_values(report, configured)}"
            if configured.history
            else ""
        )
        return f"{head} {name} did not finish ({state_text(configured)}{seen}), so that no difference is given. {OPTIMISTIC_ALONE}"
    differences = ", ".join(
        f"{title} {winner.last[key] - configured.last[key]:+.4f}" for key, title in _titles(report).items()
    )
    return f"{head} {name} has {_values(report, configured)}. Difference: {differences}. {OPTIMISTIC}"


def _titles(report: StudyReport) -> dict[str, str]:
    return objective_titles(report.objectives, report.metric)


def _front(count: int) -> str:
    return "One trial is better than all others in both." if count == 1 else f"{count} trials make up the Pareto front."


def _values(report: StudyReport, trial: Trial) -> str:
    return ", ".join(f"{title} {trial.last[name]:.4f}" for name, title in _titles(report).items())


def _beside(report: StudyReport, winner: Trial | None) -> list[dict[str, Any]]:
    """A row a parameter: what was searched, what was configured, what the winner has."""
    rows = []
    for key, dimension in report.space.items():
        searched = (
            ", ".join(map(value_text, dimension.values))
            if dimension.values is not None
            else f"{value_text(dimension.low)} to {value_text(dimension.high)}{', logarithmic' if dimension.log else ''}"
        )
        configured = value_text(_configured(report.config, key))
        rows.append(
            {
                "key": key,
                "searched": searched,
                "configured": configured,
                "winner": value_text(winner.parameters[key]) if winner else "–",
            }
        )
    return rows


def _configured(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found[part]
    return found


def _same(report: StudyReport) -> list[tuple[str, str]]:
    """What no trial could change."""
    lines = []
    for stage, budget in report.budgets.items():
        unit = ROWS[stage]
        lines.append(
            (
                f"{stage}: rows of a trial",
                f"{budget.rows:,} {unit}, in {budget.reports} parts of {budget.rows_per_report:,}",
            )
        )
        lines.append((f"{stage}: seed", value_text(report.config.get(stage, {}).get("seed"))))
    gallery = report.gallery
    lines.append(("gallery", f"{gallery['songs']:,} validation songs, {gallery['pairs']:,} validation pairs"))
    lines.append(("gallery's fingerprint", str(gallery["fingerprint"])))
    return lines


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
