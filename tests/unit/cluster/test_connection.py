"""Progress lines of workers on a private cluster; those of other clusters: tests/ray/test_tune_chaos.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from htcl_ray.cluster import connection
from htcl_ray.cluster.connection import LinePipe, progress_lines

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "on_private_cluster", lambda: True)


def test_every_line_of_every_worker_is_printed_whole(capsys: pytest.CaptureFixture[str]):
    with progress_lines() as lines:
        workers = [LinePipe(lines.path) for _ in range(3)]  # as in three processes
        with ThreadPoolExecutor(3) as pool:
            for number in range(100):
                list(pool.map(lambda worker, number=number: worker.put_nowait(f"é line {number}"), workers))
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(f"é line {number}" for number in range(100) for _ in workers)
    assert not lines.path.parent.exists()
    lines.put_nowait("after the end")


def test_a_worker_does_not_wait_for_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch):
    def gone(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(connection, "print_line", gone)
    with progress_lines() as lines:
        for _ in range(2000):
            lines.put_nowait("x" * 100)  # more than a pipe holds
