"""What a person can get wrong is said before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from htcl_ray.config import Config, resolve
from htcl_ray.errors import InputError
from htcl_ray.pipelines import cluster
from htcl_ray.pipelines.preprocess import preprocess

pytestmark = pytest.mark.unit

CATALOG = "song_id,audio_path,title\na,a.wav,One\nb,b.wav,Two\n"
LOG = "user_id,trigger_song_id,song_id,feedback,timestamp\nu,a,b,like,1700000000\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Input that is right; connecting to Ray fails the test."""

    def started(config: Config) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", started)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.zeros(16000), 16000)
    (tmp_path / "songs.csv").write_text(CATALOG)
    (tmp_path / "log.csv").write_text(LOG)
    keys = {"workspace": str(tmp_path / "ws"), "data.catalog": str(tmp_path / "songs.csv"), "data.interactions": str(tmp_path / "log.csv")}
    return resolve("demo").with_overrides(keys)


def test_right_input_starts_ray(config: Config) -> None:
    with pytest.raises(AssertionError, match="Ray was started"):
        preprocess(config)


WRONG: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({}, {"data.catalog": []}, "set data.catalog"),
    ({}, {"data.catalog": "nowhere.csv"}, "nowhere.csv does not exist"),
    ({}, {"data.interactions": "nowhere.csv"}, "nowhere.csv does not exist"),
    ({}, {"data.columns": {"genre": "stil"}}, "data.columns.genre is 'stil', but no table has"),
    ({}, {"data.text_columns": "titel"}, "did you mean 'title'"),
    ({"songs.csv": ""}, {}, "songs.csv is empty"),
    ({"songs.csv": "song_id,audio_path,title\n"}, {}, "is empty; expected at least one song"),
    ({"songs.csv": CATALOG + "a,c.wav,Three\n"}, {}, "more than once, for instance 'a'"),
    ({"songs.csv": CATALOG.replace("audio_path", "file")}, {}, "no column 'audio_path'"),
    ({"songs.csv": CATALOG + "c,c.wav,Three\n"}, {}, r"of 3 rows of the catalogue, 1 rejected \(audio_not_found 1\) is a share of 0\.333"),
    ({"songs.csv": CATALOG + "c,c.wav,\nd,,Four\n"}, {}, r"2 rejected \(missing_audio_path 1, missing_text 1\)"),
    ({"songs.csv": "song_id,audio_path,title\nc,c.wav,Three\n"}, {"data.max_rejected_share": 1}, "no song of .* can be used: 1 rejected"),
    ({"log.csv": ""}, {}, "log.csv is empty"),
    ({"log.csv": LOG.splitlines()[0] + "\n"}, {}, "is empty; expected at least one row"),
    ({"log.csv": "user_id,song_id\nu,a\n"}, {}, "no column 'timestamp'"),
    ({"log.csv": LOG + "u,a,b,liked,1700000002\n"}, {}, "unknown feedback values: 'liked'; expected like, collect"),
    ({"log.csv": LOG.replace("a,b", "y,z")}, {}, "names no song of the catalogue .*song_id 'z', the catalogue 'a'"),
]


@pytest.mark.parametrize(("files", "keys", "message"), WRONG)
def test_wrong_input(config: Config, tmp_path: Path, files: dict[str, str], keys: dict[str, Any], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        preprocess(config.with_overrides(keys))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "ws").rglob("manifest.json"))


def test_a_workspace_that_cannot_be_written(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        preprocess(config.with_overrides({"workspace": str(tmp_path / "file" / "ws")}))


def test_renamed_columns_of_either_table(config: Config, tmp_path: Path) -> None:
    (tmp_path / "songs.csv").write_text(CATALOG.replace("song_id", "track"))
    (tmp_path / "log.csv").write_text(LOG.replace("user_id", "listener").replace(",song_id", ",track"))
    with pytest.raises(AssertionError, match="Ray was started"):
        preprocess(config.with_overrides({"data.columns": {"song_id": "track", "user_id": "listener"}}))
