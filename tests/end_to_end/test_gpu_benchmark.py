"""`python -m benchmarks.gpu` on the CPU at toy size, in an environment that holds nothing but what the GPU machine
has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu.step import CASES
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.end_to_end

PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "pandas", "rich", "safetensors", "pydantic")
ABSENT = ("ray", "faiss", "librosa", "soundfile", "soxr", "optuna", "fastapi", "sklearn")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose site-packages link to the named distributions, and what they require, of this
    environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    pending, done = [*PACKAGES], set()
    while pending:
        name = pending.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if distribution.name in done:
            continue
        done.add(distribution.name)
        requirements = [Requirement(text) for text in distribution.requires or ()]
        pending += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


def environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_the_environment_lacks_what_the_gpu_machine_lacks(python: Path):
    code = f"import importlib.util; print([name for name in {ABSENT} if importlib.util.find_spec(name)])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"
    assert all(name in sys.modules or importlib.util.find_spec(name) for name in ("ray", "faiss", "soundfile")), (
        "here they are present"
    )


@pytest.mark.timeout(2000)
def test_every_part_runs_in_that_environment(python: Path, tmp_path: Path):
    command = [python, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "30", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=1900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    assert [part["ended"] for part in result["parts"].values()] == ["done"] * 4, done.stdout
    units = {name: part["units"] for name, part in result["parts"].items()}
    assert all(unit["passed"] for unit in units["correctness"].values())
    assert len(units["correctness"]) == 10
    assert not [name for part in units.values() for name, unit in part.items() if "error" in unit]
    steps = {name: unit for name, unit in units["step"].items() if not name.startswith("split")}
    assert len(steps) == sum(len(sides) for *_, sides in CASES)
    assert all(unit["songs_per_second"] > 0 and unit["model_tflops"] > 0 for unit in steps.values())
    assert all(0.1 < unit["padded_share"] < 0.6 for name, unit in steps.items() if "mixed" in name)
    assert all(unit["padded_share"] == 0 for name, unit in steps.items() if "full" in name)
    assert units["embed"]["songs, fp32"]["largest_difference"] < 1e-5
    assert 1e-5 < units["embed"]["songs, bf16"]["largest_difference"] < 0.05
    [profile] = units["profile"].values()
    assert len(profile["kernels"]) == 20
    printed = done.stdout.splitlines()
    assert all(any(name in line for line in printed) for part in units.values() for name in part), (
        "a line for each measurement"
    )


def test_it_ends_within_its_time(python: Path, tmp_path: Path):
    """Some seconds are too few for anything: what was not measured is named, and the result is written all the same."""
    command = [
        python,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--minutes",
        str(8 / 60),
        "--parts",
        "correctness,step",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu_rehearsal.json").read_text())["parts"]
    assert {part["ended"] for part in parts.values()} <= {"cut off at its time limit", "not started: no time was left"}


def test_a_wrong_part_is_refused(python: Path):
    command = [python, "-m", "benchmarks.gpu", "--parts", "speed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=100)
    assert done.returncode == 2
    assert "unknown part 'speed'; expected some of correctness,step,embed,profile" in done.stderr
