"""The sample on disk: deterministic, written atomically, and without hidden traits except in the audio."""

from __future__ import annotations

import csv
import hashlib
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from htcl_ray.demo_world import SampleTables, write, write_sample
from htcl_ray.demo_world.world import HIDDEN_TRAITS, NUISANCE_TRAITS, TextStyle, make_world
from htcl_ray.errors import WorkspaceError
from htcl_ray.schemas import Feedback

pytestmark = pytest.mark.unit

SIZES = {"songs": 90, "artists": 18, "users": 12, "seed": 3, "seconds": 1.0}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleTables:
    return write_sample(tmp_path_factory.mktemp("written") / "sample", **SIZES)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_equal_arguments_give_equal_bytes_with_any_number_of_processes(
    sample: SampleTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SONGS_PER_PROCESS", 40)
    monkeypatch.setattr(write.os, "cpu_count", lambda: 2)
    again = write_sample(tmp_path / "again", **SIZES)
    assert digests(again.catalog.parent) == digests(sample.catalog.parent)


def test_another_seed_gives_other_bytes(tmp_path: Path) -> None:
    sizes = {**SIZES, "songs": 20, "artists": 5, "seconds": 0.5}
    first, second = (write_sample(tmp_path / str(seed), **{**sizes, "seed": seed}) for seed in (3, 4))
    shared = set(digests(first.catalog.parent).values()) & set(digests(second.catalog.parent).values())
    assert shared <= {hashlib.sha256(b"").hexdigest()}


def test_an_existing_sample_is_kept_and_another_one_is_replaced(tmp_path: Path) -> None:
    small = {**SIZES, "songs": 6, "artists": 3, "users": 2, "seconds": 0.5}
    tables = write_sample(tmp_path / "s", **small)
    before = {path: path.stat().st_mtime_ns for path in tables.catalog.parent.rglob("*")}
    assert write_sample(tmp_path / "s", **small) == tables
    assert {path: path.stat().st_mtime_ns for path in tables.catalog.parent.rglob("*")} == before
    write_sample(tmp_path / "s", **{**small, "seed": 4})
    assert digests(tmp_path / "s") == digests(write_sample(tmp_path / "t", **{**small, "seed": 4}).catalog.parent)


def test_an_interrupted_run_leaves_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    small = {**SIZES, "songs": 6, "artists": 3, "users": 2, "seconds": 0.5}
    with monkeypatch.context() as patched:
        patched.setattr(write, "_log_rows", killed)  # after the audio and the catalogue
        with pytest.raises(Killed):
            write_sample(tmp_path / "s", **small)
    assert not (tmp_path / "s").exists()
    write_sample(tmp_path / "s", **small)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert digests(tmp_path / "s") == digests(write_sample(tmp_path / "t", **small).catalog.parent)


def test_other_folders_and_unwritable_paths_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(WorkspaceError, match="is not a sample"):
        write_sample(tmp_path / "mine", **SIZES)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="cannot be written"):
        write_sample(tmp_path / "file" / "s", **SIZES)


def test_the_catalogue_contains_named_traits_only(sample: SampleTables) -> None:
    world = make_world(songs=SIZES["songs"], artists=SIZES["artists"], seed=SIZES["seed"])
    catalog = rows(sample.catalog)
    assert [row["song_id"] for row in catalog] == [song.song_id for song in world.songs]
    for row, song in zip(catalog, world.songs, strict=True):
        assert row["audio_path"] == f"audio/{song.song_id}.wav"
        assert (row["title"], row["artist"], row["album"], row["year"]) == (
            song.title,
            ";".join(artist.name for artist in song.credited),
            song.album,
            str(song.year),
        )
        assert row["genre"] == song.genre
        assert row["mood"] == ("" if song.text_style is TextStyle.NO_MOOD else song.mood)
        tags = row["tags"].split(";")
        if song.text_style is TextStyle.LEAD_ONLY:
            assert tags == [song.lead]
        elif song.text_style is TextStyle.BACKING_FIRST:
            assert tags == [song.backing, song.lead]
        else:
            assert tags == [song.lead, song.backing]


