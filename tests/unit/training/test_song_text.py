"""Training texts: which texts a song may have, and that nothing but its place in training decides them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from htcl_ray.config.sections import PretrainSettings
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.batches import BatchLoader, BatchRows
from htcl_ray.training.features import open_frames
from htcl_ray.training.song_numbers import read_songs
from htcl_ray.training.song_text import TextVariation, text_number, vocabulary_texts
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features

pytestmark = pytest.mark.unit

VARIED = PretrainSettings(text_dropout=0.3, short_text_share=0.5, seed=7)
TEXT, TAGS = "Blue; rock; sad; guitar, choir", ("rock", "sad", "guitar", "choir")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> BatchLoader:
    """A loader without augmentation whose songs have tags."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        config = tiny_config(folder / "workspace")
        workspace = Workspace(config.workspace)
        path = write_features(config)
        songs = read_songs(workspace, path)
        manifest = workspace.manifest(path)
        assert manifest is not None
        model = HTCL.untrained(config, train_wordpiece([*songs.texts, *TAGS], 100))
        tagged = replace(songs, tags=[TAGS[row % 4 :] for row in range(len(songs.song_ids))])
        return BatchLoader(tagged, open_frames(workspace, path, manifest, songs), model.text_encoder, None)


def varied(plain: BatchLoader, settings: PretrainSettings = VARIED) -> BatchLoader:
    return replace(plain, text_variation=TextVariation(settings))


def drawn(settings: PretrainSettings, times: int = 4000, tags: tuple[str, ...] = TAGS) -> Counter[str]:
    variation = TextVariation(settings)
    return Counter(variation.draw(np.random.default_rng(i), TEXT, tags) for i in range(times))


def test_without_variation_a_text_is_the_songs_own(plain: BatchLoader):
    assert drawn(PretrainSettings(), 10) == {TEXT: 10}
    part = BatchRows(0, 0, plain.songs.train[:8, None])
    expected, actual = plain.load(part.songs), varied(plain, PretrainSettings()).load_for_training(part, epoch=0)
    assert (actual.tokens["input_ids"] == expected.tokens["input_ids"]).all()
    assert (actual.ids == expected.ids).all()


def test_columns_are_left_out_with_the_given_probability_and_in_any_order():
    texts = drawn(PretrainSettings(text_dropout=0.3))
    columns = TEXT.split("; ")
    counts: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for text, times in texts.items():
        parts = text.split("; ")
        assert len(set(parts)) == len(parts) >= 1
        assert set(parts) <= set(columns)
        counts.update({part: times for part in parts})
        first[parts[0]] += times
    # A column stays with probability 0.7, and when no column would stay, which has 0.3⁴, one of four.
    for column in columns:
        assert counts[column] / 4000 == pytest.approx(0.7 + 0.3**4 / 4, abs=0.03)
        assert first[column] / 4000 == pytest.approx(0.25, abs=0.03)


def test_short_texts_are_one_to_three_tags_in_a_template():
    settings = PretrainSettings(short_text_share=0.4, short_text_templates=["{tags}", "a {tags} song"])
    texts = drawn(settings)
    assert texts.pop(TEXT) / 4000 == pytest.approx(0.6, abs=0.03)
    sizes: Counter[int] = Counter()
    in_template = 0
    for text, times in texts.items():
        in_template += times * text.startswith("a ")
        tags = text.removeprefix("a ").removesuffix(" song").split()
        assert len(set(tags)) == len(tags)
        assert set(tags) <= set(TAGS)
        sizes[len(tags)] += times
    assert set(sizes) == {1, 2, 3}
    assert min(sizes.values()) > 0.28 * sum(sizes.values())
    assert in_template / sum(sizes.values()) == pytest.approx(0.5, abs=0.04)


