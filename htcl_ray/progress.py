"""Progress of a long job: a bar on a terminal, plain lines where standard output is a file or a pipe.

Both show the same text: units done, units in all, rate and time left.
"""

from __future__ import annotations

import textwrap
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 2.0
BAR_WIDTH = 16
"""Columns. With it the longest status of a bar stays below 80 columns."""


class Throttle:
    """Limits a repeated report to one in `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._last = time.monotonic()

    def is_due(self, share: float = 1.0) -> bool:
        """Whether `share` of the interval has passed since the last restart."""
        return time.monotonic() - self._last >= self.seconds * share


class Pace:
    """Rate of a job since its start, and the time that the rest takes at that rate."""

    def __init__(self, total: float, *, done: float = 0) -> None:
        """Start the clock. `done`: units that an earlier run finished; they do not count towards the rate."""
        self.total, self.already_done = total, done
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start; positive."""
        return max(time.monotonic() - self._started, 1e-9)

    def rate(self, done: float) -> float:
        """Units per second. `done`: units done so far, those of earlier runs included."""
        return (done - self.already_done) / self.seconds

    def seconds_left(self, done: float) -> float | None:
        """Seconds until `total` at the rate so far; None before the first unit."""
        rate = self.rate(done)
        return (self.total - done) / rate if rate > 0 else None


class Progress:
    """Reports the progress of one job, as a context manager around it.

    On a terminal a bar is redrawn in place. Elsewhere a line is printed at the first and the last unit, and in between
    at most every `SECONDS_BETWEEN_LINES`.
    """

    def __init__(self, step: str, total: int, unit: str, *, done: int = 0, console: Console | None = None) -> None:
        """`step`: command, at the start of each line. `unit`: plural noun. `done`: units of an earlier run."""
        self.step, self.total, self.unit, self.done = step, total, unit, done
        self._console = console or Console()
        self._pace = Pace(total, done=done)
        self._throttle: Throttle | None = None
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if self.done:
            self._print(f"{self.step}  {self.done:,} of {self.total:,} {self.unit} were finished by an earlier run")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(BAR_WIDTH), TextColumn("{task.fields[status]}"))
            self._bar = RichProgress(*columns, console=self._console)
            self._task = self._bar.add_task(
                self.step, total=self.total, completed=self.done, status=self._status().strip()
            )
            self._bar.start()
        return self

    def advance(self, count: int = 1) -> None:
        """Note that `count` more units are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=self._status())
        elif self._throttle is None or self._throttle.is_due() or self.done >= self.total:
            self._throttle = self._throttle or Throttle(SECONDS_BETWEEN_LINES)
            self._throttle.restart()
            self._print(f"{self.step}  {self._status()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _status(self) -> str:
        status, left = f"{self.done:,}/{self.total:,} {self.unit}", self._pace.seconds_left(self.done)
        return status if left is None else f"{status}  {self._pace.rate(self.done):,.0f}/s  {left:,.0f} s left"

    def _print(self, line: str) -> None:
        print(line, file=self._console.file, flush=True)


def print_line(line: str, console: Console | None = None) -> None:
    """Print a line of text, folded between words and indented where a terminal is narrower than the line."""
    console = console or Console()
    if console.is_terminal:
        wrapper = textwrap.TextWrapper(
            console.width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        line = "\n".join(folded for each in line.splitlines() for folded in wrapper.wrap(each))
    print(line, file=console.file, flush=True)
