"""What a person reads of a search, while it runs and after: every trial is there, words are words, and no figure is
made up."""

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
    figures = (
        {"semantic": value, "preference": 1 - value, "songs_per_second": 10.0 + number} if value is not None else {}
    )
    history = [{"rows": rows, **figures}] if figures else []
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
    """Tables as rows of words, tags that are open, addresses and what stands in SVG."""

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
        """The rows below the header that starts with these words, to the next header."""
        start = next(i for i, row in enumerate(self.rows) if " ".join(row).startswith(first))
        return self.rows[start + 1 :]


def several(count: int = 8) -> list[Trial]:
    found = [trial(i, 0.1 + 0.37 * i % 0.5) for i in range(count)]
    found[3] = trial(3, 0.05, "stopped", rows=200)
    found[4] = trial(4, state="failed", error='ValueError: <script>alert("1")</script> costs $5 & $6 [bold]')
    return found


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


def test_cost_is_nodes_times_seconds_and_adds_up():
    trials = [
        trial(0, 0.1, attempts={"1": [2, 30], "2": [1, 40]}),
        trial(1, 0.2, attempts={"1": [3, 1200]}),
        trial(2, state="failed"),
    ]
    costs = Page(report_html(report(trials))).after("trial node-seconds")
    assert costs[:3] == [["0", "100", "10.0", "2"], ["1", "3,600", "11.0", "1"], ["2", "0", "–", "0"]]
    assert costs[3] == ["all", "3,700 (1.0 h)", "", "3"]


def test_the_page_runs_nothing_and_fetches_nothing(page: Page):
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    html = report_html(report(several()))
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "several plots stand in one page"


def test_values_with_markup_and_dollars_are_drawn_as_they_are():
    plots = [plot for drawn in study_plots(several(), DISTRIBUTIONS, {"semantic": "s"}).values() for plot in drawn]
    assert all(plot.svg for plot in plots)
    drawn = ["".join(ElementTree.fromstring(plot.svg).itertext()) for plot in plots]
    assert sum("<script>$x_1$" in text for text in drawn) == 2, "slice of pooling, and parallel coordinates"
    assert not any("mathdefault" in text for text in drawn)


def test_logarithmic_ranges_have_logarithmic_axes():
    """Equal ratios are equally far apart on the slice's axis."""
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


def test_the_winner_stands_beside_the_configuration(page: Page):
    best = max((item for item in several() if item.state == "finished"), key=lambda item: item.last["semantic"])
    rows = page.after("parameter")
    temperature = f"{best.parameters['pretrain.temperature']:.4g}"
    assert rows[0] == ["pretrain.temperature", temperature, "0.074", "0.02 to 0.5, logarithmic"]
    assert rows[1][2:] == ["mean", "mean, <script>$x_1$, null"]
    assert "htcl pretrain --config best.yaml" in page.text


def test_what_was_the_same_and_the_versions_are_stated(page: Page):
    table = dict(row for row in page.rows if len(row) == 2)
    assert table["pretrain: rows of a trial"] == "1,000 songs, in 10 parts of 100"
    assert table["pretrain: seed"] == "17"
    assert table["gallery"] == "1,234 validation songs, 56 validation pairs"
    assert table["gallery's fingerprint"] == "feedbeef"
    assert (table["input: catalog"], table["input: pairs"], table["library: optuna"]) == ("v3", "none", "4.2")
    assert "temperature: 0.074" in page.text


def test_it_says_that_stopped_trials_saw_fewer_rows(page: Page):
    assert "1 trial was stopped early: it saw fewer rows" in page.text
    assert "No trial was stopped early" in Page(report_html(report([trial(0, 0.1), trial(1, 0.2)]))).text


def test_two_objectives_have_a_front_and_plots_of_each():
    values = {0: (0.1, 0.9), 1: (0.5, 0.6), 2: (0.4, 0.5), 3: (0.9, 0.1)}
    trials = [trial(number, 0.5) for number in values]
    for item in trials:
        item.history[0] |= dict(zip(("semantic", "preference"), values[item.number], strict=True))
    page = Page(report_html(report(trials, ("semantic", "preference"))))
    front = page.after("trial semantic recall@10 preference recall@10")
    assert [row[0] for row in front[:3]] == ["1", "0", "3"], "2 is behind 1 in both; best sum first"
    assert front[3][0] == "trial", "the next table"
    assert page.tags.count("svg") == 1 + 2 * (2 + len(SPACE))
    assert "highest sum" in page.text


def test_the_greater_value_is_the_better_one_in_plots_of_two_objectives():
    """Each objective alone is drawn with its best so far, which only Optuna's own direction gives."""
    trials = [trial(i, value) for i, value in enumerate((0.2, 0.6, 0.4))]
    plots = study_plots(trials, DISTRIBUTIONS, {"semantic": "s", "preference": "p"})
    for title in ("s", "p"):
        history = plots[f"Optimisation of {title}"][0].svg or ""
        assert "Best Value" in "".join(ElementTree.fromstring(history).itertext())


