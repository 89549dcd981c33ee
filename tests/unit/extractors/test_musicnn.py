"""musicnn: the reader of its checkpoint, its architecture, and its vectors of real audio."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from htcl_ray.audio import decode
from htcl_ray.catalog.auto_tags import VALUES
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import InputError, MismatchError
from htcl_ray.extractors.base import load_extractor
from htcl_ray.extractors.families import tags_of_encoder
from htcl_ray.extractors.musicnn import Musicnn, convert
from htcl_ray.extractors.tensorflow_checkpoint import read_checkpoint
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

FOLDER = REPOSITORY / ".models" / "musicnn"
needs_weights = pytest.mark.skipif(not FOLDER.is_dir(), reason="run 'make pretrained-audio' first")


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries: dict[bytes, bytes]) -> bytes:
    """A block of a sorted string table, with the prefixes that keys share left out, as LevelDB writes it."""
    out, last = b"", b""
    for key in sorted(entries):
        shared = len([1 for a, b in zip(key, last, strict=False) if a == b]) if key[:1] == last[:1] else 0
        while key[:shared] != last[:shared]:
            shared -= 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(entries[key])) + key[shared:] + entries[key]
        last = key
    return out + struct.pack("<II", 0, 1)


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray], kind: int = 0) -> tuple[Path, Path]:
    raw, entries = b"", {b"": field(1, 1)}
    for name, tensor in tensors.items():
        shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
        data = tensor.astype("<f4").tobytes()
        entries[name.encode()] = (
            field(1, 1) + field(2, shape) + field(4, len(raw)) + field(5, len(data)) + varint(6 << 3 | 5) + b"\0\0\0\0"
        )
        raw += data
    body = block(entries)
    trailer = bytes([kind]) + b"\0\0\0\0"
    index = block({b"~": varint(0) + varint(len(body))})
    start = len(body) + len(trailer)
    footer = (varint(0) + varint(0) + varint(start) + varint(len(index))).ljust(40, b"\0")
    table = body + trailer + index + trailer + footer + bytes.fromhex("57fb808b247547db")
    (folder / "x.index").write_bytes(table)
    (folder / "x.data").write_bytes(raw)
    return folder / "x.index", folder / "x.data"


def test_a_checkpoint_is_read(tmp_path: Path):
    generator = np.random.default_rng(0)
    tensors = {
        "conv/bias": generator.normal(size=3),
        "conv/kernel": generator.normal(size=(300, 2, 1)),
        "step": np.array(4.0),
    }
    read = read_checkpoint(*write_checkpoint(tmp_path, tensors))
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor.astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table[:-1], "does not end with the number"),
        (lambda table: b"\xff" * 40 + table[40:], "no TensorFlow checkpoint that this reader knows"),
        (lambda table: b"", "does not end with the number"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage, message: str):
    index, data = write_checkpoint(tmp_path, {"a": np.ones(4)})
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(MismatchError, match=message):
        read_checkpoint(index, data)


def test_a_checkpoint_that_is_compressed_or_cut_off_is_refused(tmp_path: Path):
    with pytest.raises(MismatchError, match="compressed or cut off"):
        read_checkpoint(*write_checkpoint(tmp_path, {"a": np.ones(4)}, kind=1))
    index, data = write_checkpoint(tmp_path, {"a": np.ones(4)})
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(MismatchError, match=r"a has shape \[4\] and 16 bytes from 0 of 15"):
        read_checkpoint(index, data)
    with pytest.raises(MismatchError, match="cannot be read; expected a TensorFlow checkpoint"):
        read_checkpoint(tmp_path / "none", data)


def test_no_window_changes_another():
    """Batch norm uses the statistics of the weights, never those of the batch."""
    torch.manual_seed(0)
    model = Musicnn().eval()
    mel = torch.rand(3, 187, 96)
    with torch.no_grad():
        together, alone = model(mel)[0], torch.cat([model(window[None])[0] for window in mel])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@needs_weights
def test_real_audio_has_the_vectors_of_the_original(shared_data: Path):
    """Some clips of music and of ESC-10, against vectors that musicnn 0.1.0 itself computed."""
    recipe = AudioRecipe(name_or_path=str(FOLDER), clip_seconds=30)
    extractor = load_extractor(recipe)
    decoding = recipe.model_copy(update={"sample_rate": extractor.record.sample_rate})
    for table, folder, step in (("music_vectors", "music", 22), ("esc10_vectors", "esc10", 80)):
        expected = pq.read_table(shared_data / f"{table}.parquet").sort_by("song_id").to_pydict()
        paths = audio_paths(shared_data / f"{folder}.csv")
        ids = expected["song_id"][::step]
        waveforms = [decode(str(shared_data / paths[song_id]), decoding) for song_id in ids]
        for song_id, rows, given in zip(ids, extractor.embed(waveforms), expected["vector"][::step], strict=True):
            mean, other = rows.mean(axis=0), np.array(given)
            cosine = mean @ other / np.linalg.norm(mean) / np.linalg.norm(other)
            assert cosine >= 0.999, song_id


def audio_paths(table: Path) -> dict[str, str]:
    with open(table, encoding="utf-8", newline="") as file:
        return {row.get("song_id") or row["clip_id"]: row["audio_path"] for row in csv.DictReader(file)}


@needs_weights
def test_a_clip_shorter_than_a_window_is_repeated():
    extractor = load_extractor(AudioRecipe(name_or_path=str(FOLDER)))
    assert extractor.record.licence == "isc"
    second = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    vectors = extractor.embed([second])[0]
    assert vectors.shape == (1, 200)
    whole = extractor.embed([np.tile(second, 3)])[0]
    cosine = float(vectors[0] @ whole[0] / np.linalg.norm(vectors[0]) / np.linalg.norm(whole[0]))
    assert cosine > 0.98


@needs_weights
def test_tags_of_real_music_are_the_stated_ones(shared_data: Path):
    """Scores equal the last layer in NumPy; solo trumpet and vibraphone are jazz, and two songs are sung and folk."""
    extractor = load_extractor(AudioRecipe(name_or_path=str(FOLDER)))
    tags = tags_of_encoder(FOLDER, extractor.record)
    assert (len(tags), tags[0], tags[-1]) == (50, "rock", "happy")
    table = pq.read_table(shared_data / "music_vectors.parquet")
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    scores = extractor.tag_scores(vectors)
    weights = load_file(FOLDER / "model.safetensors")
    logits = vectors.astype(np.float64) @ weights["tags.weight"].T.astype(np.float64) + weights["tags.bias"]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-6)

    songs = dict(zip(table["song_id"].to_pylist(), scores, strict=True))
    with open(shared_data / "music.csv", encoding="utf-8", newline="") as file:
        stated = list(csv.DictReader(file))
    for song in stated:
        of_song = dict(zip(tags, songs[song["song_id"]].tolist(), strict=True))
        if song["genre"] == "Jazz":
            assert max(of_song, key=of_song.__getitem__) == "jazz"
        if song["genre"] == "Folk":
            genres = [tag for tag in of_song if VALUES.get(tag, ("",))[0] == "genre"]
            assert max(genres, key=of_song.__getitem__) == "folk"
            assert of_song["female vocalists"] > of_song["instrumental"]
    assert sum(song["genre"] in ("Jazz", "Folk") for song in stated) == 4


def test_another_package_is_not_converted(tmp_path: Path):
    package, out = tmp_path / "package", tmp_path / "out"
    (package / "MSD_musicnn").mkdir(parents=True)
    written = write_checkpoint(tmp_path, {"batch_normalization/gamma": np.ones(1, np.float32)})
    for file, name in zip(written, (".index", ".data-00000-of-00001"), strict=True):
        file.rename(package / "MSD_musicnn" / name)
    with pytest.raises(InputError, match=r"package is not the unpacked package musicnn 0\.1\.0: .*beta"):
        convert(package, out)
    assert not out.exists()
