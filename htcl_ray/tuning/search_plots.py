"""Optuna's matplotlib plots of a study, as inline SVG in the colours of the report."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import BaseDistribution

from htcl_ray.evaluation.report.plots import INK, inline_svg
from htcl_ray.tuning.labels import short_names
from htcl_ray.tuning.optuna_study import optuna_study, quiet_optuna
from htcl_ray.tuning.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INCHES = (5.6, 3.4)
FOREST_SEED = 0
LOW, HIGH = "#9aa9bd", "#d9662c"
"""Ends of the colour scale; both are visible on a light and on a dark page."""


@dataclass(frozen=True)
class Plot:
    """A plot, or the reason why it is not drawn."""

    caption: str
    svg: str | None
    why_not: str | None = None
    inches: float = INCHES[0]
    """Width."""


def study_plots(
    trials: Sequence[Trial], distributions: Mapping[str, BaseDistribution], titles: Mapping[str, str]
) -> dict[str, list[Plot]]:
    """Draw the plots of a study, by heading. `titles`: objective → axis label.

    Each objective is drawn from a study of its own, since Optuna minimises a `target` of several objectives.
    """
    plots: dict[str, list[Plot]] = {}
    with _drawing():
        if len(titles) > 1:
            study = plotted_study(trials, distributions, list(titles))
            plots["Pareto front"] = [_pareto_front(study, list(titles.values()))]
        for number, (objective, title) in enumerate(titles.items()):
            study = plotted_study(trials, distributions, [objective])
            plots[f"Optimisation of {title}"] = [
                _history(study, title, f"history{number}"),
                _importances(study, f"importances{number}"),
                *_slices(study, title, f"slice{number}"),
            ]
        if len(titles) == 1:
            plots["Parallel coordinates"] = [_parallel_coordinates(study, title)]
    return plots


def plotted_study(
    trials: Sequence[Trial], distributions: Mapping[str, BaseDistribution], objectives: Sequence[str]
) -> optuna.Study:
    """The study with short parameter names and the trial numbers of the table.

    Optuna numbers trials by position, so missing numbers and trials without a value are filled with failed trials.
    """
    names = short_names(distributions)
    by_number = {trial.number: trial for trial in trials}
    filled = []
    for number in range(max(by_number, default=-1) + 1):
        trial = by_number.get(number) or replace(trials[0], number=number, state="failed")
        parameters = {names[key]: value for key, value in trial.parameters.items()}
        measured = trial.ended and trial.history
        filled.append(
            replace(
                trial, parameters=parameters, state="finished" if measured and trial.state != "failed" else "failed"
            )
        )
    return optuna_study(filled, {names[key]: value for key, value in distributions.items()}, objectives)


def _measured(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return list(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _too_few(study: optuna.Study) -> str | None:
    count = len(_measured(study))
    if count >= 2:
        return None
    present = ("none", "one")[count]
    return f"Not drawn: the plot needs two trials that ended with a measurement, and the study has {present}."


def _history(study: optuna.Study, title: str, name: str) -> Plot:
    def draw() -> Axes:
        axes: Axes = optuna.visualization.matplotlib.plot_optimization_history(study, target_name=title)
        return axes

    return _plot("Optimisation history: each trial, and the best until then", name, draw, _too_few(study), legend=True)


def _importances(study: optuna.Study, name: str) -> Plot:
    caption = "Parameter importances: share of the variation that each parameter explains (fANOVA, random forest)"
    why_not = _too_few(study)
    if not why_not and len({trial.value for trial in _measured(study)}) < 2:
        why_not = "Not drawn: all trials have the same value, so no parameter explains a difference."

    def draw() -> Axes:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=FOREST_SEED)
        axes: Axes = optuna.visualization.matplotlib.plot_param_importances(study, evaluator)
        return axes

    try:
        return _plot(caption, name, draw, why_not, (4.6, 3.2))
    except (RuntimeError, ValueError) as error:
        return Plot(caption, None, f"Not drawn: Optuna cannot tell the parameters apart from these trials ({error}).")


def _slices(study: optuna.Study, title: str, name: str) -> list[Plot]:
    why_not = _too_few(study)
    if why_not:
        return [Plot("Slices: the value against each parameter", None, why_not)]
    parameters = sorted({key for trial in _measured(study) for key in trial.params})
    plots = []
    for number, key in enumerate(parameters):

        def draw(key: str = key) -> Axes:
            axes: Axes = optuna.visualization.matplotlib.plot_slice(study, [key], target_name=title)
            return axes

        plots.append(_plot(f"Slice: {key}", f"{name}-{number}", draw))
    return plots


def _parallel_coordinates(study: optuna.Study, title: str) -> Plot:
    def draw() -> Axes:
        axes: Axes = optuna.visualization.matplotlib.plot_parallel_coordinate(study, target_name=title)
        return axes

    parameters = {key for trial in _measured(study) for key in trial.params}
    caption = "Parallel coordinates: a line a trial, through its value and its parameters"
    return _plot(caption, "parallel", draw, _too_few(study), (max(7.0, 3.0 + 1.6 * len(parameters)), 4.2))


def _pareto_front(study: optuna.Study, titles: list[str]) -> Plot:
    def draw() -> Axes:
        axes: Axes = optuna.visualization.matplotlib.plot_pareto_front(study, target_names=titles)
        return axes

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
    """Prepare pyplot for Optuna: no display. Restores the caller's backend, style and figures."""
    from matplotlib import get_backend, pyplot, rc_context

    backend, open_before = get_backend(), set(pyplot.get_fignums())
    # Parameter values may contain dollar signs, which are not mathematics.
    with quiet_optuna(), rc_context({"text.parse_math": False, "savefig.bbox": "tight", "savefig.pad_inches": 0.05}):
        # A parameter with a single value gives an axis of length 0; the tight box replaces Optuna's layouts.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(matplotlib|optuna)\.")
        pyplot.switch_backend("agg")
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - open_before:
                pyplot.close(number)
            pyplot.switch_backend(backend)


def _follow_page(figure: Figure, axes: Axes, legend: bool) -> None:
    """Adapt a figure to the report: text and lines in its colour, transparent background, no title."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.text import Text

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
        _style_axes(each)
    for text in figure.findobj(Text):
        text.set_color(INK)


def _style_axes(axes: Axes) -> None:
    """Colours, font sizes and ticks of one pair of axes."""
    from matplotlib.ticker import MaxNLocator

    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.grid(False)
    axes.xaxis.label.set_fontsize(10)
    axes.yaxis.label.set_fontsize(10)
    for spine in axes.spines.values():
        spine.set_color(INK)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            _plain_log_ticks(axis)
        elif axis.get_label_text() == "Trial":
            axis.set_major_locator(MaxNLocator(integer=True))


def _plain_log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
