"""Choice of the unit tests that `make fast` runs."""

from __future__ import annotations

import pytest

from tests.changed import unit_tests_of

pytestmark = pytest.mark.unit

SOURCES = {
    "tests/unit/index/test_song_index.py": "from htcl_ray.index.vectors import Vectors",
    "tests/unit/index/test_recall.py": "from htcl_ray.index.recall import recall",
    "tests/unit/search/test_service.py": "from htcl_ray.index.vectors import Vectors",
    "tests/unit/test_changed.py": "",
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["htcl_ray/index/recall.py"], ["tests/unit/index/test_recall.py"]),
        (["htcl_ray/index/vectors.py"], ["tests/unit/index/test_song_index.py"]),
        (["htcl_ray/index/plan.py"], ["tests/unit/index/test_recall.py", "tests/unit/index/test_song_index.py"]),
        (["tests/unit/search/test_service.py", "docs/generate.py"], ["tests/unit/search/test_service.py"]),
        (["benchmarks/serve.py"], []),
    ],
)
def test_changed_module_selects_its_tests(changed: list[str], expected: list[str]):
    assert unit_tests_of(changed, SOURCES) == expected
