"""Progress of a job: what a terminal and a file show, at which rate, and how often."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from htcl_ray import progress
from htcl_ray.progress import Pace, Progress, Throttle, print_line

pytestmark = pytest.mark.unit


class Clock:
    """A clock that the test sets, in place of the time module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_are_the_first_the_last_and_one_every_two_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("embed", 6000, "songs") as job:
        for _ in range(60):
            clock.now += 0.1
            job.advance(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "embed  100/6,000 songs  1,000/s  6 s left"
    assert lines[-1] == "embed  6,000/6,000 songs  1,000/s  0 s left"
    assert len(lines) == 4


def test_units_of_an_earlier_run_do_not_count_towards_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("preprocess", 5000, "songs", done=4000) as job:
        clock.now += 10
        job.advance(500)
    assert capsys.readouterr().out.splitlines() == [
        "preprocess  4,000 of 5,000 songs were finished by an earlier run",
        "preprocess  4,500/5,000 songs  50/s  10 s left",
    ]


def test_a_terminal_shows_a_bar_that_fits_80_columns(clock: Clock) -> None:
    """With the longest texts: ten million units of both, and a slow rate."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with Progress("preprocess", 10_000_000, "songs", console=console) as job:
        clock.now += 100_000
        job.advance(1_000_000)
    shown = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())) if line]
    assert re.fullmatch(r"preprocess [━╺╸ ]+ 1,000,000/10,000,000 songs  10/s  900,000 s left *", shown[-1])
    assert all(len(line.rstrip()) <= 80 for line in shown)
    assert len({line for line in shown if "10/s" in line}) == 1


def test_a_failure_leaves_the_terminal_usable() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with pytest.raises(ValueError, match="no"), Progress("embed", 10, "songs", console=console):
        raise ValueError("no")
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l"), "the cursor is visible again"


def test_no_time_left_is_given_before_the_first_unit(clock: Clock) -> None:
    pace = Pace(10, done=4)
    clock.now += 3
    assert pace.seconds_left(4) is None
    assert (pace.rate(7), pace.seconds_left(7)) == (pytest.approx(1), pytest.approx(3))


def test_a_throttle_is_due_once_in_its_interval(clock: Clock) -> None:
    throttle = Throttle(4)
    clock.now += 2
    assert (throttle.is_due(), throttle.is_due(0.5)) == (False, True)
    clock.now += 2
    assert throttle.is_due()
    throttle.restart()
    assert not throttle.is_due()


def test_long_lines_are_folded_between_words_on_a_terminal_and_whole_in_a_file() -> None:
    line = (
        "tune  3 of 20 trials ended (1 stopped early, 1 failed), 1 running, 1 starting; best recall@10 0.500 (trial 0)"
    )
    terminal, file = io.StringIO(), io.StringIO()
    print_line(line, Console(file=terminal, force_terminal=True, width=80))
    print_line(line, Console(file=file, width=80))
    folded = terminal.getvalue().splitlines()
    assert len(folded) == 2
    assert all(len(each) <= 80 for each in folded)
    assert " ".join(each.strip() for each in folded) == line
    assert file.getvalue() == line + "\n"
