"""Vector checks on tiny models, intact and broken, judged by the shipped gate."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from htcl_ray.audio import log_mel
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.gate import GateVerdict, judge, read_gate
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import MetricKey, estimates
from htcl_ray.evaluation.vector_checks import index_task, vector_check_tasks
from htcl_ray.index.vectors import Vectors
from htcl_ray.models import HTCL
from htcl_ray.search.encoder import SongEncoder
from tests.worlds.small_workspace import SONGS, small_config, song_id, sound, text_of, write_models

pytestmark = pytest.mark.unit

ROWS = np.arange(SONGS)
TEXTS = [text_of(i) for i in range(SONGS)]


@dataclasses.dataclass(frozen=True)
class World:
    """Songs of an evaluation: vectors that an encoder computed from features, and the waveforms."""

    songs: EvaluatedSongs
    mels: list[np.ndarray]
    waveforms: list[np.ndarray | None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[HTCL]:
    """Two stages whose last layers are fitted in closed form: audio vectors lie around 0, and each text's is that of
    its song."""
    folder = tmp_path_factory.mktemp("models")
    config = small_config(folder / "workspace")
    write_models(config, folder)
    stages = ("semantic", "preference")
    models = [HTCL.from_pretrained(str(folder / "workspace" / "models" / name / f"{name}-0")).eval() for name in stages]
    mels = [
        torch.from_numpy(log_mel(sound(i, config.audio), config.audio.sample_rate, config.audio)) for i in range(SONGS)
    ]
    for model in models:
        with torch.no_grad():
            audio = torch.cat([model.encode_audio(mel[None], torch.tensor([len(mel)])) for mel in mels])
            model.audio_head[-1].bias -= audio.mean(dim=0)
            hidden = model.text_head[:-1](model.text_encoder(model.text_encoder.tokenize(TEXTS)))
            with_one = torch.cat([hidden, torch.ones(SONGS, 1)], dim=1).double()
            fitted = torch.linalg.lstsq(with_one, (audio - audio.mean(dim=0)).double(), driver="gelsd").solution.float()
            model.text_head[-1].weight.copy_(fitted[:-1].T)
            model.text_head[-1].bias.copy_(fitted[-1])
    return models


def encoder_of(models: list[HTCL], kind: type[SongEncoder] = SongEncoder) -> SongEncoder:
    return kind(*models, {"semantic": "s", "preference": "p"})


@pytest.fixture(scope="module")
def encoder(models: list[HTCL]) -> SongEncoder:
    return encoder_of(models)


def world(encoder: SongEncoder, recipe: AudioRecipe | None = None, seconds: float | None = None) -> World:
    """`recipe`: of the features, where it is not the encoder's."""
    own, stored = encoder.recipe, recipe or encoder.recipe
    waveforms = [sound(i, own, seconds) for i in range(SONGS)]
    mels = [log_mel(waveform, own.sample_rate, stored).astype(np.float16).astype(np.float32) for waveform in waveforms]
    vectors = encoder.encode_songs(mels)
    assert vectors.preference is not None
    spaces = {"semantic": vectors.semantic, "preference": vectors.preference}
    groups = [f"group {i}" for i in range(SONGS)]
    songs = EvaluatedSongs(
        [song_id(i) for i in range(SONGS)],
        TEXTS,
        np.array(["test"] * SONGS),
        groups,
        pa.table({}),
        spaces,
        np.zeros((SONGS, 2)),
    )
    return World(songs, mels, waveforms)


def measure(encoder: SongEncoder, of: World) -> dict[MetricKey, Estimate]:
    tasks = vector_check_tasks(encoder, of.songs, of.mels, ROWS, TEXTS, of.waveforms, seed=0)
    return estimates(tasks) | text_to_audio(encoder, of)


