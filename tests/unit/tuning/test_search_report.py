"""Live table, progress line and report of a study: complete, escaped, and with correct values."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import optuna
import pytest
from matplotlib import pyplot
from optuna.distributions import CategoricalDistribution, FloatDistribution
from rich.console import Console

from htcl_ray.config.sections import Dimension
from htcl_ray.tuning import search_report
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.labels import short_names
from htcl_ray.tuning.live_table import live_table, progress_line, seconds_left
from htcl_ray.tuning.search_plots import plotted_study, study_plots
from htcl_ray.tuning.search_report import StudyReport, report_html, summary
from htcl_ray.tuning.trials import Trial

pytestmark = pytest.mark.unit
ROWS = 1000
SPACE = {
    "pretrain.temperature": Dimension(low=0.02, high=0.5, log=True),
    "model.pooling": Dimension(values=("mean", "<script>$x_1$", None)),
}
DISTRIBUTIONS = {
    "pretrain.temperature": FloatDistribution(0.02, 0.5, log=True),
    "model.pooling": CategoricalDistribution(("mean", "<script>$x_1$", None)),
}
CONFIG = {"pretrain": {"temperature": 0.074, "seed": 17}, "model": {"pooling": "mean"}}


def trial(number: int, value: float | None = None, state: Any = "finished", *, rows: int = ROWS, **more: Any) -> Trial:
    parameters = {
        "pretrain.temperature": 0.02 + 0.002 * number,
        "model.pooling": ("mean", "<script>$x_1$", None)[number % 3],
    }
    values = (
        {"semantic": value, "preference": 1 - value, "songs_per_second": 10.0 + number} if value is not None else {}
    )
    history = [{"rows": rows, **values}] if values else []
    attempts = {"1.000": [2.0, 30.0]} if history else {}
    return Trial(number, parameters, state, history, **{"attempts": attempts, **more})


def report(trials: list[Trial], objectives: tuple[str, ...] = ("semantic",), **more: Any) -> StudyReport:
    fields: dict[str, Any] = {
        "name": "first",
        "stage": "pretrain",
        "objectives": objectives,
        "metric": "recall@10",
        "trials": trials,
        "space": SPACE,
        "distributions": DISTRIBUTIONS,
        "budgets": {"pretrain": Budget(100, 10)},
        "gallery": {"songs": 1234, "pairs": 56, "fingerprint": "feedbeef"},
        "configured": None,
        "command": "htcl pretrain --config best.yaml",
        "created": "2026-01-02",
        "config": CONFIG,
        "inputs": {"catalog": "v3", "pairs": None},
        "libraries": {"optuna": "4.2"},
    }
    return StudyReport(**fields | more)


class Page(HTMLParser):
    """Rows of the tables, open tags, addresses and text of a page."""

    EMPTY = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def after(self, first: str) -> list[list[str]]:
        """The rows below the header that starts with this text."""
        start = next(i for i, row in enumerate(self.rows) if " ".join(row).startswith(first))
        return self.rows[start + 1 :]


def several(count: int = 8) -> list[Trial]:
    """Trials of which one was stopped and one failed."""
    trials = [trial(i, 0.1 + 0.37 * i % 0.5) for i in range(count)]
    trials[3] = trial(3, 0.05, "stopped", rows=200)
    trials[4] = trial(4, state="failed", error='ValueError: <script>alert("1")</script> costs $5 & $6 [bold]')
    return trials


@pytest.fixture(scope="module")
def html() -> str:
    """The page of `several()`."""
    return report_html(report(several()))


@pytest.fixture
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without plots, which take most of the time."""
    monkeypatch.setattr(search_report, "study_plots", lambda trials, distributions, titles: {})


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report_html(report([*several(), trial(8, state="running")], configured=0)))


def test_every_trial_is_in_both_tables_with_its_error(page: Page):
    trials, costs = page.after("trial state"), page.after("trial node-seconds")
    assert [row[0] for row in trials[:9]] == [str(i) for i in range(9)]
    assert [row[0] for row in costs[:10]] == [*(str(i) for i in range(9)), "all"]
    assert trials[4][1] == 'failedValueError: <script>alert("1")</script> costs $5 & $6 [bold]'
    assert trials[3][1:4] == ["stopped early", "0.0500", "200"]
    assert trials[8][1:4] == ["starting", "–", "0"]