def test_a_song_without_tags_keeps_its_text():
    assert drawn(PretrainSettings(short_text_share=1.0), 10, ()) == {TEXT: 10}


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("songs_per_row", [1, 2])
def test_workers_draw_the_texts_of_one_worker(plain: BatchLoader, songs_per_row: int, workers: int):
    loader = varied(plain)
    rows = plain.songs.train[: 12 * songs_per_row].reshape(12, songs_per_row)
    whole = loader.load_for_training(BatchRows(3, 0, rows), epoch=2)
    own = 12 // workers
    parts = [
        loader.load_for_training(BatchRows(3, rank * own, rows[rank * own : (rank + 1) * own]), epoch=2)
        for rank in range(workers)
    ]
    for place in range(songs_per_row):
        ids = np.concatenate([part.ids[place * own : (place + 1) * own, 2] for part in parts])
        assert (ids == whole.ids[place * 12 : (place + 1) * 12, 2].numpy()).all()


def test_texts_differ_between_seeds_epochs_and_steps(plain: BatchLoader):
    part = BatchRows(0, 0, plain.songs.train[:12, None])
    texts = [
        varied(plain, VARIED.model_copy(update={"seed": seed})).load_for_training(replace(part, step=step), epoch).ids
        for seed, epoch, step in ((7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1))
    ]
    assert len({tuple(ids[:, 2].tolist()) for ids in texts}) == 4


def test_equal_texts_have_equal_ids_and_other_ids_stay(plain: BatchLoader):
    """Rows with one drawn text are not each other's negatives, whatever their songs' own texts are."""
    settings = PretrainSettings(short_text_share=1.0, short_text_templates=["{tags}"], seed=3)
    part = BatchRows(0, 0, plain.songs.train[:24, None])
    batch = varied(plain, settings).load_for_training(part, epoch=0)
    tokens = [tuple(row) for row in batch.tokens["input_ids"].tolist()]
    ids = batch.ids[:, 2].tolist()
    pairs = [(i, j) for i in range(24) for j in range(i)]
    assert any(tokens[i] == tokens[j] for i, j in pairs)
    assert all((tokens[i] == tokens[j]) == (ids[i] == ids[j]) for i, j in pairs)
    assert (batch.ids[:, :2].numpy() == plain.songs.ids[part.songs][:, :2]).all()


def test_validation_and_probe_batches_keep_the_songs_texts(plain: BatchLoader):
    songs = plain.songs.train[:6]
    for load in ("load", "load_first_windows"):
        expected, actual = getattr(plain, load)(songs), getattr(varied(plain), load)(songs)
        assert (actual.tokens["input_ids"] == expected.tokens["input_ids"]).all()


def test_the_vocabulary_sees_the_words_of_templates_as_often_as_training():
    settings = PretrainSettings(short_text_share=0.5, short_text_templates=["{tags}", "music with {tags}"])
    texts = vocabulary_texts(["rock"] * 8, settings)
    assert Counter(" ".join(texts).split()) == {"rock": 8, "music": 2, "with": 2}
    assert vocabulary_texts(["rock"], PretrainSettings()) == ["rock"]


def test_text_numbers_are_int64():
    assert 0 <= text_number("sad guitar") < 2**63
    assert text_number("sad guitar") == text_number("sad guitar") != text_number("guitar sad")


def test_a_template_without_a_place_for_tags_is_rejected():
    with pytest.raises(ValidationError, match=r"one is 'music'; expected texts with \{tags\}"):
        PretrainSettings(short_text_templates=["{tags}", "music"])


def test_tags_are_values_of_the_text_columns_that_are_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = tiny_config(tmp_path / "workspace")
    workspace, path = Workspace(config.workspace), write_features(config)
    for file in Path(workspace.full(path)).glob("*.parquet"):
        table = pq.read_table(file)
        genre = [[text.split()[0]] for text in table["text"].to_pylist()]
        for name, values in (("genre", genre), ("tags", [["choir", *of[:1]] for of in genre])):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
        pq.write_table(table, file)
    songs = read_songs(workspace, path, ("title", "tags", "genre"))
    expected = [tuple(dict.fromkeys(["choir", text.split()[0]])) for text in songs.texts]
    assert list(songs.tags) == expected
    assert list(read_songs(workspace, path, ("title", "genre")).tags) == [(text.split()[0],) for text in songs.texts]
    assert not any(read_songs(workspace, path, ("title",)).tags)
