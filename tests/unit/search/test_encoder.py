"""Encoder of batch embedding, serving and evaluation, with real (untrained) models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from htcl_ray.config import Config
from htcl_ray.errors import InputError, MismatchError
from htcl_ray.index.vectors import Vectors, concatenate
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.pipelines.embed import embed_table, read_vectors
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import SONGS, small_config, song_id, sound, text_of, write_features, write_models

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("models")
    config = small_config(folder / "workspace")
    write_models(config, folder)
    return config


@pytest.fixture(scope="module")
def folders(config: Config) -> tuple[Path, Path]:
    models = Path(config.workspace) / "models"
    return models / "semantic" / "semantic-0", models / "preference" / "preference-0"


@pytest.fixture(scope="module")
def encoder(folders: tuple[Path, Path]) -> SongEncoder:
    return SongEncoder.load(*folders)


def clips_of(config: Config, count: int = 9) -> list[np.ndarray]:
    return [sound(i, config.audio) for i in range(count)]


def test_each_half_equals_its_model_alone(encoder: SongEncoder, folders: tuple[Path, Path], config: Config):
    clips, texts = clips_of(config), [text_of(i) for i in range(5)]
    audio, text_vectors = encoder.encode_waveforms(clips), encoder.encode_texts(texts)
    for folder, actual_audio, actual_text in (
        (folders[0], audio.semantic, text_vectors.semantic),
        (folders[1], audio.preference, text_vectors.preference),
    ):
        model = HTCL.from_pretrained(folder)
        for i, clip in enumerate(clips):
            np.testing.assert_allclose(
                actual_audio[i], model.embed_audio(clip, config.audio.sample_rate).numpy(), atol=1e-5
            )
        for i, text in enumerate(texts):
            np.testing.assert_allclose(actual_text[i], model.embed_text([text]).numpy()[0], atol=1e-5)
    assert audio.semantic.dtype == audio.preference.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(audio.preference, axis=1), 1, atol=1e-5)


def test_vectors_do_not_depend_on_the_batch(encoder: SongEncoder, config: Config):
    clips, texts = clips_of(config), [text_of(i) for i in range(7)] + ["a much longer text " * 6]
    together = encoder.encode_waveforms(clips)
    backwards = encoder.encode_waveforms(clips[::-1])
    for i, clip in enumerate(clips):
        alone = encoder.encode_waveforms([clip])
        np.testing.assert_allclose(together.semantic[i], alone.semantic[0], atol=1e-5)
        np.testing.assert_allclose(backwards.preference[-1 - i], alone.preference[0], atol=1e-5)
    text_vectors = encoder.encode_texts(texts)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(text_vectors.semantic[i], encoder.encode_texts([text]).semantic[0], atol=1e-5)


def test_only_texts_have_coverage(encoder: SongEncoder, config: Config):
    texts = [text_of(0), "\U0001f3b5\U0001f3b6", f"{text_of(0)} \U0001f3b5\U0001f3b6"]
    vectors = encoder.encode_texts(texts)
    letters = sum(character.isalnum() for character in text_of(0))
    assert vectors.text_coverage == pytest.approx([1, 0, letters / (letters + 2)])
    assert vectors.rows(slice(1, 2)).text_coverage.tolist() == [0]
    assert concatenate([vectors.rows(slice(1, 2)), vectors.rows(slice(0, 1))]).text_coverage.tolist() == [0, 1]
    audio = encoder.encode_waveforms(clips_of(config, 2))
    assert audio.text_coverage is None
    assert concatenate([audio, audio]).text_coverage is None


def test_batch_embedding_equals_online_embedding(encoder: SongEncoder, config: Config):
    """Stored log-mels, embedded in batches of 4 as by Ray Data, and one by one as queries."""
    write_features(config)
    features = Workspace(config.workspace).read_tables("features/features-1")
    table = embed_table(features, encoder, batch_size=4)
    assert table["song_id"].to_pylist() == [song_id(i) for i in range(SONGS)]
    mels = features["features"].combine_chunks().to_numpy_ndarray()
    for row, (mel, frames) in enumerate(zip(mels, features["valid_frames"].to_pylist(), strict=True)):
        online = encoder.encode_songs([mel[:frames].astype(np.float32)])
        np.testing.assert_allclose(table["semantic"][row].as_py(), online.semantic[0], atol=1e-5)
        np.testing.assert_allclose(table["preference"][row].as_py(), online.preference[0], atol=1e-5)


class Broken:
    """Encoder that scales the preference vector of one song."""

    def __init__(self, encoder: SongEncoder, mel: np.ndarray, value: float) -> None:
        self.encoder, self.mel, self.value = encoder, mel, value

    def encode_features(self, mels: np.ndarray, valid: np.ndarray, _batch_size: int) -> Vectors:
        vectors = self.encoder.encode_features(mels, valid)
        for row, mel in enumerate(mels):
            if np.array_equal(mel[:3], self.mel[:3]):
                vectors.preference[row] *= self.value
        return vectors


@pytest.mark.parametrize(
    ("value", "actual"), [(np.nan, "numbers that are not finite"), (0.0, "length 0"), (1.1, "length 1.1")]
)
def test_rows_without_unit_norm_are_not_written(encoder: SongEncoder, config: Config, value: float, actual: str):
    write_features(config)
    features = Workspace(config.workspace).read_tables("features/features-1")
    mels = features["features"].combine_chunks().to_numpy_ndarray()
    with pytest.raises(
        InputError, match=f"the preference vector of song '{song_id(6)}' has {actual}; expected unit norm"
    ):
        embed_table(features, Broken(encoder, mels[6], value), batch_size=4)


def test_song_with_invalid_embedding_is_named(encoder: SongEncoder, config: Config, folders: tuple[Path, Path]):
    """Damaged features, and a model with finite weights and vectors that are not finite."""
    write_features(config)
    features = Workspace(config.workspace).read_tables("features/features-1")
    mels = features["features"].combine_chunks().to_numpy_ndarray().copy()
    mels[9, 1, 3] = np.nan
    position = features.schema.get_field_index("features")
    damaged = features.set_column(position, "features", pa.FixedShapeTensorArray.from_numpy_ndarray(mels))
    with pytest.raises(InputError, match=rf"song '{song_id(9)}' cannot be embedded: the log-mel of clip 0 holds NaN"):
        embed_table(damaged, encoder, batch_size=4)
    model = HTCL.from_pretrained(folders[0])
    with torch.no_grad():
        model.audio_head[-1].weight.mul_(1e38)
    with pytest.raises(
        InputError, match=rf"song '{song_id(0)}' cannot be embedded: the stage-1 model gives input 0 a vector that is"
    ):
        embed_table(features, SongEncoder(model, None, {"semantic": "x", "preference": None}), batch_size=4)


def test_stored_vectors_without_unit_norm_are_not_indexed(encoder: SongEncoder, config: Config):
    write_features(config)
    workspace = Workspace(config.workspace)
    table = embed_table(workspace.read_tables("features/features-1"), encoder, batch_size=4)
    workspace.write_table("embeddings/e/shard.parquet", table)
    assert len(read_vectors(workspace, "embeddings/e")[1]) == SONGS
    values = table["semantic"].combine_chunks().flatten().to_numpy().copy()
    values[12 * 5 + 2] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), 12)
    workspace.write_table("embeddings/e/shard.parquet", table.set_column(1, table.schema.field("semantic"), column))
    with pytest.raises(
        InputError, match=f"semantic vector of song '{song_id(5)}' has numbers that are not finite.*'htcl embed' again"
    ):
        read_vectors(workspace, "embeddings/e")


def test_noise_differs_from_the_song(encoder: SongEncoder, config: Config):
    clip = sound(3, config.audio)
    noise = np.random.default_rng(0).normal(scale=clip.std(), size=len(clip)).astype(np.float32)
    song, other = encoder.encode_waveforms([clip]), encoder.encode_waveforms([noise])
    assert float(song.semantic[0] @ other.semantic[0]) < 0.999
    assert float(song.preference[0] @ other.preference[0]) < 0.999


def test_versions_are_weight_fingerprints(encoder: SongEncoder, folders: tuple[Path, Path]):
    assert encoder.model_versions == {
        "semantic": weights_fingerprint(folders[0]),
        "preference": weights_fingerprint(folders[1]),
    }
    assert SongEncoder.load(folders[0]).model_versions["preference"] is None
    with pytest.raises(MismatchError, match=rf"semantic.*{encoder.model_versions['semantic']}.*expected other"):
        encoder.check_versions({"semantic": "other", "preference": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.dim": 14}, r"12 dimensions.*14"),
        ({"audio.hop_length": 800}, r"audio\.hop_length=1536.*800"),
        ({"audio.f_min": 20.0}, r"audio\.f_min=0\.0.*20\.0"),
    ],
)
def test_mismatched_models_are_rejected(
    tmp_path: Path, folders: tuple[Path, Path], config: Config, change, message: str
):
    other = config.with_overrides({**change, "workspace": str(tmp_path / "workspace")})
    write_models(other, tmp_path)
    with pytest.raises(MismatchError, match=message):
        SongEncoder.load(folders[0], tmp_path / "workspace" / "models" / "preference" / "preference-0")
