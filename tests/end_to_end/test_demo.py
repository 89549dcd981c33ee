"""`make demo` of the README with a small sample and short trainings, in a folder that holds what is in the repository
and nothing else.

What a model learns in full is measured by tests/end_to_end/test_every_step_matters.py and benchmarks/sample_world.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.worlds.ray_head import environment

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(3600)]


SHORT = (
    "--set pretrain.epochs=1 --set finetune.epochs=1 --set finetune.pairs_per_epoch=256 --set finetune.num_workers=1"
)
SAMPLE = "SONGS, ARTISTS, SEED = 1000, 200, 0"
"""The line of the package that sets the size of the sample."""


def test_make_demo(tmp_path: Path):
    """Its environment is this one: a `.venv` that is up to date is not installed again."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    written = tmp_path / "htcl_ray/demo_world/write.py"
    assert SAMPLE in written.read_text()
    written.write_text(written.read_text().replace(SAMPLE, "SONGS, ARTISTS, SEED = 300, 60, 0"))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / ".venv/.installed").touch()
    done = subprocess.run(
        ["make", "demo", f"FLAGS={SHORT}"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "Traceback" not in done.stdout + done.stderr
    for step in ("preprocess", "pretrain", "finetune", "embed", "index", "evaluate", "serve"):
        assert f"── {step} " in done.stdout
    assert "bounds hold" in done.stdout or "the gate failed" in done.stdout, "the demo runs the shipped gate"
    for index in (tmp_path / "workspace/index").glob("*/manifest.json"):
        assert "gate" in index.read_text()
    again = subprocess.run(
        ["make", "demo", f"FLAGS={SHORT}"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr[-5000:]
    assert again.stdout.count("already done") >= 5
