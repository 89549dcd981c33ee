"""URIs and failing storage: missing, forbidden and unreachable files are three different errors."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import pathlib
import pickle
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import soundfile

from htcl_ray import cli
from htcl_ray.audio import decode
from htcl_ray.catalog.audio_files import DENIED, MISSING, UNSUPPORTED, sizes_and_times
from htcl_ray.catalog.songs import read_catalog
from htcl_ray.cluster import connection
from htcl_ray.config import resolve
from htcl_ray.config.sections import AudioRecipe, DataSettings
from htcl_ray.errors import AccessDeniedError, AudioError, InputError, StorageError, WorkspaceError
from htcl_ray.extractors.song_features import AudioFeatures
from htcl_ray.pipelines.feature_shards import make_shard
from htcl_ray.pipelines.make_features import plan_features
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.schemas import Reason
from htcl_ray.workspace import filesystem
from htcl_ray.workspace.filesystem import explain, open_filesystem
from htcl_ray.workspace.paths import local_path
from htcl_ray.workspace.storage import Workspace
from tests.worlds.object_store import ObjectStore, running_store

pytestmark = pytest.mark.processes

RECIPE = AudioRecipe(clip_seconds=3.0)
NAMES = [
    "plain.wav",
    "two words.wav",
    "né.wav",
    "名.wav",
    "100%.wav",
    "what?.wav",
    "#1.wav",
    "a+b&c=d;e.wav",
    "50%25.wav",
]


def wav(seconds: float = 0.5, seed: int = 0) -> bytes:
    """Noise as a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * 16000)), 16000, format="WAV")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts for each request of an object store in place of five: 1.5 s of waiting in place of 7.5 s."""
    monkeypatch.setattr(filesystem, "S3_ATTEMPTS", 3)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with running_store(monkeypatch) as running:
        yield running


def catalog(folder: Path, paths: list[str]) -> str:
    """Path of a catalogue with one song for each audio path."""
    with open(folder / "songs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["song_id", "audio_path", "title"], *([f"s{i}", path, f"title {i}"] for i, path in enumerate(paths))]
        )
    return str(folder / "songs.csv")


class TestUris:
    @pytest.mark.parametrize("name", NAMES)
    def test_file_uris_are_percent_decoded(self, name: str, tmp_path: Path) -> None:
        """In the spellings of `pathlib`, playlists and file managers; the oracle is `Path.as_uri`."""
        path = tmp_path / name
        path.write_bytes(wav())
        uri = path.as_uri()
        for written in (
            uri,
            uri.replace("file:", "FILE:"),
            uri.replace("file://", "file:"),
            uri.replace("file://", "file://localhost"),
        ):
            assert local_path(written) == str(path)
            assert sizes_and_times([written])[0, 0] == path.stat().st_size
            np.testing.assert_array_equal(decode(written, RECIPE), decode(path, RECIPE))

    def test_file_uris_may_have_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
        with open(path, "wb") as file:
            file.write(wav())
        assert sizes_and_times([f"{tmp_path.as_uri()}/caf%E9.wav"])[0, 0] == os.path.getsize(path)

    def test_catalogues_may_have_relative_paths_and_uris(self, tmp_path: Path) -> None:
        """From planning to decoding, for a catalogue that is itself given as a URI."""
        folder = tmp_path / "my songs é%41"
        folder.mkdir()
        for i, name in enumerate(NAMES):
            (folder / name).write_bytes(wav(seed=i))
        catalog(folder, [(folder / name).as_uri() for name in NAMES] + NAMES)
        table = (folder / "songs.csv").as_uri()
        plan = plan_features(resolve("demo").with_overrides({"data.catalog": table}))
        assert plan.songs.num_rows == 2 * len(NAMES)
        features, rejected = make_shard(plan.songs, resolve("demo"), AudioFeatures(resolve("demo").audio.recipe, None))
        assert rejected.num_rows == 0
        assert len(set(features["duplicate_group"].to_pylist())) == len(NAMES), (
            "URI and relative path of a file are the same recording"
        )

    def test_the_workspace_and_the_configuration_file_may_be_uris(self, tmp_path: Path) -> None:
        folder = tmp_path / "a b%"
        workspace = Workspace(folder.as_uri())
        workspace.write_json("x.json", 1)
        assert (folder / "x.json").exists()
        assert workspace.is_local
        assert workspace.uri_of("x") == f"{folder}/x"
        assert pickle.loads(pickle.dumps(workspace)).read_json("x.json") == 1
        (folder / "c.yaml").write_text("pretrain: {epochs: 3}")
        assert resolve("demo", (folder / "c.yaml").as_uri(), []).pretrain.epochs == 3

    @pytest.mark.parametrize("name", NAMES)
    def test_keys_of_an_object_store_are_read_as_they_are_and_percent_encoded(
        self, name: str, store: ObjectStore
    ) -> None:
        store.objects[f"music/{name}"] = wav()
        encoded = pathlib.PurePosixPath(f"/{name}").as_uri().removeprefix("file:///")
        written = [encoded] if "%25" in name else [encoded, name]
        for uri in (f"s3://bucket/music/{one}" for one in written):
            assert sizes_and_times([uri])[0, 0] == len(wav())
            np.testing.assert_array_equal(decode(uri, RECIPE), decode(wav(), RECIPE))

    def test_relative_paths_of_a_table_in_an_object_store_name_its_objects(self, store: ObjectStore) -> None:
        rows = io.StringIO()
        csv.writer(rows).writerows(
            [["song_id", "audio_path", "title"], *([str(i), f"audio/{name}", "t"] for i, name in enumerate(NAMES))]
        )
        store.objects["my tables/songs.csv"] = rows.getvalue().encode()
        store.objects.update({f"my tables/audio/{name}": wav(seed=i) for i, name in enumerate(NAMES)})
        songs = read_catalog(DataSettings(catalog="s3://bucket/my tables/songs.csv")).songs
        assert sizes_and_times(songs["audio_path"].to_pylist())[:, 0].tolist() == [len(wav())] * len(NAMES)

    def test_uris_may_have_options(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        store.objects["a/x.wav"] = wav()
        uri = f"s3://bucket/a/x.wav?region=us-east-1&scheme=http&endpoint_override={store.url.removeprefix('http://')}"
        assert sizes_and_times([uri])[0, 0] == len(wav())
        assert decode(uri, RECIPE).size == 8000

    @pytest.mark.parametrize("scheme", ["abfs", "abfss", "az", "hdfs", "http", "https", "ftp", "viewfs", "nowhere"])
    def test_an_unsupported_scheme_is_one_sentence_with_the_supported_ones(
        self, scheme: str, tmp_path: Path, capsys
    ) -> None:
        uri = f"{scheme}://container@account/x"
        for arguments in (
            ["--workspace", uri],
            ["--workspace", str(tmp_path), "--set", f"data.catalog={uri}.csv"],
            ["--config", uri],
        ):
            assert cli.main(["preprocess", "--preset", "demo", *arguments]) == 2
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1
            assert "expected a local path, file://, s3:// or gs://" in shown
        assert sizes_and_times([uri])[0, 0] == UNSUPPORTED
        with pytest.raises(AudioError) as caught:
            decode(uri, RECIPE)
        assert caught.value.reason is Reason.UNSUPPORTED_URI

    def test_a_file_of_another_host_is_refused(self) -> None:
        with pytest.raises(WorkspaceError, match="names the host 'nas'"):
            open_filesystem("file://nas/music/x.wav")


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder that belongs to root and that all users may enter, for a user that is not root."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


class TestDenied:
    def test_local_files_without_permission_are_denied_not_missing(self) -> None:
        with unprivileged() as folder:
            (folder / "closed").mkdir()
            for name in ("closed/a.wav", "b.wav"):
                (folder / name).write_bytes(wav())
            (folder / "b.wav").chmod(0)
            (folder / "closed").chmod(stat.S_IRWXU if os.geteuid() == 0 else 0)
            if os.geteuid() == 0:
                os.seteuid(65534)
            paths = [str(folder / name) for name in ("closed/a.wav", "b.wav", "c.wav", "b.wav/d")]
            sizes = sizes_and_times(paths)[:, 0].tolist()
            reasons = []
            for path in paths[:2]:
                with pytest.raises(AudioError, match=r"access denied to /tmp/.*\.wav") as caught:
                    decode(path, RECIPE)
                reasons.append(caught.value.reason)
        assert sizes == [DENIED, DENIED, MISSING, MISSING]
        assert reasons == [Reason.ACCESS_DENIED] * 2

    @pytest.mark.parametrize("status", [403, 401])
    def test_a_denied_bucket_fails_the_step(self, status: int, store: ObjectStore, tmp_path: Path, capsys) -> None:
        store.fail, store.forever = [status], True
        arguments = [
            "--workspace",
            str(tmp_path / "ws"),
            "--set",
            f"data.catalog={catalog(tmp_path, ['s3://bucket/music/x.mp3'])}",
        ]
        assert cli.main(["preprocess", "--preset", "demo", *arguments]) == 2
        shown = capsys.readouterr().err
        assert "access denied to s3://bucket/music (" in shown
        assert "does not exist" not in shown
        assert shown.count("\n") == 1
        assert not (tmp_path / "ws" / "features").exists()

    def test_denied_tables_workspace_and_configuration_are_named(
        self, store: ObjectStore, tmp_path: Path, capsys
    ) -> None:
        store.fail, store.forever = [403], True
        for uri, arguments in {
            "s3://bucket/songs.csv": ["--workspace", str(tmp_path), "--set", "data.catalog=s3://bucket/songs.csv"],
            "s3://bucket/ws": ["--workspace", "s3://bucket/ws"],
            "s3://bucket/c.yaml": ["--config", "s3://bucket/c.yaml"],
        }.items():
            assert cli.main(["preprocess", "--preset", "demo", *arguments]) == 2
            assert f"access denied to {uri} (" in capsys.readouterr().err

    def test_a_denied_object_is_named(self, store: ObjectStore) -> None:
        store.fail, store.forever = [403], True
        with pytest.raises(AccessDeniedError, match=r"access denied to s3://bucket/x\.wav"):
            decode("s3://bucket/x.wav", RECIPE)


class TestOutages:
    def test_passing_errors_are_retried(self, store: ObjectStore) -> None:
        store.objects["music/x.wav"] = wav()
        store.fail = [503, 500]
        assert sizes_and_times(["s3://bucket/music/x.wav"])[0, 0] == len(wav())
        store.fail = [503, 500]
        assert decode("s3://bucket/music/x.wav", RECIPE).size == 8000
        assert not store.fail

    def test_an_outage_is_not_a_missing_file(
        self, store: ObjectStore, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filesystem, "S3_ATTEMPTS", 4)
        store.fail, store.forever = [503], True
        arguments = [
            "--workspace",
            str(tmp_path / "ws"),
            "--set",
            f"data.catalog={catalog(tmp_path, ['s3://bucket/music/x.mp3'])}",
        ]
        assert cli.main(["preprocess", "--preset", "demo", *arguments]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("htcl: failed: s3://bucket/music cannot be reached, also after retries (")
        assert shown.count("\n") == 1
        assert len(store.requests) >= 4

    def test_an_unreachable_server_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with running_store(monkeypatch) as stopped:
            pass
        with pytest.raises(StorageError, match="s3://bucket/music cannot be reached"):
            sizes_and_times(["s3://bucket/music/x.wav", "/nowhere"])
        assert stopped.requests == []

    def test_a_read_that_breaks_off_is_not_a_short_file(self, store: ObjectStore) -> None:
        """Decoders treat a read error as the end of the file."""
        store.objects["long.wav"] = wav(60)  # longer than one read
        store.fail_after_bytes = 1 << 20
        recipe = AudioRecipe(clip_seconds=60)
        with pytest.raises(StorageError, match=r"s3://bucket/long.wav cannot be reached"):
            decode("s3://bucket/long.wav", recipe)
        store.fail_after_bytes = None
        assert decode("s3://bucket/long.wav", recipe).size == recipe.max_samples

    def test_missing_objects_are_missing(self, store: ObjectStore) -> None:
        assert sizes_and_times(["s3://bucket/music/x.wav", "s3://bucket"])[:, 0].tolist() == [MISSING, MISSING]
        with pytest.raises(AudioError, match="does not exist") as caught:
            decode("s3://bucket/music/x.wav", RECIPE)
        assert caught.value.reason is Reason.AUDIO_NOT_FOUND

    def test_object_stores_give_up_after_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Arrow's own limits are 15 minutes for gs:// and none for connecting to s3://."""
        monkeypatch.undo()
        assert 3 <= filesystem.S3_ATTEMPTS <= 5
        _, (options,) = open_filesystem("gs://bucket/x")[0].__reduce__()
        assert options["retry_time_limit"].total_seconds() <= 15
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        opened, path = open_filesystem("s3://bucket/a b")
        assert isinstance(opened, pafs.S3FileSystem)
        _, (options,) = opened.__reduce__()
        assert 0 < options["connect_timeout"] <= 5
        assert path == "bucket/a b"

    @pytest.mark.parametrize(
        ("error", "kind", "sentence"),
        [
            (OSError(28, "No space left on device"), StorageError, "no space left on the device of /w"),
            (
                OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left"),
                StorageError,
                "no space left",
            ),
            (OSError(122, "Disk quota exceeded"), StorageError, "no space left"),
            (OSError(13, "Permission denied"), AccessDeniedError, "access denied to /w (Permission denied)"),
            (OSError(30, "Read-only file system"), AccessDeniedError, "access denied to /w (Read-only file system)"),
            (OSError(5, "Input/output error"), StorageError, "/w cannot be read or written (Input/output error)"),
            (OSError(116, "Stale file handle"), StorageError, "/w cannot be read or written (Stale file handle)"),
        ],
    )
    def test_an_error_of_storage_is_one_sentence(self, error: OSError, kind: type[Exception], sentence: str) -> None:
        explained = explain(error, "/w")
        assert type(explained) is kind
        assert sentence in str(explained)
        assert type(pickle.loads(pickle.dumps(explained))) is kind


