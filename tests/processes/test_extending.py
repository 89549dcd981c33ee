"""Apply the recipes of docs/extending.md to a copy of the package, and run each extension."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.worlds.extended_package import CHECKS, recipes, write_extended

pytestmark = pytest.mark.processes

MAX_FILES = {
    "A loss": 2,
    "An audio tower": 2,
    "A log shape": 1,
    "A metadata column": 1,
    "An index engine": 2,
    "A metric": 1,
    "A route": 2,
    "A step": 3,
    "A tracker": 2,
}
"""Files of the package that each recipe may touch."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The error of each recipe's check, from one process that imports the extended copy."""
    folder = tmp_path_factory.mktemp("extended")
    write_extended(folder / "package")
    (folder / "scratch").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "package"), str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.worlds.extended_package", str(folder / "scratch")],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_recipe_has_a_check():
    assert set(recipes()) == set(CHECKS) == set(MAX_FILES)


@pytest.mark.parametrize("recipe", MAX_FILES)
def test_a_recipe_works(errors: dict[str, str | None], recipe: str):
    assert errors[recipe] is None, errors[recipe]


@pytest.mark.parametrize("recipe", MAX_FILES)
def test_a_recipe_touches_few_files(recipe: str):
    assert len({change.path for change in recipes()[recipe]}) <= MAX_FILES[recipe]


def test_the_table_counts_the_files_of_each_recipe():
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    for recipe, changes in recipes().items():
        name, anchor = recipe[0].lower() + recipe[1:], recipe.lower().replace(" ", "-")
        assert f"| [{name}](#{anchor}) | {len(changes)} |" in page


def test_recipes_are_applied_to_whole_lines(tmp_path: Path):
    write_extended(tmp_path)
    for changes in recipes().values():
        for change in changes:
            compile((tmp_path / change.path).read_text(encoding="utf-8"), change.path, "exec")
