"""Jobs as on a cluster: `ray start --head`, then `ray job submit` with the working directory."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from htcl_ray.demo_world import write_sample
from htcl_ray.models import HTCL
from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY
from tests.worlds.ray_head import Head, environment, head_node, submit
from tests.worlds.synthetic_features import tiny_config, write_features, write_negatives, write_pairs

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node("--num-cpus=4") as started:
        yield started


STARTS: tuple[tuple[str, list[str]], ...] = (("preprocess", []), ("run", ["--until", "preprocess"]))


def test_preprocess_as_a_job(head: Head, tmp_path: Path):
    tables = write_sample(tmp_path / "sample", songs=40, artists=8, users=20, seed=3, seconds=4.0)
    workspace = tmp_path / "workspace"
    flags = ["--preset", "demo", "--workspace", str(workspace), "--set", f"data.catalog={tables.catalog}"]
    flags += ["--set", f"data.interactions={tables.interactions}", "--set", "data.max_rejected_share=0.5"]
    script = " && ".join(shlex.join(["python", f"jobs/{job}.py", *flags, *more]) for job, more in STARTS)
    done = submit(head, "bash", "-c", script)  # one job: each submission packs the working directory again
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preprocess: done" in done.stdout
    assert "preprocess: already done" in done.stdout, "jobs/run.py"
    assert len(Workspace(str(workspace)).finished("features")) == 1
    assert len(Workspace(str(workspace)).finished("pairs")) == 1


def test_bad_input_fails_the_job_with_its_sentence(head: Head, tmp_path: Path):
    flags = ["--preset", "demo", "--workspace", str(tmp_path), "--set", f"data.catalog={tmp_path}/absent.csv"]
    done = submit(head, "python", "jobs/preprocess.py", *flags)
    assert done.returncode != 0
    assert "failed with exit code 2" in done.stdout + done.stderr
    assert "htcl: error: " in done.stdout + done.stderr
    assert "absent.csv" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_every_later_job_trains_and_measures(head: Head, tmp_path: Path):
    """`jobs/tune.py`: tests/ray/test_tune_autoscaling.py."""
    config = tiny_config(tmp_path / "workspace", **{"pretrain.epochs": 1, "pretrain.num_workers": 1})
    config = config.with_overrides(
        {
            "finetune.epochs": 1,
            "finetune.explicit_negatives": True,
            "finetune.loss": "sigmoid",  # not that of stage 1
            "finetune.num_workers": 1,
            "evaluate.resamples": 100,
        }
    )
    write_features(config)
    write_pairs(config)
    write_negatives(config, [(0, 3, 1.0), (0, 1, 1.0), (1, 2, 2.0)])
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    made = {
        "pretrain": "models/semantic",
        "finetune": "models/preference",
        "embed": "embeddings",
        "build_index": "index",
        "evaluate": "reports",
    }
    assert {file.stem for file in (REPOSITORY / "jobs").glob("*.py")} - {"__init__"} == {*made, *dict(STARTS), "tune"}
    scripts = " && ".join(f"python jobs/{job}.py --config {tmp_path}/c.yaml" for job in made)
    done = submit(head, "bash", "-c", scripts)  # one job: each submission packs the working directory again
    assert done.returncode == 0, done.stdout + done.stderr
    workspace = Workspace(config.workspace)
    for job, folder in made.items():
        assert len(workspace.finished(folder)) == 1, job
    assert "1 negatives are left out" in done.stdout
    ((semantic, _),), ((preference, _),) = (
        workspace.finished(f"models/{space}") for space in ("semantic", "preference")
    )
    assert HTCL.from_pretrained(workspace.full(f"models/semantic/{semantic}")).record.loss == "softmax"
    assert HTCL.from_pretrained(workspace.full(f"models/preference/{preference}")).record.loss == "sigmoid"


@pytest.mark.parametrize("job", ["tune", "evaluate"])
def test_a_job_that_lacks_its_input_fails_with_the_step_to_run(head: Head, tmp_path: Path, job: str):
    """As the head node runs a job's entry point: before it connects to Ray."""
    command = [sys.executable, f"jobs/{job}.py", "--preset", "demo", "--workspace", str(tmp_path)]
    variables = {**environment(), "RAY_ADDRESS": head.address, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "htcl: error: the workspace" in done.stderr
    assert "first" in done.stderr


def test_a_relative_workspace_is_refused(head: Head):
    done = submit(head, "python", "jobs/pretrain.py", "--preset", "demo")
    assert done.returncode != 0
    assert "is relative, and on a remote cluster" in done.stdout + done.stderr