def test_importances_find_the_parameter_that_matters():
    trials = [trial(i, 0.2 + 0.2 * (i % 3)) for i in range(30)]
    drawn = study_plots(trials, DISTRIBUTIONS, {"semantic": "s"})["Optimisation of s"][1].svg or ""
    words = list(ElementTree.fromstring(drawn).itertext())
    shares = [float(word) for word in words if re.fullmatch(r"\d\.\d\d", word.strip())]
    assert max(shares) > 0.9
    names = [word for word in words if word in ("temperature", "pooling")]
    assert names[-1] == "pooling", "bars go up to the most important"


def test_trials_in_the_plots_have_the_numbers_of_the_table():
    """A running and a failed trial between them do not move the others."""
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
def test_what_cannot_be_drawn_says_why(trials: list[Trial], words: str, objectives: tuple[str, ...]):
    page = Page(report_html(report(trials, objectives, configured=0)))
    assert "svg" not in page.tags
    assert words in page.text
    assert all(item.error is None or item.error in page.text for item in trials)


def test_importances_of_equal_values_say_why_and_the_rest_is_drawn():
    page = Page(report_html(report([trial(i, 0.5) for i in range(3)])))
    assert "all trials have the same value" in page.text
    assert page.tags.count("svg") == 1 + len(SPACE) + 1


def test_a_parameter_that_never_varied_is_drawn():
    trials = [
        replace(trial(i, 0.1 * i), parameters={"pretrain.temperature": 0.1, "model.pooling": "mean"}) for i in range(3)
    ]
    assert "svg" in Page(report_html(report(trials))).tags


def test_two_hundred_trials_make_a_page_that_opens():
    started = time.perf_counter()
    html = report_html(report([trial(i, (i * 0.37) % 1) for i in range(200)]))
    assert len(html.encode()) < 3_000_000
    assert time.perf_counter() - started < 60


def test_the_same_trials_give_the_same_page():
    assert report_html(report(several())) == report_html(report(several()))


def test_drawing_leaves_the_callers_matplotlib_alone():
    pyplot.switch_backend("svg")
    mine = pyplot.figure()
    before = dict(matplotlib.rcParams)
    report_html(report(several()))
    assert pyplot.get_fignums() == [mine.number]
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == "svg"
    pyplot.close(mine)


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
    assert "best" not in row_of(text, 2), "a trial that was stopped wins nothing"
    assert "temperature 0.022" in row_of(text, 1)
    assert "0.500" in row_of(text, 1)
    assert "11.0" in row_of(text, 1)


def test_values_in_square_brackets_are_no_markup():
    odd = replace(trial(0, 0.5), parameters={"a.b": "[red]x[/red]"})
    assert "b [red]x[/red]" in shown(live_table([odd], ["semantic"], 1, ROWS))


def test_of_many_trials_those_that_run_and_the_best_have_a_row():
    trials = [trial(i, i / 200) for i in range(100)]
    trials[7] = trial(7, 0.01, "running", rows=100)
    trials[8] = trial(8, state="failed", error="no")
    text = shown(live_table(trials, ["semantic"], 100, ROWS))
    numbers = [int(found) for found in re.findall(r"^│\s+(\d+) │", text, re.MULTILINE)]
    assert numbers == [7, *range(71, 100)]
    assert "70 more without a row: 69 finished, 1 failed" in text
    assert "more without" not in shown(live_table(trials[:30], ["semantic"], 30, ROWS))


def test_names_are_short_where_they_tell_apart():
    keys = ["pretrain.batch_size", "finetune.batch_size", "model.pooling", "plain"]
    assert short_names(keys) == {
        "pretrain.batch_size": "pretrain.batch_size",
        "finetune.batch_size": "finetune.batch_size",
        "model.pooling": "pooling",
        "plain": "plain",
    }
    assert short_names(["a.x.y", "b.x.y", "b.z.y"]) == {"a.x.y": "a.x.y", "b.x.y": "b.x.y", "b.z.y": "z.y"}


def test_time_left_is_rows_to_come_at_the_pace_so_far():
    """Seen 1000 + 250 + 500 + 400 = 2150 rows in 43 s, 50 a second. To come: 600 of trial 3, 1000 of 4, and 15 whole
    trials."""
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


def test_nothing_is_said_of_time_or_of_the_best_before_anything_was_measured():
    assert progress_line([trial(i, state="running") for i in range(2)], ["semantic"], 20, ROWS, 60) == (
        "tune  0 of 20 trials ended, 2 starting"
    )
    assert progress_line([], ["semantic"], 20, ROWS, 0) == "tune  0 of 20 trials ended"
    assert "left" not in progress_line([trial(0, 0.5)], ["semantic"], 2, ROWS, 60, rows_before=ROWS)
    assert "left" not in progress_line([trial(0, 0.5)], ["semantic"], 1, ROWS, 60), "nothing is to come"


def test_each_objective_names_its_best():
    line = progress_line([trial(0, 0.25), trial(1, 0.5)], ["semantic", "preference"], 2, ROWS, 60)
    assert "best semantic 0.500 (trial 1), best preference 0.750 (trial 0)" in line


def test_optuna_stays_silent(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder):
    report_html(report(several()))
    assert capfd.readouterr() == ("", "")
    assert not [
        item for item in recwarn if issubclass(item.category, optuna.exceptions.ExperimentalWarning | UserWarning)
    ]
