"""Both stages on a real Ray cluster: two workers, resume after a kill, refusals before anything starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from htcl_ray import artifacts
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, MismatchError, StepError, WorkspaceError
from htcl_ray.models import HTCL
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.storage import Workspace, file_sha256
from tests.conftest import REPOSITORY
from tests.synthetic_features import tiny_config, write_features, write_pairs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Config:
    """A workspace in which both stages have run, on two workers."""
    config = tiny_config(tmp_path_factory.mktemp("trained"))
    write_features(config)
    write_pairs(config, extra=2)
    first = pretrain(config)
    second = finetune(config)
    assert not first.skipped
    assert not second.skipped
    return config


def test_models_are_published_with_their_inputs(trained: Config):
    workspace = Workspace(trained.workspace)
    models = artifacts.models(workspace)
    assert models.preference is not None
    assert models.semantic.manifest["inputs"] == {"features": "synthetic"}
    assert models.preference.manifest["inputs"] == {"features": "synthetic", "pairs": "pairs", "model": models.semantic.version}
    for stage, artifact in enumerate((models.semantic, models.preference), start=1):
        folder = Path(workspace.full(artifact.path))
        assert HTCL.from_pretrained(folder).stage == stage
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
        assert set(artifact.manifest["files"]) == present >= {"model.safetensors", "config.json", "README.md", "tokenizer/tokenizer.json"}
        assert all(file_sha256(folder / name) == sha for name, sha in artifact.manifest["files"].items())
        assert artifact.manifest["config"] == trained.model_dump(mode="json")
        assert {"loss", "validation_recall@10", "validation_median_rank"} <= set(artifact.manifest["quality"])


def test_runs_leave_their_figures(trained: Config):
    workspace = Workspace(trained.workspace)
    models = artifacts.models(workspace)
    assert models.preference is not None
    for artifact, epochs in ((models.semantic, trained.pretrain.epochs), (models.preference, trained.finetune.epochs)):
        run = Path(workspace.full(artifact.manifest["run"]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
        assert list((run / "tensorboard").glob("events.*"))


def test_finished_stages_are_skipped(trained: Config):
    assert pretrain(trained).skipped
    assert finetune(trained).skipped


def test_stage_2_of_another_configuration_is_refused(trained: Config):
    with pytest.raises(MismatchError, match=r"model\.dim=16, but the configuration says 8"):
        finetune(trained.with_overrides({"model.dim": 8, "finetune.seed": 5}))


def test_two_ranks_see_different_songs_and_one_set_of_negatives(trained: Config, tmp_path: Path):
    """In workers as the pipeline starts them: each encodes its own songs, both compare with the same gathered candidates."""
    import ray.train
    import ray.train.torch

    uri, out = trained.workspace, str(tmp_path)

    def worker() -> None:
        from htcl_ray.objectives.gather import gather_rows, rank, world_size
        from htcl_ray.training.order import worker_rows
        from htcl_ray.training.songs import read_songs
        from htcl_ray.training.tasks import pretrain_task

        songs = read_songs(Workspace(uri), "features/synthetic")
        order = pretrain_task(songs, trained.pretrain).order(0)
        own = worker_rows(order, 0, trained.pretrain.batch_size, rank(), world_size())[:, 0]
        vectors = torch.from_numpy(own).double()[:, None].requires_grad_()
        everyone = gather_rows(vectors)
        (everyone * (rank() + 1)).sum().backward()
        state = {"own": torch.from_numpy(own), "everyone": everyone.detach(), "gradient": vectors.grad}
        torch.save(state, f"{out}/{rank()}.pt")

    scaling = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    run = ray.train.RunConfig(name="ranks", storage_path=str(tmp_path / "run"))
    ray.train.torch.TorchTrainer(worker, scaling_config=scaling, run_config=run).fit()
    first, second = (torch.load(tmp_path / f"{worker_rank}.pt", weights_only=True) for worker_rank in range(2))
    assert len(first["own"]) == len(second["own"]) == 8
    assert not set(first["own"].tolist()) & set(second["own"].tolist())
    assert torch.equal(first["everyone"], second["everyone"])
    assert first["everyone"][:, 0].tolist() == [*first["own"].tolist(), *second["own"].tolist()]
    assert (first["gradient"] == 3).all(), "the gathered rows carry the gradients of both workers' losses"
    assert (second["gradient"] == 3).all()


def test_an_error_of_a_worker_is_one_sentence(trained: Config):
    """A loss that is no number would be the same after a restart, so it ends the run at once."""
    config = trained.with_overrides({"pretrain.learning_rate": 1e30, "pretrain.warmup_share": 0.0, "pretrain.max_gradient_norm": None})
    with pytest.raises(StepError, match=r"^pretrain: the loss of epoch \d is .* lower pretrain\.learning_rate"):
        pretrain(config)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"pretrain.num_workers": 16, "pretrain.batch_size": 16}, ConfigError, r"num_workers × .* is 16 CPUs, .* has 4"),
        ({"text.name_or_path": "no/such/model"}, ConfigError, "text model 'no/such/model' cannot be loaded"),
        ({"audio.n_mels": 17}, MismatchError, r"audio\.n_mels=16, but the configuration says 17"),
    ],
)
def test_pretrain_is_refused_before_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object], error: type[Exception], message: str
):
    write_features(tiny_config(tmp_path))
    monkeypatch.setattr("htcl_ray.pipelines.cluster.connect", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(error, match=message):
        pretrain(tiny_config(tmp_path, **overrides))


def test_finetune_without_pairs_says_what_is_needed(tmp_path: Path):
    config = tiny_config(tmp_path)
    with pytest.raises(WorkspaceError, match=r"holds no features.*preprocess"):
        finetune(config)
    write_features(config)
    with pytest.raises(ConfigError, match=r"preference pairs, but data\.interactions is empty"):
        finetune(config)
    with pytest.raises(WorkspaceError, match=r"holds no preference pairs.*preprocess"):
        finetune(config.with_overrides({"data.interactions": ["log.csv"]}))
    write_pairs(config)
    with pytest.raises(WorkspaceError, match=r"holds no model.*pretrain"):
        finetune(config)


def test_pairs_of_unknown_songs_are_counted_before_training(trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = trained.with_overrides({"finetune.seed": 11})
    write_pairs(config, songs=0, extra=5, version="later")
    try:
        with pytest.raises(WorkspaceError, match=r"pairs/later has 0 usable training pair"):
            finetune(config)
    finally:
        Workspace(config.workspace).remove("pairs/later")
    assert "5 pairs are left out" in capsys.readouterr().out


KILLED = """
import sys
from htcl_ray.pipelines.train import pretrain
from tests.synthetic_features import tiny_config
pretrain(tiny_config(sys.argv[1], **{"pretrain.epochs": int(sys.argv[2])}))
"""


def test_a_killed_run_continues_after_its_last_epoch(tmp_path: Path, ray_cluster: None):
    """The driver and its private cluster are killed mid-run; the same command ends with the weights of a run that was not killed."""
    epochs = 20
    config = tiny_config(tmp_path / "killed", **{"pretrain.epochs": epochs})
    write_features(config)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, config.workspace, str(epochs)], cwd=REPOSITORY, env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not (seen := _epochs(tmp_path / "killed")) or seen[-1] < 3:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no third epoch within 300 s"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(3)  # the private cluster's processes end with their driver
    stopped = _epochs(tmp_path / "killed")
    assert 3 <= stopped[-1] < epochs
    assert not Workspace(config.workspace).finished("models/semantic"), "a killed run looks finished"

    result = pretrain(config)
    assert not result.skipped
    assert _epochs(tmp_path / "killed") == list(range(1, epochs + 1))

    whole = tiny_config(tmp_path / "whole", **{"pretrain.epochs": epochs})
    write_features(whole)
    pretrain(whole)
    weights = [
        HTCL.from_pretrained(Workspace(c.workspace).full(artifacts.models(Workspace(c.workspace)).semantic.path)).state_dict()
        for c in (config, whole)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _epochs(workspace: Path) -> list[int]:
    """Epochs in the run's metrics.jsonl."""
    found = list(workspace.glob("runs/pretrain/*/metrics.jsonl"))
    return [json.loads(line)["epoch"] for line in found[0].read_text().splitlines()] if found else []
