"""Every Arrow type in every column gives songs, events or reasons, and never an unexpected error."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.catalog.columns import as_ids, as_lists, as_strings, unreadable
from htcl_ray.catalog.songs import read_catalog
from htcl_ray.config.sections import DataSettings, PairSettings
from htcl_ray.errors import TableError
from htcl_ray.interactions.log_summary import LogSummary
from htcl_ray.interactions.logs import COLUMNS, OPTIONAL_COLUMNS, LogShape, normalise
from htcl_ray.schemas import METADATA

pytestmark = pytest.mark.unit

IDS = [uuid.UUID(int=0xF0 << 120 | i) for i in range(3)]
MOMENT = datetime.datetime(2024, 1, 31, 12)


def invalid_strings(kind: pa.DataType) -> pa.Array:
    """A string array with bytes that are not UTF-8, as some writers of Parquet files produce."""
    bytes_ = pa.array([b"caf\xe9", b"ok", None], pa.binary() if pa.types.is_string(kind) else pa.large_binary())
    return pa.Array.from_buffers(kind, 3, bytes_.buffers())


def ints(kind: pa.DataType) -> pa.Array:
    return pa.array([4, 5, None], kind)


ARRAYS: dict[str, pa.Array] = {
    **{
        str(kind): ints(kind)
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    },
    **{str(kind): pa.array([1.5, 2001, None], kind) for kind in (pa.float32(), pa.float64())},
    "half": pa.array(np.array([1999, 4, np.nan], np.float16)),
    "infinite": pa.array([np.inf, -np.inf, 1e308]),
    "null": pa.nulls(3),
    "bool": pa.array([True, False, None]),
    **{
        f"decimal{n}": pa.array([Decimal("4.00"), Decimal("2.50"), None], getattr(pa, f"decimal{n}")(7, 2))
        for n in (32, 64, 128, 256)
    },
    **{str(kind): pa.array(["s0", " ", None], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())},
    **{f"invalid {kind}": invalid_strings(kind) for kind in (pa.string(), pa.large_string())},
    **{
        str(kind): pa.array([b"s0", b"caf\xe9", IDS[0].bytes], kind)
        for kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    },
    "fixed 16": pa.array([value.bytes for value in IDS], pa.binary(16)),
    "fixed 3": pa.array([b"abc", b"\xff\xff\xff", None], pa.binary(3)),
    "uuid": pa.array([value.bytes for value in IDS], pa.uuid()),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"s0"', '{"a": [1]}', "not json"])),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "t", "v"), pa.array([b"x", b"\xff", None])),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), (2,)), pa.array([[1, 2], [3, 4], None], pa.list_(pa.int32(), 2))
    ),
    "date32": pa.array([MOMENT.date()] * 3),
    "date64": pa.array([MOMENT.date()] * 3, pa.date64()),
    **{
        f"time {unit}": pa.array([1, 2, None], (pa.time32 if unit in ("s", "ms") else pa.time64)(unit))
        for unit in ("s", "ms", "us", "ns")
    },
    **{f"timestamp {unit}": pa.array([MOMENT] * 3, pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")},
    "timestamp zone": pa.array([MOMENT] * 3, pa.timestamp("us", "Europe/Berlin")),
    "timestamp no such zone": pa.array([0, 1, None], pa.int64()).cast(pa.timestamp("us", "Nowhere/Atall")),
    "timestamp far": pa.array([2**62, -(2**62), None], pa.timestamp("s")),
    **{f"duration {unit}": pa.array([1, 2, None], pa.duration(unit)) for unit in ("s", "ns")},
    "interval": pa.array([(1, 2, 3), None, (0, 0, 0)], pa.month_day_nano_interval()),
    **{
        str(kind): pa.array([["like"], ["a", None], []], kind)
        for kind in (pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_view(pa.string()))
    },
    "fixed list": pa.array([["a", "b"], None, ["c", "d"]], pa.list_(pa.string(), 2)),
    "list of bytes": pa.array([[b"\xff"], [b"a"], None]),
    "list of objects": pa.array([[{"name": "x"}], [], None]),
    "list of lists": pa.array([[["x"]], [[]], None]),
    "struct": pa.array([{"name": "x"}, {"name": None}, None]),
    "map": pa.array([[("k", "v")], [], None], pa.map_(pa.string(), pa.string())),
    "dense union": pa.UnionArray.from_dense(
        pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array(["a", "b"]), pa.array([1])]
    ),
    "sparse union": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0], pa.int8()), [pa.array(["a", "b", "c"]), pa.array([1, 2, 3])]
    ),
    "dictionary": pa.array(["like", "skip", None]).dictionary_encode(),
    "dictionary of lists": pa.DictionaryArray.from_arrays(pa.array([0, None, 0], pa.int8()), pa.array([["a"], ["b"]])),
    "run ends": pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", None])),
    "run ends of lists": pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array([["a"], None])),
}


@pytest.fixture(params=ARRAYS)
def array(request: pytest.FixtureRequest) -> pa.Array:
    return ARRAYS[request.param]


def test_read_catalog_accepts_every_type_in_every_column(array: pa.Array, tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "song_id": ["s0", "s1", "s2"],
        "audio_path": ["0.wav", "1.wav", "2.wav"],
        "title": ["a", "b", "c"],
        "part": ["train"] * 3,
        "key": ["C"] * 3,
    }
    for column in ("song_id", "audio_path", "part", "key", *METADATA.names):
        with pa.ipc.new_file(tmp_path / "songs.arrow", (table := pa.table({**base, column: array})).schema) as file:
            file.write_table(table)
        settings = DataSettings(
            catalog=str(tmp_path / "songs.arrow"), split_column="part", text_columns=("key", "title", "year", "genre")
        )
        ids = as_ids(array).drop_null()
        if column == "song_id" and len(ids.unique()) < len(ids):
            with pytest.raises(TableError, match="more than once"):
                read_catalog(settings)
            continue
        catalog = read_catalog(settings)
        assert catalog.songs.num_rows + catalog.rejected.num_rows == 3
        assert all(catalog.rejected["detail"].to_pylist())
        str(catalog.null_cells)


def test_normalise_accepts_every_type_in_every_column(array: pa.Array) -> None:
    songs, settings = pa.array(["s0", "s1", "s2"]), PairSettings()
    good: dict[str, Any] = {
        "user_id": ["u"] * 3,
        "song_id": ["s0", "s1", "s2"],
        "trigger_song_id": ["s1", "s2", "s0"],
        "feedback": ["like"] * 3,
        "timestamp": [1_700_000_000] * 3,
        "played_ratio": [0.5] * 3,
        "weight": [1] * 3,
        "rating": [4] * 3,
    }
    for shape in LogShape:
        names = (*COLUMNS[shape], *OPTIONAL_COLUMNS[shape])
        for column in names:
            table = pa.table({**{name: good[name] for name in names}, column: array})
            summary = LogSummary("log", shape)
            summary.add(table, settings)
            summary.lines(settings)
            events, rejected = normalise(table, shape, songs, settings, "log", 0)
            assert events.num_rows + rejected.num_rows == 3
            assert np.isfinite(events["value"].to_numpy()).all()
            assert all(rejected["detail"].to_pylist())


def test_bytes_become_ids_and_strings() -> None:
    texts = [str(value) for value in IDS]
    assert as_ids(ARRAYS["uuid"]).to_pylist() == as_ids(ARRAYS["fixed 16"]).to_pylist() == texts
    assert as_strings(ARRAYS["uuid"]).to_pylist() == texts
    assert texts[0] == "f0000000-0000-0000-0000-000000000000"
    mixed = pa.array([b"s0", b"caf\xe9", IDS[0].bytes])
    assert as_ids(mixed).to_pylist() == ["s0", None, texts[0]]  # Spark writes UUIDs as plain binary
    assert as_strings(mixed).to_pylist() == ["s0", None, None]
    assert unreadable(mixed, as_strings(mixed)).tolist() == [False, True, True]
    assert as_ids(pa.array([Decimal(7), Decimal("7.50"), None])).to_pylist() == ["7", "7.50", None]
    assert as_ids(pa.array([7.0, 8.0], pa.float16())).to_pylist() == ["7", "8"]
    assert as_ids(ARRAYS["run ends"]).to_pylist() == ["a", "a", None]
    assert as_ids(pa.array([["a"], None])).to_pylist() == [None, None]


def test_objects_are_unreadable_as_labels() -> None:
    objects = pa.array([{"name": "rock"}, None])
    assert as_strings(objects).to_pylist() == as_lists(objects).to_pylist() == [None, None]
    assert unreadable(objects, as_lists(objects)).tolist() == [True, False]
    nested = pa.array([[{"name": "rock"}], [], None])
    assert as_lists(nested).to_pylist() == [None] * 3
    assert unreadable(nested, as_lists(nested)).tolist() == [True, False, False]
    tags = pa.array([[("mood", "calm")], None], pa.map_(pa.string(), pa.string()))
    assert unreadable(tags, as_lists(tags)).tolist() == [True, False]
    json_ = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['["rock", "folk"]', '"jazz; pop"', '{"a": 1}', None]))
    assert as_lists(json_).to_pylist() == [["rock", "folk"], ["jazz", "pop"], None, None]


def test_blank_cells_are_not_unreadable() -> None:
    for blank in (pa.array([" ", "", None]), pa.array([np.nan, None]), pa.array([[], [None], [" "]]), pa.nulls(2)):
        assert not unreadable(blank, as_strings(blank)).any()
