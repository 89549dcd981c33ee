"""Write the sample world to disk: catalogue, interaction log and audio files, some of them damaged on purpose."""

from __future__ import annotations

import concurrent.futures
import csv
import io
import json
import multiprocessing
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import soundfile

from htcl_ray.demo_world.listeners import make_tastes, simulate
from htcl_ray.demo_world.synthesis import SAMPLE_RATE, render
from htcl_ray.demo_world.world import SampleSong, TextStyle, World, make_world, random_stream
from htcl_ray.errors import WorkspaceError
from htcl_ray.workspace.manifest import file_sha256, fingerprint

SONGS, ARTISTS, SEED = 1000, 200, 0
"""Of the sample of `htcl demo`."""
MARKER = "sample.json"
DAMAGED_SHARE = 0.006
"""Share of damaged audio files."""
BROKEN_ROW_SHARE = 0.004
"""Share of damaged rows of the log."""
SONGS_PER_PROCESS = 100
"""Smallest number of songs for which another rendering process is started."""
CATALOG_COLUMNS = ("song_id", "audio_path", "title", "artist", "album", "genre", "mood", "tags", "year")
LOG_COLUMNS = ("user_id", "trigger_song_id", "song_id", "feedback", "timestamp")


@dataclass(frozen=True)
class SampleTables:
    """Paths of the tables of a written sample."""

    catalog: Path
    interactions: Path


