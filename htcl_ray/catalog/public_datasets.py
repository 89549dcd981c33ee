"""Public data sets, in the layout that their authors publish, as a catalogue and a log in our columns.

A reader takes the folder of a data set and returns its songs and events as streams of tables, so a log larger than
memory is converted piece by piece. Nothing is downloaded. Layouts: the documentation of MTG-Jamendo (Bogdanov et al.
2019), FMA (Defferrard et al. 2017), Melon Playlist Dataset (Ferraro et al. 2021), Music4All (Santana et al. 2020) and
Music4All-Onion (Moscati et al. 2022), Yambda (Ploshkin et al. 2025), and the dumps of ListenBrainz.
"""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from htcl_ray.errors import TableError

ROWS = 1 << 16
"""Rows of a table of a stream."""
YAMBDA_START = 1_577_836_800
"""2020-01-01 in epoch seconds, where the relative times of Yambda are put; its publisher removed the dates."""
FMA_SPLITS = {"training": "train", "validation": "validation", "test": "test"}


@dataclass
class Dataset:
    """A public data set as streams of tables. Read `songs` before `events`."""

    songs: Iterable[pa.Table]
    """Tables of one schema, with `song_id` and what the data set has of the catalogue's columns."""
    events: Iterable[pa.Table] | None = None
    """Rows of the log; None without listening data."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that are not in the streams, by reason; complete when both streams have ended."""
    note: str = ""
    """What a user must know about the values."""


def read_jamendo(folder: Path) -> Dataset:
    """MTG-Jamendo: its table of tags, `raw.meta.tsv` for names, and MP3 files by `PATH`."""
    tables = ("raw_30s_cleantags_50artists", "autotagging", "raw_30s_cleantags", "raw_30s", "raw")
    tags = _first(folder, [f"{sub}{name}.tsv" for name in tables for sub in ("", "data/")], "MTG-Jamendo")
    names = {row["TRACK_ID"]: row for row in _delimited(tags.with_name("raw.meta.tsv"))}
    dropped: Counter[str] = Counter()
    audio = _files_below(folder, ".mp3")

    def rows() -> Iterator[dict[str, Any]]:
        with open(tags, encoding="utf-8", newline="") as file:
            lines = csv.reader(file, delimiter="\t")  # a row has one cell for each of its tags
            header = next(lines, [])
            if header[:4] != ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH"]:
                raise TableError(f"{tags} has the columns {header[:4]}; expected TRACK_ID, ARTIST_ID, ALBUM_ID, PATH")
            for track, artist, album, path, _, *labels in lines:
                file_of = audio.get(path) or audio.get(f"{path.removesuffix('.mp3')}.low.mp3")
                if file_of is None:
                    dropped["no audio file"] += 1
                    continue
                by_kind: dict[str, list[str]] = {}
                for label in labels:
                    kind, _, value = label.partition("---")
                    by_kind.setdefault(kind, []).append(value)
                name = names.get(track, {})
                yield {
                    "song_id": track,
                    "audio_path": file_of,
                    "title": name.get("TRACK_NAME"),
                    "artist": name.get("ARTIST_NAME") or artist,
                    "album": name.get("ALBUM_NAME") or album,
                    "genre": by_kind.get("genre", []),
                    "mood": by_kind.get("mood/theme", []),
                    "tags": by_kind.get("instrument", []),
                    "year": _year(name.get("RELEASEDATE")),
                }

    return Dataset(_tables(rows(), lists=("genre", "mood", "tags"), path=True), dropped=dropped)


