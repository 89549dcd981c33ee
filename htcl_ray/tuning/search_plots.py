"""Optuna's matplotlib plots of a search as inline SVG in the page's colours, each with what it shows or why it is not
drawn.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import BaseDistribution

from htcl_ray.evaluation.report.plots import INK, inline_svg
from htcl_ray.tuning.trials import Trial, optuna_study, quiet_optuna
from htcl_ray.tuning.wording import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INCHES = (5.6, 3.4)
FOREST_SEED = 0
LOW, HIGH = "#9aa9bd", "#d9662c"
"""Of a colour scale: both ends can be told from light and from dark paper."""


@dataclass(frozen=True)
class Plot:
    """A plot, or the sentence that stands in its place."""

    caption: str
    svg: str | None
    why_not: str | None = None
    inches: float = INCHES[0]
    """Width."""


def study_plots(
    trials: Sequence[Trial], distributions: Mapping[str, BaseDistribution], titles: Mapping[str, str]
) -> dict[str, list[Plot]]:
    """The plots under a heading each. `titles`: objective → its name on an axis.

    Each objective is drawn from a study of its own: Optuna takes a `target` for something to be minimised.
    """
    found: dict[str, list[Plot]] = {}
    with _drawing():
        if len(titles) > 1:
            study = _study(trials, distributions, list(titles))
            found["Pareto front"] = [_pareto_front(study, list(titles.values()))]
        for number, (objective, title) in enumerate(titles.items()):
            study = _study(trials, distributions, [objective])
            found[f"Optimisation of {title}"] = [
                _history(study, title, f"history{number}"),
                _importances(study, f"importances{number}"),
                *_slices(study, title, f"slice{number}"),
            ]
        if len(titles) == 1:
            found["Parallel coordinates"] = [_parallel_coordinates(study, title)]
    return found


def _study(
    trials: Sequence[Trial], distributions: Mapping[str, BaseDistribution], objectives: Sequence[str]
) -> optuna.Study:
    """The study under short names, in which Optuna's numbers of the trials are ours: those without a value hold their
    places.
    """
    names = short_names(distributions)
    by_number = {trial.number: trial for trial in trials}
    places = []
    for number in range(max(by_number, default=-1) + 1):
        trial = by_number.get(number) or replace(trials[0], number=number, state="failed")
        parameters = {names[key]: value for key, value in trial.parameters.items()}
        counts = trial.ended and trial.history
        places.append(
            replace(trial, parameters=parameters, state="finished" if counts and trial.state != "failed" else "failed")
        )
    return optuna_study(places, {names[key]: value for key, value in distributions.items()}, objectives)


def _measured(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _too_few(study: optuna.Study) -> str | None:
    count = len(_measured(study))
    return (
        None
        if count >= 2
        else f"Not drawn: it takes two trials that ended with a measurement, and there {_are(count)}."
    )


def _are(count: int) -> str:
    return {0: "is none", 1: "is one"}.get(count, f"are {count}")


def _history(study: optuna.Study, title: str, name: str) -> Plot:
    def draw() -> Axes:
        return optuna.visualization.matplotlib.plot_optimization_history(study, target_name=title)

    return _plot("Optimisation history: each trial, and the best until then", name, draw, _too_few(study), legend=True)


def _importances(study: optuna.Study, name: str) -> Plot:
    caption = "Parameter importances: share of the variation of the value that each parameter explains (fANOVA, random forest)"
    why_not = _too_few(study)
    if not why_not and len({trial.value for trial in _measured(study)}) < 2:
        why_not = "Not drawn: all trials have the same value, so that no parameter explains a difference."

    def draw() -> Axes:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=FOREST_SEED)
        return optuna.visualization.matplotlib.plot_param_importances(study, evaluator)

    try:
        return _plot(caption, name, draw, why_not, (4.6, 3.2))
    except (RuntimeError, ValueError) as error:
        return Plot(caption, None, f"Not drawn: Optuna cannot tell the parameters apart from these trials ({error}).")


def _slices(study: optuna.Study, title: str, name: str) -> list[Plot]:
    why_not = _too_few(study)
    if why_not:
        return [Plot("Slices: the value against each parameter", None, why_not)]
    parameters = sorted({key for trial in _measured(study) for key in trial.params})
    found = []
    for number, key in enumerate(parameters):

        def draw(key: str = key) -> Axes:
            return optuna.visualization.matplotlib.plot_slice(study, [key], target_name=title)

        found.append(_plot(f"Slice: {key}", f"{name}-{number}", draw))
    return found


def _parallel_coordinates(study: optuna.Study, title: str) -> Plot:
    def draw() -> Axes:
        return optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=title)

    parameters = {key for trial in _measured(study) for key in trial.params}
    caption = "Parallel coordinates: a line a trial, through its value and its parameters"
    return _plot(caption, "parallel", draw, _too_few(study), (max(7.0, 3.0 + 1.6 * len(parameters)), 4.2))


def _pareto_front(study: optuna.Study, titles: list[str]) -> Plot:
    def draw() -> Axes:
        return optuna.visualization.matplotlib.plot_pareto_front(study, target_names=titles)

    return _plot("Pareto front: no other trial is better in both", "pareto", draw, _too_few(study), legend=True)


def _plot(
    caption: str,
    name: str,
    draw: Callable[[], Axes],
    why_not: str | None = None,
    inches: tuple[float, float] = INCHES,
    *,
    legend: bool = False,
) -> Plot:
    if why_not:
        return Plot(caption, None, why_not)
    from matplotlib import pyplot, rc_context

    with rc_context({"figure.figsize": inches}):
        axes = draw()
        figure = axes.get_figure(root=True)
        assert figure is not None
        _follow_page(figure, axes, legend)
        svg = inline_svg(figure, name)
        pyplot.close(figure)
    return Plot(caption, svg, inches=inches[0])


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Optuna draws with pyplot, in its own style: without a display, and the caller finds backend, style and figures as
    they were.
    """
    from matplotlib import get_backend, pyplot, rc_context

    before, theirs = get_backend(), set(pyplot.get_fignums())
    # Parameter values are words, not mathematics.
    with quiet_optuna(), rc_context({"text.parse_math": False, "savefig.bbox": "tight", "savefig.pad_inches": 0.05}):
        # Of one value only, an axis is a point; Optuna's layouts are replaced by the tight box.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(matplotlib|optuna)\.")
        pyplot.switch_backend("agg")
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - theirs:
                pyplot.close(number)
            pyplot.switch_backend(before)


