"""Fixtures of the evaluation tasks."""

from __future__ import annotations

import pytest

from tests.worlds.recommendation_logs import Listeners


@pytest.fixture(scope="module")
def listeners() -> Listeners:
    return Listeners()
