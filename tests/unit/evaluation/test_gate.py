"""Bounds of the gate against hand-computed cases, invalid gates, and a stage 2 of shuffled pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from htcl_ray.config import PRESETS
from htcl_ray.errors import ConfigError
from htcl_ray.evaluation.gate import Bound, BoundResult, Gate, judge, read_gate
from htcl_ray.evaluation.report.report_tree import verdict
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate

pytestmark = pytest.mark.unit

USERS = [f"user {i}" for i in range(60)]


def of_users(values: np.ndarray, seed: int = 0) -> Estimate:
    return bootstrap.mean(values, bootstrap.draw(USERS, 500, seed))


def one(bound: dict, metrics: dict, served: dict | None = None) -> BoundResult:
    (result,) = judge(Gate(bounds=(Bound(**bound),)), metrics, served).results
    return result


def passes(bound: dict, metrics: dict, served: dict | None = None) -> bool:
    return one(bound, metrics, served).passed


def test_method_names_may_contain_dots():
    assert Bound(figure="cold.blend_0.5.ndcg@10", at_least=0).key == ("cold", "blend_0.5", "ndcg@10")
    assert Bound(figure="index.index.recall@10", at_least=0).key == ("index", "index", "recall@10")


def test_absolute_bounds_apply_to_the_value():
    estimate = of_users(np.linspace(0, 1, 60))
    low, high = estimate.interval
    assert low < 0.5 < high
    metrics = {("cold", "semantic", "ndcg@10"): estimate}
    name = "cold.semantic.ndcg@10"
    assert passes({"figure": name, "at_least": 0.5 - 1e-9}, metrics)
    assert not passes({"figure": name, "at_least": 0.5 + 1e-9}, metrics)
    assert passes({"figure": name, "at_most": 0.5 + 1e-9}, metrics)
    assert not passes({"figure": name, "at_most": 0.5 - 1e-9}, metrics)
    assert not passes({"figure": name, "at_least": 0.2, "at_most": 0.3}, metrics)


def test_difference_bounds_apply_to_the_ends_of_the_paired_interval():
    rng = np.random.default_rng(0)
    base, gain = rng.uniform(size=60), rng.normal(0.05, 0.05, size=60)
    metrics = {
        ("cold", "semantic", "ndcg@10"): of_users(base),
        ("cold", "preference", "ndcg@10"): of_users(base + gain),
    }
    weights = bootstrap.draw(USERS, 500, 0).weights
    paired = (weights @ gain) / weights.sum(axis=1)
    low, high = np.percentile(paired, [2.5, 97.5])
    bound = {"figure": "cold.preference.ndcg@10", "over": "semantic"}
    result = one({**bound, "shown": True}, metrics)
    assert (result.value, result.low, result.high) == pytest.approx((gain.mean(), low, high), abs=1e-4)
    for key, sign, end in (("at_least", -1, low), ("at_most", 1, high)):
        assert passes({**bound, key: end + sign * 1e-3}, metrics)
        assert not passes({**bound, key: end - sign * 1e-3}, metrics)


def test_shown_requires_a_significant_improvement():
    better = {"lower": np.full(60, 0.1), "higher": np.full(60, 0.9)}
    metrics = {
        (task, method, name): of_users(v)
        for task in "t"
        for method, v in better.items()
        for name in ("mrr", "median_rank")
    }
    assert passes({"figure": "t.higher.mrr", "over": "lower", "shown": True}, metrics)
    assert not passes({"figure": "t.lower.mrr", "over": "higher", "shown": True}, metrics)
    assert passes({"figure": "t.lower.median_rank", "over": "higher", "shown": True}, metrics)
    assert not passes({"figure": "t.higher.median_rank", "over": "lower", "shown": True}, metrics)
    assert not passes({"figure": "t.lower.mrr", "over": "lower", "shown": True}, metrics)


def test_ratio_bounds():
    metrics = {("p", "preference", "accuracy"): Estimate(0.57, 9), ("p", "semantic", "accuracy"): Estimate(0.6, 9)}
    bound = {"figure": "p.preference.accuracy", "over": "semantic"}
    assert passes({**bound, "ratio_at_least": 0.95 - 1e-9}, metrics)
    assert not passes({**bound, "ratio_at_least": 0.951}, metrics)
    assert one({**bound, "ratio_at_least": 0.9}, metrics).value == pytest.approx(0.95)
    zero = metrics | {("p", "semantic", "accuracy"): Estimate(0.0, 9)}
    assert not passes({**bound, "ratio_at_least": 0.9}, zero)


def test_bounds_against_the_model_being_served():
    key = ("cold", "preference", "ndcg@10")
    own, other = of_users(np.linspace(0.4, 0.6, 60)), of_users(np.linspace(0.41, 0.61, 60))
    bound = {"figure": "cold.preference.ndcg@10", "over_served": True, "at_least": -0.02}
    assert one(bound, {key: own}, {key: other}).value == pytest.approx(-0.01)
    assert passes(bound, {key: own}, {key: other})
    assert not passes({**bound, "at_least": -0.005}, {key: own}, {key: other})
    elsewhere = one(bound, {key: own}, {key: of_users(np.linspace(0, 0.1, 60), seed=1)})
    assert not elsewhere.passed
    assert "other songs, users or candidates" in elsewhere.note
    alone = one(bound, {key: own})
    assert (alone.passed, alone.value, alone.note) == (False, None, "no model is being served")
    assert passes({**bound, "optional": True}, {key: own})
    worst = {("collapse", "semantic", "audio_effective_rank"): Estimate(9.0, 5)}
    assert passes(
        {"figure": "collapse.semantic.audio_effective_rank", "over_served": True, "at_least": -1}, worst, worst
    )


NDCG, MRR = ("cold", "preference", "ndcg@10"), ("text_to_audio", "semantic", "mrr")
OTHER_USERS = bootstrap.mean(np.zeros(60), bootstrap.draw(USERS, 500, 0).for_task("one user more"))


@pytest.mark.parametrize(
    ("own", "served", "unmeasured", "note"),
    [
        ({NDCG: of_users(np.ones(60))}, {NDCG: OTHER_USERS}, None, "was measured on other songs, users or candidates"),
        ({NDCG: of_users(np.ones(60))}, {("cold", "preference", "mrr"): OTHER_USERS}, None, "ndcg@10 was not measured"),
        ({MRR: OTHER_USERS}, {NDCG: of_users(np.ones(60))}, None, "ndcg@10 was not measured"),
        ({NDCG: Estimate(math.nan, 0)}, {NDCG: of_users(np.ones(60))}, None, "has no value"),
        (
            {("cold", "preference", "mrr"): OTHER_USERS},
            {("cold", "preference", "mrr"): OTHER_USERS},
            None,
            "was not measured",
        ),
        (
            {NDCG: of_users(np.ones(60))},
            None,
            "its recipe is another",
            "could not be evaluated on this test set: its recipe is another",
        ),
        ({MRR: OTHER_USERS}, None, "its recipe is another", "was not measured"),
        ({NDCG: of_users(np.full(60, np.nan))}, {NDCG: of_users(np.ones(60))}, None, "has no value"),
    ],
)
@pytest.mark.parametrize("wanted", [{"at_least": -0.02}, {"ratio_at_least": 0.9}, {"shown": True}])
def test_missing_values_fail_while_a_model_is_served(own, served, unmeasured, note, wanted):
    bound = Bound(figure=".".join(NDCG), over_served=True, optional=True, **wanted)
    (result,) = judge(Gate(bounds=(bound,)), own, served, unmeasured=unmeasured).results
    assert (result.passed, result.value) == (False, None)
    assert note in result.note
    assert not BoundResult.from_json(json.loads(json.dumps(result.as_json()))).passed, (
        "still fails when the verdict is read again"
    )
    assert judge(Gate(bounds=(bound,)), own if NDCG not in own else {}, None).passed, (
        "nothing is served: optional holds"
    )


def test_bounds_on_missing_stages():
    """Stage 1 alone on both sides: the bound does not apply. A first stage 2 is compared with the stage 1 that is
    served."""
    bound = {"figure": ".".join(NDCG), "over_served": True, "at_least": -0.02, "optional": True}
    stage_1 = {MRR: of_users(np.ones(60)), ("cold", "semantic", "ndcg@10"): of_users(np.full(60, 0.3))}
    assert passes(bound, stage_1, stage_1)
    for value, better in ((0.4, True), (0.2, False)):
        result = one(bound, {**stage_1, NDCG: of_users(np.full(60, value))}, stage_1)
        assert result.passed is better
        assert result.value == pytest.approx(value - 0.3)
        assert "no preference space" in result.note


@pytest.mark.parametrize(
    "figure", ["gini@10", "popularity_lift@10", "median_rank", "ndcg@10", "coverage@5", "knn_map_folds"]
)
def test_shown_uses_the_direction_of_the_metric_for_any_k(figure: str):
    metrics = {("t", "low", figure): of_users(np.full(60, 0.2)), ("t", "high", figure): of_users(np.full(60, 0.6))}
    falls = figure.startswith(("gini", "popularity_lift", "median_rank"))
    better, worse = ("low", "high") if falls else ("high", "low")
    assert passes({"figure": f"t.{better}.{figure}", "over": worse, "shown": True}, metrics)
    assert not passes({"figure": f"t.{worse}.{figure}", "over": better, "shown": True}, metrics)
    assert (
        verdict(figure, bootstrap.difference(metrics["t", better, figure], metrics["t", worse, figure])) == "improved"
    )
    assert verdict(figure, bootstrap.difference(metrics["t", worse, figure], metrics["t", better, figure])) == "worse"


@pytest.mark.parametrize("value", [None, math.nan])
def test_missing_values_fail_unless_optional(value: float | None):
    metrics = {("cold", "preference", "ndcg@5"): Estimate(0.5, 3)}
    if value is not None:
        metrics["cold", "preference", "ndcg@10"] = Estimate(value, 0)
    result = one({"figure": "cold.preference.ndcg@10", "at_least": 0}, metrics)
    assert not result.passed
    assert ("did you mean 'cold.preference.ndcg@5'" if value is None else "has no value") in result.note
    assert passes({"figure": "cold.preference.ndcg@10", "at_least": 0, "optional": True}, metrics)
    assert not passes(
        {"figure": "cold.preference.ndcg@10", "at_least": 0.6, "optional": True},
        {("cold", "preference", "ndcg@10"): of_users(np.zeros(60))},
    )


def test_json_round_trip_computes_passed_again():
    metrics = {("a", "b", "c"): of_users(np.linspace(0, 1, 60)), ("a", "d", "c"): of_users(np.linspace(0, 2, 60))}
    for bound in (
        {"at_least": 0.1},
        {"over": "d", "shown": True},
        {"over": "d", "ratio_at_least": 0.3},
        {"over": "x", "at_most": 1},
    ):
        result = one({"figure": "a.b.c", **bound}, metrics)
        tree = json.loads(json.dumps(result.as_json(), allow_nan=False))
        assert BoundResult.from_json(tree) == result
        assert BoundResult.from_json({**tree, "passed": not tree["passed"]}).passed == result.passed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bounds:\n- {figure: a.b.c, at_lest: 1}", "unknown key 'bounds.0.at_lest'; did you mean 'at_least'?"),
        ("bound:\n- {figure: a.b.c, at_least: 1}", "bounds"),
        ("bounds: []", "bounds"),
        ("", "expected a list 'bounds:'"),
        ("bounds:\n- {figure: cold.ndcg, at_least: 1}", "expected TASK.METHOD.METRIC"),
        ("bounds:\n- {figure: a.b.c}", "needs at_least, at_most or shown"),
        ("bounds:\n- {figure: a.b.c, shown: true}", "nothing to compare with"),
        ("bounds:\n- {figure: a.b.c, ratio_at_least: 0.9}", "nothing to compare with"),
        ("bounds:\n- {figure: a.b.c, over: d, ratio_at_least: 0.9, at_least: 0}", "ratio_at_least alone"),
        ("bounds:\n- {figure: a.b.c, over: d, over_served: true, at_least: 0}", "choose one"),
        ("bounds:\n- {figure: a.b.median_rank, over: d, ratio_at_least: 0.9}", "better when it is lower"),
        ("bounds:\n- {figure: a.b.gini@10, over_served: true, ratio_at_least: 0.9}", "better when it is lower"),
        ("bounds: [", "is not YAML"),
    ],
)
def test_invalid_gates_are_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_gate(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_gate_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the gate .*No such file"):
        read_gate(str(tmp_path / "gate.yaml"))


def test_the_shipped_gate_covers_the_documented_tasks():
    bounds = read_gate("default").bounds
    assert {bound.key[0] for bound in bounds} >= {
        "determinism",
        "collapse",
        "text_to_audio",
        "probe_genre",
        "cold",
        "index",
    }
    assert all(bound.optional for bound in bounds if bound.over_served or bound.key[1] == "preference")
    assert len({bound.description for bound in bounds}) == len(bounds)
    assert "gate" not in PRESETS


def test_a_stage_2_of_shuffled_pairs_fails():
    """Stage 1 knows no taste, an intact stage 2 most of it, one of shuffled pairs that of other users."""
    rng = np.random.default_rng(0)
    songs, dim = 300, 8
    taste, users = rng.normal(size=(songs, dim)), rng.normal(size=(len(USERS), dim))
    taste /= np.linalg.norm(taste, axis=1, keepdims=True)
    liked = (users @ taste.T).argsort(axis=1)[:, -5:]

    def ndcg_of(vectors: np.ndarray) -> Estimate:
        """NDCG@10 of one target a user, from the mean of four liked songs."""
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        history, target = liked[:, :4], liked[:, 4]
        scores = unit[history].mean(axis=1) @ unit.T
        np.put_along_axis(scores, history, -np.inf, axis=1)
        rank = 1 + (scores > np.take_along_axis(scores, target[:, None], axis=1)).sum(axis=1)
        return of_users(np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0))

    key = ("cold", "semantic", "ndcg@10"), ("cold", "preference", "ndcg@10")
    semantic = ndcg_of(rng.normal(size=(songs, dim)))
    shuffled = ndcg_of(rng.permutation(taste))
    intact = ndcg_of(taste + 0.1 * rng.normal(size=(songs, dim)))
    gate = Gate(
        bounds=tuple(bound for bound in read_gate("default").bounds if bound.key == key[1] and not bound.over_served)
    )
    assert judge(gate, {key[0]: semantic, key[1]: intact}).passed
    verdict = judge(gate, {key[0]: semantic, key[1]: shuffled})
    assert [result.bound.over for result in verdict.failed] == ["semantic"]
    assert verdict.results[0].low < 0 < verdict.results[0].high
