"""Workers that prepare for a run: none times out while another one copies, and what one refuses all
refuse."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from htcl_ray.errors import StepError
from htcl_ray.losses.collectives import gather_rows, prepared_together, rank
from tests.distributed.conftest import run_workers

pytestmark = pytest.mark.distributed
SHORT = timedelta(seconds=2)


def prepare(folder: str) -> None:
    """The last worker takes longer than collectives of the default group may."""
    dist.distributed_c10d._set_pg_timeout(SHORT, dist.group.WORLD)  # noqa: SLF001, PyTorch has no public name for it
    with prepared_together():
        time.sleep(3 * SHORT.total_seconds() if rank() == 1 else 0)
    gathered = gather_rows(torch.tensor([rank()])).tolist()
    Path(folder, f"{rank()}").write_text(str(gathered))


def refuse(folder: str) -> None:
    try:
        with prepared_together():
            if rank() == 1:
                raise StepError("no room on this machine")
    except StepError as error:
        Path(folder, f"{rank()}").write_text(str(error))


def test_workers_wait_for_the_slowest(tmp_path: Path):
    run_workers(2, tmp_path, prepare, str(tmp_path))
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == ["[0, 1]"] * 2


def test_what_one_worker_refuses_all_refuse(tmp_path: Path):
    run_workers(2, tmp_path, refuse, str(tmp_path))
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == ["no room on this machine"] * 2


def test_a_worker_alone_raises_what_it_refuses():
    with pytest.raises(StepError, match="no room"), prepared_together():
        raise StepError("no room")
