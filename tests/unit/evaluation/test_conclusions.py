"""What a report opens with: each use against simple baselines, what the gate said, and what was not measured; in plain
sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from htcl_ray.evaluation.metrics import primary_metric
from htcl_ray.evaluation.report.conclusions import BETTER, CHANCE, NOT_BETTER, Conclusion, draw_conclusions
from htcl_ray.evaluation.report.report_page import html, plain
from htcl_ray.evaluation.report.report_schema import Report
from htcl_ray.evaluation.report.report_tree import baseline_differences, report_tree
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.task_result import EvaluationResult, TaskResult, estimates

pytestmark = pytest.mark.unit

UNITS = [f"artist {i}" for i in range(80)]
NOISE = np.random.default_rng(0).normal(0, 0.02, size=(12, len(UNITS)))
DRAWS = bootstrap.draw(UNITS, 400, 0)


def task(name: str, metric: str, control: str | None, **values: float) -> TaskResult:
    """A task of one metric; each method has its value with a little noise of its own on every artist."""
    methods = {
        method.replace("blend", "blend_0.5"): {metric: bootstrap.mean(value + noise - noise.mean(), DRAWS)}
        for (method, value), noise in zip(values.items(), NOISE, strict=False)
    }
    return TaskResult(name, name.replace("_", " "), "songs", "artists", control, methods)


def report_of(*tasks: TaskResult, stage_2: bool = True) -> dict[str, Any]:
    spaces = ["semantic", "preference", "blend_0.5"] if stage_2 else ["semantic"]
    described = {
        "run": "r",
        "format_version": 1,
        "created": "2026-01-01T00:00:00.000000+00:00",
        "command": "htcl evaluate",
    }
    described |= {"config": {}, "inputs": {"pairs": None}, "libraries": {}}
    data = {"split": "test", "songs": 80, "artists": 80, "unique_texts": 80, "spaces": spaces}
    return report_tree(described, EvaluationResult(data, {}, list(tasks), {}))[0]


SEARCH = task(
    "text_to_audio", "recall@10", "random", semantic=0.9, preference=0.8, blend=0.85, shuffled=0.1, random=0.1
)
PROBE = task(
    "probe_genre", "accuracy", "commonest", semantic=0.8, preference=0.78, blend=0.79, log_mel=0.95, commonest=0.2
)
COLD = task(
    "cold", "ndcg@10", "random", semantic=0.05, preference=0.3, blend=0.2, random=0.04, popularity=0.05, log_mel=0.1
)
HOT = task("hot", "ndcg@10", "random", semantic=0.05, preference=0.1, blend=0.08, random=0.02, item_knn=0.3, als=0.1001)
LOST = task("zero_shot_mood", "accuracy", "random", semantic=0.2, preference=0.2, blend=0.2, random=0.2001)


def conclusion(report: Mapping[str, Any], use: str) -> Conclusion:
    (match,) = [one for one in draw_conclusions(report).conclusions if one.use == use]
    return match


def test_each_use_compares_its_best_space_with_every_baseline():
    report = report_of(SEARCH, PROBE, COLD, HOT, LOST)
    Report.model_validate(report)
    assert [(one.use, one.verdict) for one in draw_conclusions(report).conclusions] == [
        ("mood from the text of its labels", CHANCE),
        ("genre by a classifier on the vectors", NOT_BETTER),
        ("songs with listeners, for new users", NOT_BETTER),
        ("search by text", BETTER),
        ("cold-start songs for new users", BETTER),
    ]
    search = conclusion(report, "search by text")
    assert search.finding == "Recall@10 0.900 (stage 1, blend 0); the best baseline, a random order, has 0.100."
    assert search.advice == "Use it with blend=0"
    assert conclusion(report, "cold-start songs for new users").advice == "Use it with blend=1"
    probe = conclusion(report, "genre by a classifier on the vectors")
    assert (
        probe.finding
        == "Accuracy 0.800 (stage 1, blend 0); statistics of the raw features 0.950 (1.2 times as much), significantly better."
    )
    assert "mel bands" in probe.advice
    hot = conclusion(report, "songs with listeners, for new users")
    assert "item-kNN 0.300 (3.0 times as much), significantly better" in hot.finding
    assert "ALS 0.100, no significant difference" in hot.finding
    assert "collaborative filtering" in hot.advice
    assert "Do not rely on it for this" in conclusion(report, "mood from the text of its labels").advice


def test_sentences_name_uses_by_verdict_with_reasons():
    sentences = draw_conclusions(report_of(SEARCH, PROBE, COLD, HOT, LOST)).sentences
    assert sentences == [
        "Better than every simple baseline: search by text; cold-start songs for new users.",
        "Not better than a simple baseline: genre by a classifier on the vectors (statistics of the raw features); "
        "songs with listeners, for new users (item-kNN).",
        "Not significantly better than chance: mood from the text of its labels (a random order).",
        "Stage 2 alone, compared with stage 1, significantly improves "
        "cold-start songs for new users (NDCG@10 0.050 → 0.300); "
        "songs with listeners, for new users (NDCG@10 0.050 → 0.100), "
        "and significantly worsens search by text (recall@10 0.900 → 0.800); "
        "genre by a classifier on the vectors (accuracy 0.800 → 0.780).",
    ]


def test_missing_stage_and_tasks_are_stated():
    report = report_of(task("text_to_audio", "recall@10", "random", semantic=0.9, random=0.1), stage_2=False)
    assert draw_conclusions(report).sentences == [
        "Better than every simple baseline: search by text.",
        "The model has no stage 2 and contains no preferences of listeners; 'htcl finetune' trains it on an "
        "interaction log.",
        "Not measured: recommendation (no interaction log, or too few users in the held-out period); "
        "labels (no column of evaluate.probe_columns has enough values).",
    ]
    nothing = report_of(TaskResult("text_to_audio", "text", "texts", "artists", None, SEARCH.methods))
    assert draw_conclusions(nothing).conclusions == []
    assert "draws no conclusion about the uses of the model" in html(nothing)


def test_verdict_of_the_gate_comes_first():
    report = report_of(SEARCH)
    bounds = [
        {"figure": f"f{i}", "asked": "a", "value": 0.1, "low": None, "high": None, "passed": i > 1, "note": ""}
        for i in range(5)
    ]
    none, failed, passed = (
        draw_conclusions(report, gate)
        for gate in (None, {"passed": False, "results": bounds}, {"passed": True, "results": bounds[2:]})
    )
    assert (none.gate_passed, failed.gate_passed, passed.gate_passed) == (None, False, True)
    assert none.served == "No gate was applied to this model; 'htcl evaluate --gate default' applies the shipped one."
    assert failed.served == "The gate failed: 2 of 5 bounds do not hold. Do not serve this model."
    assert passed.served == "The gate passed: all 3 bounds hold. This model may be served."


def test_differences_from_baselines_are_paired_and_of_the_best_space():
    """Against a naive interval: percentiles of the weighted mean of the differences, artist by artist."""
    spaces = ["semantic", "preference", "blend_0.5"]
    rows = {row["against"]: row for row in baseline_differences(estimates([PROBE]), [PROBE], spaces)}
    assert set(rows) == {"log_mel", "commonest"}
    for against, value, place in (("log_mel", 0.95, 3), ("commonest", 0.2, 4)):
        gain = 0.8 - value + (NOISE[0] - NOISE[0].mean()) - (NOISE[place] - NOISE[place].mean())
        paired = DRAWS.weights @ gain / DRAWS.weights.sum(axis=1)
        row = rows[against]
        assert (row["method"], row["figure"]) == ("semantic", "accuracy")
        assert (row["first"], row["second"], row["value"]) == pytest.approx((0.8, value, 0.8 - value))
        assert (row["low"], row["high"]) == pytest.approx(np.percentile(paired, [2.5, 97.5]), abs=1e-4)
        assert row["verdict"] == ("worse" if value > 0.8 else "improved")


def test_spaces_and_baselines_without_a_value_are_left_out():
    unknown = {"accuracy": bootstrap.Estimate(math.nan, 0)}
    probe = replace(
        PROBE,
        methods={
            name: unknown if name in ("preference", "log_mel") else PROBE.methods[name]
            for name in PROBE.methods
            if name != "blend_0.5"
        },
    )
    (row,) = baseline_differences(estimates([probe]), [probe], ["preference", "semantic"])
    assert (row["method"], row["against"], row["first"]) == ("semantic", "commonest", pytest.approx(0.8))
    assert baseline_differences(estimates([probe]), [probe], ["preference"]) == []


def test_ndcg_precedes_recall_as_primary_metric():
    assert primary_metric(["recall@1", "ndcg@5", "ndcg@10", "user_auc"]) == "ndcg@10"
    assert primary_metric(["map", "roc_auc", "accuracy_folds"]) == "roc_auc"
    assert primary_metric(["mrr", "recall@1", "recall@10"]) == "recall@10"
    assert primary_metric(["mrr", "median_rank"]) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "none"),
        ([], "none"),
        ({}, "none"),
        (True, "yes"),
        (False, "no"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        ("a_b", "a_b"),
        (["a", None, 2], "a, none, 2"),
        ({"held_out": 3, "examples": ["x → y"], "forbidden": True}, "held out 3; examples x → y; forbidden yes"),
        ({"more": {"a": []}}, "more a none"),
    ],
)
def test_values_are_formatted_for_people(value: object, said: str):
    assert plain(value) == said