@pytest.mark.usefixtures("_no_plots")
def test_cost_is_nodes_times_seconds_and_adds_up():
    trials = [
        trial(0, 0.1, attempts={"1": [2, 30], "2": [1, 40]}),
        trial(1, 0.2, attempts={"1": [3, 1200]}),
        trial(2, state="failed"),
    ]
    costs = Page(report_html(report(trials))).after("trial node-seconds")
    assert costs[:3] == [["0", "100", "10.0", "2"], ["1", "3,600", "11.0", "1"], ["2", "0", "–", "0"]]
    assert costs[3] == ["all", "3,700 (1.0 h)", "", "3"]


def test_the_page_runs_nothing_and_fetches_nothing(page: Page, html: str):
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "ids are unique in a page of several plots"


def test_plots_escape_markup_and_dollar_signs():
    plots = [plot for drawn in study_plots(several(), DISTRIBUTIONS, {"semantic": "s"}).values() for plot in drawn]
    assert all(plot.svg for plot in plots)
    drawn = ["".join(ElementTree.fromstring(plot.svg).itertext()) for plot in plots]
    assert sum("<script>$x_1$" in text for text in drawn) == 2, "slice of pooling, and parallel coordinates"
    assert not any("mathdefault" in text for text in drawn)


def test_logarithmic_ranges_have_logarithmic_axes():
    """Equal ratios have equal distances on the axis of a slice."""
    trials = [
        replace(item, parameters=item.parameters | {"pretrain.temperature": 0.02 * 25 ** (i / 7)})
        for i, item in enumerate(several())
    ]
    plots = study_plots(trials, DISTRIBUTIONS, {"semantic": "s"})["Optimisation of s"]
    svg = next(plot.svg for plot in plots if plot.caption == "Slice: temperature")
    below = [
        text
        for text in ElementTree.fromstring(svg or "").iter("text")
        if "text-anchor: middle" in text.get("style", "")
    ]
    texts = {text.text: text for text in below}
    ticks = [float(texts[word].get("x", "")) for word in ("0.02", "0.05", "0.1", "0.2", "0.5")]
    assert np.diff(ticks) == pytest.approx(np.log([2.5, 2, 2, 2.5]) * (ticks[-1] - ticks[0]) / np.log(25), rel=1e-3)


def test_the_summary_gives_the_difference_and_calls_it_optimistic():
    trials = [trial(0, 0.25), trial(1, 0.5), trial(2, 0.125)]
    text = summary(report(trials, configured=0))
    assert "Trial 1 is best: semantic recall@10 0.5000" in text
    assert "trial 0, has semantic recall@10 0.2500" in text
    assert "Difference: semantic recall@10 +0.2500" in text
    assert "optimistic" in text
    assert "no trial beat" in summary(report(trials, configured=1))
    assert "no difference can be given" in summary(report(trials))
    stopped = summary(report([trial(0, 0.25, "stopped", rows=300), trial(1, 0.5)], configured=0))
    assert "Difference" not in stopped
    assert "stopped early, after 300 rows" in stopped


def test_the_winner_is_compared_with_the_configuration(page: Page):
    best = max((item for item in several() if item.state == "finished"), key=lambda item: item.last["semantic"])
    rows = page.after("parameter")
    temperature = f"{best.parameters['pretrain.temperature']:.4g}"
    assert rows[0] == ["pretrain.temperature", temperature, "0.074", "0.02 to 0.5, logarithmic"]
    assert rows[1][2:] == ["mean", "mean, <script>$x_1$, null"]
    assert "htcl pretrain --config best.yaml" in page.text


def test_constants_and_versions_are_listed(page: Page):
    table = dict(row for row in page.rows if len(row) == 2)
    assert table["pretrain: rows of a trial"] == "1,000 songs, in 10 parts of 100"
    assert table["pretrain: seed"] == "17"
    assert table["gallery"] == "1,234 validation songs, 56 validation pairs"
    assert table["gallery's fingerprint"] == "feedbeef"
    assert (table["input: catalog"], table["input: pairs"], table["library: optuna"]) == ("v3", "none", "4.2")
    assert "temperature: 0.074" in page.text


@pytest.mark.usefixtures("_no_plots")
def test_the_page_warns_that_stopped_trials_saw_fewer_rows(page: Page):
    assert "1 trial was stopped early: it saw fewer rows" in page.text
    assert "No trial was stopped early" in Page(report_html(report([trial(0, 0.1), trial(1, 0.2)]))).text


