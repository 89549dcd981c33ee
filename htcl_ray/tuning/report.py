"""The report of a search as one page that opens offline: the winner, Optuna's plots, every trial and what it cost."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import optuna
import yaml
from markupsafe import Markup
from optuna.distributions import BaseDistribution

from htcl_ray.settings import Dimension
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.live_table import in_words, short_names, shown
from htcl_ray.tuning.trials import Trial, optuna_study, quiet_optuna, winners


@dataclass(frozen=True)
class StudyReport:
    """What the page shows."""

    name: str
    stage: str
    objectives: tuple[str, ...]
    metric: str
    """recall@10 or ndcg@10."""
    trials: list[Trial]
    space: dict[str, Dimension]
    distributions: dict[str, BaseDistribution]
    budgets: dict[str, Budget]
    """By stage."""
    gallery: Mapping[str, Any]
    """`songs`, `pairs` and `fingerprint` of what every trial was measured on."""
    configured: int | None
    """The trial that ran the configuration as it is."""
    command: str
    """Trains the winner in full."""
    created: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    libraries: Mapping[str, str | None]


def report_html(report: StudyReport) -> str:
    """The page."""
    best = winners(report.trials, report.objectives)
    keys = list(report.space)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("htcl_ray.tuning").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        summary=summary(report),
        changes=_changes(report, best[0]) if best else [],
        plots=list(_plots(report)),
        keys=list(short_names(keys).values()),
        trials=[_row(report, trial, trial in best) for trial in report.trials],
        node_seconds=f"{sum(trial.node_seconds for trial in report.trials):,.0f}",
        attempts=sum(len(trial.attempts) for trial in report.trials),
        same=_same(report),
        config=yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True),
    )


def summary(report: StudyReport) -> str:
    """What was found, in words, and how far to believe it."""
    best = winners(report.trials, report.objectives)
    ended = {state: sum(trial.state == state for trial in report.trials) for state in ("finished", "stopped", "failed")}
    said = f"{len(report.trials)} trials: {ended['finished']} saw all their rows, {ended['stopped']} were stopped early, "
    said += f"{ended['failed']} failed."
    if not best:
        return f"{said} None can be compared."
    found = ", ".join(f"{name} {best[0].last[name]:.4f}" for name in report.objectives)
    said += f" Trial {best[0].number} is best: {found}, with {in_words(best[0].parameters)}."
    if len(report.objectives) > 1:
        said += f" It has the best sum on a front of {len(best)}: trial(s) {', '.join(str(trial.number) for trial in best)}."
    before = next((trial for trial in report.trials if trial.number == report.configured and trial.state == "finished"), None)
    if before is not None and before is not best[0]:
        gains = ", ".join(f"{name} {best[0].last[name] - before.last[name]:+.4f}" for name in report.objectives)
        said += f" Against the configuration as it was (trial {before.number}): {gains}."
    elif before is not None:
        said += " That is the configuration as it was: nothing better was found."
    return f"{said} The winner was chosen on these validation songs, so its figure is too good; test songs say what was gained."


def _changes(report: StudyReport, best: Trial) -> list[dict[str, Any]]:
    rows = []
    for key, value in best.parameters.items():
        section, _, name = key.partition(".")
        configured: Any = report.config[section]
        for part in name.split("."):
            configured = configured[part]
        rows.append({"key": key, "configured": shown(configured), "winner": shown(value), "changed": configured != value})
    return rows


def _row(report: StudyReport, trial: Trial, best: bool) -> dict[str, Any]:
    last = trial.last
    return {
        "number": trial.number,
        "best": best,
        "state": trial.state,
        "parameters": [shown(trial.parameters.get(key, "")) for key in report.space],
        "rows": f"{last.get('rows', 0):,.0f}",
        "values": [f"{last[name]:.4f}" if name in last else "" for name in report.objectives],
        "error": trial.error or "",
        "node_seconds": f"{trial.node_seconds:,.0f}",
        "speed": f"{last['songs_per_second']:,.0f}" if last else "",
        "attempts": len(trial.attempts),
    }


def _same(report: StudyReport) -> dict[str, str]:
    found = {
        f"rows of {stage}": f"{budget.rows:,}, measured {budget.reports} times, after {budget.rows_per_report:,} each"
        for stage, budget in report.budgets.items()
    }
    seeds = {f"seed of {stage}": str(report.config[stage]["seed"]) for stage in report.budgets}
    gallery = f"{report.gallery['songs']:,} songs, {report.gallery['pairs']:,} pairs, fingerprint {report.gallery['fingerprint']}"
    inputs = {f"input: {name}": version for name, version in report.inputs.items()}
    libraries = {f"library: {name}": version or "not installed" for name, version in report.libraries.items()}
    return {**found, **seeds, "gallery": gallery, **inputs, **libraries}


def _plots(report: StudyReport) -> Iterator[dict[str, Any]]:
    """Optuna's plots, each as an SVG or with the reason why there is none."""
    from optuna.visualization import matplotlib as drawn

    study = optuna_study(report.trials, report.distributions, report.objectives)
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    several = len(report.objectives) > 1
    # Optuna's default evaluator looks at low values when there are two objectives.
    importances = functools.partial(drawn.plot_param_importances, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    if several:
        front = functools.partial(drawn.plot_pareto_front, study, target_names=list(report.objectives))
        yield _plot("The front: no trial is better in both", front, (7.0, 4.5), None if complete else "No trial was measured.")
    for position, name in enumerate(report.objectives):
        target: dict[str, Any] = {"target_name": f"{name} {report.metric}"}
        if several:
            target["target"] = lambda trial, position=position: trial.values[position]
        of = f"{name}: " if several else ""
        none = None if complete else "No trial was measured."
        few = none or (
            None if len({trial.values[position] for trial in complete}) > 1 else "Importances need two trials with different values."
        )
        wide = max(7.0, 2.6 * len(report.space))
        options: list[tuple[str, Callable[..., Any], tuple[float, float], str | None]] = [
            ("history", drawn.plot_optimization_history, (7.0, 3.8), none),
            ("importance of each key for the value (fANOVA)", importances, (7.0, 1.5 + 0.4 * len(report.space)), few),
            ("value against each key", drawn.plot_slice, (wide, 3.6), none),
            ("all keys of a trial as one line", drawn.plot_parallel_coordinate, (wide, 4.2), none),
        ]
        for caption, plot, size, missing in options:
            yield _plot(f"{of}{caption}", functools.partial(plot, study, **target), size, missing)


def _plot(caption: str, draw: Callable[[], Any], size: tuple[float, float], missing: str | None) -> dict[str, Any]:
    if missing is not None:
        return {"caption": caption, "svg": None, "missing": missing}
    import matplotlib
    from matplotlib import pyplot

    backend = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    try:
        with (
            quiet_optuna(),
            warnings.catch_warnings(),
            matplotlib.rc_context({"figure.figsize": size, "svg.fonttype": "none", "svg.hashsalt": caption, "font.size": 9}),
        ):
            warnings.simplefilter("ignore", UserWarning)  # axes of a single value
            axes = draw()
            figure = pyplot.gcf() if not hasattr(axes, "figure") else axes.figure
            figure.set_size_inches(*size)
            out = io.StringIO()
            figure.savefig(out, format="svg", bbox_inches="tight", metadata={key: None for key in ("Date", "Creator", "Format", "Type")})
            return {"caption": caption, "svg": Markup(_inline(out.getvalue(), caption)), "missing": None}
    except (ValueError, RuntimeError) as error:  # Optuna's: too little to draw from
        return {"caption": caption, "svg": None, "missing": f"Optuna cannot draw it: {str(error).splitlines()[0]}"}
    finally:
        pyplot.close("all")
        pyplot.switch_backend(backend)


def _inline(svg: str, caption: str) -> str:
    """The SVG element alone; its ids carry the caption, so that several stand in one page."""
    prefix = re.sub(r"\W+", "-", caption)
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return re.sub(r'(<svg) [^>]*?(viewBox="[^"]*")[^>]*>', r'\1 \2 role="img">', text, count=1).strip()
