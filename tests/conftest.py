"""Fixtures that more than one tier uses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
LONGEST_FIRST = (
    "tests/end_to_end/test_every_step_matters.py",
    "tests/ray/test_tune.py",
    "tests/end_to_end/test_documented_commands.py",
    "tests/end_to_end/test_gpu_benchmark.py",
    "tests/end_to_end/test_demo.py",
    "tests/end_to_end/test_jobs.py",
    "tests/ray/test_train.py",
    "tests/ray/test_tune_autoscaling.py",
    "tests/ray/test_tune_chaos.py",
    "tests/serve/test_page.py",
    "tests/serve/test_commands.py",
    "tests/serve/test_network.py",
    "tests/ray/test_ablate.py",
    "tests/end_to_end/",
    "tests/ray/",
    "tests/serve/",
    "tests/distributed/",
    "tests/processes/test_sandbox.py",
    "tests/processes/",
)
"""Order in which the processes of pytest-xdist take files, so that none is left with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=_position)


def _position(item: pytest.Item) -> int:
    file = item.path.relative_to(REPOSITORY).as_posix()
    return next((place for place, prefix in enumerate(LONGEST_FIRST) if file.startswith(prefix)), len(LONGEST_FIRST))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real audio that cannot be part of this repository; it lies beside the checkout where there is any."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real audio is absent: expected a folder ../shared/data beside the checkout")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 200 kB; needs root, as continuous integration has."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small private Ray cluster for all tests that ask for it."""
    import ray

    from htcl_ray.cluster.connection import connect
    from htcl_ray.config import resolve

    connect(resolve("demo"))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def in_process_training(ray_cluster: None) -> Iterator[None]:
    """Trainings of this module run in this process: tests/worlds/in_process_training.py."""
    from tests.worlds.in_process_training import training_in_process

    with training_in_process():
        yield