def test_two_objectives_have_a_pareto_front_and_plots_of_each():
    values = {0: (0.1, 0.9), 1: (0.5, 0.6), 2: (0.4, 0.5), 3: (0.9, 0.1)}
    trials = [trial(number, 0.5) for number in values]
    for item in trials:
        item.history[0] |= dict(zip(("semantic", "preference"), values[item.number], strict=True))
    page = Page(report_html(report(trials, ("semantic", "preference"))))
    front = page.after("trial semantic recall@10 preference recall@10")
    assert [row[0] for row in front[:3]] == ["1", "0", "3"], "1 dominates 2; highest sum first"
    assert front[3][0] == "trial", "the next table"
    assert page.tags.count("svg") == 1 + 2 * (2 + len(SPACE))
    assert "highest sum" in page.text


def test_plots_of_two_objectives_maximise_both():
    """Optuna draws the best value so far for a single objective only."""
    trials = [trial(i, value) for i, value in enumerate((0.2, 0.6, 0.4))]
    plots = study_plots(trials, DISTRIBUTIONS, {"semantic": "s", "preference": "p"})
    for title in ("s", "p"):
        history = plots[f"Optimisation of {title}"][0].svg or ""
        assert "Best Value" in "".join(ElementTree.fromstring(history).itertext())


def test_importances_rank_the_parameter_that_explains_the_values_first():
    trials = [trial(i, 0.2 + 0.2 * (i % 3)) for i in range(30)]
    drawn = study_plots(trials, DISTRIBUTIONS, {"semantic": "s"})["Optimisation of s"][1].svg or ""
    words = list(ElementTree.fromstring(drawn).itertext())
    shares = [float(word) for word in words if re.fullmatch(r"\d\.\d\d", word.strip())]
    assert max(shares) > 0.9
    names = [word for word in words if word in ("temperature", "pooling")]
    assert names[-1] == "pooling", "bars go up to the most important"


def test_trials_in_the_plots_have_the_numbers_of_the_table():
    """Running, failed and missing trials do not shift the numbers of the others."""
    trials = [
        trial(0, 0.3),
        trial(1, 0.1, "running", rows=300),
        trial(2, state="failed"),
        trial(5, 0.4),
        trial(6, state="running"),
    ]
    study = plotted_study(trials, DISTRIBUTIONS, ["semantic"])
    assert {item.number: item.value for item in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))} == {
        0: 0.3,
        5: 0.4,
    }


@pytest.mark.parametrize("objectives", [("semantic",), ("semantic", "preference")])
@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "the study has none"),
        ([trial(0, 0.5)], "the study has one"),
        ([trial(i, state="failed", error=f"broke {i}") for i in range(3)], "the study has none"),
        ([trial(0, state="running")], "the study has none"),
    ],
)
def test_a_plot_that_cannot_be_drawn_gives_the_reason(trials: list[Trial], words: str, objectives: tuple[str, ...]):
    page = Page(report_html(report(trials, objectives, configured=0)))
    assert "svg" not in page.tags
    assert words in page.text
    assert all(item.error is None or item.error in page.text for item in trials)


def test_importances_of_equal_values_give_the_reason_and_other_plots_are_drawn():
    page = Page(report_html(report([trial(i, 0.5) for i in range(3)])))
    assert "all trials have the same value" in page.text
    assert page.tags.count("svg") == 1 + len(SPACE) + 1


def test_a_parameter_with_a_single_value_is_drawn():
    trials = [
        replace(trial(i, 0.1 * i), parameters={"pretrain.temperature": 0.1, "model.pooling": "mean"}) for i in range(3)
    ]
    assert "svg" in Page(report_html(report(trials))).tags


def test_a_page_of_two_hundred_trials_is_small_and_quickly_made():
    started = time.perf_counter()
    html = report_html(report([trial(i, (i * 0.37) % 1) for i in range(200)]))
    assert len(html.encode()) < 3_000_000
    assert time.perf_counter() - started < 60


def test_drawing_again_gives_the_same_page_restores_matplotlib_and_says_nothing(
    html: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
):
    pyplot.switch_backend("svg")
    mine = pyplot.figure()
    before = dict(matplotlib.rcParams)
    assert report_html(report(several())) == html
    assert pyplot.get_fignums() == [mine.number]
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == "svg"
    pyplot.close(mine)
    assert capfd.readouterr() == ("", "")
    assert not [
        item for item in recwarn if issubclass(item.category, optuna.exceptions.ExperimentalWarning | UserWarning)
    ]


