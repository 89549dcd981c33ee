"""`htcl tune` on a real cluster: trials of equal length, failures, a killed search, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from htcl_ray.cli import main
from htcl_ray.config import Config, resolve
from htcl_ray.pipelines.train import pretrain
from htcl_ray.pipelines.tuning.study import StudyCallback
from htcl_ray.pipelines.tuning.tune import tune
from tests.worlds.in_process_training import training_in_process
from tests.worlds.synthetic_features import tiny_config, write_features, write_pairs

pytestmark = pytest.mark.ray
SPACE = {"pretrain.temperature": {"low": 0.02, "high": 0.5, "log": True}, "pretrain.batch_size": [8, 16, 32]}


def tune_config(workspace: Path, **overrides: object) -> Config:
    settings = {
        "tune.space": SPACE,
        "tune.reports": 4,
        "tune.trials": 4,
        "tune.seed": 6,  # the first three points of SPACE have three batch sizes
        "pretrain.num_workers": 1,
        "finetune.num_workers": 1,
    }
    config = tiny_config(workspace, **{"pretrain.epochs": 4, **settings, **overrides})
    write_features(config)
    write_pairs(config)
    return config


def processes() -> list[str]:
    """Titles of all processes below this one."""
    lines = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split(None, 2) for line in lines]
    own = {os.getpid()}
    for _ in range(8):
        own |= {int(pid) for pid, parent, _ in rows if int(parent) in own}
    return [title for pid, _, title in rows if int(pid) in own]


def table(config: Config) -> list[dict[str, Any]]:
    file = Path(config.workspace) / "runs" / "tune" / config.tune.name / "trials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def pending() -> list[int]:
    """Number of pending trials at each step of the search `searched`."""
    return []


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, pending: list[int]) -> Config:
    """A workspace with a finished study of three trials, two at a time."""
    settings = {"tune.trials": 3, "tune.max_concurrent_trials": 2, "tune.early_stopping": False}
    config = tune_config(tmp_path_factory.mktemp("searched"), **settings)

    def record_pending(self: StudyCallback, iteration: int, trials: list[Any], **info: Any) -> None:
        pending.append(sum(trial.status == "PENDING" for trial in trials))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudyCallback, "on_step_end", record_pending)
        tune(config)
    return config


@pytest.mark.usefixtures("searched")
def test_trials_are_requested_together(pending: list[int]):
    """An autoscaler then adds several nodes at once. Ray's default for a searcher is one pending trial at a time."""
    assert max(pending) == 2


def test_every_trial_sees_equally_many_rows_and_is_what_its_metrics_say(searched: Config):
    trials = table(searched)
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert {trial["state"] for trial in trials} == {"finished"}
    assert len({trial["parameters"]["pretrain.batch_size"] for trial in trials}) > 1, (
        "the search must have tried several batch sizes"
    )
    for trial in trials:
        assert [item["rows"] for item in trial["history"]] == [32, 64, 96, 128]
        run = (
            Path(searched.workspace)
            / f"runs/tune/pretrain/trials/{trial['number']:04d}/runs/pretrain/pretrain-{trial['number']:04d}"
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["validation_recall@10"] for line in lines] == [item["semantic"] for item in trial["history"]]
        assert lines[0]["candidates"] == trial["parameters"]["pretrain.batch_size"]
        assert not list(run.glob("checkpoint_*")), "a trial that has ended keeps its metrics only"
    assert trials[0]["parameters"] == {"pretrain.temperature": 0.074, "pretrain.batch_size": 16}, (
        "the configuration as it is comes first"
    )


def test_the_winner_is_a_configuration_that_trains(searched: Config):
    study = Path(searched.workspace) / "runs" / "tune" / "pretrain"
    trials = table(searched)
    best = max(trials, key=lambda trial: (trial["history"][-1]["semantic"], -trial["number"]))
    chosen = resolve(file=study / "best.yaml")
    assert chosen.pretrain.batch_size == best["parameters"]["pretrain.batch_size"]
    assert chosen.pretrain.temperature == best["parameters"]["pretrain.temperature"]
    assert chosen.pretrain.epochs == searched.pretrain.epochs, "the winner trains in full"
    manifest = json.loads((study / "manifest.json").read_text())
    assert manifest["best"] == best["number"]
    assert manifest["quality"] == {"semantic": best["history"][-1]["semantic"]}
    with training_in_process():
        assert not pretrain(chosen).skipped
    page = (study / "report.html").read_text()
    assert f"htcl pretrain --config {study}/best.yaml" in page


