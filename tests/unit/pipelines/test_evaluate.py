"""The evaluation step on tiny models: report, page, errors, repetition, and comparison and gate over its reports."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from htcl_ray.cli import main
from htcl_ray.config import Config, resolve
from htcl_ray.errors import ConfigError, LeakageError, MismatchError, StepError, TableError, WorkspaceError
from htcl_ray.evaluation.metrics import headline_metrics
from htcl_ray.evaluation.report import plots
from htcl_ray.evaluation.report import report_tree as reports
from htcl_ray.evaluation.report.report_page import html
from htcl_ray.evaluation.report.report_schema import Report
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.models import HTCL
from htcl_ray.pipelines import evaluate as step
from htcl_ray.pipelines.apply_gate import evaluate_and_judge
from htcl_ray.pipelines.compare import compare
from htcl_ray.pipelines.evaluation_inputs import find_inputs, log_mel_statistics
from htcl_ray.pipelines.index import build_index
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.evaluated_workspace import ENCODER, SONGS, encode_features, grow, write_embeddings, write_evaluated
from tests.worlds.small_workspace import write_models

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StepResult]:
    """A workspace and its report; tests that write take a copy."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = write_evaluated(folder / "workspace", folder)
    return config, step.evaluate(config)


@pytest.fixture(scope="module")
def semantic_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StepResult]:
    """A workspace without stage 2, log and index, and its report."""
    folder = tmp_path_factory.mktemp("semantic-only")
    config = write_evaluated(folder / "workspace", folder, log=False, preference=False, index=False)
    return config, step.evaluate(config)


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch):
    """Drawing takes half of the time of an evaluation; the reports of the fixtures above are drawn."""
    for name in ("recall_curves", "blend_curve", "genre_bars", "song_map", "similarity_histograms"):
        monkeypatch.setattr(plots, name, lambda *arguments: "<svg></svg>")


def copied(
    world: tuple[Config, StepResult], folder: Path, without: tuple[str, ...] = (), **overrides: object
) -> Config:
    """A copy of a workspace for a test that writes, without these kinds of artifacts."""
    shutil.copytree(
        world[0].workspace, folder / "workspace", ignore=lambda at, _: without if at == world[0].workspace else ()
    )
    return world[0].with_overrides({"workspace": str(folder / "workspace"), **overrides})


def read(result: StepResult) -> dict:
    return json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8"))


def values(report: dict, task: str, metric: str) -> dict[str, float]:
    return {
        method: of_method[metric]["value"]
        for method, of_method in report["tasks"][task]["methods"].items()
        if metric in of_method
    }


def test_the_report_names_the_encoder_and_its_licence(evaluated: tuple[Config, StepResult]):
    report = read(evaluated[1])
    assert report["encoder"] == ENCODER
    assert report["encoder"]["licence"] == "apache-2.0"


def test_the_report_names_the_tagger_of_estimated_values(evaluated: tuple[Config, StepResult], tmp_path: Path):
    assert read(evaluated[1])["auto_tags"] is None
    config = copied(evaluated, tmp_path, without=("reports",))
    workspace = Workspace(config.workspace)
    ((index, manifest),) = workspace.finished("index")
    origin = {"tagger": {"name_or_path": "a tagger", "licence": "isc"}, "min_score": 0.2, "songs": {"genre": 17}}
    workspace.write_json(f"index/{index}/manifest.json", {**manifest, "auto_tags": origin})
    result = step.evaluate(config)
    assert read(result)["auto_tags"] == origin
    page = (Path(result.location) / "report.html").read_text(encoding="utf-8")
    assert "a tagger, licence isc; songs: genre 17" in page


