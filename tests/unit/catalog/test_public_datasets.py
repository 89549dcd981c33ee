"""`htcl import` of public data sets: a few rows of each, written by hand in the published layout."""

from __future__ import annotations

import bz2
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from htcl_ray import cli
from htcl_ray.catalog.public_datasets import DATASETS, YAMBDA_START
from htcl_ray.catalog.songs import read_catalog
from htcl_ray.catalog.tables import column_names, table_files
from htcl_ray.commands.flags import IMPORT_SOURCES
from htcl_ray.config.sections import DataSettings
from htcl_ray.interactions.logs import LogShape, detect_shape

pytestmark = pytest.mark.unit


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def audio(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not decoded by an import")
    return str(path)


def jamendo(root: Path) -> None:
    text(
        root / "data/autotagging.tsv",
        "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS",
        "track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t124.6\tgenre---punkrock\tgenre---rock\tmood/theme---happy",
        "track_0000215\tartist_000014\talbum_000031\t15/215.mp3\t151.4\tinstrument---guitar",
        "track_0000216\tartist_000014\talbum_000031\t16/216.mp3\t99.0\tgenre---metal",
    )
    text(
        root / "data/raw.meta.tsv",
        "TRACK_ID\tARTIST_ID\tALBUM_ID\tTRACK_NAME\tARTIST_NAME\tALBUM_NAME\tRELEASEDATE\tURL",
        'track_0000214\tartist_000014\talbum_000031\tGot "My Own\tNosika\tFirst\t2004-12-30\thttp://example.org/214',
    )
    audio(root / "audio/14/214.mp3")
    audio(root / "audio-low/15/215.low.mp3")


def fma(root: Path) -> None:
    text(
        root / "fma_metadata/tracks.csv",
        ",album,artist,set,set,track,track,track,track,track,track",
        ",date_released,name,split,subset,date_recorded,genre_top,genres,license,tags,title",
        "track_id,,,,,,,,,,",
        "2,2009-01-05 00:00:00,AWOL,training,small,2008-11-26 00:00:00,Hip-Hop,[21],Attribution 3.0,[],Food",
        '10,2008-02-06 00:00:00,"Kurt Vile, band",validation,small,,Pop,"[10, 76]",CC0,"[\'lo-fi\', \'pop\']","A, ""B""\nand C"',
        "20,,Nicky Cook,test,large,,,[],CC0,[],Spiritual Level",
    )
    text(
        root / "fma_metadata/genres.csv",
        "genre_id,#tracks,parent,title,top_level",
        "21,12693,0,Hip-Hop,21",
        "10,13845,0,Pop,10",
        "76,432,10,Experimental Pop,10",
    )
    audio(root / "fma_small/000/000002.mp3")
    audio(root / "fma_small/000/000010.mp3")


def melon(root: Path) -> None:
    songs = [
        {
            "id": i,
            "song_name": f"song {i}",
            "album_name": "album",
            "album_id": 7,
            "artist_id_basket": [1, 2],
            "artist_name_basket": ["가수", "second"],
            "song_gn_gnr_basket": ["GN0900"],
            "song_gn_dtl_gnr_basket": ["GN0901"],
            "issue_date": ("20140512", "00000000")[i % 2],
        }
        for i in (0, 1001)
    ]
    text(root / "song_meta.json", json.dumps(songs, ensure_ascii=False))
    text(root / "genre_gn_all.json", json.dumps({"GN0900": "POP", "GN0901": "세부장르전체"}, ensure_ascii=False))
    playlists = [
        {
            "id": 61281,
            "plylst_title": "t",
            "songs": [1001, 0],
            "tags": ["rock"],
            "like_cnt": 71,
            "updt_date": "2013-12-19 18:36:19.000",
        }
    ]
    text(root / "train.json", json.dumps(playlists))
    (root / "arena_mel/0").mkdir(parents=True)
    np.save(root / "arena_mel/0/0.npy", np.arange(96, dtype=np.float32).reshape(48, 2))


def music4all(root: Path) -> None:
    text(
        root / "id_information.csv",
        "id\tartist\tsong\talbum_name",
        "0009fFIM1eYThaPg\tA\tSong\tAlbum",
        "0010xmHR6UICBOYT\tB\tOther\tAlbum 2",
    )
    text(root / "id_genres.csv", "id\tgenres", "0009fFIM1eYThaPg\tjazz,soul")
    text(root / "id_tags.csv", "id\ttags", "0009fFIM1eYThaPg\tpiano, live")
    text(root / "id_lang.csv", "id\tlang", "0009fFIM1eYThaPg\ten")
    text(root / "id_metadata.csv", "id\tspotify_id\tpopularity\trelease", "0009fFIM1eYThaPg\txyz\t23.0\t2018")
    audio(root / "audios/0009fFIM1eYThaPg.mp3")
    rows = "user_id\ttrack_id\ttimestamp\nuser_007XIjOr\t0009fFIM1eYThaPg\t2019-02-20 12:28:00\n"
    (root / "userid_trackid_timestamp.tsv.bz2").write_bytes(bz2.compress(rows.encode()))


def yambda(root: Path) -> None:
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float64()))
    root.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"item_id": pa.array([5, 3], pa.uint32()), "embed": vectors, "normalized_embed": vectors}),
        root / "embeddings.parquet",
    )
    pq.write_table(
        pa.table({"artist_id": pa.array([9, 4, 4], pa.uint32()), "item_id": pa.array([5, 5, 3], pa.uint32())}),
        root / "artist_item_mapping.parquet",
    )
    flat = root / "flat/50m"
    flat.mkdir(parents=True)
    event = {
        "uid": pa.array([100, 100], pa.uint32()),
        "timestamp": pa.array([10, 25], pa.uint32()),
        "item_id": pa.array([5, 3], pa.uint32()),
        "is_organic": pa.array([1, 0], pa.uint8()),
    }
    listened = {
        "played_ratio_pct": pa.array([40, 130], pa.uint16()),
        "track_length_seconds": pa.array([200, 180], pa.uint32()),
    }
    pq.write_table(pa.table(event | listened), flat / "listens.parquet")
    pq.write_table(pa.table(event).slice(1), flat / "likes.parquet")