def shown(table: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def row_of(text: str, number: int) -> str:
    return next(line for line in text.splitlines() if re.match(rf"│\s+{number} │", line))


def test_the_live_table_shows_state_parameters_rows_and_the_best():
    trials = [
        trial(0, 0.25),
        trial(1, 0.5),
        trial(2, 0.9, "stopped", rows=250),
        trial(3, state="running"),
        trial(4, state="running", attempts={"1": [1.0, 0.0]}),
    ]
    text = shown(live_table(trials, ["semantic"], 20, ROWS))
    assert "5 of 20 trials" in text
    assert "starting" in row_of(text, 3)
    assert "running" in row_of(text, 4)
    assert "finished, best" in row_of(text, 1)
    assert "250 / 1,000" in row_of(text, 2)
    assert "best" not in row_of(text, 2), "a stopped trial cannot win"
    assert "temperature 0.022" in row_of(text, 1)
    assert "0.500" in row_of(text, 1)
    assert "11.0" in row_of(text, 1)


def test_values_in_square_brackets_are_not_markup():
    odd = replace(trial(0, 0.5), parameters={"a.b": "[red]x[/red]"})
    assert "b [red]x[/red]" in shown(live_table([odd], ["semantic"], 1, ROWS))


def test_of_many_trials_the_running_and_the_best_have_a_row():
    trials = [trial(i, i / 200) for i in range(100)]
    trials[7] = trial(7, 0.01, "running", rows=100)
    trials[8] = trial(8, state="failed", error="no")
    text = shown(live_table(trials, ["semantic"], 100, ROWS))
    numbers = [int(number) for number in re.findall(r"^│\s+(\d+) │", text, re.MULTILINE)]
    assert numbers == [7, *range(71, 100)]
    assert "70 more without a row: 69 finished, 1 failed" in text
    assert "more without" not in shown(live_table(trials[:30], ["semantic"], 30, ROWS))


def test_short_names_are_the_shortest_unique_suffixes():
    keys = ["pretrain.batch_size", "finetune.batch_size", "model.pooling", "plain"]
    assert short_names(keys) == {
        "pretrain.batch_size": "pretrain.batch_size",
        "finetune.batch_size": "finetune.batch_size",
        "model.pooling": "pooling",
        "plain": "plain",
    }
    assert short_names(["a.x.y", "b.x.y", "b.z.y"]) == {"a.x.y": "a.x.y", "b.x.y": "b.x.y", "b.z.y": "z.y"}


def test_time_left_is_remaining_rows_at_the_rate_so_far():
    """1000 + 250 + 500 + 400 = 2150 rows in 43 s, 50 a second; 600 rows of trial 3, 1000 of 4, and 15 trials remain."""
    trials = [
        trial(0, 0.5),
        trial(1, 0.1, "stopped", rows=250),
        trial(2, 0.1, "failed", rows=500),
        trial(3, 0.2, "running", rows=400),
        trial(4, state="running"),
    ]
    assert seconds_left(trials, 20, ROWS, 43) == pytest.approx(16600 / 50)
    assert seconds_left(trials, 20, ROWS, 43, rows_before=1000) == pytest.approx(16600 / (1150 / 43))
    line = progress_line(trials, ["semantic"], 20, ROWS, 43, metric="recall@10")
    assert line == (
        "tune  3 of 20 trials ended (1 stopped early, 1 failed), 1 running, 1 starting; "
        "best semantic recall@10 0.500 (trial 0); about 6 min left"
    )


def test_the_line_has_no_time_left_and_no_best_before_the_first_measurement():
    assert progress_line([trial(i, state="running") for i in range(2)], ["semantic"], 20, ROWS, 60) == (
        "tune  0 of 20 trials ended, 2 starting"
    )
    assert progress_line([], ["semantic"], 20, ROWS, 0) == "tune  0 of 20 trials ended"
    assert "left" not in progress_line([trial(0, 0.5)], ["semantic"], 2, ROWS, 60, rows_before=ROWS)
    assert "left" not in progress_line([trial(0, 0.5)], ["semantic"], 1, ROWS, 60), "no rows remain"


def test_each_objective_names_its_best():
    line = progress_line([trial(0, 0.25), trial(1, 0.5)], ["semantic", "preference"], 2, ROWS, 60)
    assert "best semantic 0.500 (trial 1), best preference 0.750 (trial 0)" in line
