"""What training reads and in which order."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from htcl_ray.errors import StepError, WorkspaceError
from htcl_ray.training.features import Frames, open_frames
from htcl_ray.training.order import global_batch, pair_order, song_order, steps_per_epoch, with_rejected, worker_rows
from htcl_ray.training.song_numbers import (
    known_pair_codes,
    log_draw_probability,
    normalized_text,
    read_pairs,
    read_songs,
)
from htcl_ray.workspace.local_copies import identity
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features, write_negatives, write_pairs

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_songs_are_sorted_and_of_their_splits(tmp_path: Path):
    config = tiny_config(tmp_path / "workspace")
    path = write_features(config, songs=60)
    songs = read_songs(Workspace(config.workspace), path)
    assert songs.song_ids == sorted(songs.song_ids)
    assert len(songs.train) == 36
    assert len(songs.validation) == 12
    assert not set(songs.train) & set(songs.validation)
    for row in songs.train.tolist():
        assert (int(songs.song_ids[row][-4:]) // 6) % 5 < 3
    assert songs.ids[:, 0].tolist() == list(range(48))


def test_equal_texts_and_duplicate_groups_share_numbers(tmp_path: Path):
    config = tiny_config(tmp_path / "workspace")
    path = write_features(config, songs=6)
    workspace = Workspace(config.workspace)
    table = workspace.read_tables(path)
    rows = table.to_pylist()
    for row, (text, group) in zip(
        rows, [("A song", "x"), ("a  SONG ", "y"), ("ａ song", "x"), ("b", "z"), ("c", "z"), ("d", "w")], strict=True
    ):
        row["text"], row["duplicate_group"] = text, group
    columns = {name: [row[name] for row in rows] for name in ("text", "duplicate_group")}
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, [values])
    workspace.write_table(f"{path}/shard-00000.parquet", table)
    songs = read_songs(workspace, path)
    assert songs.ids[:, 1].tolist() == [0, 1, 0, 2, 2, 3]
    assert songs.ids[:, 2].tolist() == [0, 0, 0, 1, 2, 3]
    assert normalized_text(" Straße\tX ") == "strasse x"


def test_frames_are_those_of_the_shards(tmp_path: Path):
    config = tiny_config(tmp_path / "workspace")
    path = write_features(config, songs=60)
    workspace = Workspace(config.workspace)
    manifest = workspace.manifest(path)
    songs = read_songs(workspace, path)
    frames = open_frames(workspace, path, manifest, songs)
    wanted = {row["song_id"]: row for row in workspace.read_tables(path, ["song_id", "valid_frames"]).to_pylist()}
    mels = workspace.read_tables(path, ["song_id", "features"]).sort_by("song_id")
    by_id = dict(zip(mels["song_id"].to_pylist(), mels["features"].combine_chunks().to_numpy_ndarray(), strict=True))
    rows = np.array([30, 2, 2, 47, 0])
    mel, valid = frames.batch(rows)
    assert mel.shape == (5, valid.max(), config.audio.n_mels)
    for row, song, count in zip(mel, rows, valid, strict=True):
        song_id = songs.song_ids[song]
        assert count == wanted[song_id]["valid_frames"]
        assert np.array_equal(row[:count], by_id[song_id][:count])
        assert not row[count:].any()
    assert np.array_equal(open_frames(workspace, path, manifest, songs).batch(rows)[0], mel)  # the existing file
    made = [file.name for file in (tmp_path / "tmp").rglob("*.f16")]
    assert made == ["frames.f16"]


@dataclass
class Source:
    """Features, and how they are opened."""

    workspace: Workspace
    path: str
    root: Path

    def open(self) -> Frames:
        manifest = self.workspace.manifest(self.path)
        assert manifest is not None
        return open_frames(self.workspace, self.path, manifest, read_songs(self.workspace, self.path))

    def left(self) -> set[str]:
        """Kinds of files in the temporary directory."""
        return {re.sub("-[0-9a-f]{16}", "", path.name) for path in self.root.rglob("*")}


WHOLE = {"frames", "frames.lock", "frames.f16", "offsets.npy", "whole.json"}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    config = tiny_config(tmp_path / "workspace")
    root = tmp_path / f"tmp/htcl-{os.getuid()}"
    return Source(Workspace(config.workspace), write_features(config, songs=60), root)


def everything(frames: Frames) -> bytes:
    mel, valid = frames.batch(np.arange(48))
    return mel.tobytes() + valid.tobytes()


def test_frames_are_removed_by_their_last_user(source: Source):
    first, second = source.open(), source.open()
    first.close()
    first.close()
    assert source.left() == WHOLE
    with second:
        assert len(second.batch(np.array([0]))[0]) == 1
    assert source.left() == set()


@pytest.mark.parametrize("cut", [0.0, 0.0001, 0.2, 0.7, 0.999, 1.0])
def test_a_half_written_file_is_completed(source: Source, monkeypatch: pytest.MonkeyPatch, cut: float):
    """Cut anywhere, also within a song: what is whole stays, no shard that is whole is read again, and the result is
    the same."""
    with source.open() as frames:
        expected, folder = everything(frames), frames.folder
        whole = (folder / "frames.f16").read_bytes()
    folder.mkdir()
    (folder / "frames.f16").write_bytes(whole[: int(cut * len(whole))])
    inode = (folder / "frames.f16").stat().st_ino
    read: list[str] = []
    read_table = pq.read_table

    def counted(file: Any, columns: list[str]) -> Any:
        read.append(columns[0])
        return read_table(file, columns=columns)

    monkeypatch.setattr("htcl_ray.training.features.pq.read_table", counted)
    with source.open() as frames:
        assert everything(frames) == expected
        assert (folder / "frames.f16").read_bytes() == whole
        assert (folder / "frames.f16").stat().st_ino == inode
    assert len(read) == {0.0: 2, 0.0001: 2, 0.2: 2, 0.7: 1, 0.999: 1, 1.0: 0}[cut], "of two shards, of 32 and 28 songs"


def test_frames_that_lost_a_part_are_made_again(source: Source, monkeypatch: pytest.MonkeyPatch):
    """Cleaners of temporary directories remove old files one by one. While a run uses them, another one cannot make
    them again."""
    monkeypatch.setattr("htcl_ray.training.features.SECONDS_TO_AGREE", 0.2)
    frames = source.open()
    expected = everything(frames)
    (frames.folder / "frames.f16").unlink()
    with pytest.raises(StepError, match="is damaged while another run uses it"):
        source.open()
    assert everything(frames) == expected
    os.close(frames.lock)  # as the end of a process that was killed
    with source.open() as again:
        assert everything(again) == expected


@pytest.mark.parametrize("name", ["frames.f16", "offsets.npy"])
def test_frames_whose_content_changed_are_made_again(source: Source, name: str):
    """Of the same size, with the file's times put back."""
    frames = source.open()
    expected, file = everything(frames), frames.folder / name
    os.close(frames.lock)  # as the end of a process that was killed
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-2] + b"\x01\x02")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with source.open() as again:
        assert everything(again) == expected