def test_the_same_command_is_done(searched: Config):
    """More trials than before: the second one of `test_a_killed_search_resumes`."""
    assert tune(searched).skipped


def test_another_space_is_another_study(searched: Config, tmp_path: Path, capsys):
    (tmp_path / "c.yaml").write_text(searched.as_yaml())
    assert (
        main(["tune", "--config", str(tmp_path / "c.yaml"), "--set", "tune.space={pretrain.batch_size: [8, 16]}"]) == 2
    )
    said = capsys.readouterr().err
    assert "was begun with space" in said
    assert "name another study with tune.study" in said
    assert main(["tune", "--config", str(tmp_path / "c.yaml"), "--set", "pretrain.seed=5"]) == 2
    assert "was begun with configuration pretrain.seed 0, and this command says 5" in capsys.readouterr().err


def test_a_trial_of_both_stages_measures_both_objectives(tmp_path: Path, ray_cluster: None):
    """Its configuration is the whole front. Fronts of many trials: tests/unit/tuning/test_trials.py."""
    space = {"finetune.preference_loss_weight": {"low": 0.1, "high": 2.0}, "pretrain.learning_rate": [0.001, 0.002]}
    config = tune_config(
        tmp_path,
        **{
            "tune.stage": "both",
            "tune.objectives": ["semantic", "preference"],
            "tune.space": space,
            "tune.trials": 1,
            "tune.samples": 64,
        },
    )
    tune(config)
    (trial,) = table(config)
    assert trial["state"] == "finished"
    assert len(trial["attempts"]) == 2, "both stages cost something"
    assert trial["history"][-1].keys() >= {"semantic", "preference"}
    assert [file.name for file in (Path(config.workspace) / "runs/tune/both/pareto").iterdir()] == ["0000.yaml"]


def test_trials_that_are_behind_are_stopped_and_one_that_raises_is_recorded(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
):
    """One after the other, the good one first: ASHA stops those that learn nothing after the grace period.

    A space of three points is searched through with three trials, however many are requested.
    """
    import ray

    groups = set(ray.util.placement_group_table())
    config = tune_config(
        tmp_path,
        **{
            "tune.space": {"pretrain.learning_rate": [0.003, 1e-12, 1e30]},
            "tune.trials": 5,
            "tune.max_concurrent_trials": 1,
            "tune.samples": 320,
            "tune.metric": "ndcg@10",
            "pretrain.learning_rate": 0.003,
            "pretrain.text_learning_rate": 1e-12,
        },
    )
    tune(config)
    trials = {trial["parameters"]["pretrain.learning_rate"]: trial for trial in table(config)}
    assert len(table(config)) == 3
    assert trials[0.003]["state"] == "finished"
    assert trials[1e-12]["state"] == "stopped"
    assert len(trials[1e-12]["history"]) < 4
    assert trials[1e30]["state"] == "failed"
    assert trials[1e30]["error"].startswith("pretrain: the gradient of step")
    assert "lower pretrain.learning_rate" in trials[1e30]["error"]
    assert "failed: pretrain: the gradient of step" in capsys.readouterr().out
    left = {
        key: group
        for key, group in ray.util.placement_group_table().items()
        if key not in groups and group["state"] != "REMOVED"
    }
    assert not left, "a stopped trial keeps its CPUs"
    deadline = time.monotonic() + 120  # it ends by itself, after its last request to Ray's state API
    while [name for name in processes() if "PlacementGroupCleaner" in name]:
        assert time.monotonic() < deadline, "a stopped trial leaves an actor of Ray Train"
        time.sleep(0.5)