def read_fma(folder: Path) -> Dataset:
    """FMA: `tracks.csv` and `genres.csv`, and the MP3 files of one or more subsets, such as `fma_small`."""
    tracks = _first(folder, ["tracks.csv", "fma_metadata/tracks.csv"], "FMA")
    titles = {row["genre_id"]: row["title"] for row in _delimited(tracks.with_name("genres.csv"), ",")}
    audio = _files_below(folder, ".mp3")
    dropped: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        with open(tracks, encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            groups, columns, index = (next(lines, []) for _ in range(3))
            if index[:1] != ["track_id"]:
                raise TableError(f"{tracks} has no header of FMA; expected track_id at the start of the third row")
            names = [".".join(pair) for pair in zip(groups, columns, strict=True)]
            for cells in lines:
                row = dict(zip(["id", *names[1:]], cells, strict=True))
                number = f"{int(row['id']):06d}"
                path = audio.get(f"{number[:3]}/{number}.mp3")
                if path is None:
                    dropped["no audio file"] += 1
                    continue
                genres = [titles.get(str(genre), str(genre)) for genre in _literal(row.get("track.genres"))]
                top = row.get("track.genre_top")
                yield {
                    "song_id": row["id"],
                    "audio_path": path,
                    "title": row.get("track.title"),
                    "artist": row.get("artist.name"),
                    "album": row.get("album.title"),
                    "genre": list(dict.fromkeys([*([top] if top else []), *genres])),
                    "tags": [str(tag) for tag in _literal(row.get("track.tags"))],
                    "language": row.get("track.language_code"),
                    "year": _year(row.get("track.date_recorded")) or _year(row.get("album.date_released")),
                    "licence": row.get("track.license"),
                    "split": FMA_SPLITS.get(row.get("set.split", "")),
                }

    songs = _tables(rows(), lists=("genre", "tags"), path=True, columns=("language", "licence", "split"))
    return Dataset(songs, dropped=dropped, note="the column split has the published splits: data.split_column=split")


def read_melon(folder: Path) -> Dataset:
    """Melon Playlist Dataset: a playlist is a user, and a song's vector is the mean and deviation of its mel bands."""
    meta = _first(folder, ["song_meta.json"], "the Melon Playlist Dataset")
    genres = json.loads(_first(folder, ["genre_gn_all.json"], "the Melon Playlist Dataset").read_text("utf-8"))
    playlists = _first(folder, ["train.json"], "the Melon Playlist Dataset")
    mels = folder / "arena_mel"
    dropped: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for song in json.loads(meta.read_text("utf-8")):
            vector = None
            if mels.is_dir():
                path = mels / str(song["id"] // 1000) / f"{song['id']}.npy"
                if not path.is_file():
                    dropped["no mel-spectrogram"] += 1
                    continue
                mel = np.load(path)
                vector = np.concatenate([mel.mean(axis=1), mel.std(axis=1)]).astype(np.float32)
            codes = [*song["song_gn_gnr_basket"], *song["song_gn_dtl_gnr_basket"]]
            yield {
                "song_id": str(song["id"]),
                "title": song["song_name"],
                "artist": "; ".join(song["artist_name_basket"]),
                "album": song["album_name"],
                "genre": list(dict.fromkeys(genres.get(code, code) for code in codes)),
                "year": _year(song["issue_date"]),
                "vector": vector,
            }

    def events() -> Iterator[pa.Table]:
        for playlist in json.loads(playlists.read_text("utf-8")):
            songs = pa.array([str(song) for song in playlist["songs"]], pa.string())
            users = pa.array([str(playlist["id"])] * len(songs), pa.string())
            yield pa.table({"user_id": users, "song_id": songs, "weight": pa.array([1.0] * len(songs), pa.float32())})

    return Dataset(_tables(rows(), lists=("genre",), vector=mels.is_dir()), events(), dropped)


def read_music4all(folder: Path) -> Dataset:
    """Music4All with the listening events of Music4All-Onion (`userid_trackid_timestamp.tsv`, also as `.bz2`)."""
    information = _first(folder, ["id_information.csv"], "Music4All")
    log = next(iter(sorted(folder.glob("userid_trackid_timestamp.tsv*"))), None)
    of = {
        name: {row["id"]: row.get(column) for row in _delimited(folder / f"id_{name}.csv")}
        for name, column in (("genres", "genres"), ("tags", "tags"), ("lang", "lang"), ("metadata", "release"))
    }
    audio = _files_below(folder, ".mp3")
    dropped: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for row in _delimited(information):
            path = audio.get(f"audios/{row['id']}.mp3")
            if audio and path is None:
                dropped["no audio file"] += 1
                continue
            yield {
                "song_id": row["id"],
                "audio_path": path,
                "title": row.get("song"),
                "artist": row.get("artist"),
                "album": row.get("album_name"),
                "genre": _values(of["genres"].get(row["id"])),
                "tags": _values(of["tags"].get(row["id"])),
                "language": of["lang"].get(row["id"]),
                "year": _year(of["metadata"].get(row["id"])),
            }

    def events(path: Path) -> Iterator[pa.Table]:
        with pacsv.open_csv(
            path,
            parse_options=pacsv.ParseOptions(delimiter="\t"),
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.string() for name in ("user_id", "track_id", "timestamp")}
            ),
        ) as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch]).select(["user_id", "track_id", "timestamp"])
                yield table.rename_columns(["user_id", "song_id", "timestamp"])

    songs = _tables(rows(), lists=("genre", "tags"), path=bool(audio), columns=("language",))
    return Dataset(songs, events(log) if log else None, dropped)


