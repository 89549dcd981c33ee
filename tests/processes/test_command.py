"""The `htcl` command as a process: help, encodings of the terminal, closed pipes, a full disk."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.processes


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "htcl_ray.cli", *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )


def test_version_and_help_of_the_command():
    assert "htcl-ray" in run("--version").stdout
    listed = run("--help").stdout
    for command in (
        "demo",
        "preprocess",
        "pretrain",
        "finetune",
        "embed",
        "index",
        "evaluate",
        "serve",
        "search",
        "config",
    ):
        assert command in listed


class TestOutput:
    """Output to a terminal without UTF-8, to a closed pipe and to a full disk, without tracebacks."""

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
    def test_every_encoding_can_print_every_character(self, encoding: str):
        code = (
            "import sys; from pathlib import Path; from rich.console import Console; from rich.table import Table\n"
            "from htcl_ray import cli; from htcl_ray.commands.terminal import print_result\n"
            "from htcl_ray.workspace.artifacts import StepResult; import dataclasses\n"
            "def speak(config, options):\n"
            "    print_result(StepResult('step', '/é/名', '5 × 4 – 3 … 🎵', 1.0))\n"
            "    table = Table('↔ título'); table.add_row('名→')\n"
            "    Console().print(table); print('→ é', file=sys.stderr)\n"
            "cli.COMMANDS['config'] = dataclasses.replace(cli.COMMANDS['config'], run=speak)\n"
            "sys.exit(cli.main(['config', 'show']))"
        )
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode(encoding)
        shown = done.stdout.decode(encoding)
        assert "step: done in 1 s: 5 " in shown
        assert ("→ /é/名" if encoding == "utf-8" else "-> /") in shown

    def test_help_of_every_command_in_ascii(self):
        code = (
            "from htcl_ray import cli\n"
            "for name in ['', *cli.COMMANDS]:\n"
            "    try: cli.main([*name.split(), '--help'])\n"
            "    except SystemExit as stop: assert not stop.code\n"
            "assert cli.main(['config', 'schema']) == cli.main(['config', 'show']) == 0"
        )
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY, env=environment, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize(
        ("arguments", "code"), [(["config", "schema"], 141), (["config", "show"], 141), (["--help"], 0)]
    )
    def test_closed_pipe(self, arguments: list[str], code: int):
        """`htcl search … | head -1`; 141 is what a shell says of a program that SIGPIPE ended."""
        process = subprocess.Popen(
            [sys.executable, "-m", "htcl_ray.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        assert process.stdout is not None
        process.stdout.close()
        _, shown = process.communicate(timeout=120)
        assert (process.returncode, shown) == (code, b"")

    def test_output_to_a_full_disk(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "htcl_ray.cli", "config", "schema"],
                stdout=full,
                stderr=subprocess.PIPE,
                cwd=REPOSITORY,
                text=True,
            )
        assert (done.returncode, done.stderr) == (
            1,
            "htcl: failed: the output cannot be written (No space left on device)\n",
        )