def test_no_file_names_hidden_traits(sample: SampleTables) -> None:
    folder = sample.catalog.parent
    assert {path.name for path in folder.iterdir()} == {"catalog.csv", "interactions.csv", "audio", "sample.json"}
    text = " ".join(path.read_text(encoding="utf-8").lower() for path in folder.iterdir() if path.is_file())
    assert not set(HIDDEN_TRAITS + NUISANCE_TRAITS) & set(re.findall("[a-z]+", text))
    known = {row["song_id"] for row in rows(sample.catalog)}
    assert {path.stem for path in (folder / "audio").iterdir()} <= known


def test_audio_is_16_bit_mono_with_a_length_independent_of_traits(sample: SampleTables) -> None:
    world = make_world(songs=SIZES["songs"], artists=SIZES["artists"], seed=SIZES["seed"])
    sizes, genres, hidden = [], [], []
    for song in world.songs:
        path = sample.catalog.parent / "audio" / f"{song.song_id}.wav"
        if not path.exists() or path.stat().st_size < 10_000:
            continue  # damaged
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert 0.97 <= info.duration <= 1.03
        assert path.stat().st_size == 44 + 2 * info.frames
        sizes.append([info.duration])
        genres.append(song.genre)
        hidden.append([value > 0 for value in song.hidden])
    assert len({duration for (duration,) in sizes}) > 50
    assert cross_val_score(LogisticRegression(), sizes, genres, cv=3).mean() < 0.3
    for side in np.array(hidden).T:
        assert abs(np.corrcoef(np.ravel(sizes), side)[0, 1]) < 0.3


def test_every_kind_of_damage_occurs_at_the_size_of_the_demo() -> None:
    world = make_world(songs=1000, artists=200, seed=0)
    damaged = write.damaged_songs(world)
    assert len(damaged) == 6
    assert set(damaged.values()) == set(write.Damage)
    # No original of a duplicate recording is damaged.
    assert all(sum(song.recording == position for song in world.songs) == 1 for position in damaged)


@pytest.mark.parametrize("damage", list(write.Damage))
def test_damaged_files_are_unusable(damage: write.Damage, tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    soundfile.write(path, np.zeros(16000), 16000, subtype="PCM_16")
    write.damage_file(path, damage)
    if damage is write.Damage.MISSING:
        assert not path.exists()
    elif damage is write.Damage.TOO_SHORT:
        assert soundfile.info(path).duration == pytest.approx(0.05)
    else:
        with pytest.raises(soundfile.LibsndfileError):
            soundfile.read(path)


def test_the_log_has_the_feedback_shape_and_a_few_unusable_rows(sample: SampleTables) -> None:
    log = rows(sample.interactions)
    assert list(log[0]) == ["user_id", "trigger_song_id", "song_id", "feedback", "timestamp"]
    known = {row["song_id"] for row in rows(sample.catalog)}
    assert {row["feedback"] for row in log} == {str(feedback) for feedback in Feedback}  # other values fail the step
    unknown = [row for row in log if row["song_id"] not in known or row["trigger_song_id"] not in known]
    without_user = [row for row in log if not row["user_id"]]
    without_time = [row for row in log if not is_time(row["timestamp"])]
    assert unknown
    assert without_user
    assert without_time
    assert len(unknown) + len(without_user) + len(without_time) < 0.01 * len(log)
    assert len({row["user_id"] for row in log} - {""}) == SIZES["users"]


def test_rows_of_the_log_are_shuffled(sample: SampleTables) -> None:
    log = [row for row in rows(sample.interactions) if is_time(row["timestamp"])]
    moments = np.array([datetime.fromisoformat(row["timestamp"]).timestamp() for row in log])
    users = np.unique([row["user_id"] for row in log], return_inverse=True)[1]
    position = np.arange(len(log))
    assert abs(np.corrcoef(position, moments)[0, 1]) < 0.1
    assert abs(np.corrcoef(position, users)[0, 1]) < 0.1


def is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