def _follow_page(figure: Figure, axes: Axes, legend: bool) -> None:
    """Ink is the page's, paper shows through, no title since the page has a caption."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator

    figure.set_layout_engine("none")
    figure.patch.set_alpha(0)
    axes.set_title("", loc="left")
    axes.set_title("")
    if (shown := axes.get_legend()) is not None:
        shown.remove()
    for line in axes.lines:
        line.set_alpha(1)
    if legend:
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=3, frameon=False)
    scale = LinearSegmentedColormap.from_list("of the page", [LOW, HIGH])
    for drawn in figure.findobj():
        if isinstance(drawn, ScalarMappable) and drawn.get_array() is not None:
            drawn.set_cmap(scale)
    for each in figure.axes:
        each.patch.set_alpha(0)
        each.tick_params(which="both", colors=INK, labelsize=9)
        each.grid(False)
        each.xaxis.label.set_fontsize(10)
        each.yaxis.label.set_fontsize(10)
        for spine in each.spines.values():
            spine.set_color(INK)
        for axis in (each.xaxis, each.yaxis):
            if axis.get_scale() == "log":
                _plain_log_ticks(axis)
            elif axis.get_label_text() == "Trial":
                axis.set_major_locator(MaxNLocator(integer=True))
    for text in figure.findobj(Text):
        text.set_color(INK)


def _plain_log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as numbers: powers would need mathematics."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
