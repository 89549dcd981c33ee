"""Reading and checking of catalogue tables."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import soundfile

from htcl_ray.audio import decode
from htcl_ray.catalog import tables
from htcl_ray.catalog.audio_files import MISSING, UNSUPPORTED, sizes_and_times
from htcl_ray.catalog.columns import (
    TIME_FORMS,
    as_epoch_seconds,
    as_lists,
    as_numbers,
    as_strings,
    as_years,
    read_times,
)
from htcl_ray.catalog.quarantine import check_share, count_reasons, describe, rejected_rows
from htcl_ray.catalog.songs import duplicate_group, read_catalog, song_text
from htcl_ray.config import resolve
from htcl_ray.config.sections import AudioRecipe, DataSettings
from htcl_ray.errors import InputError, TableError
from htcl_ray.extractors.song_features import AudioFeatures
from htcl_ray.pipelines.feature_shards import make_shard
from htcl_ray.schemas import Reason

pytestmark = pytest.mark.unit

ROWS = [
    {
        "song_id": "b",
        "audio_path": "audio/b.wav",
        "title": "Blue",
        "artist": "Ann",
        "genre": "folk;  jazz",
        "year": "1994",
    },
    {"song_id": "007", "audio_path": "/music/a.wav", "title": "NA", "artist": None, "genre": None, "year": None},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        pacsv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(
            "".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows),
            encoding="utf-8",
        )
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_read_catalog_gives_the_same_songs_for_every_format(tmp_path: Path, suffix: str) -> None:
    catalog = read_catalog(DataSettings(catalog=str(write(tmp_path / f"songs{suffix}", ROWS))))
    first, second = catalog.songs.to_pylist()
    assert (first["song_id"], second["song_id"]) == ("007", "b")  # sorted, with leading zeros
    assert first["audio_path"] == "/music/a.wav"
    assert second["audio_path"] == str(tmp_path / "audio/b.wav")
    assert second["genre"] == ["folk", "jazz"]
    assert second["year"] == 1994
    assert first["title"] == "NA"
    assert (first["text"], second["text"]) == ("NA", "Blue; Ann; folk, jazz; 1994")
    assert (first["row"], second["row"]) == (1, 0)
    assert first["artist"] is first["genre"] is first["year"] is first["split"] is None
    assert catalog.rows == 2
    assert not catalog.rejected.num_rows


def test_read_catalog_reads_folders_and_several_tables(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "2.parquet", ROWS[:1])
    write(tmp_path / "parts" / "_ignored.parquet", ROWS)
    (tmp_path / "parts" / "notes.txt").write_text("not a table")
    csv = write(tmp_path / "more.csv", ROWS[1:])
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress(csv.read_bytes().replace(b"007", b"008")))
    catalog = read_catalog(DataSettings(catalog=(str(tmp_path / "parts"), str(csv), str(packed))))
    assert catalog.songs["song_id"].to_pylist() == ["007", "008", "b"]
    assert catalog.songs["audio_path"][2].as_py() == str(tmp_path / "parts/audio/b.wav")


def test_read_catalog_reads_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "songs.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    assert read_catalog(DataSettings(catalog="songs.csv")).songs["audio_path"][1].as_py() == str(
        tmp_path / "audio/b.wav"
    )


def test_columns_are_renamed_by_the_settings(tmp_path: Path) -> None:
    rows = [{"clip": 12, "audio_path": "x.wav", "label": "dog bark", "genre": "replaced by label"}]
    path = write(tmp_path / "clips.parquet", rows)
    settings = DataSettings(
        catalog=str(path), columns={"song_id": "clip", "genre": "label"}, text_columns=("label", "genre")
    )
    (song,) = read_catalog(settings).songs.to_pylist()
    assert song["song_id"] == "12"
    assert song["genre"] == ["dog bark"]
    assert song["text"] == "dog bark; dog bark"  # both names are accepted


def test_text_columns_select_and_order_the_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "songs.jsonl",
        [{"song_id": "1", "audio_path": "x", "title": "T", "tags": ["a", " b ", None], "key": "C# minor"}],
    )
    assert read_catalog(DataSettings(catalog=str(path), text_columns=("key", "tags"))).songs["text"].to_pylist() == [
        "C# minor; a, b"
    ]


def test_rejected_rows_have_reasons(tmp_path: Path) -> None:
    good = {"song_id": "1", "audio_path": "1.wav", "title": "One", "part": "train"}
    rows = [good] + [{**good, "song_id": f"{i}"} for i in range(2, 7)]
    rows[1]["song_id"] = "  "
    rows[2]["audio_path"] = None
    rows[3]["title"] = ""
    rows[4]["part"] = "dev"
    rows[5]["part"] = None
    catalog = read_catalog(
        DataSettings(catalog=str(write(tmp_path / "s.csv", rows)), text_columns="title", split_column="part")
    )
    assert catalog.songs["split"].to_pylist() == ["train"]
    assert [(r["song_id"], r["row"], r["reason"]) for r in catalog.rejected.to_pylist()] == [
        (None, 1, "missing_song_id"),
        ("3", 2, "missing_audio_path"),
        ("4", 3, "missing_text"),
        ("5", 4, "unknown_split"),
        ("6", 5, "unknown_split"),
    ]
    assert catalog.rejected["source"].unique().to_pylist() == [str(tmp_path / "s.csv")]
    assert "'dev'; expected train, validation, test" in catalog.rejected["detail"][3].as_py()


Change = Callable[[Path], DataSettings]


def settings_for(name: str, content: str | bytes) -> Change:
    def make(folder: Path) -> DataSettings:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return DataSettings(catalog=str(folder / name))

    return make


UNUSABLE: list[tuple[Change, str]] = [
    (lambda folder: DataSettings(), "set data.catalog"),
    (lambda folder: DataSettings(catalog=str(folder / "no.csv")), "no.csv does not exist"),
    (lambda folder: DataSettings(catalog=str(folder)), "holds no table"),
    (settings_for("s.xlsx", "x"), "unknown format"),
    (settings_for("s.csv", ""), "is empty"),
    (settings_for("s.csv", "song_id,audio_path,title\n"), "is empty"),
    (settings_for("s.jsonl", ""), "is empty"),
    (
        settings_for("s.jsonl", '[{"song_id": 1}]\n'),
        "no row of .* can be read: line 1 is not a JSON object; expected one row a line",
    ),
    (settings_for("s.parquet", "not parquet"), "cannot be read as parquet"),
    (settings_for("s.csv.gz", "no gzip"), "cannot be read as csv"),
    (settings_for("s.csv", "song_id,audio_path,title,title\n1,x,y,z\n"), "several columns called 'title'"),
    (settings_for("s.csv", "song_id,path,title\n1,x,y\n"), r"no column 'audio_path' .*set data\.columns\.audio_path"),
    (settings_for("s.csv", "id,audio_path,title\n1,x,y\n"), r"no column 'song_id'"),
    (settings_for("s.csv", "song_id,audio_path,mp3\n1,x,y\n"), "none of the text columns"),
    (settings_for("s.csv", "song_id,audio_path,title\n1,x,y\n2,x,y\n1,z,y\n"), "'1' in row 0 of .* and row 2 of"),
]


@pytest.mark.parametrize(("make", "message"), UNUSABLE)
def test_unusable_tables_raise_an_error(tmp_path: Path, make: Change, message: str) -> None:
    with pytest.raises(TableError, match=message):
        read_catalog(make(tmp_path))


def test_missing_configured_columns_raise_an_error(tmp_path: Path) -> None:
    path = str(write(tmp_path / "s.csv", ROWS))
    with pytest.raises(TableError, match="did you mean 'title'"):
        read_catalog(DataSettings(catalog=path, text_columns=("titel",)))
    with pytest.raises(TableError, match=r"data\.split_column is 'part'"):
        read_catalog(DataSettings(catalog=path, split_column="part"))
    with pytest.raises(TableError, match=r"data\.columns\.genre is 'styl'.*did you mean 'style'"):
        tables.check_renames(["song_id", "style"], {"genre": "styl"})


def test_large_parquet_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 250)
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"n": range(1000)}), path, row_group_size=100)
    parts = tables.table_parts(tables.table_files([str(path)]))
    assert [part.row_groups for part in parts] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]
    read = [(row, batch["n"].to_pylist()) for part in parts for row, batch in tables.read_part(part)]
    assert all(numbers[0] == row for row, numbers in read)
    assert [n for _, numbers in read for n in numbers] == list(range(1000))


def test_as_strings_converts_every_common_type() -> None:
    assert as_strings(pa.array([12.0, 2.5, None, float("nan"), 1e300])).to_pylist()[:4] == ["12", "2.5", None, None]
    assert as_strings(pa.array([7, None])).to_pylist() == ["7", None]
    assert as_strings(pa.array([" a ", "", "  "])).to_pylist() == ["a", None, None]
    assert as_strings(pa.array(["x", "y", "x"]).dictionary_encode()).to_pylist() == ["x", "y", "x"]
    assert as_strings(pa.array([["a", "b"], [], None])).to_pylist() == ["a; b", None, None]
    assert as_strings(pa.chunked_array([pa.array(["a"]), pa.array(["b"])])).to_pylist() == ["a", "b"]
    assert as_strings(pa.nulls(1)).to_pylist() == [None]


def test_as_lists_and_as_years_convert_common_types() -> None:
    assert as_lists(pa.array(["a; b;;", "", None, "c"])).to_pylist() == [["a", "b"], None, None, ["c"]]
    assert as_lists(pa.array([["a;b", " c "], [None], None])).to_pylist() == [["a;b", "c"], None, None]
    assert as_years(pa.array(["1994", "1994-05-01", "ca. 1990", "19945", None])).to_pylist() == [
        1994,
        1994,
        None,
        None,
        None,
    ]
    assert as_years(pa.array([1994.0, None])).to_pylist() == [1994, None]
    assert as_years(pa.array([date(2001, 2, 3)])).to_pylist() == [2001]


def test_as_numbers_and_as_epoch_seconds_convert_common_types() -> None:
    np.testing.assert_array_equal(
        as_numbers(pa.array(["1", " 2.5e1", "x", "", "nan", "-.5"])), [1, 25, np.nan, np.nan, np.nan, -0.5]
    )
    moment = datetime(2024, 3, 1, 12, 0, 0, 500_000, tzinfo=UTC)
    texts = [
        "2024-03-01T12:00:00.5Z",
        "2024-03-01 12:00:00.500",
        "2024-03-01T13:00:00.5+01:00",
        str(moment.timestamp()),
    ]
    np.testing.assert_array_equal(as_epoch_seconds(pa.array(texts)), [moment.timestamp()] * 4)
    np.testing.assert_array_equal(as_epoch_seconds(pa.array([moment])), [moment.timestamp()])
    np.testing.assert_array_equal(as_epoch_seconds(pa.array([date(2000, 1, 2)])), [946_771_200])


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.string()])
def test_epoch_numbers_are_read_in_every_unit(unit: int, kind: pa.DataType) -> None:
    seconds = np.array([315_532_800, 1_700_000_000, int(time.time())])  # 1980 and later
    np.testing.assert_array_equal(as_epoch_seconds(pa.array(seconds * unit).cast(kind, safe=False)), seconds)


def test_compact_dates_are_read_as_dates() -> None:
    random = np.random.default_rng(0)
    moments = [datetime.fromtimestamp(int(t), UTC) for t in random.integers(315_532_800, 1_750_000_000, 300)]
    for form, digits in (
        ("%Y%m%d", 86400),
        ("%Y%m%d%H%M", 60),
        ("%Y%m%d%H%M%S", 1),
        ("%Y%m%dT%H%M%SZ", 1),
        ("%Y-%m-%dT%H:%M:%SZ", 1),
    ):
        expected = [int(moment.timestamp()) // digits * digits for moment in moments]
        texts = [moment.strftime(form) for moment in moments]
        np.testing.assert_array_equal(as_epoch_seconds(pa.array(texts)), expected)
        if form.isalnum() or "T" not in form:
            np.testing.assert_array_equal(as_epoch_seconds(pa.array([int(text) for text in texts])), expected)
            np.testing.assert_array_equal(as_epoch_seconds(pa.array([float(text) for text in texts])), expected)
    seconds, forms = read_times(pa.array(["20240131", "1700000000", "2024-01-31", "x"]))
    assert [TIME_FORMS[form] for form in forms] == ["ISO 8601", "epoch seconds", "ISO 8601", "unreadable"]
    assert seconds[0] == seconds[2]


def test_implausible_times_are_unreadable() -> None:
    texts = ["yesterday", "-5", "2024-13-01", "20240230", "20241301", "202401312460", None]
    counts = [
        "1",
        "2024",
        "202401",
        "19723",
        "473352",
        "28401120",
        "20240131123000123",
    ]  # a year, a month, days, hours, minutes
    future = [str(int(time.time()) + 2 * 86400), "2099-01-01", "20990101"]
    for wrong in (texts, counts, future):
        assert np.isnan(as_epoch_seconds(pa.array(wrong))).all()
    assert np.isnan(as_epoch_seconds(pa.array([date(1970, 1, 1), date(2099, 1, 1)]))).all()
    assert np.isnan(as_epoch_seconds(pa.array([2**62], pa.timestamp("s")))).all()
    assert np.isnan(as_epoch_seconds(pa.array([2**62], pa.int64()))).all()


@pytest.mark.parametrize("suffix", [".jsonl", ".arrow", ".parquet"])
def test_every_batch_has_the_columns_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 10)
    rows: list[dict[str, Any]] = [{"song_id": f"{i:03d}", "audio_path": "x"} for i in range(95)]
    for row in rows[50:]:
        row["title"] = "late"
    for row in rows[80:]:
        row["genre"] = ["rock"]
    del rows[93]["audio_path"]
    path = tmp_path / f"songs{suffix}"
    if suffix == ".arrow":
        types = {
            "song_id": pa.string(),
            "audio_path": pa.string(),
            "title": pa.string(),
            "genre": pa.list_(pa.string()),
        }
        table = pa.Table.from_pylist(rows, schema=pa.schema(types))
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    else:
        write(path, [{**dict.fromkeys(("song_id", "audio_path", "title", "genre")), **row} for row in rows])
    (file,) = tables.table_files([str(path)])
    assert tables.column_names(file) == ("song_id", "audio_path", "title", "genre")
    (part,) = tables.table_parts([file])
    for columns in (None, ["genre", "song_id"]):
        batches = list(tables.read_part(part, columns))
        assert {tuple(table.column_names) for _, table in batches} == {tuple(columns or tables.column_names(file))}
        assert [row for row, _ in batches] == list(range(0, 95, 10))
        assert [song for _, table in batches for song in table["song_id"].to_pylist()] == [
            row["song_id"] for row in rows
        ]
    catalog = read_catalog(DataSettings(catalog=str(path)))
    assert catalog.songs["title"].to_pylist() == ["late"] * 44
    assert catalog.songs["genre"].to_pylist() == [None] * 30 + [["rock"]] * 14
    assert count_reasons(catalog.rejected) == {"missing_text": 50, "missing_audio_path": 1}


def test_unreadable_rows_of_json_lines_are_rejected(tmp_path: Path) -> None:
    good = '{"song_id": "%s", "audio_path": "x", "title": "T"}'
    deep = '{"song_id": "d", "audio_path": "x", "title": ' + "[" * 5000 + "]" * 5000 + "}"
    lines = [
        good % "a",
        "[1]",
        "",
        '{"song_id": ',
        deep,
        (good % "b").replace('"T"', '"caf\xe9"').encode("latin-1"),
        good % "c",
    ]
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (tmp_path / "s.jsonl").write_bytes(codecs.BOM_UTF8 + data)
    catalog = read_catalog(DataSettings(catalog=str(tmp_path / "s.jsonl")))
    assert catalog.songs["song_id"].to_pylist() == ["a", "c"]
    assert catalog.rows == 6
    rejected = [(row["row"], row["reason"], row["detail"].partition(";")[0]) for row in catalog.rejected.to_pylist()]
    assert rejected == [
        (row, "unreadable_row", f"line {line} is not a JSON object") for row, line in ((1, 2), (2, 4), (3, 5), (4, 6))
    ]


@pytest.mark.parametrize("block", [1 << 24, 64])
def test_unreadable_rows_of_csv_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", block)
    random = np.random.default_rng(0)
    for broken in (
        [],
        [0],
        [19],
        [0, 1, 2],
        [5, 6, 17, 18, 19],
        list(range(20)),
        sorted(random.choice(20, 8, False).tolist()),
    ):
        lines = [
            f'{i},x{i}.wav,"Song\n{i}"' if i not in broken else f"{i},x{i}.wav" + ",too,many" * (i % 2)
            for i in range(20)
        ]
        (tmp_path / "s.csv").write_text("song_id,audio_path,title\n" + "\n".join(lines) + "\n")
        catalog = read_catalog(DataSettings(catalog=str(tmp_path / "s.csv")))
        assert catalog.rows == 20
        assert {row["row"]: row["song_id"] for row in catalog.songs.to_pylist()} == {
            i: str(i) for i in range(20) if i not in broken
        }
        assert [(row["row"], row["reason"]) for row in catalog.rejected.to_pylist()] == [
            (i, "unreadable_row") for i in broken
        ]
        assert all(
            f"has {4 if i % 2 else 2} cells; expected 3" in catalog.rejected["detail"][n].as_py()
            for n, i in enumerate(broken)
        )


def test_csv_cells_that_are_not_utf8_are_null(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(
        "song_id,audio_path,title,artist\n1,x,caf\xe9,A\n2,x,B,B\n\xe9,x,C,C\n".encode("latin-1")
    )
    catalog = read_catalog(DataSettings(catalog=str(tmp_path / "s.csv")))
    assert [(song["song_id"], song["title"], song["text"]) for song in catalog.songs.to_pylist()] == [
        ("1", None, "A"),
        ("2", "B", "B; B"),
    ]
    assert str(catalog.null_cells).endswith(rf"title 1, e.g. b'caf\xe9' in row 0 of {tmp_path}/s.csv")
    assert [(row["row"], row["detail"]) for row in catalog.rejected.to_pylist()] == [
        (2, r"song_id cannot be read as text: b'\xe9'")
    ]


def test_json_cells_of_mixed_types_are_converted_one_by_one(tmp_path: Path) -> None:
    rows = [
        {"title": "plain", "genre": "rock; pop", "tags": ["a", "b"], "year": 1999},
        {"title": 12, "genre": ["jazz"], "tags": [["deep"]], "year": "ca. 1990"},
        {"title": "smile \ud83d", "genre": {"name": "folk"}, "tags": [{"x": 1}], "year": 20240101},
        {"title": True, "genre": 7, "tags": "c", "year": 1.5},
        {"title": None, "genre": None, "tags": [], "year": "2001-05"},
    ]
    songs = [{"song_id": f"s{i}", "audio_path": "x", "key": "C", **row} for i, row in enumerate(rows)]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in songs))
    catalog = read_catalog(DataSettings(catalog=str(path), text_columns=("title", "key")))
    assert catalog.songs["title"].to_pylist() == ["plain", "12", None, "true", None]
    assert catalog.songs["genre"].to_pylist() == [["rock", "pop"], ["jazz"], None, ["7"], None]
    assert catalog.songs["tags"].to_pylist() == [["a", "b"], None, None, ["c"], None]
    assert catalog.songs["year"].to_pylist() == [1999, None, None, None, 2001]
    assert catalog.null_cells.counts == {"title": 1, "genre": 1, "tags": 2, "year": 3}
    message = str(catalog.null_cells)
    assert message.startswith("7 cells cannot be read and are null")
    assert f"year 3, e.g. 'ca. 1990' in row 1 of {path}" in message
    assert "genre 1, e.g. {'name': 'folk'} in row 2" in message


def test_unreadable_required_cells_reject_the_row(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    ids = pa.array([b"a", b"caf\xe9", None, b"d"])
    paths = pa.array([b"x", b"x", b"x", b"\xff.wav"])
    pq.write_table(pa.table({"song_id": ids, "audio_path": paths, "title": ["T"] * 4}), path)
    catalog = read_catalog(DataSettings(catalog=str(path)))
    assert catalog.songs["song_id"].to_pylist() == ["a"]
    assert [(row["row"], row["reason"], row["detail"]) for row in catalog.rejected.to_pylist()] == [
        (1, "missing_song_id", r"song_id cannot be read as text: b'caf\xe9'"),
        (2, "missing_song_id", "the row has no song_id"),
        (3, "missing_audio_path", r"audio_path cannot be read as text: b'\xff.wav'"),
    ]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_hidden_and_temporary_names_below_a_folder_are_skipped(tmp_path: Path, scheme: str) -> None:
    folder = tmp_path / "_data" / ".live"  # a hidden folder that the user names is read
    kept = ["a.csv", "day=2024-01-01/b.csv", "x/y/c.csv"]
    hidden = [
        ".ipynb_checkpoints/a-checkpoint.csv",
        "_temporary/0/task/part-0.csv",
        "_delta_log/00000000000000000000.json",
        "_delta_log/_last_checkpoint.parquet",
        ".spark-staging-1/day=2024-01-01/b.csv",
        "x/__MACOSX/._c.csv",
        "x/.hidden.csv",
        "_metadata.parquet",
    ]
    for name in kept + hidden:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("song_id,audio_path,title\n" + f"{name},x,T\n")
    files = tables.table_files([f"{scheme}{folder}"])
    assert [file.path for file in files] == [f"{folder}/{name}" for name in kept]
    assert tables.table_files([f"{scheme}{folder}/_metadata.parquet"])[0].path.endswith("_metadata.parquet")
    assert read_catalog(DataSettings(catalog=f"{scheme}{folder}")).rows == 3


def test_song_text_is_one_line() -> None:
    assert song_text(["  Two\n words ", None, ["a", "b"], "", 1999]) == "Two words; a, b; 1999"
    assert song_text([None, [], " "]) == ""


def test_duplicate_group_depends_on_the_samples_only() -> None:
    waveform = np.sin(np.arange(10_000) / 10).astype(np.float32)
    groups = set()
    for format in ("WAV", "FLAC", "AIFF"):
        file = io.BytesIO()
        soundfile.write(file, (waveform * 32767).astype(np.int16), 44100, format=format, subtype="PCM_16")
        groups.add(duplicate_group(decode(file, AudioRecipe())))
    assert len(groups) == 1
    assert len({duplicate_group(other) for other in (waveform, waveform[:-1], waveform * 0.9, -waveform)}) == 4


def test_sizes_and_times_of_paths_and_uris(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    sizes = sizes_and_times(
        [str(tmp_path / "a"), str(tmp_path / "b"), f"file://{tmp_path}/a", f"file://{tmp_path}/b", "nowhere://x/y"]
    )
    assert sizes[:, 0].tolist() == [5, MISSING, 5, MISSING, UNSUPPORTED]
    assert sizes[0, 1] == sizes[2, 1] == (tmp_path / "a").stat().st_mtime_ns


def test_check_share_raises_above_the_allowed_share() -> None:
    rejected = rejected_rows(["a", None, "c"], [0, 1, 2], "t.csv", Reason.TOO_SHORT, "why")
    counts = count_reasons(rejected)
    assert describe(counts) == "3 rejected (too_short 3)"
    check_share("catalogue", counts, 30, 0.1, "quarantine.parquet")
    message = r"0\.103, more than data\.max_rejected_share=0\.1 allows; see quarantine\.parquet"
    with pytest.raises(InputError, match=message):
        check_share("catalogue", counts, 29, 0.1, "quarantine.parquet")


def test_make_shard_rejects_silence_groups_copies_and_measures_damage(tmp_path: Path) -> None:
    """Three songs that begin with 9 s of silence, two copies of one song, and a truncated one; clips are 8 s."""
    random = np.random.default_rng(0)
    waveforms = [random.uniform(-0.4, 0.4, 16000 * 9) for _ in range(5)]
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.concatenate([np.zeros(16000 * 9), waveforms[i]]), 16000)
    for i in (3, 4):
        soundfile.write(tmp_path / f"{i}.wav", waveforms[3], 16000)
    soundfile.write(tmp_path / "5.wav", waveforms[4], 16000)
    whole = (tmp_path / "5.wav").read_bytes()
    (tmp_path / "5.wav").write_bytes(whole[: 44 + 2 * 16000 * 4])
    rows = [{"song_id": str(i), "audio_path": f"{i}.wav", "title": f"t{i}"} for i in range(6)]
    config = resolve("demo").with_overrides(
        {"data.catalog": str(write(tmp_path / "songs.csv", rows)), "audio.clip_seconds": 8.0}
    )
    features, rejected = make_shard(read_catalog(config.data).songs, config, AudioFeatures(config.audio.recipe, None))
    assert [(row["song_id"], row["reason"]) for row in rejected.to_pylist()] == [
        ("0", "silent"),
        ("1", "silent"),
        ("2", "silent"),
    ]
    assert all("the 8.0 s that are used are silent" in detail for detail in rejected["detail"].to_pylist())
    groups = features["duplicate_group"].to_pylist()
    assert groups[0] == groups[1] != groups[2]
    assert features["decoded_share"].to_pylist() == [1, 1, pytest.approx(0.5)]
