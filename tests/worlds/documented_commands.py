"""The commands that the documentation shows, taken from its blocks of shell lines, tables and sentences."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
JOB = re.compile(r"(?:\S*/)?jobs/(\w+)\.py$")
STEP_OF_JOB = {"build_index": "index"}
SEPARATORS = {"&&", ";", "||", "|", "&"}


@dataclass(frozen=True)
class Shown:
    """A command line, and where it is shown."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the page's fenced blocks of a language."""
    return [match[3] for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match[2] == language]


def spans(page: Path) -> list[str]:
    """Code within sentences and tables."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [span.replace("\\|", "|") for span in SPAN.findall(prose)]


def commands(page: Path) -> list[Shown]:
    """Every `htcl …` of the page's shell blocks, and every job as its step; variables are those of the page or of the
    README."""
    named = variables(PAGES[0]) | variables(page)
    shown = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in named.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True) if "htcl" in line or "jobs/" in line else []
            shown += [Shown(page.name, command) for part in _parts(words) if (command := _htcl(part))]
    return shown


def variables(page: Path) -> dict[str, str]:
    """What the page's shell blocks assign."""
    return dict(re.findall(r'^(\w+)="([^"]*)"$', "\n".join(blocks(page, "bash")), re.MULTILINE))


def _parts(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in SEPARATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _htcl(words: list[str]) -> tuple[str, ...]:
    """What the `htcl` command is given; empty for another command."""
    if words[:1] == ["htcl"]:
        return tuple(words[1:])
    for at, word in enumerate(words):
        if match := JOB.match(word):
            return (STEP_OF_JOB.get(match[1], match[1]), *words[at + 1 :])
    return ()
