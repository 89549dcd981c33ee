"""Commands of `htcl` in one process that stays: what the command does, without its start.

Importing the package and starting a private cluster takes longer than most steps of a small catalogue. The process
imports and connects once, and training runs in it: tests/worlds/in_process_training.py. The start of each command:
tests/processes/test_command.py, tests/end_to_end/test_demo.py, tests/serve/test_commands.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.worlds.in_process_training import training_in_process

RESULT = "result of the command: "


class CommandProcess:
    """A running process, in which commands of `htcl` run one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """Run `htcl` with these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(RESULT):
                return subprocess.CompletedProcess(["htcl", *arguments], **json.loads(line.removeprefix(RESULT)))
        raise AssertionError(f"the process ended in: htcl {arguments}")


@contextlib.contextmanager
def command_process(folder: Path, variables: Mapping[str, str]) -> Iterator[CommandProcess]:
    """A process in `folder` with these environment variables."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.worlds.command_process"],
        cwd=folder,
        env=dict(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield CommandProcess(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def main() -> None:
    """Run the command of each line of standard input, a list of arguments, and print its exit code and its output."""
    from htcl_ray.cli import main as htcl

    with training_in_process():
        for line in sys.stdin:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = htcl(json.loads(line))
            result = {"returncode": code, "stdout": out.getvalue(), "stderr": err.getvalue()}
            print(f"{RESULT}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
