"""What is shipped: the wheel's content and the resolved presets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from htcl_ray.config import PRESETS, resolve
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit


def tracked(pattern: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"htcl_ray"}
    shipped = {name for name in names if name.startswith("htcl_ray/")}
    assert {path for path in tracked("htcl_ray") if path.endswith((".py", ".yaml", ".html", ".typed"))} <= shipped


@pytest.mark.parametrize("preset", PRESETS)
def test_resolved_preset_is_the_golden_one(preset: str):
    """A changed default shows in review. CONTRIBUTING.md has the command that accepts one."""
    golden = (REPOSITORY / "tests" / "golden" / f"{preset}.yaml").read_text(encoding="utf-8")
    assert resolve(preset).as_yaml() == golden


def test_no_preset_sets_the_users_tables():
    for preset in PRESETS:
        assert resolve(preset).data.catalog == ()
        assert resolve(preset).data.interactions == ()


def test_every_requirement_is_pinned():
    """`constraints.txt` names every direct dependency, so that an installation under it is reproducible."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = {re.split(r"[\[<>= ]", name)[0].lower() for name in requirements}
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in pins if "==" in line}
    assert len(wanted) > 15
    assert wanted <= pinned, f"not pinned: {sorted(wanted - pinned)}"


def test_schema_is_json_and_describes_the_contract():
    from htcl_ray.config import json_schema

    text = json.dumps(json_schema())
    for key in (
        "catalog",
        "interactions",
        "text_columns",
        "split_column",
        "split_shares",
        "max_rejected_share",
        "name_or_path",
        "batch_size",
    ):
        assert f'"{key}"' in text
