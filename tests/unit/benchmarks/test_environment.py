"""What a result of a benchmark says of the run that made it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.environment import RESULTS, write_result

pytestmark = pytest.mark.unit


def test_the_recorded_command_has_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = [
        str(tmp_path / "data"),
        "--out",
        "here/out",
        f"--model={tmp_path}/m",
        "--url",
        "http://a/b",
        "--seeds=0",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    command = json.loads(write_result("x", {}, tmp_path).read_text())["command"]
    assert command.endswith(" data --out here/out --model=m --url http://a/b --seeds=0")


def test_no_committed_result_names_a_folder_of_a_machine():
    commands = {file.name: json.loads(file.read_text())["command"] for file in RESULTS.glob("*.json")}
    assert len(commands) > 10
    assert {name: command for name, command in commands.items() if " /" in command or "=/" in command} == {}