def text_to_audio(encoder: SongEncoder, of: World) -> dict[MetricKey, Estimate]:
    """MRR and recall@10 of each text for its own song, equal scores at the middle of their ranks, and of a random
    order."""
    draws = bootstrap.draw(TEXTS, 200, seed=0)
    text_vectors = encoder.encode_texts(TEXTS)
    metrics = {}
    ranks = {"random": np.full(SONGS, np.nan)}
    for space, vectors in (("semantic", text_vectors.semantic), ("preference", text_vectors.preference)):
        scores = np.round(vectors @ of.songs.spaces[space].T, 5)
        own = scores.diagonal()[:, None]
        ranks[space] = 1 + (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    for method, rank in ranks.items():
        chance = method == "random"
        reciprocal = np.full(SONGS, (1 / np.arange(1, SONGS + 1)).mean()) if chance else 1 / rank
        recall = np.full(SONGS, 10 / SONGS) if chance else (rank <= 10).astype(float)
        metrics["text_to_audio", method, "mrr"] = bootstrap.mean(reciprocal, draws)
        metrics["text_to_audio", method, "recall@10"] = bootstrap.mean(recall, draws)
    return metrics


def failed(verdict: GateVerdict) -> set[str]:
    return {result.bound.figure for result in verdict.failed}


GATE = read_gate("default")


def test_an_intact_model_passes(encoder: SongEncoder):
    verdict = judge(GATE, measure(encoder, world(encoder)))
    assert failed(verdict) == set()
    judged = {result.bound.figure for result in verdict.results if result.value is not None}
    assert {name for name in judged if name.startswith("determinism")} == {
        f"determinism.{space}.{metric}_difference"
        for space in ("semantic", "preference")
        for metric in ("repeat", "batch", "padding", "stored", "from_audio")
    }
    assert len([name for name in judged if name.startswith("collapse")]) == 8


@pytest.mark.parametrize("stage", [0, 1])
def test_a_collapsed_text_tower_is_detected(models: list[HTCL], stage: int):
    models = copy.deepcopy(models)
    broken = encoder_of(models)
    with torch.no_grad():
        models[stage].text_head[-1].weight.zero_()
    space = ("semantic", "preference")[stage]
    failures = failed(judge(GATE, measure(broken, world(broken))))
    assert {f"collapse.{space}.text_mean_cosine", f"collapse.{space}.text_effective_rank"} <= failures
    assert (
        {"text_to_audio.semantic.mrr"} <= failures if stage == 0 else {"text_to_audio.preference.recall@10"} <= failures
    )
    assert not any("audio_mean" in name or "determinism" in name for name in failures)


def test_a_collapsed_audio_tower_is_detected(models: list[HTCL]):
    models = copy.deepcopy(models)
    broken = encoder_of(models)
    with torch.no_grad():
        models[0].audio_head[-1].weight.zero_()
        models[0].audio_head[-1].bias.fill_(1)
    failures = failed(judge(GATE, measure(broken, world(broken))))
    assert {"collapse.semantic.audio_mean_cosine", "collapse.semantic.audio_effective_rank"} <= failures


class ReadsPadding(SongEncoder):
    """Treats padding as audio."""

    def encode_features(self, mel: np.ndarray, valid_frames: np.ndarray) -> Vectors:
        return super().encode_features(mel, np.full(len(mel), mel.shape[1]))


class UsesOneFrameMore(SongEncoder):
    """Adds a tenth of the frame behind the clip to its last frame: silent while padding is zeros."""

    def encode_features(self, mel: np.ndarray, valid_frames: np.ndarray) -> Vectors:
        mel = mel.copy()
        for clip, frames in zip(mel, valid_frames, strict=True):
            if frames < len(clip):
                clip[frames - 1] += 0.1 * clip[frames]
        return super().encode_features(mel, valid_frames)


class Unmasked(nn.Module):
    """A transformer layer whose tokens attend to padding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        return self.layer(x, None)


def without_mask(models: list[HTCL]) -> SongEncoder:
    models = copy.deepcopy(models)
    model = models[0]
    model.audio_encoder.layers = nn.ModuleList(Unmasked(layer) for layer in model.audio_encoder.layers)
    return encoder_of(models)


def test_use_of_padding_is_detected(models: list[HTCL]):
    broken = encoder_of(models, ReadsPadding)
    failures = failed(judge(GATE, measure(broken, world(broken))))
    assert {
        f"determinism.{space}.{name}_difference"
        for space in ("semantic", "preference")
        for name in ("batch", "padding")
    } <= failures


def test_use_of_padding_is_detected_although_zeros_would_hide_it(models: list[HTCL]):
    broken = encoder_of(models, UsesOneFrameMore)
    assert failed(judge(GATE, measure(broken, world(broken)))) == {
        "determinism.semantic.padding_difference",
        "determinism.preference.padding_difference",
    }


@pytest.mark.parametrize("seconds", [None, 1.5])
def test_attention_to_padding_is_detected_for_clips_of_equal_length_too(
    encoder: SongEncoder, models: list[HTCL], seconds: float | None
):
    intact = world(encoder, seconds=seconds)
    assert (len({len(mel) for mel in intact.mels}) == 1) == (seconds is not None)
    assert measure(encoder, intact)["determinism", "semantic", "padding_difference"].value < 1e-4
    broken = without_mask(models)
    failures = failed(judge(GATE, measure(broken, world(broken, seconds=seconds))))
    assert "determinism.semantic.padding_difference" in failures
    assert not any(name.startswith("determinism.preference") for name in failures)


@pytest.mark.parametrize("change", [{"n_fft": 512}, {"hop_length": 768}, {"top_db": 40.0}])
def test_features_with_other_audio_settings_are_detected(encoder: SongEncoder, change: dict):
    wrong = encoder.recipe.model_copy(update=change)
    failures = failed(judge(GATE, measure(encoder, world(encoder, wrong))))
    assert {name for name in failures if name.startswith("determinism")} == {
        "determinism.semantic.from_audio_difference",
        "determinism.preference.from_audio_difference",
    }


def test_vectors_of_another_model_are_detected(encoder: SongEncoder):
    of = world(encoder)
    swapped = dataclasses.replace(
        of.songs, spaces={"semantic": of.songs.spaces["semantic"][::-1], "preference": of.songs.spaces["preference"]}
    )
    failures = failed(judge(GATE, measure(encoder, dataclasses.replace(of, songs=swapped))))
    assert "determinism.semantic.stored_difference" in failures
    assert "determinism.preference.stored_difference" not in failures


def test_unreadable_files_are_left_out(encoder: SongEncoder):
    of = world(encoder)
    some = dataclasses.replace(of, waveforms=[None, *of.waveforms[1:]])
    metrics = measure(encoder, some)
    assert metrics["determinism", "semantic", "from_audio_difference"].n == SONGS - 1
    assert metrics["determinism", "semantic", "from_audio_difference"].value < 0.05
    none = measure(encoder, dataclasses.replace(of, waveforms=[None] * SONGS))
    assert ("determinism", "semantic", "from_audio_difference") not in none
    assert judge(GATE, none).passed


def test_collapse_uses_one_song_of_each_duplicate_group_of_the_split(encoder: SongEncoder):
    of = world(encoder)
    splits = np.array(["train"] * 4 + ["test"] * (SONGS - 4))
    groups = [f"group {i}" for i in range(SONGS)]
    groups[-1] = groups[-2]
    songs = dataclasses.replace(of.songs, splits=splits, duplicate_groups=groups)
    tasks = vector_check_tasks(encoder, songs, of.mels[5:7], np.array([5, 6]), TEXTS, of.waveforms[5:7], seed=0)
    metrics = estimates(tasks)
    unit = songs.spaces["semantic"][4:-1].astype(np.float64)
    cosines = [unit[a] @ unit[b] for a in range(len(unit)) for b in range(len(unit)) if a != b]
    assert metrics["collapse", "semantic", "audio_mean_cosine"].value == pytest.approx(np.mean(cosines), abs=1e-6)
    assert metrics["collapse", "semantic", "audio_mean_cosine"].n == len(unit)
    assert metrics["collapse", "semantic", "text_mean_cosine"].n == len(TEXTS)


def test_index_task_reports_the_recall_of_the_manifest():
    task = index_task({"quality": {"recall_at_10": 0.97}, "songs": 40})
    assert estimates([task])["index", "index", "recall@10"] == Estimate(0.97, 40)
    assert "index.index.recall@10" not in failed(judge(GATE, estimates([task])))
    worse = index_task({"quality": {"recall_at_10": 0.9}, "songs": 40})
    assert "index.index.recall@10" in failed(judge(GATE, estimates([worse])))
