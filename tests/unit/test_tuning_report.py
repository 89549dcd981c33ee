"""The pages of a search: what they show is what the trials hold, whatever the trials hold."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from htcl_ray.config import resolve
from htcl_ray.settings import Dimension
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.live_table import duration, in_words, live_table, progress_line, state_of
from htcl_ray.tuning.report import StudyReport, report_html, summary
from htcl_ray.tuning.space import distributions
from htcl_ray.tuning.trials import Trial

pytestmark = pytest.mark.unit
SPACE = {
    "pretrain.temperature": Dimension(low=0.02, high=0.5, log=True),
    "pretrain.batch_size": Dimension(values=(32, 64, 128)),
    "pretrain.loss": Dimension(values=("softmax", "sigmoid")),
}


def trial(number: int, *values: float, state: str = "finished", rows: int = 400, error: str | None = None) -> Trial:
    rng = np.random.default_rng(number)
    parameters = {
        "pretrain.temperature": float(rng.uniform(0.02, 0.5)),
        "pretrain.batch_size": int(rng.choice([32, 64, 128])),
        "pretrain.loss": str(rng.choice(["softmax", "sigmoid"])),
    }
    made = Trial(number, parameters, state=state, error=error)  # type: ignore[arg-type]
    if values:
        made.measure({"rows": rows, **dict(zip(("semantic", "preference"), values, strict=False)), "songs_per_second": 50.0})
        made.worked(1000.0 + number, 2.0, 10.0)
    return made


def report(trials: list[Trial], objectives: tuple[str, ...] = ("semantic",), **more: object) -> StudyReport:
    config = resolve("demo")
    given: dict[str, object] = {
        "name": "pretrain",
        "stage": "pretrain",
        "objectives": objectives,
        "metric": "recall@10",
        "trials": trials,
        "space": SPACE,
        "distributions": distributions(config, SPACE),
        "budgets": {"pretrain": Budget(128, 4)},
        "gallery": {"songs": 60, "pairs": 0, "fingerprint": "abcdef"},
        "configured": 0,
        "command": "htcl pretrain --config best.yaml",
        "created": "2026-01-01",
        "config": config.model_dump(mode="json"),
        "inputs": {"features": "f00"},
        "libraries": {"ray": "2.60.0", "faiss-cpu": None},
        **more,
    }
    return StudyReport(**given)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Texts of table rows, and everything that would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(str(value))

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()


def test_the_page_holds_every_trial_and_fetches_nothing():
    trials = [trial(0, 0.5), trial(1, 0.7), trial(2, 0.4, state="stopped", rows=128), trial(3, state="failed", error="the gradient is nan")]
    page = Page(report_html(report(trials)))
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4
    every = {row[0].split(" ")[0]: row for row in page.rows if len(row) == 8 and row[0][:1].isdigit()}
    assert {number: row[1] for number, row in every.items()} == {"0": "finished", "1": "finished", "2": "stopped", "3": "failed"}
    assert every["1"][0] == "1 ★"
    assert every["3"][-1] == "the gradient is nan"
    assert [every[number][6] for number in "012"] == ["0.5000", "0.7000", "0.4000"]
    cost = {row[0]: row for row in page.rows if len(row) == 4}
    assert cost["1"][1:] == ["20", "50", "1"]
    assert cost["all"][1] == "60"


def test_the_summary_says_what_was_gained_and_how_far_to_believe_it():
    said = summary(report([trial(0, 0.5), trial(1, 0.7), trial(2, 0.9, state="stopped")]))
    assert "Trial 1 is best: semantic 0.7000" in said
    assert "Against the configuration as it was (trial 0): semantic +0.2000" in said
    assert "test songs say what was gained" in said
    assert "nothing better was found" in summary(report([trial(0, 0.7), trial(1, 0.5)]))


def test_the_winners_values_stand_beside_the_configured():
    winner = trial(1, 0.7)
    rows = {row[0]: row[1:] for row in Page(report_html(report([trial(0, 0.5), winner]))).rows if row and row[0].startswith("pretrain.")}
    assert rows["pretrain.temperature"] == ["0.074", f"{winner.parameters['pretrain.temperature']:.4g}"]
    assert rows["pretrain.loss"] == ["softmax", winner.parameters["pretrain.loss"]]


def test_two_objectives_have_a_front():
    trials = [trial(0, 0.5, 0.5), trial(1, 0.7, 0.2), trial(2, 0.4, 0.4)]
    html = report_html(report(trials, ("semantic", "preference")))
    assert "a front of 2: trial(s) 0, 1" in html
    assert Page(html).tags.count("svg") == 9


@pytest.mark.parametrize("trials", [[trial(0, state="failed", error="no")], [trial(0, 0.5)], [trial(n, 0.5) for n in range(3)], []])
def test_too_little_to_draw_from_is_said(trials: list[Trial]):
    page = Page(report_html(report(trials)))
    assert "figure" in page.tags
    assert page.tags.count("svg") < 4


def test_hostile_text_stays_text():
    bad = trial(1, state="failed", error="<script>alert(1)</script> $x_{")
    html = report_html(report([trial(0, 0.5), bad], name="<b>$n_{</b>"))
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x_{" in html


def test_two_hundred_trials_are_a_page_that_opens():
    html = report_html(report([trial(number, number / 200) for number in range(200)]))
    assert len(html) < 3_000_000


def test_drawing_leaves_matplotlib_as_it_was():
    from matplotlib import pyplot

    before = pyplot.get_backend()
    report_html(report([trial(0, 0.5), trial(1, 0.6)]))
    assert pyplot.get_fignums() == []
    assert pyplot.get_backend() == before


def test_the_line_says_how_far_it_is():
    trials = [trial(0, 0.5), trial(1, 0.6, state="stopped", rows=100), trial(2, 0.4, state="running", rows=300), trial(3, state="running")]
    line = progress_line(trials, ["semantic"], 6, 400, seconds=80.0)
    assert line.startswith("tune  2 of 6 trials ended (1 stopped early), 1 running, 1 starting; best semantic 0.5000 (trial 0)")
    left = ((400 - 300) + 400 + 2 * 400) * 80 / (400 + 100 + 300)
    assert line.endswith(f"; at most {duration(left)} left")
    before = progress_line(trials, ["semantic"], 6, 400, seconds=80.0, rows_before=400)
    assert before.endswith(f"; at most {duration(left * 2)} left"), "what an earlier session saw took no time of this one"
    assert progress_line([trial(0, state="running")], ["semantic"], 2, 400, 5.0) == "tune  0 of 2 trials ended, 1 starting"


@pytest.mark.parametrize(("seconds", "said"), [(45.4, "45 s"), (89, "89 s"), (600, "10 min"), (5400, "1.5 h"), (100_000, "27.8 h")])
def test_durations(seconds: float, said: str):
    assert duration(seconds) == said


def test_the_table_shows_what_runs_and_the_best_first(tmp_path: Path):
    trials = [trial(number, number / 100) for number in range(40)] + [trial(40, state="running"), trial(41, 0.1, state="running")]
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(live_table(trials, ["semantic"], 50, 400))
    lines = console.export_text().splitlines()
    shown = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert shown[:3] == ["41", "40", "* 39"]
    assert len(shown) == 30
    assert any("12 more are in trials.jsonl" in line for line in lines)
    assert any("starting" in line for line in lines)
    assert state_of(trials[40]) == "starting"


def test_names_are_short_where_they_are_unambiguous():
    assert in_words({"pretrain.temperature": 0.0741, "finetune.temperature": 0.2, "pretrain.learn_temperature": True}) == (
        "pretrain.temperature 0.0741, finetune.temperature 0.2, learn_temperature true"
    )
