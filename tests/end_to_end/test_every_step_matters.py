"""Each step's output depends on the one before: spoil one input, and the results change and the metric falls to chance.

One small world, run once as it is and then with noise for audio, an untrained checkpoint, shuffled captions, and a
permuted log.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from htcl_ray.config import Config
from htcl_ray.demo_world import SampleTables, write_sample
from htcl_ray.models import HTCL
from htcl_ray.pipelines import inputs
from htcl_ray.workspace.manifest import file_sha256
from htcl_ray.workspace.storage import Workspace
from tests.worlds.whole_path import Outcome, configuration, rewrite, run_every_step

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("in_process_training")]

TEXT_TO_AUDIO = "text_to_audio.semantic.mrr"
STAGE_TWO_GAIN = "cold.preference.ndcg@10"
RETENTION = ("probe_genre.preference.accuracy", "text_to_audio.preference.recall@10")
"""Bounds of the shipped gate. In a world this small, stage 2 may fail to show its gain or to keep what stage 1 knew."""
WORLD = {"songs": 500, "artists": 100, "users": 400, "seed": 5, "seconds": 4.0}
EPOCHS = {
    "pretrain__epochs": 16,
    "finetune__epochs": 4,
    "finetune__pairs_per_epoch": 2048,
    "finetune__preference_loss_weight": 1.0,
}
"""Of every run but those that show it in less. With worlds of the seeds 5 and 6, the median rank is at .09 and .11 of the
gallery, the probe .54 and .46, and the user AUC .64 and .62."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SampleTables:
    return write_sample(tmp_path_factory.mktemp("world") / "sample", **WORLD)


@pytest.fixture(scope="module")
def query(world: SampleTables) -> tuple[bytes, str]:
    """An upload and a song to ask every run about."""
    files = sorted((world.catalog.parent / "audio").glob("*.wav"), key=lambda path: (-path.stat().st_size, path.name))
    return files[0].read_bytes(), files[1].stem


@pytest.fixture(scope="module")
def baseline_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baseline")


@pytest.fixture(scope="module")
def baseline(
    world: SampleTables, query: tuple[bytes, str], baseline_workspace: Path, in_process_training: None
) -> Outcome:
    return run_every_step(configuration(baseline_workspace, world, **EPOCHS), *query)


def changed_results(one: Outcome, other: Outcome) -> None:
    """Every query's results differ."""
    assert one.results.keys() == other.results.keys()
    for query, songs in one.results.items():
        assert songs != other.results[query], f"the results of '{query}' did not change"


def test_the_small_world_is_learned(baseline: Outcome):
    """So that the falls below mean something. How far stage 2 exceeds stage 1 needs more songs:
    benchmarks/sample_world.py."""
    assert baseline.median_rank_share() < 0.2  # chance 0.5
    assert baseline.probe() > 0.3  # chance 0.1
    assert baseline.user_auc("preference") > 0.6  # chance 0.5
    assert set(baseline.failed_bounds) <= {STAGE_TWO_GAIN, *RETENTION}, "the gate lets the model of stage 1 through"


def test_noise_for_audio(baseline: Outcome, world: SampleTables, query: tuple[bytes, str], tmp_path: Path):
    """The same tables over files of white noise: nothing to learn from."""
    folder = tmp_path / "noise"
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for path in (world.catalog.parent / "audio").glob("*.wav"):
        soundfile.write(folder / "audio" / path.name, 0.1 * rng.standard_normal(64000), 16000)
    tables = SampleTables(rewrite(world.catalog, folder / "catalog.csv", list), world.interactions)
    outcome = run_every_step(configuration(tmp_path / "workspace", tables, **EPOCHS), *query)
    changed_results(baseline, outcome)
    assert 0.35 < outcome.median_rank_share() < 0.65
    assert outcome.probe() < 0.3
    assert outcome.user_auc("preference") < 0.58
    assert TEXT_TO_AUDIO in outcome.failed_bounds


