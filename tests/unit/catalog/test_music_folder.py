"""`htcl import folder`: tags of real files, names from paths, ids, and what a folder may hold besides music."""

from __future__ import annotations

import csv
import io
import os
import socket
import time
from pathlib import Path, PurePosixPath

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from htcl_ray import cli
from htcl_ray.catalog import music_folder
from htcl_ray.catalog.audio_tags import MAX_LENGTH, SongTags, TagError, read_tags, tags_from_path
from htcl_ray.catalog.music_folder import IMPORTED, Rejection, list_music, read_songs
from htcl_ray.catalog.songs import read_catalog
from htcl_ray.config.sections import DataSettings

pytestmark = pytest.mark.unit

RATE = 8_000
TONE = (0.2 * np.sin(np.arange(RATE // 4) / 5)).astype(np.float32)


def text_frame(name: str, *values: str) -> bytes:
    """A text frame of ID3v2.4 in UTF-8; null characters separate values."""
    content = b"\x03" + "\0".join(values).encode()
    return name.encode() + synchsafe(len(content)) + b"\0\0" + content


def synchsafe(size: int) -> bytes:
    return bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))


def mp3(path: Path, *frames: bytes) -> Path:
    """An MP3 file with an ID3v2.4 tag made by hand."""
    audio = io.BytesIO()
    soundfile.write(audio, TONE, RATE, format="MP3")
    tag = b"".join(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"ID3\x04\0\0" + synchsafe(len(tag)) + tag if frames else b"") + audio.getvalue())
    return path


def flac(path: Path, comments: list[str]) -> Path:
    """A FLAC file whose Vorbis comments were made by hand."""
    audio = io.BytesIO()
    soundfile.write(audio, TONE, RATE, format="FLAC")
    data = audio.getvalue()
    entries = [b"test", *(comment.encode() for comment in comments)]
    block = len(entries[0]).to_bytes(4, "little") + entries[0] + len(comments).to_bytes(4, "little")
    block += b"".join(len(entry).to_bytes(4, "little") + entry for entry in entries[1:])
    streaminfo = data[4:42]  # its header says that more blocks follow
    assert streaminfo[0] == 0
    rest = data[42:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"fLaC" + streaminfo + b"\x04" + len(block).to_bytes(3, "big") + block + without_comments(rest))
    return path


def without_comments(blocks: bytes) -> bytes:
    """The blocks after STREAMINFO without libsndfile's own comments."""
    kept, at = b"", 0
    while True:
        size = int.from_bytes(blocks[at + 1 : at + 4], "big") + 4
        last = bool(blocks[at] & 0x80)
        if blocks[at] & 0x7F != 4:
            kept += bytes([blocks[at] & 0x7F]) + blocks[at + 1 : at + size]
        at += size
        if last:
            return kept + b"\x81\0\0\0" + blocks[at:]  # an empty padding block is the last one