def test_a_cluster_that_can_never_hold_a_trial_is_refused_with_the_arithmetic(
    tmp_path: Path, ray_cluster: None, capsys
):
    config = tune_config(tmp_path, **{"ray.num_cpus": 64, "pretrain.num_workers": 2, "pretrain.cpus_per_worker": 3.0})
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["tune", "--config", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr()
    assert (
        "pretrain needs 2 worker(s) with 3 CPU each, but only 1 fit on the cluster, which has 1 node(s): 1 × 4 CPU"
        in said.err
    )
    assert table(config) == []


def test_a_killed_search_resumes(tmp_path: Path, searched: Config):
    """The interrupted trial resumes from its last checkpoint, and the next one gets the point that an uninterrupted
    search gives it: that of `searched`, since the first ten points do not depend on results.

    Interruptions at each trial, and trials that had ended: tests/unit/pipelines/tuning/test_study.py. The workspace is
    relative to the directory of the command, and trials run in folders of their own.
    """
    rows_per_report = 32 * 10  # long enough that the worker does not see all rows between the kill and its own end
    num_reports, num_trials = 15, 2
    settings = {
        "tune.samples": rows_per_report * num_reports,
        "tune.reports": num_reports,
        "tune.trials": num_trials,
        "tune.max_concurrent_trials": 1,
        "tune.early_stopping": False,
    }
    config = tune_config(tmp_path / "killed", **settings)
    (tmp_path / "c.yaml").write_text(config.with_overrides({"workspace": "./killed"}).as_yaml())
    command = [sys.executable, "-m", "htcl_ray.cli", "tune", "--config", "c.yaml"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 300
        try:
            while not _in_the_middle_of(table(config), 0):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    before = table(config)
    assert [trial["state"] for trial in before] == ["running"]
    assert list((Path(config.workspace) / "runs/tune/pretrain/trials/0000/runs/pretrain").glob("*/checkpoint_*"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    after = table(config)
    assert [trial["state"] for trial in after] == ["finished"] * num_trials
    assert [len(trial["attempts"]) for trial in after] == [2, 1]
    num_seen = len(before[0]["history"])
    assert after[0]["history"][:num_seen] == before[0]["history"]
    for trial in after:
        rows = [item["rows"] for item in trial["history"]]
        assert rows == [rows_per_report * number for number in range(1, num_reports + 1)], (
            "also what was measured between the last line of the table and the kill"
        )
    uninterrupted = [trial["parameters"] for trial in table(searched)[:num_trials]]
    assert [trial["parameters"] for trial in after] == uninterrupted
    best = yaml.safe_load((tmp_path / "killed/runs/tune/pretrain/best.yaml").read_text())
    assert best["workspace"] == str(tmp_path / "killed")


def _in_the_middle_of(trials: list[dict[str, Any]], number: int) -> bool:
    return len(trials) > number and trials[number]["state"] == "running" and len(trials[number]["history"]) >= 3


def test_a_failed_trial_runs_again(
    searched: Config, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
):
    """Trial 2 failed, as with a workspace that no trial can read; trial 1 had seen all its rows when the search was
    killed, and trains no more; trial 0 had ended."""
    shutil.copytree(searched.workspace, tmp_path / "workspace")
    expected = table(searched)
    config = searched.with_overrides({"workspace": str(tmp_path / "workspace")})
    failed = {**expected[2], "state": "failed", "history": [], "error": "no such workspace"}
    killed = {**expected[1], "state": "running", "history": expected[1]["history"][:2]}
    study = tmp_path / "workspace/runs/tune/pretrain"
    (study / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in (expected[0], killed, failed)))
    (study / "manifest.json").unlink()
    tune(config)
    assert "trial 2 failed before and is tried again: no such workspace" in capsys.readouterr().out
    after = table(config)
    assert [trial["state"] for trial in after] == ["finished"] * 3
    assert [trial["parameters"] for trial in after] == [trial["parameters"] for trial in expected]
    assert [trial["error"] for trial in after] == [None] * 3
    rows = [[item["rows"] for item in trial["history"]] for trial in after]
    assert rows == [[item["rows"] for item in trial["history"]] for trial in expected]
    assert after[:2] == [expected[0], {**expected[1], "attempts": after[1]["attempts"]}]
    assert len(after[1]["attempts"]) == len(killed["attempts"]), "trained again"
