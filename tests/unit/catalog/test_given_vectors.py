"""Given vectors of a catalogue: their types, their tables, and those that are rejected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from htcl_ray.catalog.given_vectors import as_vectors, check_vectors
from htcl_ray.catalog.songs import read_catalog
from htcl_ray.config.sections import DataSettings
from htcl_ray.errors import TableError
from htcl_ray.schemas import QUARANTINE

pytestmark = pytest.mark.unit

ROWS = [[1.0, 2.0], None, [3.0, 4.5]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS, pa.list_(pa.float64())),
        pa.array(ROWS, pa.list_(pa.float32(), 2)),
        pa.array(ROWS, pa.large_list(pa.float16())),
        pa.chunked_array([pa.array(ROWS[:1], pa.list_(pa.float32())), pa.array(ROWS[1:], pa.list_(pa.float32()))]),
        pa.array([None, *ROWS], pa.list_(pa.float64())).slice(1),
        pa.array(["[1, 2]", "no list", "[3.0, 4.5]"]),
    ],
)
def test_lists_of_any_type_are_read(column: pa.Array):
    assert as_vectors(column).to_pylist() == ROWS


def test_tensors_and_integers_are_read():
    values = np.arange(6.0).reshape(3, 2)
    assert as_vectors(pa.FixedShapeTensorArray.from_numpy_ndarray(values)).to_pylist() == values.tolist()
    assert as_vectors(pa.array([[1, 2]])).to_pylist() == [[1.0, 2.0]]


@pytest.mark.parametrize("column", [pa.array([["a"]]), pa.array([1.5]), pa.array([{"x": 1}]), pa.array(["{}"])])
def test_other_types_are_unreadable(column: pa.Array):
    assert as_vectors(column).to_pylist() == [None]


def test_a_missing_or_too_large_number_is_not_finite():
    vectors = as_vectors(pa.array([[1.0, None], [1.0, 1e300]])).to_pylist()
    assert np.isnan(vectors[0][1])
    assert np.isinf(vectors[1][1])


def catalogue(tmp_path: Path, vectors: list, name: str = "songs.parquet") -> DataSettings:
    ids = [f"s{row}" for row in range(len(vectors))]
    table = pa.table({"song_id": ids, "title": ids, "vector": pa.array(vectors, pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / name)
    return DataSettings(catalog=(str(tmp_path / name),))


def test_unusable_vectors_are_rejected_with_reasons(tmp_path: Path):
    settings = catalogue(tmp_path, [[1, 2], [3, 4], None, [1, 2, 3], [float("nan"), 1], [7e4, 1], [5, 6]])
    read = read_catalog(settings, given_vectors=True)
    assert read.rejected.num_rows == 0
    songs, rejected = check_vectors(read.songs)
    assert songs["song_id"].to_pylist() == ["s0", "s1", "s6"]
    assert songs["vector"].to_pylist() == [[1, 2], [3, 4], [5, 6]]
    assert songs.schema.field("vector").type == pa.list_(pa.float32(), 2)
    assert rejected.schema == QUARANTINE
    assert {(row["song_id"], row["row"], row["reason"]) for row in rejected.to_pylist()} == {
        ("s2", 2, "missing_vector"),
        ("s3", 3, "wrong_vector_width"),
        ("s4", 4, "not_finite"),
        ("s5", 5, "not_finite"),
    }


def test_a_catalogue_without_any_vector_has_no_song(tmp_path: Path):
    songs, rejected = check_vectors(read_catalog(catalogue(tmp_path, [None, None]), given_vectors=True).songs)
    assert (songs.num_rows, rejected["reason"].to_pylist()) == (0, ["missing_vector"] * 2)


def test_vectors_too_small_for_half_precision_are_refused(tmp_path: Path):
    read = read_catalog(catalogue(tmp_path, [[1e-7, 2e-7], [3e-7, 1e-8]]), given_vectors=True)
    with pytest.raises(TableError, match="the largest number of all vectors is 3e-07, too small to be stored"):
        check_vectors(read.songs)


def test_vectors_of_other_tables_are_joined_by_id(tmp_path: Path):
    settings = catalogue(tmp_path, [None, None, None])
    vectors = pa.table({"track": ["s2", "s0", "unknown"], "vector": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]})
    pq.write_table(vectors, tmp_path / "vectors.parquet")
    settings = settings.model_copy(update={"vectors": (str(tmp_path / "vectors.parquet"),)})
    with pytest.raises(TableError, match=r"have no column 'song_id' .*set data.columns.song_id=<its name>"):
        read_catalog(settings, given_vectors=True)
    pq.write_table(vectors.rename_columns(["song_id", "vector"]), tmp_path / "vectors.parquet")
    songs = read_catalog(settings, given_vectors=True).songs
    assert songs["vector"].to_pylist() == [[3.0, 4.0], None, [1.0, 2.0]]
    twice = pa.table({"song_id": ["s2", "s2"], "vector": [[1.0], [2.0]]})
    pq.write_table(twice, tmp_path / "vectors.parquet")
    with pytest.raises(TableError, match=r"1 song ids of .* occur more than once, for instance 's2'"):
        read_catalog(settings, given_vectors=True)


def test_a_table_without_vectors_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"song_id": ["a"], "title": ["a"]}), tmp_path / "songs.parquet")
    settings = DataSettings(catalog=(str(tmp_path / "songs.parquet"),))
    with pytest.raises(
        TableError, match=r"has no column 'vector' .*or give tables of song_id and vector as data.vectors"
    ):
        read_catalog(settings, given_vectors=True)
