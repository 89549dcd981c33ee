"""The report of a study as one HTML page without external files: winner, comparison, plots, trials and their cost."""

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
from htcl_ray.tuning.labels import objective_titles, short_names, state_text, value_text
from htcl_ray.tuning.search_plots import study_plots
from htcl_ray.tuning.trials import Trial, winners

UNITS = {"pretrain": "songs", "finetune": "pairs"}
"""Rows of each stage."""
UNBIASED = "For an unbiased metric train it in full and run htcl evaluate, on songs that no trial was measured on."
OPTIMISTIC = (
    "Both were trained once and measured on the validation gallery that selected the winner, so the winner's metric "
    f"and the difference are optimistic. {UNBIASED}"
)
OPTIMISTIC_ALONE = (
    "It was trained once and measured on the validation gallery that selected it, so its metric is optimistic. "
    f"{UNBIASED}"
)


@dataclass(frozen=True)
class StudyReport:
    """Data of the page."""

    name: str
    """Name of the study."""
    stage: str
    """pretrain, finetune or both."""
    objectives: tuple[str, ...]
    """One or two; keys of the trials' measurements."""
    metric: str
    """Metric of the objectives, such as recall@10."""
    trials: list[Trial]
    space: dict[str, Dimension]
    """By dotted configuration key."""
    distributions: dict[str, BaseDistribution]
    """Optuna's form of the space."""
    budgets: dict[str, Budget]
    """Budget of every trial, by stage in order."""
    gallery: dict[str, Any]
    """Validation gallery: numbers of `songs` and `pairs`, and their `fingerprint`."""
    configured: int | None
    """Number of the trial that ran the unchanged configuration; None when no trial did."""
    command: str
    """Command line that trains the winner in full."""
    created: str
    """Time of the report."""
    config: dict[str, Any]
    """The configuration that the trials change, nested."""
    inputs: dict[str, Any]
    """Versions of the input artifacts."""
    libraries: dict[str, Any]
    """Versions of the libraries."""


def report_html(report: StudyReport) -> str:
    """Render the page. A plot that cannot be drawn is replaced by the reason."""
    titles = _titles(report)
    trials = sorted(report.trials, key=lambda trial: trial.number)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        value=value_text, state=state_text, rows=lambda count: f"{count:,.0f}", metric=lambda value: f"{value:.4f}"
    )
    template = environment.from_string(
        resources.files("htcl_ray.tuning").joinpath("report.html").read_text(encoding="utf-8")
    )
    best = winners(trials, report.objectives)
    # Markup, since matplotlib escapes the texts of its SVG.
    plots = {
        heading: [(plot, None if plot.svg is None else Markup(plot.svg)) for plot in drawn]
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
        comparison=_comparison(report, best[0] if best else None),
        plots=plots,
        stopped=sum(trial.state == "stopped" for trial in trials),
        rows=list(report.budgets.values())[-1].rows,
        constants=_constants(report),
        config=yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True),
    )


def summary(report: StudyReport) -> str:
    """One paragraph: the winner, its difference to the configuration, and how reliable the difference is."""
    states = Counter(state_text(trial) for trial in report.trials)
    counts = (
        f"{len(report.trials)} trials: {', '.join(f'{count} {state}' for state, count in states.most_common())}."
        if states
        else "No trial."
    )
    best = winners(report.trials, report.objectives)
    if not best:
        return f"{counts} No trial finished, so no trial is best; the table of trials holds the errors."
    winner = best[0]
    head = f"{counts} Trial {winner.number} is best: {_values(report, winner)}."
    if len(report.objectives) > 1:
        head = (
            f"{counts} {_front(len(best))} Of these, trial {winner.number} has the highest sum: "
            f"{_values(report, winner)}."
        )
    if winner.number == report.configured:
        return f"{head} It ran the unchanged configuration, which no trial beat. {OPTIMISTIC_ALONE}"
    configured = next((trial for trial in report.trials if trial.number == report.configured), None)
    if configured is None:
        return f"{head} No trial ran the unchanged configuration, so no difference can be given. {OPTIMISTIC_ALONE}"
    name = f"The unchanged configuration, trial {configured.number},"
    if configured.state != "finished" or not configured.history:
        seen = (
            f", after {configured.last['rows']:,.0f} rows at {_values(report, configured)}"
            if configured.history
            else ""
        )
        return (
            f"{head} {name} did not finish ({state_text(configured)}{seen}), so no difference can be given. "
            f"{OPTIMISTIC_ALONE}"
        )
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


def _comparison(report: StudyReport, winner: Trial | None) -> list[dict[str, Any]]:
    """One row for each parameter: searched values, configured value, and value of the winner."""
    rows = []
    for key, dimension in report.space.items():
        scale = ", logarithmic" if dimension.log else ""
        searched = (
            ", ".join(map(value_text, dimension.values))
            if dimension.values is not None
            else f"{value_text(dimension.low)} to {value_text(dimension.high)}{scale}"
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
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def _constants(report: StudyReport) -> list[tuple[str, str]]:
    """Names and values that are equal in every trial."""
    lines = []
    for stage, budget in report.budgets.items():
        unit = UNITS[stage]
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