def tagged(path: Path, kind: str, **tags: str) -> Path:
    """A file whose tags libsndfile wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(path, "w", RATE, 1, format=kind) as file:
        for name, value in tags.items():
            setattr(file, name, value)
        file.write(TONE)
    return path


def m4a(path: Path, **tags: str) -> Path:
    """A file whose tags FFmpeg wrote."""
    with av.open(str(path), "w", format="ipod") as container:
        container.metadata.update(tags)
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


class TestTags:
    def test_id3_of_an_mp3(self, tmp_path: Path):
        frames = [
            text_frame("TIT2", "Öde an die Nacht"),
            text_frame("TPE1", "Ana", "Ben"),
            text_frame("TALB", "Album"),
            text_frame("TCON", "Jazz", "Bossa Nova"),
            text_frame("TDRC", "1987-05-01"),
            text_frame("TMOO", "calm; warm"),
            text_frame("TSRC", "DEABC8700001"),
        ]
        expected = SongTags(
            "Öde an die Nacht", ("Ana", "Ben"), "Album", ("Jazz", "Bossa Nova"), ("calm", "warm"), 1987, "DEABC8700001"
        )
        assert read_tags(str(mp3(tmp_path / "a.mp3", *frames))) == expected

    def test_vorbis_comments_of_a_flac(self, tmp_path: Path):
        comments = ["TITLE=Title", "artist=Ana", "ARTIST=Ben", "ALBUM=Album", "GENRE=Rock", "GENRE=Pop; Soul"]
        comments += ["DATE=2001", "MOOD=happy", "MOOD=bright", "ISRC=GBXYZ0100002"]
        expected = SongTags(
            "Title", ("Ana", "Ben"), "Album", ("Rock", "Pop", "Soul"), ("happy", "bright"), 2001, "GBXYZ0100002"
        )
        assert read_tags(str(flac(tmp_path / "a.flac", comments))) == expected

    @pytest.mark.parametrize("kind", ["FLAC", "OGG", "WAV", "AIFF"])
    def test_tags_that_libsndfile_wrote_are_those_that_ffmpeg_reads(self, tmp_path: Path, kind: str):
        tags = {"title": "A Title", "artist": "An Artist"}
        if kind != "AIFF":
            tags |= {"album": "An Album", "genre": "Genre", "date": "1999"}
        path = tagged(tmp_path / f"a.{kind.lower()}", kind, **tags)
        with av.open(str(path)) as container:
            metadata = {**container.metadata, **container.streams.audio[0].metadata}
        of_ffmpeg = {name.lower(): value for name, value in metadata.items()}
        read = read_tags(str(path))
        assert (read.title, "; ".join(read.artists)) == (
            of_ffmpeg["title"],
            of_ffmpeg.get("artist") or of_ffmpeg["author"],
        )
        assert read.album == of_ffmpeg.get("album")
        assert (str(read.year) if read.year else None) == of_ffmpeg.get("date")
        assert list(read.genres) == [of_ffmpeg["genre"]] if "genre" in of_ffmpeg else not read.genres

    def test_mp4_tags_that_ffmpeg_wrote(self, tmp_path: Path):
        path = m4a(tmp_path / "a.m4a", title="Title", artist="Artist", album="Album", genre="Genre", date="2010")
        assert read_tags(str(path)) == SongTags("Title", ("Artist",), "Album", ("Genre",), (), 2010)

    def test_the_album_artist_stands_in_for_an_absent_artist(self, tmp_path: Path):
        assert read_tags(str(flac(tmp_path / "a.flac", ["ALBUMARTIST=Band"]))).artists == ("Band",)
        assert read_tags(str(flac(tmp_path / "b.flac", ["ALBUMARTIST=Band", "ARTIST=Ana"]))).artists == ("Ana",)

    def test_hostile_text_is_cut_to_one_printable_line(self, tmp_path: Path):
        title = "a\x1b[31m\n\rb\u0000\u0085c" + "x" * 5_000
        tags = read_tags(str(flac(tmp_path / "a.flac", [f"TITLE={title}", *(f"GENRE=g{i}" for i in range(500))])))
        assert tags.title is not None
        assert tags.title.isprintable()
        assert len(tags.title) <= MAX_LENGTH
        assert len(tags.genres) == 100

    def test_damaged_files_end_in_tags_or_an_error_of_their_own_within_moments(self, tmp_path: Path):
        rng = np.random.default_rng(0)
        sources = [
            mp3(tmp_path / "a.mp3", text_frame("TIT2", "Title"), text_frame("TPE1", "Artist")),
            flac(tmp_path / "a.flac", ["TITLE=Title", "ARTIST=Artist"]),
            tagged(tmp_path / "a.ogg", "OGG", title="Title"),
            tagged(tmp_path / "a.wav", "WAV", title="Title"),
            m4a(tmp_path / "a.m4a", title="Title"),
        ]
        started, errors = time.monotonic(), 0
        for source in sources:
            original = source.read_bytes()
            for _ in range(40):
                data = bytearray(original[: int(rng.integers(1, len(original)))])
                for at in rng.integers(0, min(len(data), 400), size=8):
                    data[at] = rng.integers(256)
                source.write_bytes(data)
                try:
                    read_tags(str(source))
                except TagError:
                    errors += 1
        assert errors
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Ana/First/01 Intro.mp3", SongTags("Intro", ("Ana",), "First")),
        ("Music/Ana/First/07. Long Way.flac", SongTags("Long Way", ("Ana",), "First")),
        ("Ana/First/1-07 - Song_2.ogg", SongTags("Song 2", ("Ana",), "First")),
        ("Ana/First/CD 2/03 Song.ogg", SongTags("Song", ("Ana",), "First")),
        ("Ana/First/disc1/03) Song.ogg", SongTags("Song", ("Ana",), "First")),
        ("Ana/First/Intro.mp3", SongTags("Intro")),
        ("Playlists/2023/99 Luftballons.mp3", SongTags("Luftballons", ("Playlists",), "2023")),
        ("First/01 Intro.mp3", SongTags("Intro")),
        ("Ana - Intro.mp3", SongTags("Ana - Intro")),
        ("1999.mp3", SongTags("1999")),
        ("50_Ways_to_say.wav", SongTags("Ways to say")),
        ("7th_Heaven.mp3", SongTags("7th Heaven")),
        ("Café  del  Mar.mp3", SongTags("Café del Mar")),
        ("__.mp3", SongTags("__.mp3")),
    ],
)
def test_names_from_paths(path: str, expected: SongTags):
    assert tags_from_path(PurePosixPath(path)) == expected


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """A folder as people have them."""
    folder = tmp_path / "music"
    mp3(folder / "Ana/First/01 Intro.mp3")
    mp3(folder / "Ana/First/02 Name in path.mp3", text_frame("TIT2", "Name in the tag"))
    tagged(folder / "loose.ogg", "OGG", title="Loose", artist="Ben", genre="Folk")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "Ana/notes.txt").write_text("notes")
    (folder / "README").write_text("no extension")
    (folder / ".hidden").mkdir()
    mp3(folder / ".hidden/secret.mp3")
    (folder / "Ana/._01 Intro.mp3").write_bytes(b"resource fork")
    (folder / "__MACOSX").mkdir()
    mp3(folder / "__MACOSX/x.mp3")
    (folder / "empty.mp3").touch()
    return folder


def test_a_folder_becomes_a_catalogue(music: Path):
    listing = list_music(str(music))
    imported = read_songs(listing)
    assert imported.songs.schema == IMPORTED
    rows = imported.songs.to_pylist()
    assert [(row["title"], row["artist"], row["album"], row["genre"]) for row in rows] == [
        ("Intro", "Ana", "First", None),
        ("Name in the tag", "Ana", "First", None),
        ("Loose", "Ben", None, ["Folk"]),
    ]
    assert [row["audio_path"] for row in rows] == [
        str(music / name) for name in ("Ana/First/01 Intro.mp3", "Ana/First/02 Name in path.mp3", "loose.ogg")
    ]
    assert imported.tagged == 2
    assert [(row.path, row.reason) for row in imported.rejected] == [("empty.mp3", Rejection.AUDIO_EMPTY)]
    assert listing.other == {".jpg": 1, ".txt": 1, "without extension": 1}
    assert listing.hidden == 3


def ids(folder: Path) -> dict[str, str]:
    rows = read_songs(list_music(str(folder))).songs.to_pylist()
    return {os.path.relpath(row["audio_path"], folder): row["song_id"] for row in rows}


def test_ids_stay_when_tags_change_when_songs_come_and_when_the_folder_moves(music: Path, tmp_path: Path):
    before = ids(music)
    assert len(set(before.values())) == 3
    mp3(music / "Ana/First/01 Intro.mp3", text_frame("TIT2", "Another title"))
    mp3(music / "AAA/first.mp3")
    after = ids(music)
    assert {path: after[path] for path in before} == before
    moved = tmp_path / "elsewhere"
    music.rename(moved)
    assert ids(moved) == after


def test_links_are_followed_once_and_loops_end(music: Path, tmp_path: Path):
    before = ids(music)
    outside = tmp_path / "outside"
    mp3(outside / "far.mp3")
    (music / "Ana/loop").symlink_to(music)
    (music / "AAA link to Ana").symlink_to(music / "Ana")
    (music / "again.mp3").symlink_to(music / "Ana/First/01 Intro.mp3")
    (music / "outside").symlink_to(outside)
    (music / "self.mp3").symlink_to(music / "self.mp3")
    (music / "broken.mp3").symlink_to(music / "absent.mp3")
    (music / "broken.jpg").symlink_to(music / "absent.jpg")
    listing = list_music(str(music))
    after = {file.relative for file in listing.files}
    assert after == {*before, "outside/far.mp3"}, "real paths win over links, whatever they are called"
    assert {path: ids(music)[path] for path in before} == before
    assert listing.repeated == 3
    reasons = {row.path: row.reason for row in listing.rejected if row.reason != Rejection.AUDIO_EMPTY}
    assert reasons == {"broken.mp3": Rejection.MISSING, "self.mp3": Rejection.UNREADABLE}


def test_pipes_sockets_and_names_that_are_no_text_are_never_opened(music: Path):
    os.mkfifo(music / "pipe.mp3")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(music / "s.mp3"))
        mp3(music / os.fsdecode(b"caf\xe9.mp3"))
        rejected = {row.path: row.reason for row in list_music(str(music)).rejected}
    assert rejected == {
        "pipe.mp3": Rejection.NOT_A_FILE,
        "s.mp3": Rejection.NOT_A_FILE,
        os.fsdecode(b"caf\xe9.mp3"): Rejection.NAME_NOT_UTF8,
        "empty.mp3": Rejection.AUDIO_EMPTY,
    }


def test_folders_and_files_that_may_not_be_read(music: Path, monkeypatch: pytest.MonkeyPatch):
    """The system's own refusal, which a test of the superuser does not get."""
    scandir, get = os.scandir, music_folder.read_tags

    def refused(path: str) -> object:
        if path.endswith("Ana"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def unreadable(path: str) -> SongTags:
        if path.endswith("loose.ogg"):
            raise PermissionError(13, "Permission denied")
        return get(path)

    mp3(music / "other.mp3")
    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(music_folder, "read_tags", unreadable)
    imported = read_songs(list_music(str(music)))
    assert imported.songs["title"].to_pylist() == ["other"]
    assert {(row.path, row.reason, row.detail) for row in imported.rejected if row.path != "empty.mp3"} == {
        ("Ana", Rejection.ACCESS_DENIED, "Permission denied"),
        ("loose.ogg", Rejection.ACCESS_DENIED, "Permission denied"),
    }


def test_formats_that_need_ffmpeg_are_named_when_it_is_absent(music: Path, monkeypatch: pytest.MonkeyPatch):
    m4a(music / "a.m4a", title="Title")
    assert "a.m4a" in ids(music)
    monkeypatch.setattr(music_folder.importlib.util, "find_spec", lambda name: None)
    assert "a.m4a" not in ids(music)
    (row,) = [row for row in list_music(str(music)).rejected if row.path == "a.m4a"]
    assert row.reason == Rejection.DECODER_MISSING
    assert "pip install 'htcl-ray[ffmpeg]'" in row.detail


class TestCommand:
    def test_catalogue_and_table_of_rejected_files(
        self, music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (music / "bad.flac").write_bytes(b"no FLAC at all")
        mp3(music / "e\x1b[31mvil.mp3")
        (music / "e\x1b[31mvil.ogg").touch()
        out = tmp_path / "catalog.parquet"
        assert cli.main(["import", "folder", str(music), "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert f"import: 5 songs, 2 artists, 1 albums → {out}" in shown
        assert "audio_empty 2, for instance" in shown
        assert "unreadable_tags 1, for instance bad.flac: the song is imported" in shown
        assert "skipped: 3 files that are no audio" in shown
        assert f"next: htcl run --set data.catalog={out}" in shown
        assert "\x1b" not in shown
        with (tmp_path / "rejected.csv").open(newline="") as file:
            assert [row["reason"] for row in csv.DictReader(file)] == ["unreadable_tags", "audio_empty", "audio_empty"]
        catalog = read_catalog(DataSettings(catalog=[str(out)]))
        assert catalog.songs.num_rows == 5
        assert catalog.rejected.num_rows == 0
        assert "Loose; Ben; Folk" in catalog.songs["text"].to_pylist()

    def test_the_recording_code_is_metadata_of_the_song(self, tmp_path: Path):
        mp3(tmp_path / "music" / "a.mp3", text_frame("TIT2", "Title"), text_frame("TSRC", "DEABC8700001"))
        out = tmp_path / "catalog.parquet"
        assert cli.main(["import", "folder", str(tmp_path / "music"), "--out", str(out)]) == 0
        assert read_catalog(DataSettings(catalog=[str(out)])).songs["isrc"].to_pylist() == ["DEABC8700001"]

    def test_a_second_import_replaces_the_first(self, music: Path, tmp_path: Path):
        out = tmp_path / "catalog.parquet"
        assert cli.main(["import", "folder", str(music), "--out", str(out)]) == 0
        (music / "empty.mp3").unlink()
        mp3(music / "more.mp3")
        assert cli.main(["import", "folder", str(music), "--out", str(out)]) == 0
        assert pq.read_table(out).num_rows == 4
        assert (tmp_path / "rejected.csv").read_text().splitlines() == ["path,reason,detail"]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda folder: (folder / "m").mkdir(), "holds no audio file that can be read"),
            (lambda folder: (folder / "m").touch(), "cannot be listed: Not a directory"),
            (lambda folder: None, "cannot be listed: No such file or directory"),
            (lambda folder: (folder / "catalog.parquet").write_text("mine"), "was not made by htcl import"),
            (lambda folder: (folder / "rejected.csv").write_text("mine"), "was not made by htcl import"),
        ],
    )
    def test_what_cannot_be_imported_is_one_sentence(
        self, make: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        make(tmp_path)  # type: ignore[operator]
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert cli.main(["import", "folder", str(tmp_path / "m"), "--out", str(tmp_path / "catalog.parquet")]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    def test_arguments(self, music: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        for arguments, message in [
            (["playlist", str(music)], "invalid choice: 'playlist'"),
            (["folder", "s3://bucket/music"], "reads and writes local folders"),
            (["folder", str(music), "--out", "songs.csv"], "ends in .parquet"),
            (["folder", str(music), "--out", f"{tmp_path}/absent/c.parquet"], "does not exist"),
        ]:
            assert cli.main(["import", *arguments]) == 2
            assert message in capsys.readouterr().err


def test_real_music_without_tags(shared_data: Path):
    imported = read_songs(list_music(str(shared_data / "music")))
    with (shared_data / "music.csv").open(encoding="utf-8") as file:
        expected = {str(shared_data / row["audio_path"]) for row in csv.DictReader(file)}
    assert set(imported.songs["audio_path"].to_pylist()) == expected
    assert not imported.rejected


def test_real_files_of_every_kind_of_damage(shared_data: Path):
    """Files of decoders' and tag readers' own tests: each is imported or has a reason, and none ends the import."""
    listing = list_music(str(shared_data / "oddaudio"))
    imported = read_songs(listing)
    present = {path.name for path in (shared_data / "oddaudio").iterdir()}
    assert len(listing.files) + sum(listing.other.values()) == len(present)
    assert imported.songs.num_rows == len(listing.files)
    assert {row.reason for row in imported.rejected} == {Rejection.UNREADABLE_TAGS}
    assert "Courtney Barnett" in imported.songs["artist"].to_pylist()