def spoil_checkpoint(config: Config) -> None:
    """Put initial weights into both newest models, the way a run that forgot to save would have."""
    workspace = Workspace(config.workspace)
    chosen = inputs.models(workspace, config, inputs.features(workspace, config).version)
    for number, artifact in enumerate((chosen.semantic, chosen.preference)):
        assert artifact is not None
        folder = workspace.local_copy(artifact.path)
        model = HTCL.from_pretrained(folder)
        torch.manual_seed(number)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        copy = folder.with_name(f"{folder.name}-initial")
        model.save_pretrained(copy)
        (copy / "model.safetensors").replace(folder / "model.safetensors")
        manifest = workspace.read_json(f"{artifact.path}/manifest.json")
        manifest["files"]["model.safetensors"] = file_sha256(folder / "model.safetensors")
        workspace.write_json(f"{artifact.path}/manifest.json", manifest)


def test_initial_checkpoint(
    baseline: Outcome, baseline_workspace: Path, world: SampleTables, query: tuple[bytes, str], tmp_path: Path
):
    """The baseline's models with initial weights."""
    for made in ("features", "events", "pairs", "negatives", "models"):
        shutil.copytree(baseline_workspace / made, tmp_path / made)
    config = configuration(tmp_path, world, **EPOCHS)
    outcome = run_every_step(config, *query, after_training=spoil_checkpoint)
    changed_results(baseline, outcome)
    assert 0.3 < outcome.median_rank_share() < 0.7
    assert TEXT_TO_AUDIO in outcome.failed_bounds


def test_permuted_log(
    baseline: Outcome, baseline_workspace: Path, world: SampleTables, query: tuple[bytes, str], tmp_path: Path
):
    """Songs exchanged throughout the log: as many rows, as skewed, but no user's taste is in the audio any more.

    Features and stage 1 are the baseline's own, and recognised: they do not depend on the log.
    """
    for made in ("features", "models/semantic"):
        shutil.copytree(baseline_workspace / made, tmp_path / "workspace" / made)

    def permute(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        songs = sorted({row["song_id"] for row in rows} | {row["trigger_song_id"] for row in rows})
        shuffled = songs.copy()
        random.Random(0).shuffle(shuffled)
        other = dict(zip(songs, shuffled, strict=True))
        return [
            row | {"song_id": other[row["song_id"]], "trigger_song_id": other[row["trigger_song_id"]]} for row in rows
        ]

    tables = SampleTables(world.catalog, rewrite(world.interactions, tmp_path / "log.csv", permute))
    outcome = run_every_step(configuration(tmp_path / "workspace", tables, **EPOCHS), *query)
    changed_results(baseline, outcome)
    assert outcome.user_auc("preference") < 0.58
    assert STAGE_TWO_GAIN in outcome.failed_bounds
    assert outcome.median_rank_share() == baseline.median_rank_share(), "stage 1 does not depend on the log"


def test_shuffled_captions(baseline: Outcome, world: SampleTables, query: tuple[bytes, str], tmp_path: Path):
    """The negative control of stage 1: texts exchanged between songs."""

    def shuffle(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        words = [{name: row[name] for name in ("genre", "mood", "tags")} for row in rows]
        random.Random(0).shuffle(words)
        return [
            row | other | {"audio_path": str(world.catalog.parent / row["audio_path"])}
            for row, other in zip(rows, words, strict=True)
        ]

    tables = SampleTables(rewrite(world.catalog, tmp_path / "catalog.csv", shuffle), world.interactions)
    outcome = run_every_step(configuration(tmp_path / "workspace", tables, **{**EPOCHS, "finetune__epochs": 1}), *query)
    changed_results(baseline, outcome)
    assert 0.35 < outcome.median_rank_share() < 0.65
    assert TEXT_TO_AUDIO in outcome.failed_bounds
