"""The vocabulary of the code, its messages and its pages: terms of the field, and no words that hide what is meant."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

INSTEAD = {
    "anew": "again",
    "answer": "response, result",
    "answered": "responded to, returned",
    "answers": "responses, results",
    "asked": "requested, queried",
    "asks": "requests, queries",
    "beside": "next to, in addition to",
    "figure": "metric, measurement",
    "figures": "metrics, measurements",
    "found": "result, hit, match; actual",
    "goes on": "resumes, continues",
    "hear": "listen to, play, cover",
    "heard": "played, listened to, covered",
    "hears": "listens to, covers",
    "nobody": "no client, no process",
    "ours": "expected, self",
    "question": "query, request",
    "questions": "queries, requests",
    "sound": "audio",
    "sounds": "audio",
    "theirs": "actual, other",
    "there": "present, exists, or name the place",
    "whoever": "the client, the process",
    "whom": "the client, the user",
}
"""Each word that is not written, and what to write."""
PATTERN = re.compile(
    r"(?<![A-Za-z])(" + "|".join(sorted(INSTEAD, key=len, reverse=True)) + r")(?![a-z])", re.IGNORECASE
)
"""Names are read as words: `answers_of` and `Answer` hold one, `answerable` and `nothing_there` do and do not."""
EXCEPTIONS = Path(__file__).with_name("language_exceptions.yaml")
"""How many uses each file still has, all of them right, such as HTTP's `not found` and a figure of matplotlib."""
WRITTEN = (
    "htcl_ray",
    "jobs",
    "serve",
    "tests",
    "benchmarks",
    "docs",
    "deploy",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "Makefile",
    "cluster.yaml",
)
NOT_OURS = {
    "tests/worlds/opensubsonic.schema.json",
    "tests/architecture/test_language.py",
    "tests/architecture/language_exceptions.yaml",
}


def uses() -> dict[str, Counter[str]]:
    """Words of `INSTEAD` in each file of the repository, results of benchmarks apart."""
    listed = subprocess.run(
        ["git", "ls-files", "--", *WRITTEN], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    names = [
        name
        for name in listed.stdout.split()
        if name not in NOT_OURS and not name.startswith("benchmarks/results/") and not name.endswith(".png")
    ]
    counts = {
        name: Counter(word.lower() for word in PATTERN.findall((REPOSITORY / name).read_text(encoding="utf-8")))
        for name in names
    }
    return {name: words for name, words in counts.items() if words}


def test_no_file_has_more_words_that_are_not_written_than_its_exceptions():
    allowed = yaml.safe_load(EXCEPTIONS.read_text(encoding="utf-8")) or {}
    actual = {name: dict(sorted(words.items())) for name, words in uses().items()}
    more = {
        f"{name}: {word!r} {number} times, {allowed.get(name, {}).get(word, 0)} allowed; write {INSTEAD[word]}"
        for name, words in actual.items()
        for word, number in words.items()
        if number > allowed.get(name, {}).get(word, 0)
    }
    assert not more, "\n".join(sorted(more))


def test_exceptions_only_shrink():
    """An exception that is no longer used is removed: python -m tests.architecture.test_language."""
    allowed = yaml.safe_load(EXCEPTIONS.read_text(encoding="utf-8")) or {}
    actual = uses()
    unused = {
        f"{name}: {word!r}"
        for name, words in allowed.items()
        for word, number in words.items()
        if actual.get(name, {}).get(word, 0) < number
    }
    assert not unused, "\n".join(sorted(unused))


if __name__ == "__main__":
    EXCEPTIONS.write_text(
        yaml.safe_dump({name: dict(sorted(words.items())) for name, words in uses().items()}), encoding="utf-8"
    )
