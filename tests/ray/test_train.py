"""Both stages on a real Ray cluster: two workers, resume after a kill, refusals before anything starts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from htcl_ray.cluster.ray_internals import session_folder, torch_trainer
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, MismatchError, StepError, WorkspaceError
from htcl_ray.models import HTCL
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.train import discard_unusable_checkpoints, finetune, pretrain
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.manifest import file_sha256
from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY
from tests.worlds.in_process_training import training_in_process
from tests.worlds.synthetic_features import tiny_config, write_features, write_negatives, write_pairs

pytestmark = pytest.mark.ray


STAGE_1 = {
    "pretrain.epochs": 12,
    "pretrain.checkpoint_every_steps": 1,
    "pretrain.best_metric": "validation_median_rank",
    "pretrain.keep_checkpoints": 2,
}
"""Enough steps to be killed between two of them; ranks of twelve validation songs go up and down."""


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    """Standard output of `trained`."""
    return io.StringIO()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, printed: io.StringIO) -> Config:
    """A workspace in which both stages have run, on two workers."""
    config = tiny_config(tmp_path_factory.mktemp("trained"), **STAGE_1)
    write_features(config)
    write_pairs(config, extra=2)
    with contextlib.redirect_stdout(printed):
        first = pretrain(config)
        second = finetune(config)
    assert not first.skipped
    assert not second.skipped
    return config


def test_models_are_published_with_their_inputs(trained: Config):
    workspace = Workspace(trained.workspace)
    models = inputs.models(workspace, trained, "synthetic")
    assert models.preference is not None
    assert models.semantic.manifest["inputs"] == {"features": "synthetic"}
    assert models.preference.manifest["inputs"] == {
        "features": "synthetic",
        "pairs": "pairs",
        "model": models.semantic.version,
    }
    for stage, artifact in enumerate((models.semantic, models.preference), start=1):
        folder = Path(workspace.full(artifact.path))
        assert HTCL.from_pretrained(folder).stage == stage
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
            "manifest.json"
        }
        assert (
            set(artifact.manifest["files"])
            == present
            >= {"model.safetensors", "config.json", "README.md", "tokenizer/tokenizer.json"}
        )
        assert all(file_sha256(folder / name) == sha for name, sha in artifact.manifest["files"].items())
        assert artifact.manifest["config"] == trained.model_dump(mode="json")
        assert {"loss", "validation_recall@10", "validation_median_rank"} <= set(artifact.manifest["quality"])


def test_runs_leave_their_figures(trained: Config):
    workspace = Workspace(trained.workspace)
    models = inputs.models(workspace, trained, "synthetic")
    assert models.preference is not None
    for artifact, epochs in ((models.semantic, trained.pretrain.epochs), (models.preference, trained.finetune.epochs)):
        run = Path(workspace.full(artifact.manifest["run"]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
        assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.usefixtures("trained")
def test_a_run_on_a_private_cluster_starts_no_other_process():
    logs = [log.read_text(errors="replace") for log in (Path(session_folder()) / "logs").glob("worker-*.out")]
    actors = {name for log in logs for name in re.findall(r":actor_name:(\w+)", log)}
    assert actors >= {"PrivateController", "RayTrainWorker", "SynchronizationActor"}
    unneeded = {"DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher", "_AutoscalingCoordinatorActor"}
    assert not actors & unneeded


def test_finished_stages_are_skipped(trained: Config):
    assert pretrain(trained).skipped
    assert finetune(trained).skipped


def test_stage_2_of_another_configuration_is_refused(trained: Config):
    with pytest.raises(MismatchError, match=r"model\.dim=16, but the configuration says 8"):
        finetune(trained.with_overrides({"model.dim": 8, "finetune.seed": 5}))


def test_two_ranks_see_different_songs_and_one_set_of_negatives(trained: Config, tmp_path: Path):
    """In workers as the pipeline starts them: each encodes its own songs, both compare with the same gathered
    candidates."""
    import ray.train

    uri, out = trained.workspace, str(tmp_path)

    def worker() -> None:
        from htcl_ray.losses.collectives import gather_rows, rank, world_size
        from htcl_ray.training.order import worker_rows
        from htcl_ray.training.song_numbers import read_songs
        from htcl_ray.training.stage_tasks import pretrain_task

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
    torch_trainer()(worker, scaling_config=scaling, run_config=run).fit()
    first, second = (torch.load(tmp_path / f"{worker_rank}.pt", weights_only=True) for worker_rank in range(2))
    assert len(first["own"]) == len(second["own"]) == 8
    assert not set(first["own"].tolist()) & set(second["own"].tolist())
    assert torch.equal(first["everyone"], second["everyone"])
    assert first["everyone"][:, 0].tolist() == [*first["own"].tolist(), *second["own"].tolist()]
    assert (first["gradient"] == 3).all(), "the gathered rows carry the gradients of both workers' losses"
    assert (second["gradient"] == 3).all()


def test_an_error_of_a_worker_is_one_sentence(trained: Config):
    """A loss that is no number would be the same after a restart, so it ends the run at once. With real workers:
    tests/ray/test_tune.py."""
    config = trained.with_overrides(
        {
            "pretrain.learning_rate": 1e30,
            "pretrain.warmup_share": 0.0,
            "pretrain.max_gradient_norm": None,
            "pretrain.num_workers": 1,
        }
    )
    message = r"^pretrain: the gradient of step \d+ has norm .* lower pretrain\.learning_rate"
    with training_in_process(), pytest.raises(StepError, match=message):
        pretrain(config)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"pretrain.num_workers": 16, "pretrain.batch_size": 16},
            ConfigError,
            r"num_workers × .* is 16 CPUs, .* has 4",
        ),
        ({"text.name_or_path": "no/such/model"}, ConfigError, "text model 'no/such/model' cannot be loaded"),
        ({"pretrain.best_metric": "validation_pair_recall@10"}, ConfigError, "stage 1 has no pairs"),
        ({"audio.n_mels": 17}, MismatchError, r"audio\.n_mels=16, but the configuration says 17"),
    ],
)
def test_pretrain_is_refused_before_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object], error: type[Exception], message: str
):
    write_features(tiny_config(tmp_path))
    monkeypatch.setattr("htcl_ray.cluster.connection.connect", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(error, match=message):
        pretrain(tiny_config(tmp_path, **overrides))


def test_finetune_without_pairs_says_what_is_needed(tmp_path: Path):
    config = tiny_config(tmp_path)
    with pytest.raises(WorkspaceError, match=r"holds no features.*preprocess"):
        finetune(config)
    write_features(config)
    with pytest.raises(ConfigError, match=r"preference pairs, but data\.interactions is empty"):
        finetune(config)
    (tmp_path / "log.csv").write_text("user_id,song_id,weight\nu,song-0000,1\n")
    with pytest.raises(WorkspaceError, match=r"holds no pairs of .*log\.csv .*run 'htcl preprocess'"):
        finetune(config.with_overrides({"data.interactions": [str(tmp_path / "log.csv")]}))
    write_pairs(config)
    with pytest.raises(WorkspaceError, match=r"holds no model.*pretrain"):
        finetune(config)


def without_pairs(trained: Config, folder: Path) -> Config:
    """The same features and semantic model in a workspace of their own."""
    for kept in ("features", "models/semantic"):
        shutil.copytree(f"{trained.workspace}/{kept}", folder / kept)
    return trained.with_overrides({"workspace": str(folder)})


def test_a_best_metric_that_no_epoch_would_have_is_refused(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("htcl_ray.cluster.connection.connect", lambda config: pytest.fail("Ray was started"))
    config = without_pairs(trained, tmp_path / "workspace")
    write_pairs(config, songs=18)  # training songs only
    with pytest.raises(ConfigError, match="no pair has both songs in the validation gallery"):
        finetune(config.with_overrides({"finetune.best_metric": "validation_pair_recall@10"}))


def test_pairs_of_unknown_songs_are_counted_before_training(
    trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = without_pairs(trained, tmp_path / "workspace")
    write_pairs(config, songs=0, extra=5)
    with pytest.raises(WorkspaceError, match=r"pairs/pairs has 0 usable training pair"):
        finetune(config)
    assert "5 pairs are left out" in capsys.readouterr().out


def test_explicit_negatives_are_refused_without_rejected_songs(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With them, and with another loss than stage 1, stage 2 trains: tests/end_to_end/test_jobs.py."""
    config = without_pairs(trained, tmp_path / "workspace").with_overrides({"finetune.explicit_negatives": True})
    write_pairs(config)
    monkeypatch.setattr("htcl_ray.cluster.connection.connect", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(
        WorkspaceError, match=r"negatives/pairs, which finetune\.explicit_negatives needs, .*run 'htcl preprocess'"
    ):
        finetune(config)
    write_negatives(config, [(0, 3, 1.0)])
    with pytest.raises(WorkspaceError, match="give a log with skips or dislikes"):
        finetune(config)


def test_a_killed_run_continues_after_its_last_checkpoint(trained: Config, tmp_path: Path):
    """The driver and its private cluster are killed mid-run; the same command ends with the weights of a run that was
    not killed: that of `trained`.

    Stage 2 differs in its batches only, and resumes bit for bit at every step: tests/distributed/test_resume.py.
    """
    config = trained.with_overrides({"workspace": str(tmp_path / "killed"), "ray.num_cpus": 4})
    shutil.copytree(Path(trained.workspace) / "features", Path(config.workspace) / "features")
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "htcl_ray.cli", "pretrain", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    runs = tmp_path / "killed/runs/pretrain"
    epochs = config.pretrain.epochs
    try:
        deadline = time.monotonic() + 300
        while _stored(runs) < 4:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no fourth checkpoint within 300 s"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(3)  # the private cluster's processes end with their driver
    assert 4 <= _stored(runs) < epochs * 2
    assert not Workspace(config.workspace).finished("models/semantic"), "a killed run looks finished"

    assert not pretrain(config).skipped
    weights = []
    for workspace in (Workspace(config.workspace), Workspace(trained.workspace)):
        ((version, manifest),) = workspace.finished("models/semantic")
        lines = workspace.read_bytes(f"{manifest['run']}/metrics.jsonl").decode().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epochs + 1))
        weights.append(HTCL.from_pretrained(workspace.full(f"models/semantic/{version}")).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _stored(runs: Path) -> int:
    """Checkpoints that Ray Train has on record in the one run of a folder."""
    snapshots = list(runs.glob("*/checkpoint_manager_snapshot.json"))
    try:
        return json.loads(snapshots[0].read_text())["current_report_index"] if snapshots else 0
    except ValueError:  # being written
        return 0


def test_the_best_epoch_is_published(trained: Config, printed: io.StringIO):
    """Checkpoints within epochs have no metrics and are never chosen."""
    workspace = Workspace(trained.workspace)
    model = artifacts.newest_semantic(workspace, "failed")
    lines = [
        json.loads(line)
        for line in workspace.read_bytes(f"{model.manifest['run']}/metrics.jsonl").decode().splitlines()
    ]
    quality = model.manifest["quality"]
    assert quality["validation_median_rank"] == min(line["validation_median_rank"] for line in lines)
    assert quality["loss"] == next(line["loss"] for line in lines if line["epoch"] == quality["epoch"])
    assert f"epoch {quality['epoch']} had the best validation_median_rank" in printed.getvalue()
    kept = list(Path(workspace.full(model.manifest["run"])).glob("checkpoint_2*"))
    assert 2 <= len(kept) <= 3, "the two best and the newest"


def test_a_damaged_list_of_checkpoints_starts_again(
    trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = trained.with_overrides({"workspace": str(tmp_path / "workspace")})
    shutil.copytree(trained.workspace, config.workspace)
    workspace = Workspace(config.workspace)
    model = inputs.models(workspace, config, "synthetic").preference
    assert model is not None
    run = model.manifest["run"]
    record = Path(workspace.full(run)) / "checkpoint_manager_snapshot.json"
    intact = record.read_text()
    discard_unusable_checkpoints(workspace, run, "finetune")
    assert record.read_text() == intact
    record.write_text(intact[:40])
    discard_unusable_checkpoints(workspace, run, "finetune")
    assert not record.exists()
    record.write_text(intact.replace("checkpoint_2", "checkpoint_1"))  # names an absent folder
    workspace.remove(model.path)
    with training_in_process():
        assert not finetune(config).skipped
    assert capsys.readouterr().out.count("is damaged or names missing ones; training starts again") == 2


def test_both_stages_start_from_earlier_models(trained: Config, capsys: pytest.CaptureFixture[str]):
    """Without a learning rate the published weights are those of the source, through the workspace."""
    workspace = Workspace(trained.workspace)
    models = inputs.models(workspace, trained, "synthetic")
    assert models.preference is not None
    still = {
        f"{step}.{key}": value
        for step in ("pretrain", "finetune")
        for key, value in {"learning_rate": 1e-30, "text_learning_rate": 1e-30, "epochs": 1, "num_workers": 1}.items()
    }
    still |= {"finetune.audio_learning_rate": 1e-30, "finetune.pairs_per_epoch": 16, "pretrain.best_metric": None}
    config = trained.with_overrides(still)
    again = config.with_overrides({"finetune.warm_start": models.preference.version})
    with training_in_process():
        first = pretrain(config.with_overrides({"pretrain.warm_start": models.semantic.version}))
        second = finetune(again, models.semantic.version)
    assert f"starts from {models.semantic.version}: audio tower" in capsys.readouterr().out
    for result, source in ((first, models.semantic), (second, models.preference)):
        assert not result.skipped
        artifact = workspace.manifest(f"models/{'semantic' if result is first else 'preference'}/{result.version}")
        assert artifact is not None
        assert artifact["inputs"]["warm_start"] == source.version
        made = HTCL.from_pretrained(Path(result.location)).state_dict()
        for name, value in HTCL.from_pretrained(Path(workspace.full(source.path))).state_dict().items():
            assert torch.equal(made[name], value), name
    assert finetune(again, models.semantic.version).skipped
