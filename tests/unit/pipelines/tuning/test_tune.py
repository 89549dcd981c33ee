"""Decisions of `htcl tune` before it starts Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from htcl_ray.cli import main
from htcl_ray.cluster.capacity import Capacity
from htcl_ray.errors import ConfigError
from htcl_ray.pipelines.tuning.tune import fit_to_cluster
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features, write_pairs

pytestmark = pytest.mark.unit
GROWING = Capacity(({"CPU": 4.0},), (({"CPU": 8.0, "GPU": 1.0}, 3),), 3, grows=True)


def test_trials_fill_the_cluster_that_its_autoscaler_may_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    workers = {"pretrain.num_workers": 2, "pretrain.accelerator": "cpu"}
    fitted = fit_to_cluster(tiny_config(tmp_path, **workers), GROWING)
    assert fitted.tune.max_concurrent_trials == (4 + 3 * 8) // 2
    assert capsys.readouterr().out.startswith("tune  at most 14 trial(s) at a time; the cluster is ")


def test_one_accelerator_is_chosen_for_all_trials(tmp_path: Path):
    fitted = fit_to_cluster(tiny_config(tmp_path, **{"pretrain.num_workers": 2, "pretrain.batch_size": 16}), GROWING)
    assert (fitted.pretrain.accelerator, fitted.tune.max_concurrent_trials) == ("gpu", 1)


def test_a_configured_number_of_trials_is_kept(tmp_path: Path):
    config = tiny_config(tmp_path, **{"pretrain.accelerator": "cpu", "tune.max_concurrent_trials": 3})
    assert fit_to_cluster(config, GROWING).tune.max_concurrent_trials == 3


def test_a_cluster_of_unknown_growth_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    unknown = Capacity(({"CPU": 4.0},), (), 0, grows=None)
    config = tiny_config(tmp_path, **{"pretrain.num_workers": 2, "pretrain.accelerator": "cpu"})
    assert fit_to_cluster(config, unknown).tune.max_concurrent_trials == 2
    said = capsys.readouterr().out
    assert "so 2 trial(s) run at a time, as many as fit on its 1 node(s); set tune.max_concurrent_trials" in said


def test_a_cluster_that_can_never_hold_a_trial_is_refused_with_the_arithmetic(tmp_path: Path):
    config = tiny_config(tmp_path, **{"pretrain.num_workers": 2, "pretrain.cpus_per_worker": 3.0})
    fixed = Capacity(({"CPU": 4.0},), (), 0, grows=False)
    with pytest.raises(
        ConfigError,
        match=r"needs 2 worker\(s\) with 3 CPU each, but only 1 fit on the cluster, which has 1 node\(s\): 1 × 4 CPU",
    ):
        fit_to_cluster(config, fixed)


def test_relative_paths_become_absolute_since_trials_run_in_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, **{"pretrain.accelerator": "cpu"}).with_overrides({"workspace": "./workspace"})
    assert fit_to_cluster(config, GROWING).workspace == str(tmp_path / "workspace")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"tune.space": {"pretrain.temprature": [0.1, 0.2]}},
            "tune.space names pretrain.temprature, but no configuration key has this name; did you mean",
        ),
        (
            {"tune.space": {"pretrain.temperature": {"low": 0.5, "high": 0.1}}},
            "expected finite numbers, low less than high",
        ),
        ({"tune.space": {"pretrain.temperature": []}}, "expected at least two"),
        (
            {"tune.space": {"pretrain.batch_size": [8, 9]}, "pretrain.num_workers": 2},
            "has 9, which pretrain.num_workers (2) does not divide",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
):
    monkeypatch.setattr("htcl_ray.cluster.connection.connect", lambda config: pytest.fail("Ray was started"))
    config = tiny_config(tmp_path, **{"pretrain.num_workers": 1})
    write_features(config)
    write_pairs(config)
    tree = config.model_dump(mode="json")
    for key, value in change.items():
        section, name = key.split(".")
        tree[section][name] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert main(["tune", "--config", str(tmp_path / "c.yaml")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (Workspace(config.workspace).exists("runs"))