def test_report_holds_every_task_and_method(evaluated: tuple[Config, StepResult]):
    report = read(evaluated[1])
    spaces, controls = ["semantic", "preference", "blend_0.5"], ["random", "popularity", "shuffled", "log_mel", "genre"]
    collaborative = ["item_knn", "als"]
    assert {name: list(task["methods"]) for name, task in report["tasks"].items()} == {
        "text_to_audio": [*spaces, "shuffled", "random"],
        "audio_to_text": [*spaces, "shuffled", "random"],
        **{f"tag_queries_{count}": [*spaces, "shuffled", "random", "best"] for count in (1, 2)},
        "zero_shot_genre": [*spaces, "random", "commonest"],
        "probe_genre": [*spaces, "log_mel", "shuffled", "commonest"],
        "zero_shot_tags": [*spaces, "random"],
        "probe_tags": [*spaces, "log_mel", "shuffled", "random"],
        "cold": [*spaces, *controls, "artist_mean"],
        "cold_known_users": [*spaces, *controls, "artist_mean"],
        "hot": [*spaces, *controls, *collaborative],
        "hot_known_users": [*spaces, *controls, *collaborative],
        "collapse": ["semantic", "preference"],
        "determinism": ["semantic", "preference"],
        "index": ["index"],
    }
    assert report["data"]["songs"] == SONGS // 2
    assert report["data"]["artists"] == 4
    assert {kind: of_method["shared"] for kind, of_method in report["leakage"].items()}.keys() >= {
        "songs",
        "artists",
        "users",
        "times",
    }
    assert values(report, "index", "recall@10") == {"index": 1.0}
    assert values(report, "cold", "user_auc")["random"] == 0.5
    assert values(report, "cold", "user_auc")["genre"] > 0.8, "the users of this log like genres"
    assert len(report["pictures"]["blend_curve"]) == 11
    for metric in ("repeat_difference", "padding_difference", "stored_difference"):
        assert max(values(report, "determinism", metric).values()) < 1e-5
    assert max(values(report, "determinism", "from_audio_difference").values()) < 0.05


def test_every_metric_has_n_and_resampled_ones_an_interval(evaluated: tuple[Config, StepResult]):
    for name, task in read(evaluated[1])["tasks"].items():
        for method, of_method in task["methods"].items():
            for metric, item in of_method.items():
                assert item["n"] > 0, (name, method, metric)
                if task["control"] and metric.partition("@")[0] not in ("coverage", "gini", "prompt_spread"):
                    assert item["low"] <= item["value"] + 1e-6, (name, method, metric)
                    assert item["high"] >= item["value"] - 1e-6, (name, method, metric)
                    assert (item["shown"] is None) == (method == task["control"]), (name, method, metric)


def test_each_stage_is_evaluated_with_its_own_towers(evaluated: tuple[Config, StepResult]):
    config, result = evaluated
    workspace = Workspace(config.workspace)
    texts = (
        workspace.read_tables("features/features-1", ["song_id", "text"]).sort_by("song_id")["text"].to_pylist()[1::2]
    )
    vectors = encode_features(config)
    assert vectors.preference is not None
    for space, songs in (("semantic", vectors.semantic), ("preference", vectors.preference)):
        folder = workspace.full(f"models/{space}/{space}-0")
        scores = HTCL.from_pretrained(folder).embed_text(texts).detach().numpy() @ songs[1::2].T
        ranks = [1 + (row > row[i]).sum() for i, row in enumerate(scores)]
        assert values(read(result), "text_to_audio", "mrr")[space] == pytest.approx(np.mean(1 / np.array(ranks)))


