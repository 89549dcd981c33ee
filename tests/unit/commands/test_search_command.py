"""`htcl search` on an index with hand-made vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from htcl_ray.api.requests import Filter
from htcl_ray.cli import main
from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.storage import Workspace
from tests.worlds.evaluated_workspace import write_evaluated
from tests.worlds.live import VERSIONS, write_index
from tests.worlds.small_workspace import small_config

pytestmark = pytest.mark.unit

SONGS = {f"s{row}": row + 1 for row in range(8)}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_index(Workspace(str(tmp_path / "w")), "v1", SONGS, titles={"s1": "One", "s2": "Two", "s3": "Three"})
    return tmp_path / "w"


def test_json_equals_the_results_of_the_service(workspace: Path, capsys: pytest.CaptureFixture):
    arguments = [
        "search",
        "--workspace",
        str(workspace),
        "--song-id",
        "s1",
        "-k",
        "3",
        "--blend",
        "0.2",
        "--max-per-artist",
        "1",
    ]
    assert main([*arguments, "--filter", '{"title": ["two", "three", "one"]}', "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    service = SearchService.open(small_config(workspace), encoder=False)
    response = service.search_songs(["s1"], k=3, blend=0.2, filter=Filter(title=["two", "three"]), max_per_artist=1)
    assert [(result["song_id"], result["score"]) for result in printed["results"]] == [
        (hit.song_id, hit.score) for hit in response.hits
    ]
    assert {result["title"] for result in printed["results"]} == {"Two", "Three"}
    assert (printed["k"], printed["blend"], printed["text_coverage"]) == (3, 0.2, None)


@pytest.fixture(scope="module")
def with_models(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workspace whose index has real (untrained) models."""
    folder = tmp_path_factory.mktemp("models")
    return write_evaluated(folder / "workspace", folder).workspace


@pytest.mark.parametrize(
    ("text", "coverage", "said"),
    [
        ("jazz number 4", 1, ""),
        ("\U0001f3b5\U0001f3b6", 0, "warning: the text model knows nothing of this text"),
        ("静かなピアノ", 0, "warning: the text model knows nothing of this text"),
        ("jazz \U0001f3b5\U0001f3b6", 4 / 6, ""),
        (
            "jazz \U0001f3b5\U0001f3b6\U0001f3b5\U0001f3b6\U0001f3b5\U0001f3b6",
            0.4,
            "warning: the text model knows only 40% of this text",
        ),
    ],
)
def test_text_with_little_coverage_prints_a_warning(
    with_models: str, text: str, coverage: float, said: str, capsys: pytest.CaptureFixture
):
    for flags in ([], ["--json"]):
        assert main(["search", "--workspace", with_models, "--text", text, *flags]) == 0
        printed = capsys.readouterr()
        assert printed.err.strip().startswith(said)
        assert bool(printed.err.strip()) == bool(said)
    assert json.loads(printed.out)["text_coverage"] == pytest.approx(coverage)


def test_table_output(workspace: Path, capsys: pytest.CaptureFixture):
    assert main(["search", "--workspace", str(workspace), "--song-id", "s1"]) == 0
    assert "s2" in capsys.readouterr().out


def test_estimated_values_are_marked_in_the_table(
    workspace: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    told = {"genre": ["jazz"], "tags": ["live"], "estimated": ["genre"]}
    LiveIndex(Workspace(str(workspace)), ServeSettings(), VERSIONS).describe("s2", told)
    assert main(["index", "--compact", "--workspace", str(workspace)]) == 0
    capsys.readouterr()
    assert main(["search", "--workspace", str(workspace), "--song-id", "s1", "-k", "9"]) == 0
    out = capsys.readouterr().out
    assert "jazz (estimated)" in out
    assert out.count("(estimated)") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--filter", "{"], "--filter: Invalid JSON"),
        (["--filter", '{"genres": ["x"]}'], "--filter: 'genres' is not a column to filter by"),
        (["--filter", '{"year": "soon"}'], "--filter.year"),
        (["--max-per-artist", "0"], "max_per_artist is 0; expected at least 1"),
        (["-k", "0"], "k is 0; expected 1 to 1000"),
    ],
)
def test_invalid_queries_exit_2(workspace: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture):
    assert main(["search", "--workspace", str(workspace), "--song-id", "s1", *flags]) == 2
    assert said in capsys.readouterr().err