def listenbrainz(root: Path) -> None:
    def listen(user: int, time: int, name: str, **track: object) -> str:
        track = {"track_name": name, "artist_name": "X", "release_name": "R", "additional_info": {}} | track
        return json.dumps(
            {"user_id": user, "user_name": "n", "listened_at": time, "recording_msid": "m", "track_metadata": track}
        )

    text(
        root / "listens/2023/1.listens",
        listen(1, 1672531200, "one", additional_info={"recording_mbid": "aaaa"}),
        listen(1, 1672531500, "no id"),
        listen(
            2,
            1672531600,
            "One (live)",
            additional_info={"recording_mbid": "zzzz"},
            mbid_mapping={"recording_mbid": "aaaa"},
        ),
    )
    text(root / "listens/2023/2.listens", listen(2, 1675209600, "two", additional_info={"recording_mbid": "bbbb"}))


WRITERS = {
    "jamendo": jamendo,
    "fma": fma,
    "melon": melon,
    "music4all-onion": music4all,
    "yambda": yambda,
    "listenbrainz": listenbrainz,
}


def imported(name: str, tmp_path: Path) -> tuple[dict[str, dict], list[dict] | None]:
    """Songs by id and rows of the log, as `htcl import` writes them."""
    root, out = tmp_path / "published", tmp_path / "catalog.parquet"
    WRITERS[name](root)
    assert cli.main(["import", name, str(root), "--out", str(out)]) == 0
    log = tmp_path / "interactions.parquet"
    songs = {row["song_id"]: row for row in pq.read_table(out).to_pylist()}
    return songs, pq.read_table(log).to_pylist() if log.exists() else None


def test_every_data_set_can_be_named():
    assert set(IMPORT_SOURCES[1:]) == set(DATASETS) == set(WRITERS)