class TestWrongFolder:
    """Audio paths that are relative to another folder than that of the table, a common first mistake."""

    @pytest.fixture(autouse=True)
    def _no_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "connect", lambda config: pytest.fail("Ray was started"))

    @pytest.mark.parametrize("share", [0.05, 1])
    def test_the_message_names_a_path_and_the_quarantine_table_is_written(self, share: float, tmp_path: Path) -> None:
        table = catalog(tmp_path, [f"audio/s{i}.wav" for i in range(12)])
        config = resolve("demo").with_overrides(
            {"workspace": str(tmp_path / "ws"), "data.catalog": table, "data.max_rejected_share": share}
        )
        with pytest.raises(
            InputError, match=rf"for instance row 0 of {table} \(song 's0'\): {tmp_path}/audio/s0.wav does not exist"
        ) as caught:
            preprocess(config)
        (folder,) = (tmp_path / "ws" / "quarantine").iterdir()
        assert f"see {folder}" in str(caught.value)
        written = Workspace(str(tmp_path / "ws")).read_tables(f"quarantine/{folder.name}")
        shown = zip(written["row"].to_pylist(), written["detail"].to_pylist(), strict=True)
        assert sorted(shown) == [(i, f"{tmp_path}/audio/s{i}.wav does not exist") for i in range(12)]
