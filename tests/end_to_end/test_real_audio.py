"""Real audio through the steps that need no log: preprocess, pretrain, embed, index, search."""

from __future__ import annotations

import csv
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from htcl_ray import cli
from htcl_ray.workspace.storage import Workspace

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("in_process_training")]

SHORT = ["--set", "pretrain.epochs=2", "--set", "audio.clip_seconds=5", "--set", "data.max_rejected_share=1"]
SHORT += ["--set", "audio.tower=transformer"]  # a third of the time of a step


def run(*arguments: str) -> str:
    """One command; its output."""
    output = io.StringIO()
    with redirect_stdout(output):
        assert cli.main(arguments) == 0
    return output.getvalue()


def through_to_search(catalog: Path, workspace: Path, *flags: str) -> list[dict]:
    common = ["--preset", "demo", "--workspace", str(workspace), "--set", f"data.catalog={catalog}", *SHORT, *flags]
    for step in ("preprocess", "pretrain", "embed", "index", "evaluate"):
        run(step, *common)
    first = Workspace(str(workspace)).read_tables(
        f"features/{Workspace(str(workspace)).children('features')[0]}", ["song_id"]
    )
    song = first["song_id"][0].as_py()
    neighbours = json.loads(run("search", *common, "--song-id", song, "-k", "5", "--json"))["results"]
    assert song not in [hit["song_id"] for hit in neighbours]
    by_text = json.loads(run("search", *common, "--text", "orchestra", "-k", "5", "--json"))["results"]
    return [*neighbours, *by_text]


@pytest.fixture(scope="module")
def music(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory, in_process_training: None
) -> tuple[Path, list[dict]]:
    """A workspace of stage 1 over real music, and the results of two searches in it."""
    workspace = tmp_path_factory.mktemp("music")
    return workspace, through_to_search(shared_data / "music.csv", workspace)


def test_music_without_logs_carries_through_to_search(shared_data: Path, music: tuple[Path, list[dict]]):
    """Stage 1 alone; a song's own file retrieves the song."""
    workspace, hits = music
    assert len(hits) == 10
    assert all(hit["preference_score"] is None for hit in hits)
    with (shared_data / "music.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert {hit["song_id"] for hit in hits} <= {row["song_id"] for row in rows}
    common = ["--preset", "demo", "--workspace", str(workspace), *SHORT]
    for row in rows[::30]:
        hits = json.loads(run("search", *common, "--audio", str(shared_data / row["audio_path"]), "-k", "3", "--json"))[
            "results"
        ]
        best = {hit["song_id"]: hit["score"] for hit in hits}
        assert max(best.values()) > 0.9999
        assert best[row["song_id"]] == pytest.approx(max(best.values()), abs=1e-3)


def test_other_column_names(shared_data: Path, tmp_path: Path):
    flags = ["--set", "data.columns.song_id=clip_id", "--set", "data.text_columns=[label]"]
    assert len(through_to_search(shared_data / "esc10.csv", tmp_path, *flags)) == 10


def test_without_a_log_stage_two_is_refused(
    shared_data: Path, music: tuple[Path, list[dict]], capsys: pytest.CaptureFixture[str]
):
    common = ["--preset", "demo", "--workspace", str(music[0]), "--set", f"data.catalog={shared_data / 'music.csv'}"]
    assert cli.main(["finetune", *common, *SHORT]) == 2
    assert "data.interactions" in capsys.readouterr().err