def test_report_matches_its_schema_and_its_table(evaluated: tuple[Config, StepResult]):
    config, result = evaluated
    report = read(result)
    schema = json.loads((Path(result.location) / "report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(report)
    assert Report.model_validate(report).run == report["run"]
    broken = report | {"tasks": {"cold": {"methods": {}}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(broken)
    metrics = step.read_metrics(Workspace(config.workspace), report["run"])
    for (task, method, metric), item in metrics.items():
        written = report["tasks"][task]["methods"][method][metric]
        assert written["value"] == (None if np.isnan(item.value) else item.value)
    assert {row["method"] for row in report["differences"]} == {"preference"}
    row = next(row for row in report["differences"] if (row["task"], row["figure"]) == ("cold", "ndcg@10"))
    gain = bootstrap.difference(metrics["cold", "preference", "ndcg@10"], metrics["cold", "semantic", "ndcg@10"])
    assert (row["value"], (row["low"], row["high"])) == (gain.value, gain.interval)


def test_command_of_the_report_repeats_it(evaluated: tuple[Config, StepResult], capsys):
    config, result = evaluated
    report = read(result)
    assert resolve(assignments=[]).model_validate(report["config"]) == config
    arguments = report["command"].split()[1:]
    assert main(arguments) == 0
    assert "evaluate: already done" in capsys.readouterr().out


def test_second_run_is_skipped_with_the_same_summary(evaluated: tuple[Config, StepResult], monkeypatch, capsys):
    config, first = evaluated
    monkeypatch.setattr(step, "SongEncoder", None)  # nothing is encoded again
    second = step.evaluate(config)
    assert (second.skipped, second.location, second.summary) == (True, first.location, first.summary)
    printed = capsys.readouterr().out
    assert "stage 2" in printed
    assert "°" in printed
    match = (
        r"text→audio median rank [\d.]+ of 20, genre probe \d\.\d\d \(stage 1: .*\), "
        r"cold NDCG@10 0\.\d\d \(stage 1: 0\.\d\d\)"
    )
    assert re.fullmatch(match, second.summary)
    with pytest.raises(AttributeError):
        step.evaluate(config.with_overrides({"evaluate.seed": 9}))  # other settings are another run


def test_repeated_evaluation_gives_the_same_report(evaluated: tuple[Config, StepResult], tmp_path: Path):
    again = read(step.evaluate(copied(evaluated, tmp_path, without=("reports", "statistics"))))
    first = read(evaluated[1])
    for key in ("data", "tasks", "differences", "pictures"):
        assert again[key] == first[key]


def test_without_logs_only_semantic_tasks_are_evaluated(semantic_only: tuple[Config, StepResult]):
    result = semantic_only[1]
    report = read(result)
    assert list(report["tasks"]) == [
        "text_to_audio", "audio_to_text", "tag_queries_1", "tag_queries_2", "zero_shot_genre", "probe_genre", "zero_shot_tags", "probe_tags", "collapse", "determinism"
    ]  # fmt: skip
    assert report["inputs"]["events"] is None
    assert report["differences"] == []
    assert report["pictures"]["blend_curve"] is None
    assert "NDCG" not in result.summary
    assert "Stage 1 against the controls" in (Path(result.location) / "report.html").read_text(encoding="utf-8")


def test_an_unfinished_report_is_written_again(semantic_only: tuple[Config, StepResult], tmp_path: Path):
    config = copied(semantic_only, tmp_path)
    result = step.evaluate(config)
    assert result.skipped
    (Path(result.location) / "manifest.json").unlink()
    assert not step.evaluate(config).skipped


def test_wrong_input_is_refused_in_one_sentence(evaluated: tuple[Config, StepResult], tmp_path: Path):
    config = copied(evaluated, tmp_path, without=("reports", "index"))
    with pytest.raises(ConfigError, match="did you mean 'genre'"):
        step.evaluate(config.with_overrides({"evaluate.probe_columns": ["genres"]}))
    with pytest.raises(ConfigError, match=r"label_prompts.*expected texts with \{label\}"):
        config.with_overrides({"evaluate.label_prompts": "a song"})
    with pytest.raises(WorkspaceError, match="run 'htcl preprocess' first"):
        step.evaluate(config.with_overrides({"workspace": str(tmp_path / "empty")}))
    with pytest.raises(
        WorkspaceError, match=r"no embeddings of the features features-1 by semantic model semantic-0; run 'htcl embed'"
    ):
        step.evaluate(config, "semantic-0")
    with pytest.raises(WorkspaceError, match="no song of the catalogue is in the validation split"):
        step.evaluate(config.with_overrides({"evaluate.split": "validation"}))
    workspace = Workspace(config.workspace)
    pairs = workspace.read_tables("pairs/pairs-1").to_pylist()
    leaking = [pairs[0] | {"song_id": "song-001"}, *pairs[1:]]
    workspace.write_table("pairs/pairs-1/part-0.parquet", pa.Table.from_pylist(leaking))
    with pytest.raises(LeakageError, match=r"1 of the test songs are in training pairs \(for instance song-001\)"):
        step.evaluate(config)
    name = workspace.children("embeddings")[0]
    table = workspace.read_tables(f"embeddings/{name}")
    workspace.write_table(f"embeddings/{name}/part-0.parquet", table.slice(1))
    with pytest.raises(MismatchError, match="hold 39 songs, but the features features-1 hold 40"):
        step.evaluate(config)


class Page(HTMLParser):
    """Collects the URLs that a browser would load, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value for name, value in attrs if name in {"src", "href", "srcset", "data"} and not value.startswith("#")
        ]
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert "http" not in text
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    return text


def test_page_is_complete_self_contained_and_escaped(evaluated: tuple[Config, StepResult], tmp_path: Path):
    report = read(evaluated[1])
    text = check_page(Path(evaluated[1].location) / "report.html")
    for task in report["tasks"].values():
        for of_method in task["methods"].values():
            for metric, item in of_method.items():
                assert reports.number(item["value"], metric) in text
    assert text.count("<svg") == 5
    assert report["command"] in text.replace("&#39;", "'")
    assert json.dumps(report, allow_nan=False)
    report["config"]["data"]["text_columns"] = ["<script>alert(1)</script>"]
    (tmp_path / "report.html").write_text(html(report), encoding="utf-8")
    assert "alert(1)" in check_page(tmp_path / "report.html")


class VisibleText(HTMLParser):
    """Text outside of scripts, styles, SVG and <pre>, and the open <details> elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.order: list[str] = []
        self.open: list[bool] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("style", "script", "svg", "pre"):
            self._hidden.append(tag)
        if tag == "details":
            self.open.append("open" in dict(attrs))
        if tag in ("h2", "table", "details"):
            self.order.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden and self._hidden[-1] == tag:
            self._hidden.pop()

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


@pytest.mark.parametrize("kind", ["everything", "without a log", "semantic only"])
def test_page_opens_with_the_verdict_and_contains_no_python(
    evaluated: tuple[Config, StepResult], semantic_only: tuple[Config, StepResult], tmp_path: Path, kind: str
):
    config, result = semantic_only if kind == "semantic only" else evaluated
    if kind == "without a log":
        config = copied(evaluated, tmp_path, without=("events", "pairs", "reports"))
        result = step.evaluate(config)
    run = result.location.rpartition("/")[2]
    report = Workspace(config.workspace).read_json(f"reports/{run}/report.json")
    bound = {
        "figure": "a.b.c",
        "asked": "a.b.c: at least 1",
        "value": None,
        "low": None,
        "high": None,
        "passed": False,
        "note": "",
        "required": False,
    }
    stored = Path(result.location, "report.html").read_text(encoding="utf-8")
    report["leakage"]["artists"] |= {"shared": 1, "examples": ["it's 'one'"]}
    for page in (stored, html(report), html(report, {"passed": False, "results": [bound]})):
        seen = VisibleText()
        seen.feed(page)
        text = " ".join(" ".join(seen.text).split())
        assert not re.search(
            r"\bNone\b|\bTrue\b|\bFalse\b|\bnan\b|\[\]|\{\}|\['|\{'|np\.|dict\(|array\(|<class", text
        ), text
        assert text.index("Verdict") < text.index("Metrics") < text.index("How it was measured")
        assert seen.order[:2] == ["h2", "details"], "the verdict comes first, and no table before it"
        assert seen.order.count("table") < seen.order.count("details")
        assert sum(seen.open) == ("The gate failed" in text), "all are folded but a gate that failed"
        assert re.search("The gate failed: 1 of 1 bounds do not hold|No gate was applied to this model", text)
        assert ("The model has no stage 2" in text) == (kind == "semantic only")
        assert ("Not measured: recommendation" in text) == (kind != "everything")


def test_model_folders_contain_the_metrics(evaluated: tuple[Config, StepResult]):
    config, result = evaluated
    of_method = values(read(result), "cold", "ndcg@10")["preference"]
    model = HTCL.from_pretrained(Path(config.workspace) / "models" / "preference" / "preference-0")
    assert model.evaluation is not None
    card = (Path(config.workspace) / "models" / "preference" / "preference-0" / "README.md").read_text(encoding="utf-8")
    assert "model-index:" in card
    assert str(of_method) in card


def test_two_reports_are_compared_with_paired_intervals(evaluated: tuple[Config, StepResult], tmp_path: Path, capsys):
    config = copied(evaluated, tmp_path)
    result = step.evaluate(config)
    other = step.evaluate(config.with_overrides({"evaluate.min_history": 2}))
    first, second = (one.location.rpartition("/")[2] for one in (result, other))
    comparison = compare(config, result.location, second)
    assert comparison.location == compare(config, first, second).location
    tree = read(comparison)
    cold = next(
        row
        for row in tree["differences"]
        if (row["task"], row["method"], row["figure"]) == ("text_to_audio", "semantic", "mrr")
    )
    assert (cold["value"], cold["low"], cold["high"], cold["verdict"]) == (0, 0, 0, "not shown")
    check_page(Path(comparison.location) / "report.html")
    assert "not significant" in comparison.summary
    with pytest.raises(WorkspaceError, match=f"report 'nothing' does not exist in .*; expected one of .*{first}"):
        compare(config, first, "nothing")
    assert main(["evaluate", "--workspace", config.workspace, "--compare", first, second, "--gate", "default"]) == 2
    assert "cannot be combined" in capsys.readouterr().err


def test_gate_is_applied_recorded_and_fails_the_command(evaluated: tuple[Config, StepResult], tmp_path: Path, capsys):
    config = copied(evaluated, tmp_path)
    gate = tmp_path / "gate.yaml"
    gate.write_text("bounds:\n- {figure: determinism.semantic.repeat_difference, at_most: 1.0e-4}\n")
    result = evaluate_and_judge(config, None, str(gate))
    assert result.step == "gate"
    workspace = Workspace(config.workspace)
    index = f"index/{workspace.children('index')[0]}"
    for path in ("models/preference/preference-0", index):
        assert workspace.manifest(path)["gate"]["passed"] is True
    assert "Gate: " in check_page(Path(result.location) / "report.html")
    gate.write_text("bounds:\n- {figure: cold.preference.ndcg@10, over: semantic, shown: true}\n")
    with pytest.raises(
        StepError, match=r"the gate failed: 1 of 1 bounds do not hold, first cold.preference.ndcg@10 over semantic"
    ):
        evaluate_and_judge(config, None, str(gate))
    assert workspace.manifest("models/preference/preference-0")["gate"]["passed"] is False
    arguments = ["--workspace", config.workspace, "--preset", "demo"]
    assert main(["search", *arguments, "--song-id", "song-001"]) == 2
    assert "gate" in capsys.readouterr().err
    assert main(["search", *arguments, "--song-id", "song-001", "--set", "gate.require=off"]) == 0
    gate.write_text("bounds:\n- {figure: cold.ndcg@10, at_least: 0.1}\n")
    with pytest.raises(ConfigError, match=r"names no metric; expected TASK\.METHOD\.METRIC"):
        evaluate_and_judge(config, None, str(gate))


def test_gate_compares_with_the_newest_accepted_model(evaluated: tuple[Config, StepResult], tmp_path: Path, capsys):
    config = copied(evaluated, tmp_path)
    gate = tmp_path / "gate.yaml"
    gate.write_text("bounds:\n- {figure: text_to_audio.preference.mrr, over_served: true, at_least: -1}\n")
    with pytest.raises(
        StepError, match="the gate failed: 1 of 1"
    ):  # nothing is served yet, and the bound is not optional
        evaluate_and_judge(config, None, str(gate))
    gate.write_text(
        "bounds:\n- {figure: text_to_audio.preference.mrr, over_served: true, at_least: -1, optional: true}\n"
    )
    first = evaluate_and_judge(config, None, str(gate))
    write_models(config, tmp_path, seed=1)
    write_embeddings(config)
    build_index(config)
    gate.write_text("bounds:\n- {figure: text_to_audio.preference.mrr, over_served: true, at_least: -1}\n")
    second = evaluate_and_judge(config, None, str(gate))
    assert second.location != first.location
    assert "gate  compared with index" in capsys.readouterr().out
    judged = json.loads((Path(second.location) / "gate.json").read_text(encoding="utf-8"))["results"][0]
    metrics = [values(read(result), "text_to_audio", "mrr")["preference"] for result in (first, second)]
    assert judged["value"] == pytest.approx(metrics[1] - metrics[0])
    assert judged["low"] < judged["value"] < judged["high"]
    gate.write_text("bounds:\n- {figure: text_to_audio.preference.mrr, at_least: 2}\n")
    with pytest.raises(StepError):
        evaluate_and_judge(config, None, str(gate))
    write_models(config, tmp_path, seed=2)
    write_embeddings(config)
    build_index(config)
    gate.write_text("bounds:\n- {figure: text_to_audio.preference.mrr, over_served: true, at_least: -1}\n")
    capsys.readouterr()
    evaluate_and_judge(config, None, str(gate))
    assert f"compared with index {read(first)['inputs']['index']}" in capsys.readouterr().out, (
        "the second failed its gate"
    )


def test_models_are_compared_on_the_test_set_of_a_grown_catalogue(
    evaluated: tuple[Config, StepResult], tmp_path: Path, capsys
):
    """The model being served is evaluated on the new songs; bounds have paired values, and fail when it cannot be."""
    config = copied(evaluated, tmp_path)
    workspace = Workspace(config.workspace)
    gate = tmp_path / "gate.yaml"
    bounds = "bounds:\n" + "".join(
        f"- {{figure: {name}, over_served: true, at_least: -1, optional: true}}\n"
        for name in ("text_to_audio.preference.mrr", "cold.preference.ndcg@10", "cold.preference.coverage@10")
    )
    gate.write_text(bounds)
    first = evaluate_and_judge(config, None, str(gate))
    card = workspace.read_bytes("models/preference/preference-0/evaluation.json")
    grow(config)
    write_embeddings(config)
    build_index(config)
    unchanged = evaluate_and_judge(config, None, str(gate))
    for result in json.loads((Path(unchanged.location) / "gate.json").read_text(encoding="utf-8"))["results"]:
        assert (result["value"], result["passed"]) == (0, True), "the same model on the same songs, however many"
    compared = read(compare(config, first.location, unchanged.location))
    assert {row["verdict"] for row in compared["differences"]} == {"not shown"}, "only the catalogue grew"
    assert {row["value"] for row in compared["differences"] if row["method"] == "semantic"} == {0}

    write_models(config, tmp_path, seed=1)
    write_embeddings(config)
    build_index(config)
    before = workspace.read_bytes("models/preference/preference-0/evaluation.json")
    assert before != card
    changed = evaluate_and_judge(config, None, str(gate))
    assert workspace.read_bytes("models/preference/preference-0/evaluation.json") == before
    judged = json.loads((Path(changed.location) / "gate.json").read_text(encoding="utf-8"))
    assert judged["served"]["report"] == unchanged.location.rpartition("/")[2]
    own, other = (values(read(result), "cold", "ndcg@10")["preference"] for result in (changed, unchanged))
    assert judged["results"][1]["value"] == pytest.approx(own - other)
    assert judged["results"][1]["low"] < judged["results"][1]["value"] < judged["results"][1]["high"]

    compared = read(compare(config, first.location, changed.location))
    assert compared["reference"] == judged["served"]["report"]
    assert all(row["verdict"] != "not comparable" for row in compared["differences"])
    row = next(
        row
        for row in compared["differences"]
        if (row["task"], row["method"], row["figure"]) == ("cold", "preference", "ndcg@10")
    )
    assert (row["first"], row["second"]) == (own, other)
    assert row["low"] < row["value"] < row["high"]

    for artifact in (
        "models/preference/preference-0",
        "models/semantic/semantic-0",
        f"reports/{judged['served']['report']}",
    ):
        shutil.rmtree(Path(config.workspace) / artifact)
    capsys.readouterr()
    with pytest.raises(
        StepError,
        match=r"the gate failed: 3 of 3 bounds do not hold, .*could not be evaluated on this test set: .*lacks",
    ):
        evaluate_and_judge(config, "preference-1", str(gate))
    compared = compare(config, first.location, changed.location)
    changed_tasks = {
        row["verdict"]
        for row in read(compared)["differences"]
        if row["task"] in ("text_to_audio", "cold", "probe_genre")
    }
    assert changed_tasks == {"not comparable"}
    assert "not comparable" in compared.summary
    assert "has no model 'preference-0'" in " ".join(read(compared)["test_set"].split())


def test_the_configured_index_is_evaluated(evaluated: tuple[Config, StepResult], tmp_path: Path):
    """Two indexes of the same vectors, and the compacted successor of one of them."""
    config = copied(evaluated, tmp_path, without=("index", "reports"))
    hnsw, flat = (config.with_overrides({"index.kind": kind}) for kind in ("hnsw", "flat"))
    made = [build_index(one).location.rpartition("/")[2] for one in (hnsw, flat)]
    workspace = Workspace(config.workspace)
    for one, version in zip((hnsw, flat), made, strict=True):
        index = find_inputs(workspace, one).index
        assert index is not None
        assert index.version == version
    workspace.finish("index/folded", build_manifest("index", config={}, inputs={"compacted_from": made[0]}))
    assert [index.version for one in (hnsw, flat) if (index := find_inputs(workspace, one).index)] == [
        "folded",
        made[1],
    ]
    assert find_inputs(workspace, config.with_overrides({"index.kind": "ivf"})).index is None


def test_log_mel_statistics_cover_the_valid_frames(evaluated: tuple[Config, StepResult]):
    config, _ = evaluated
    workspace = Workspace(config.workspace)
    table = workspace.read_tables("features/features-1").sort_by("song_id")
    mels = table["features"].combine_chunks().to_numpy_ndarray().astype(np.float64)
    parts = [mel[:frames] for mel, frames in zip(mels, table["valid_frames"].to_pylist(), strict=True)]
    naive = np.array([np.concatenate([part.mean(axis=0), part.std(axis=0)]) for part in parts])
    training = naive[::2]
    naive = (naive - training.mean(axis=0)) / training.std(axis=0)
    naive /= np.linalg.norm(naive, axis=1, keepdims=True)
    features = Artifact("features/features-1", "features-1", workspace.manifest("features/features-1"))
    np.testing.assert_allclose(log_mel_statistics(workspace, features), naive, atol=2e-3)


def test_lower_ranks_are_better():
    worse, better = (bootstrap.Estimate(sign * 2.0, 9, np.full(100, sign * 2.0, np.float32), "p") for sign in (1, -1))
    assert (reports.verdict("median_rank", worse), reports.verdict("median_rank", better)) == ("worse", "improved")
    assert (reports.verdict("recall@5", worse), reports.verdict("recall@5", better)) == ("improved", "worse")


def test_headline_metrics_have_the_largest_k():
    metrics = ["recall@1", "recall@10", "recall@5", "mrr", "median_rank", "ndcg@5", "gini@10"]
    assert headline_metrics(metrics) == ["recall@10", "median_rank", "ndcg@5"]


def write_oracle(path: Path, songs: list[str], vectors: np.ndarray) -> str:
    pq.write_table(pa.table({"song_id": songs, "vector": vectors.tolist()}), path)
    return str(path)


def test_an_oracle_is_reported_in_recommendation_tasks_and_is_no_baseline(
    evaluated: tuple[Config, StepResult], tmp_path: Path
):
    """Its vectors are those of the model here, in another order of the songs, so its metrics are the model's."""
    config = copied(evaluated, tmp_path, without=("reports",))
    vectors = encode_features(config)
    assert vectors.preference is not None
    songs = [f"song-{row:03d}" for row in range(SONGS)]
    path = write_oracle(tmp_path / "traits.parquet", songs[::-1], vectors.preference[::-1])
    report = read(step.evaluate(config.with_overrides({"evaluate.oracle_vectors": path})))
    for task in ("cold", "cold_known_users", "hot", "hot_known_users"):
        assert values(report, task, "ndcg@10")["oracle"] == pytest.approx(values(report, task, "ndcg@10")["preference"])
    assert "oracle" not in report["tasks"]["probe_genre"]["methods"]
    assert not {row["against"] for row in report["baselines"]} & {"oracle", "best"}


def test_an_oracle_without_some_songs_is_refused(evaluated: tuple[Config, StepResult], tmp_path: Path):
    path = write_oracle(tmp_path / "traits.parquet", ["song-000"], np.ones((1, 2)))
    config = copied(evaluated, tmp_path, without=("reports",))
    with pytest.raises(TableError, match=rf"no vector of {SONGS - 1} songs of the catalogue, for instance 'song-001'"):
        step.evaluate(config.with_overrides({"evaluate.oracle_vectors": path}))
    with pytest.raises(TableError, match="cannot be read"):
        step.evaluate(config.with_overrides({"evaluate.oracle_vectors": str(tmp_path / "absent.parquet")}))
