"""Copies of the log-mels that other processes of this machine use, left behind, or had no room for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.unit.training.test_training_data import WHOLE, Source, own_temporary_files, source
from tests.worlds.synthetic_features import tiny_config, write_features

pytestmark = pytest.mark.processes
__all__ = ["own_temporary_files", "source"]
"""Fixtures."""


def test_what_is_left_of_a_killed_process_is_removed_and_what_is_used_is_not(source: Source, tmp_path: Path):
    """Three other files in the temporary directory: of a process that is alive, of one that was killed, and of one
    killed while copying."""
    script = "\n".join(
        (
            "import sys; sys.path[:0] = sys.argv[1:2]",
            "import tempfile; tempfile.tempdir = sys.argv[2]",
            "from tests.unit.training.test_training_data import Source, Workspace, Path",
            "frames = Source(Workspace(sys.argv[3]), 'features/synthetic', Path()).open()",
            "print('open', flush=True); sys.stdin.read()",
        )
    )
    for name in ("alive", "killed"):
        write_features(tiny_config(tmp_path / name), songs=24)
    running = []
    try:
        for name in ("alive", "killed"):
            command = [sys.executable, "-c", script, str(REPOSITORY), str(tmp_path / "tmp"), str(tmp_path / name)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        killed = running[1]
        killed.kill()
        killed.wait()
        halved = source.root / "frames-0123456789abcdef"
        halved.mkdir()
        (halved / "frames.f16").write_bytes(b"half of it")
        assert len(list(source.root.glob("frames-*/"))) == 3
        with source.open():
            assert len(list(source.root.glob("frames-*/offsets.npy"))) == 2, (
                "of the process that is alive, and of this one"
            )
            assert not halved.exists()
        assert source.left() == WHOLE
    finally:
        for process in running:
            process.kill()
            process.communicate()
    with source.open():
        pass
    assert source.left() == set()


def test_a_disk_that_fills_up_while_copying_is_one_sentence_and_nothing_stays(source: Source):
    """The limit on the size of a file stands in for a full disk; both fail in the middle of a write."""
    script = "\n".join(
        (
            "import sys; sys.path[:0] = sys.argv[1:2]",
            "import tempfile; tempfile.tempdir = sys.argv[2]",
            "import errno, resource, signal",
            "from tests.unit.training.test_training_data import Source, Workspace, Path",
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))",
            "errno.EDQUOT = errno.EFBIG",
            "Source(Workspace(sys.argv[3]), 'features/synthetic', Path()).open()",
        )
    )
    command = [sys.executable, "-c", script, str(REPOSITORY), str(source.root.parent), source.workspace.uri]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1].startswith("htcl_ray.errors.StepError: the features of 48 songs need ")
    assert "frames.f16" not in source.left()