def test_jamendo(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    songs, log = imported("jamendo", tmp_path)
    first = songs["track_0000214"]
    assert first == {
        "song_id": "track_0000214",
        "audio_path": str(tmp_path / "published/audio/14/214.mp3"),
        "title": 'Got "My Own',
        "artist": "Nosika",
        "album": "First",
        "genre": ["punkrock", "rock"],
        "mood": ["happy"],
        "tags": [],
        "year": 2004,
    }
    assert songs["track_0000215"]["audio_path"].endswith("audio-low/15/215.low.mp3")
    assert songs["track_0000215"]["tags"] == ["guitar"]
    assert songs["track_0000215"]["artist"] == "artist_000014", "without names, artists are told apart by their ids"
    assert len(songs) == 2
    assert log is None
    shown = capsys.readouterr().out
    assert "1 left out: no audio file" in shown
    assert f"next: htcl run --set data.catalog={tmp_path}/catalog.parquet\n" in shown


def test_fma(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    songs, _ = imported("fma", tmp_path)
    assert songs.keys() == {"2", "10"}
    assert (songs["2"]["genre"], songs["2"]["year"], songs["2"]["split"]) == (["Hip-Hop"], 2008, "train")
    assert songs["10"]["title"] == 'A, "B"\nand C'
    assert songs["10"]["genre"] == ["Pop", "Experimental Pop"]
    assert songs["10"]["tags"] == ["lo-fi", "pop"]
    assert (songs["10"]["year"], songs["10"]["split"], songs["10"]["licence"]) == (2008, "validation", "CC0")
    assert "data.split_column=split" in capsys.readouterr().out


def test_melon(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    songs, log = imported("melon", tmp_path)
    song = songs["0"]
    assert (song["artist"], song["genre"], song["year"]) == ("가수; second", ["POP", "세부장르전체"], 2014)
    mel = np.arange(96).reshape(48, 2)
    np.testing.assert_allclose(song["vector"], [*mel.mean(1), *mel.std(1)], rtol=1e-6)
    assert log == [{"user_id": "61281", "song_id": song, "weight": 1.0} for song in ("1001", "0")]
    shown = capsys.readouterr().out
    assert "1 left out: no mel-spectrogram" in shown
    assert "--set audio.extractor=vectors" in shown


def test_music4all_onion(tmp_path: Path):
    songs, log = imported("music4all-onion", tmp_path)
    assert songs.keys() == {"0009fFIM1eYThaPg"}
    song = songs["0009fFIM1eYThaPg"]
    assert (song["genre"], song["tags"], song["language"], song["year"]) == (
        ["jazz", "soul"],
        ["piano", "live"],
        "en",
        2018,
    )
    assert log == [{"user_id": "user_007XIjOr", "song_id": "0009fFIM1eYThaPg", "timestamp": "2019-02-20 12:28:00"}]


def test_yambda(tmp_path: Path):
    songs, log = imported("yambda", tmp_path)
    assert songs["5"] == {"song_id": "5", "artist": "artist 4; artist 9", "album": None, "vector": [1.0, 0.0]}
    assert songs["3"]["artist"] == "artist 4"
    assert [
        (row["song_id"], row["timestamp"] - YAMBDA_START, row["feedback"], row["played_ratio"]) for row in log or ()
    ] == [
        ("5", 10, "play", pytest.approx(0.4)),
        ("3", 25, "play", 1.0),
        ("3", 25, "like", None),
    ]


def test_listenbrainz(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    songs, log = imported("listenbrainz", tmp_path)
    assert {song: row["title"] for song, row in songs.items()} == {"aaaa": "one", "bbbb": "two"}
    assert [(row["user_id"], row["song_id"]) for row in log or ()] == [("1", "aaaa"), ("2", "aaaa"), ("2", "bbbb")]
    shown = capsys.readouterr().out
    assert "1 left out: listens without a recording of MusicBrainz" in shown
    assert "data.vectors=TABLE" in shown


SHAPES = {
    "melon": LogShape.AFFINITY,
    "music4all-onion": LogShape.PLAYS,
    "yambda": LogShape.PLAYS,
    "listenbrainz": LogShape.PLAYS,
}


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_what_is_imported_is_accepted_by_preprocess(name: str, tmp_path: Path):
    songs, _ = imported(name, tmp_path)
    catalog, log = tmp_path / "catalog.parquet", tmp_path / "interactions.parquet"
    if name != "listenbrainz":  # without audio or vectors
        settings = DataSettings(catalog=[str(catalog)], split_column="split" if name == "fma" else None)
        read = read_catalog(settings, given_vectors="audio_path" not in pq.read_schema(catalog).names)
        assert set(read.songs["song_id"].to_pylist()) == set(songs)
        assert (read.rejected.num_rows, read.null_cells.counts) == (0, {})
    if name in SHAPES:
        assert detect_shape(column_names(table_files([str(log)])[0]), str(log)) is SHAPES[name]
    assert cli.main(["import", name, str(tmp_path / "published"), "--out", str(catalog)]) == 0, "may be repeated"


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_another_folder_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["import", name, str(tmp_path), "--out", str(tmp_path / "catalog.parquet")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("jamendo", "data/autotagging.tsv"),
        ("fma", "fma_metadata/tracks.csv"),
        ("melon", "song_meta.json"),
        ("music4all-onion", "id_information.csv"),
        ("yambda", "embeddings.parquet"),
        ("listenbrainz", "listens/2023/2.listens"),
        ("melon", "train.json"),
        ("melon", "arena_mel/0/0.npy"),
        ("music4all-onion", "userid_trackid_timestamp.tsv.bz2"),
        ("yambda", "flat/50m/likes.parquet"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"[1]", b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_a_damaged_file_is_one_sentence_and_leaves_nothing(
    name: str, file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    WRITERS[name](tmp_path / "published")
    (tmp_path / "published" / file).write_bytes(content)
    expected = 0 if (name, content) == ("listenbrainz", b"") else 2  # a month without listens
    assert (
        cli.main(["import", name, str(tmp_path / "published"), "--out", str(tmp_path / "catalog.parquet")]) == expected
    )
    if expected:
        assert "published" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_table_of_the_user_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    melon(tmp_path / "published")
    pq.write_table(pa.table({"user_id": ["mine"]}), tmp_path / "interactions.parquet")
    assert cli.main(["import", "melon", str(tmp_path / "published"), "--out", str(tmp_path / "catalog.parquet")]) == 2
    assert "was not made by htcl import" in capsys.readouterr().err
    assert not (tmp_path / "catalog.parquet").exists()