def read_yambda(folder: Path) -> Dataset:
    """Yambda: one size of its flat files (listens, likes, dislikes) and `embeddings.parquet`."""
    embeddings = pq.ParquetFile(_first(folder, ["embeddings.parquet"], "Yambda"))
    listens = sorted(folder.rglob("listens.parquet"))
    if len(listens) > 1:
        raise TableError(
            f"{folder} holds Yambda in several sizes ({', '.join(str(path.parent) for path in listens)}); give a "
            "folder with one of them"
        )
    owners = {name: _owners(folder, name) for name in ("artist", "album")}

    def songs() -> Iterator[pa.Table]:
        for batch in embeddings.iter_batches(ROWS, columns=["item_id", "normalized_embed"]):
            items = batch.column(0).to_numpy()
            columns = {"song_id": pc.cast(batch.column(0), pa.string())}
            for name, (ids, values) in owners.items():
                first, last = np.searchsorted(ids, items), np.searchsorted(ids, items, side="right")
                cells = [
                    "; ".join(f"{name} {value}" for value in values[start:end]) or None
                    for start, end in zip(first, last, strict=True)
                ]
                columns[name] = pa.array(cells, pa.string())
            yield pa.table(columns | {"vector": pc.cast(batch.column(1), pa.list_(pa.float32()))})

    def events() -> Iterator[pa.Table]:
        for name, feedback in (("listens", "play"), ("likes", "like"), ("dislikes", "dislike")):
            path = listens[0].with_name(f"{name}.parquet")
            if not path.is_file():
                continue
            ratio = "played_ratio_pct"
            for batch in pq.ParquetFile(path).iter_batches(ROWS):
                nothing = pa.nulls(len(batch), pa.float32())
                played = pc.cast(batch.column(ratio), pa.float32()) if ratio in batch.schema.names else nothing
                yield pa.table(
                    {
                        "user_id": pc.cast(batch.column("uid"), pa.string()),
                        "song_id": pc.cast(batch.column("item_id"), pa.string()),
                        "timestamp": pc.add(pc.cast(batch.column("timestamp"), pa.int64()), YAMBDA_START),
                        "feedback": pa.array([feedback] * len(batch), pa.string()),
                        # above 100: parts were played twice
                        "played_ratio": pc.min_element_wise(pc.divide(played, 100.0), 1.0, skip_nulls=False),
                    }
                )

    note = "timestamps are relative in Yambda; here they begin on 2020-01-01. Artists and albums are numbers."
    return Dataset(songs(), events() if listens else None, note=note)


