"""One head node for the documented commands and the jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.worlds.ray_head import Head, head_node


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    with head_node("--num-cpus=4") as started:
        yield started
