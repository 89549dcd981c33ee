"""Output of the `htcl` command: characters that every terminal can print, results of steps, errors and exit codes."""

from __future__ import annotations

import codecs
import io
import re
import sys
import traceback
from typing import TYPE_CHECKING

from htcl_ray import errors
from htcl_ray.errors import HtclError, InputError
from htcl_ray.workspace.credentials import without_credentials

if TYPE_CHECKING:
    from htcl_ray.workspace.artifacts import StepResult

ASCII = {
    "→": "->",
    "↔": "<->",
    "–": "-",
    "—": "-",
    "×": "x",
    "…": "...",
    "·": ".",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "−": "-",
    "’": "'",
}
"""Replacements for characters that an encoding lacks; all others become \\uXXXX."""
MAX_CAUSES = 10
"""Depth to which the causes of an error are searched."""
RAISED_IN_A_TASK = re.compile(r"^htcl_ray\.errors\.((?!AudioError|RequestError)\w+): (.+)$", re.MULTILINE)
"""The line of a traceback that names one of this package's errors which is built from its message alone."""


def accept_any_character() -> None:
    """Replace characters that the encoding of standard output or standard error lacks, so that printing never fails."""
    codecs.register_error("htcl-ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="htcl-ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(
        ASCII.get(character) or f"\\u{ord(character):04x}" for character in error.object[error.start : error.end]
    ), error.end


def print_result(result: StepResult) -> None:
    """Print one line about a finished step."""
    state = "already done" if result.skipped else f"done in {result.seconds:.0f} s"
    print(f"{result.step}: {state}: {result.summary} → {result.location}", flush=True)


def report_error(error: BaseException, where: str = "the workspace") -> int:
    """Print an error to standard error and return the exit code.

    Errors of this package and of storage are one sentence, and all others a traceback without credentials. `where`: the
    place to name when a storage error does not name one.
    """
    from htcl_ray.workspace.filesystem import storage_failure

    known = _package_error(error) or storage_failure(error, where)
    if known is not None:
        kind = "error" if isinstance(known, InputError) else "failed"
        print(f"htcl: {kind}: {known}", file=sys.stderr)
        return known.exit_code
    print(without_credentials("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return 1


def _package_error(error: BaseException) -> HtclError | None:
    """The error of this package that caused `error`, also when Ray wrapped it in errors of its own."""
    cause: BaseException | None = error
    for _ in range(MAX_CAUSES):
        # Ray's error of a task is also of the class of its cause, but its message is a traceback.
        carried = getattr(cause, "cause", None)
        if isinstance(cause, HtclError) and not isinstance(carried, BaseException):
            return cause
        cause = carried or (cause and cause.__cause__)
    if match := RAISED_IN_A_TASK.search(str(error)):  # Ray Data keeps only the traceback of an error
        kind: type[HtclError] = getattr(errors, match[1])
        return kind(match[2])
    return None
