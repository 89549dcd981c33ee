"""The encoder that batch embedding, serving and evaluation share, with real (untrained) models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from htcl_ray.config import Config
from htcl_ray.errors import MismatchError
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.pipelines.embed import embed_table
from htcl_ray.retrieval.encoder import SongEncoder
from htcl_ray.retrieval.vectors import concatenate
from htcl_ray.storage import Workspace
from tests.small_workspace import SONGS, small_config, song_id, sound, text_of, write_features, write_models

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


def sounds(config: Config, count: int = 9) -> list[np.ndarray]:
    return [sound(i, config.audio) for i in range(count)]


def test_each_half_is_what_its_model_gives_alone(encoder: SongEncoder, folders: tuple[Path, Path], config: Config):
    clips, texts = sounds(config), [text_of(i) for i in range(5)]
    audio, words = encoder.encode_waveforms(clips), encoder.encode_texts(texts)
    for folder, got_audio, got_words in (
        (folders[0], audio.semantic, words.semantic),
        (folders[1], audio.preference, words.preference),
    ):
        model = HTCL.from_pretrained(folder)
        for i, clip in enumerate(clips):
            np.testing.assert_allclose(got_audio[i], model.embed_audio(clip, config.audio.sample_rate).numpy(), atol=1e-5)
        for i, text in enumerate(texts):
            np.testing.assert_allclose(got_words[i], model.embed_text([text]).numpy()[0], atol=1e-5)
    assert audio.semantic.dtype == audio.preference.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(audio.preference, axis=1), 1, atol=1e-5)


def test_vectors_do_not_depend_on_the_batch(encoder: SongEncoder, config: Config):
    clips, texts = sounds(config), [text_of(i) for i in range(7)] + ["a much longer text " * 6]
    together = encoder.encode_waveforms(clips)
    backwards = encoder.encode_waveforms(clips[::-1])
    for i, clip in enumerate(clips):
        alone = encoder.encode_waveforms([clip])
        np.testing.assert_allclose(together.semantic[i], alone.semantic[0], atol=1e-5)
        np.testing.assert_allclose(backwards.preference[-1 - i], alone.preference[0], atol=1e-5)
    words = encoder.encode_texts(texts)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(words.semantic[i], encoder.encode_texts([text]).semantic[0], atol=1e-5)


def test_texts_come_with_their_coverage_and_clips_without(encoder: SongEncoder, config: Config):
    texts = [text_of(0), "\U0001f3b5\U0001f3b6", f"{text_of(0)} \U0001f3b5\U0001f3b6"]
    vectors = encoder.encode_texts(texts)
    letters = sum(character.isalnum() for character in text_of(0))
    assert vectors.text_coverage == pytest.approx([1, 0, letters / (letters + 2)])
    assert vectors.rows(slice(1, 2)).text_coverage.tolist() == [0]
    assert concatenate([vectors.rows(slice(1, 2)), vectors.rows(slice(0, 1))]).text_coverage.tolist() == [0, 1]
    audio = encoder.encode_waveforms(sounds(config, 2))
    assert audio.text_coverage is None
    assert concatenate([audio, audio]).text_coverage is None


def test_batch_embedding_equals_online_for_the_same_mel(encoder: SongEncoder, config: Config):
    """The stored log-mel, through Ray Data's function in batches of 4 and through the query path one by one."""
    write_features(config)
    features = Workspace(config.workspace).read_tables("features/features-1")
    table = embed_table(features, encoder, batch_size=4)
    assert table["song_id"].to_pylist() == [song_id(i) for i in range(SONGS)]
    mels = features["log_mel"].combine_chunks().to_numpy_ndarray()
    for row, (mel, frames) in enumerate(zip(mels, features["valid_frames"].to_pylist(), strict=True)):
        online = encoder.encode_mels([mel[:frames].astype(np.float32)])
        np.testing.assert_allclose(table["semantic"][row].as_py(), online.semantic[0], atol=1e-5)
        np.testing.assert_allclose(table["preference"][row].as_py(), online.preference[0], atol=1e-5)


def test_noise_is_not_the_song(encoder: SongEncoder, config: Config):
    clip = sound(3, config.audio)
    noise = np.random.default_rng(0).normal(scale=clip.std(), size=len(clip)).astype(np.float32)
    song, other = encoder.encode_waveforms([clip]), encoder.encode_waveforms([noise])
    assert float(song.semantic[0] @ other.semantic[0]) < 0.999
    assert float(song.preference[0] @ other.preference[0]) < 0.999


def test_versions_are_those_of_the_weights(encoder: SongEncoder, folders: tuple[Path, Path]):
    assert encoder.model_versions == {"semantic": weights_fingerprint(folders[0]), "preference": weights_fingerprint(folders[1])}
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
def test_two_models_that_do_not_fit_each_other(tmp_path: Path, folders: tuple[Path, Path], config: Config, change, message: str):
    other = config.with_overrides({**change, "workspace": str(tmp_path / "workspace")})
    write_models(other, tmp_path)
    with pytest.raises(MismatchError, match=message):
        SongEncoder.load(folders[0], tmp_path / "workspace" / "models" / "preference" / "preference-0")