def write_sample(
    folder: Path | str,
    *,
    songs: int = SONGS,
    artists: int = ARTISTS,
    users: int = 600,
    seed: int = SEED,
    seconds: float = 8.0,
) -> SampleTables:
    """Write `catalog.csv`, `interactions.csv` and `audio/*.wav` (16 kHz mono PCM16) to `folder`, deterministically.

    A folder that already holds this sample is kept, and a folder that holds another sample is replaced, atomically.
    Clips last `seconds` ± 3 %, drawn independently of every trait. Raises WorkspaceError when the folder holds
    other files or cannot be written, ValueError for impossible sizes.
    """
    folder = Path(folder).absolute()
    identity = fingerprint(
        songs, artists, users, seed, seconds, [file_sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    )
    tables = SampleTables(folder / "catalog.csv", folder / "interactions.csv")
    marker = folder / MARKER
    if marker.is_file() and json.loads(marker.read_text())["identity"] == identity:
        return tables
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise WorkspaceError(
            f"{folder} exists and is not a sample that was written here; choose another folder for the sample"
        )
    world = make_world(songs=songs, artists=artists, seed=seed)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "audio").mkdir(parents=True)
        _write_audio(world, unfinished / "audio", seconds)
        _write_rows(unfinished / "catalog.csv", CATALOG_COLUMNS, _catalog_rows(world))
        _write_rows(unfinished / "interactions.csv", LOG_COLUMNS, _log_rows(world, users))
        (unfinished / MARKER).write_text(json.dumps({"identity": identity}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        raise WorkspaceError(
            f"the sample cannot be written to {folder} ({error.strerror}); choose another folder"
        ) from None
    return tables


def _write_audio(world: World, folder: Path, seconds: float) -> None:
    recordings = [i for i, song in enumerate(world.songs) if song.recording == i]
    workers = min(os.cpu_count() or 1, 8, 1 + len(recordings) // SONGS_PER_PROCESS)
    if workers == 1:
        _write_recordings(world, recordings, folder, seconds)
    else:
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = [
                pool.submit(_write_recordings, world, recordings[i::workers], folder, seconds) for i in range(workers)
            ]
            for part in parts:
                part.result()
    for i, song in enumerate(world.songs):
        if song.recording != i:
            shutil.copyfile(folder / f"{world.songs[song.recording].song_id}.wav", folder / f"{song.song_id}.wav")
    for position, damage in damaged_songs(world).items():
        damage_file(folder / f"{world.songs[position].song_id}.wav", damage)


def _write_recordings(world: World, positions: list[int], folder: Path, seconds: float) -> None:
    for position in positions:
        take = random_stream(world.seed, "take", position)
        length = seconds * float(take.uniform(0.97, 1.03))
        composition = random_stream(world.seed, "composition", world.songs[position].work)
        waveform = render(world.songs[position], length, composition, take)
        soundfile.write(folder / f"{world.songs[position].song_id}.wav", waveform, SAMPLE_RATE, subtype="PCM_16")


class Damage(StrEnum):
    """Kinds of damage to an audio file that occur in real catalogues."""

    EMPTY = "empty"
    WEB_PAGE = "web page"
    HALF_A_HEADER = "half a header"
    MISSING = "missing"
    TOO_SHORT = "too short"


def damaged_songs(world: World) -> dict[int, Damage]:
    """Select the songs with damaged files: index in `World.songs` → damage. No duplicate recordings are among them."""
    copies = Counter(song.recording for song in world.songs)
    single = [position for position in range(len(world.songs)) if copies[position] == 1]
    count = int(np.ceil(DAMAGED_SHARE * len(world.songs)))
    chosen = random_stream(world.seed, "damage").permutation(single)[:count].tolist()
    return {position: list(Damage)[i % len(Damage)] for i, position in enumerate(chosen)}


def damage_file(path: Path, damage: Damage) -> None:
    """Damage a WAV file in place."""
    if damage is Damage.EMPTY:
        path.write_bytes(b"")
    elif damage is Damage.WEB_PAGE:
        path.write_bytes(
            b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"
        )
    elif damage is Damage.HALF_A_HEADER:
        path.write_bytes(path.read_bytes()[:22])
    elif damage is Damage.MISSING:
        path.unlink()
    else:
        soundfile.write(path, soundfile.read(path)[0][: SAMPLE_RATE // 20], SAMPLE_RATE, subtype="PCM_16")


def _catalog_rows(world: World) -> list[tuple[str, ...]]:
    return [
        (
            song.song_id,
            f"audio/{song.song_id}.wav",
            song.title,
            ";".join(artist.name for artist in song.credited),
            song.album,
            song.genre,
            "" if song.text_style is TextStyle.NO_MOOD else song.mood,
            ";".join(_tags(song)),
            str(song.year),
        )
        for song in world.songs
    ]


def _tags(song: SampleSong) -> tuple[str, ...]:
    match song.text_style:
        case TextStyle.LEAD_ONLY:
            return (song.lead,)
        case TextStyle.BACKING_FIRST:
            return song.backing, song.lead
        case _:
            return song.lead, song.backing


def _log_rows(world: World, users: int) -> list[tuple[str, ...]]:
    """Build the log's rows in random order, with a few unusable rows."""
    rng = random_stream(world.seed, "rows")
    log = simulate(world, make_tastes(world, users))
    names: dict[str, None] = {}
    while len(names) < users:
        names[f"u{rng.bytes(4).hex()}"] = None
    user_ids = list(names)
    song_ids = [song.song_id for song in world.songs]
    rows = [
        (user_ids[user], song_ids[trigger], song_ids[song], feedback, f"{moment:%Y-%m-%dT%H:%M:%S}Z")
        for user, trigger, song, feedback, moment in zip(
            log.user.tolist(), log.trigger.tolist(), log.song.tolist(), log.feedback, log.timestamp, strict=True
        )
    ]
    for count in range(round(BROKEN_ROW_SHARE * len(rows))):
        user, trigger, song, feedback, moment = rows[int(rng.integers(len(rows)))]
        rows.append(
            (
                (user, trigger, rng.bytes(6).hex(), feedback, moment),
                (user, rng.bytes(6).hex(), song, feedback, moment),
                (user, trigger, song, feedback, "yesterday evening"),
                ("", trigger, song, feedback, moment),
            )[count % 4]
        )
    return [rows[i] for i in rng.permutation(len(rows)).tolist()]


def _write_rows(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