def read_listenbrainz(folder: Path) -> Dataset:
    """ListenBrainz: the JSON Lines (`*.listens`) of a dump; a song is a recording of MusicBrainz, without audio.

    Names are the first ones that a listen gives; one entry a recording is held in memory.
    """
    files = sorted(folder.rglob("*.listens"))
    if not files:
        raise TableError(f"{folder} holds no *.listens file; expected an unpacked dump of ListenBrainz")
    dropped = Counter[str]()

    def listens() -> Iterator[tuple[str, str, int, Mapping[str, Any]]]:
        dropped.clear()
        for path in files:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        listen = json.loads(line)
                        track = listen["track_metadata"]
                        user, time = str(listen["user_id"]), int(listen.get("listened_at") or listen["timestamp"])
                    except (ValueError, KeyError, TypeError):
                        raise TableError(
                            f"line {number} of {path} is no listen; expected user_id, listened_at and track_metadata"
                        ) from None
                    recording = (track.get("mbid_mapping") or {}).get("recording_mbid")
                    recording = recording or (track.get("additional_info") or {}).get("recording_mbid")
                    if not recording:
                        dropped["listens without a recording of MusicBrainz"] += 1
                        continue
                    yield user, recording, time, track

    def rows() -> Iterator[dict[str, Any]]:
        seen = set[str]()
        for _, recording, _, track in listens():
            if recording not in seen:
                seen.add(recording)
                yield {
                    "song_id": recording,
                    "title": track.get("track_name"),
                    "artist": track.get("artist_name"),
                    "album": track.get("release_name"),
                }

    def events() -> Iterator[pa.Table]:
        schema = pa.schema({"user_id": pa.string(), "song_id": pa.string(), "timestamp": pa.int64()})
        yield from _in_tables(({"user_id": u, "song_id": r, "timestamp": t} for u, r, t, _ in listens()), schema)

    return Dataset(_tables(rows()), events(), dropped)


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "jamendo": read_jamendo,
    "fma": read_fma,
    "melon": read_melon,
    "music4all-onion": read_music4all,
    "yambda": read_yambda,
    "listenbrainz": read_listenbrainz,
}
"""Reader of each data set by the name that `htcl import` takes."""


def _first(folder: Path, names: Sequence[str], dataset: str) -> Path:
    """The first of these files that exists."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise TableError(f"{folder} does not hold {' or '.join(names[:2])}; expected the published files of {dataset}")


def _delimited(path: Path, delimiter: str = "\t") -> Iterator[dict[str, str]]:
    """Rows of a table with a header; none when the file does not exist."""
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as file:
            if delimiter == "\t":  # in which a quotation mark is a character like any other
                yield from csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            else:
                yield from csv.DictReader(file, delimiter=delimiter)


def _files_below(folder: Path, extension: str) -> dict[str, str]:
    """Absolute path of each file by the last two parts of its path."""
    return {"/".join(path.parts[-2:]): str(path) for path in sorted(folder.rglob(f"*{extension}"))}


def _owners(folder: Path, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Item ids in ascending order, and the artist or album of each; empty without a file."""
    path = next(iter(sorted(folder.rglob(f"{name}_item_mapping.parquet"))), None)
    if path is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    table = pq.read_table(path, columns=["item_id", f"{name}_id"])
    table = table.sort_by([("item_id", "ascending"), (f"{name}_id", "ascending")])
    return table["item_id"].to_numpy(), table[f"{name}_id"].to_numpy()


def _tables(
    rows: Iterable[Mapping[str, Any]],
    *,
    lists: Sequence[str] = (),
    path: bool = False,
    vector: bool = False,
    columns: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """Songs as tables; empty texts become null, and keys of a row that are no column are left out."""
    fields = [pa.field("song_id", pa.string(), nullable=False)]
    fields += [pa.field("audio_path", pa.string())] if path else []
    fields += [pa.field(name, pa.string()) for name in ("title", "artist", "album", *columns)]
    fields += [pa.field(name, pa.list_(pa.string())) for name in lists]
    fields += [pa.field("year", pa.int32())]
    fields += [pa.field("vector", pa.list_(pa.float32()))] if vector else []
    return _in_tables(rows, pa.schema(fields))


def _in_tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(
            {name: None if isinstance(row.get(name), str) and not row[name] else row.get(name) for name in schema.names}
        )
        if len(batch) == ROWS:
            yield pa.Table.from_pylist(batch, schema=schema)
            batch = []
    yield pa.Table.from_pylist(batch, schema=schema)


def _values(cell: str | None) -> list[str]:
    return [value.strip() for value in (cell or "").split(",") if value.strip()]


def _literal(cell: str | None) -> list[Any]:
    """A list that is written as in Python; empty for anything else."""
    try:
        value = ast.literal_eval(cell or "[]")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) else []


def _year(date: str | None) -> int | None:
    """The year at the beginning of a date; None where it is unknown."""
    year = (date or "")[:4]
    return int(year) if year.isdigit() and year != "0000" else None