def test_frames_that_another_user_planted_are_not_used(source: Source):
    frames = source.open()
    expected, folder = everything(frames), frames.folder
    os.close(frames.lock)
    (folder / "frames.f16").write_bytes(bytes((folder / "frames.f16").stat().st_size))
    (folder / "whole.json").write_text(json.dumps([identity(folder / name) for name in ("frames.f16", "offsets.npy")]))
    source.root.chmod(0o777)
    with source.open() as again:
        assert everything(again) == expected
        assert again.folder.parent != source.root


def test_a_disk_without_room_is_refused_before_copying(source: Source, monkeypatch: pytest.MonkeyPatch):
    with source.open() as frames:
        size = frames.data.nbytes
    usage = shutil.disk_usage(source.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=size - 1))
    message = rf"^the features of 48 songs need {size:,} bytes in {source.root} on .*, where {size - 1:,} are free; free .* TMPDIR"
    with pytest.raises(StepError, match=message):
        source.open()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=size))
    source.open().close()


def test_an_interrupted_cache_is_made_again(source: Source, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as broken:
        broken.setattr("numpy.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            source.open()
    assert len(source.open().batch(np.arange(36))[0]) == 36


def test_features_that_changed_are_refused(source: Source):
    songs, manifest = read_songs(source.workspace, source.path), source.workspace.manifest(source.path)
    assert manifest is not None
    Path(source.workspace.full(f"{source.path}/shard-00001.parquet")).unlink()
    with pytest.raises(
        WorkspaceError, match=r"changed while it was read: \d+ songs are missing; run 'htcl preprocess' again"
    ):
        open_frames(source.workspace, source.path, manifest, songs)


def test_too_few_songs_are_refused(tmp_path: Path):
    config = tiny_config(tmp_path / "workspace")
    path = write_features(config, songs=1)
    with pytest.raises(WorkspaceError, match="1 song\\(s\\) in the training split"):
        read_songs(Workspace(config.workspace), path)


def test_pairs_are_numbers_and_unknown_songs_are_counted(tmp_path: Path):
    config = tiny_config(tmp_path / "workspace")
    workspace = Workspace(config.workspace)
    songs = read_songs(workspace, write_features(config))
    pairs = read_pairs(workspace, write_pairs(config, extra=3), songs)
    assert pairs.missing == 3
    assert len(pairs.train) == 36 * 6
    assert set(pairs.train.ravel()) <= set(songs.train)
    assert set(pairs.validation.ravel()) <= set(songs.validation)
    assert pairs.train.tolist() == sorted(pairs.train.tolist())
    codes = known_pair_codes(pairs.train)
    assert {(int(code) >> 32, int(code) & 0xFFFFFFFF) for code in codes} == {
        (min(a, b), max(a, b)) for a, b in pairs.train.tolist()
    }
    assert (np.diff(codes) > 0).all()


def test_negatives_are_rejected_songs_that_are_no_pair(tmp_path: Path):
    config = tiny_config(tmp_path / "workspace")
    workspace = Workspace(config.workspace)
    songs = read_songs(workspace, write_features(config))
    path = write_pairs(config)  # every two training songs whose numbers differ by 3 mod 6
    with pytest.raises(
        WorkspaceError, match=r"negatives/pairs, which finetune\.explicit_negatives needs, .*run 'htcl preprocess'"
    ):
        read_pairs(workspace, path, songs, rejected=True)
    write_negatives(
        config, [(0, 3, 1.0), (3, 0, 1.0), (9, 0, 1.0), (18, 19, 1.0)]
    )  # pairs, and a song of another split
    with pytest.raises(WorkspaceError, match="has no song that was only rejected after its trigger"):
        read_pairs(workspace, path, songs, rejected=True)
    write_negatives(config, [(6, 2, 2.0), (0, 3, 1.0), (0, 2, 0.5), (18, 19, 1.0), (0, 1, 1.5)])
    pairs = read_pairs(workspace, path, songs, rejected=True)
    assert [[songs.song_ids[song] for song in row] for row in pairs.rejected] == [
        ["song-0000", "song-0001"],
        ["song-0000", "song-0002"],
        ["song-0006", "song-0002"],
    ]
    assert pairs.rejected_weights.tolist() == [1.5, 0.5, 2.0]
    assert pairs.rejected_left_out == 2
    plain = read_pairs(workspace, path, songs)
    assert np.array_equal(plain.train, pairs.train)
    assert plain.rejected.shape == (0, 2)


def test_rejected_songs_are_drawn_by_weight_for_their_trigger():
    rejected, weights = np.array([[2, 7], [2, 8], [2, 9], [5, 1], [9, 4]]), np.array([1.0, 2.0, 1.0, 0.3, 5.0])
    drawn = np.repeat([[2, 0], [5, 0], [3, 6], [9, 0], [10, 11], [0, 12]], [40_000, 10, 10, 10, 10, 10], axis=0)
    actual = with_rejected(1, 2, drawn, rejected, weights)
    assert np.array_equal(actual[:, :2], drawn)
    share = [(actual[:40_000, 2] == song).mean() for song in (7, 8, 9)]
    np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.01)
    assert actual[40_000:, 2].tolist() == [1] * 10 + [6] * 10 + [4] * 10 + [11] * 10 + [12] * 10
    assert np.array_equal(actual, with_rejected(1, 2, drawn, rejected, weights))
    assert not np.array_equal(actual, with_rejected(1, 3, drawn, rejected, weights))
    assert not np.array_equal(actual, with_rejected(2, 2, drawn, rejected, weights))


def test_draw_probabilities_are_those_of_the_drawing():
    random = np.random.default_rng(0)
    pairs, weights = random.integers(0, 6, (20, 2)), random.uniform(0.1, 2, 20)
    probability = np.exp(log_draw_probability(pairs, weights))
    np.testing.assert_allclose(probability.sum(axis=0), [1, 1])
    drawn = pair_order(0, 0, pairs, weights, 200_000)
    for side in range(2):
        seen = np.bincount(drawn[:, side], minlength=len(probability)) / len(drawn)
        np.testing.assert_allclose(probability[:, side], seen, atol=0.005)


def test_order_is_a_function_of_seed_and_epoch():
    songs = np.arange(100, 150)
    assert np.array_equal(song_order(3, 4, songs), song_order(3, 4, songs))
    assert not np.array_equal(song_order(3, 4, songs), song_order(3, 5, songs))
    assert not np.array_equal(song_order(3, 4, songs), song_order(4, 4, songs))
    assert sorted(song_order(3, 4, songs)[:, 0]) == songs.tolist()


@pytest.mark.parametrize("length", [1, 7, 49, 50, 51, 100, 130])
def test_epochs_of_any_length_follow_each_other_in_one_endless_order(length: int):
    """Every song comes once before any comes again; with the catalogue's length it is the order without one."""
    songs = np.arange(100, 150)
    endless = np.concatenate([song_order(3, epoch, songs)[:, 0] for epoch in range(9)])
    rounds = endless.reshape(9, 50)
    assert (np.sort(rounds, axis=1) == songs).all()
    assert len({tuple(order) for order in rounds.tolist()}) == 9
    epochs = [song_order(3, epoch, songs, length) for epoch in range(len(endless) // length)]
    assert {order.shape for order in epochs} == {(length, 1)}
    actual = np.concatenate(epochs)[:, 0]
    assert np.array_equal(actual, endless[: len(actual)])
    old = np.random.default_rng([3, 5]).permutation(songs)[:, None]
    assert np.array_equal(song_order(3, 5, songs), old)
    assert np.array_equal(song_order(3, 5, songs, 50), old)


def test_pairs_are_drawn_by_weight():
    pairs, weights = np.array([[0, 1], [2, 3], [4, 5]]), np.array([6.0, 3.0, 1.0])
    drawn = pair_order(0, 0, pairs, weights, 30_000)
    share = [(drawn[:, 0] == trigger).mean() for trigger in (0, 2, 4)]
    np.testing.assert_allclose(share, [0.6, 0.3, 0.1], atol=0.02)
    assert np.array_equal(drawn, pair_order(0, 0, pairs, weights, 30_000))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_out_each_batch(workers: int):
    order = song_order(0, 0, np.arange(50))
    for step in range(steps_per_epoch(50, 12)):
        parts = [worker_rows(order, step, 12, rank, workers) for rank in range(workers)]
        assert np.array_equal(np.concatenate(parts), order[step * 12 : step * 12 + 12])
    assert steps_per_epoch(50, 12) == 4


def test_a_small_catalogue_is_one_batch():
    assert [global_batch(rows, 32, 2) for rows in (100, 32, 31, 2)] == [32, 32, 30, 2]
    with pytest.raises(WorkspaceError, match="2 rows for 3 workers"):
        global_batch(2, 33, 3)
