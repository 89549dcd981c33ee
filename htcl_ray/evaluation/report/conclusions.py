"""Conclusions of a report in plain sentences: each use of the model against simple baselines, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from htcl_ray.evaluation.metrics import metric_label, primary_metric
from htcl_ray.evaluation.report.report_tree import IMPROVED, METHOD_LABELS, WORSE, number

BETTER, NOT_BETTER, CHANCE = (
    "better than every simple baseline",
    "not better than a simple baseline",
    "not significantly better than chance",
)
USES = {
    "text_to_audio": "search by text",
    "audio_to_text": "retrieving the text of a recording",
    "cold": "cold-start songs for new users",
    "cold_known_users": "cold-start songs for known users",
    "hot": "songs with listeners, for new users",
    "hot_known_users": "songs with listeners, for known users",
}
"""Use that each task stands for; of other tasks see `_use`."""
BASELINES = {
    "random": "a random order",
    "commonest": "always the most frequent label",
    "popularity": "popularity",
    "log_mel": "statistics of the raw features",
    "genre": "genre labels",
    "artist_mean": "the mean of the artist's songs",
    "item_knn": "item-kNN",
    "als": "ALS",
}
BLENDS = {"semantic": "0", "preference": "1", "blend_0.5": "0.5"}
"""Value of the search option `blend` that corresponds to each space."""
RECOMMENDATION = ("cold", "cold_known_users", "hot", "hot_known_users")
COLLABORATIVE = "use collaborative filtering for songs that have listeners, and this model for songs that have none"
ADVICE = {
    "log_mel": "the vectors are not better than the mean and deviation of the features (log-mel bands, or the vectors "
    "of an encoder) here; train longer or on more songs, or use those",
    "genre": "recommend by genre label, or train stage 2 on more interactions",
    "artist_mean": "recommend by artist or genre, or train stage 2 on more interactions",
    "popularity": "recommend what is popular, or train stage 2 on more interactions",
    "item_knn": COLLABORATIVE,
    "als": COLLABORATIVE,
}
"""Advice where the model is not significantly better than a baseline."""


@dataclass(frozen=True)
class Conclusion:
    """One use of the model."""

    use: str
    verdict: str
    """BETTER, NOT_BETTER or CHANCE."""
    finding: str
    """The measurements, in a sentence."""
    advice: str
    baseline: str
    """The best baseline that the model does not beat significantly; otherwise the best one."""


@dataclass(frozen=True)
class ReportConclusions:
    """The first section of a report."""

    served: str
    """Whether a gate allows the model to be served."""
    gate_passed: bool | None
    """None without a gate."""
    sentences: list[str]
    conclusions: list[Conclusion]
    """Those that need action first."""


def draw_conclusions(report: Mapping[str, Any], gate: Mapping[str, Any] | None = None) -> ReportConclusions:
    """Draw conclusions from the content of report.json, and of gate.json when a gate was applied."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["baselines"]:
        rows.setdefault(row["task"], []).append(row)
    conclusions = [_conclusion(task, report["tasks"][task], compared) for task, compared in rows.items()]
    conclusions.sort(key=lambda one: (CHANCE, NOT_BETTER, BETTER).index(one.verdict))
    sentences = [
        _sentence(verdict, [one for one in conclusions if one.verdict == verdict])
        for verdict in (BETTER, NOT_BETTER, CHANCE)
    ]
    sentences += [_stage_2(report), _not_measured(report)]
    gate_passed = None if gate is None else bool(gate["passed"])
    return ReportConclusions(_served(gate), gate_passed, [one for one in sentences if one], conclusions)


def _conclusion(task: str, described: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Conclusion:
    metric, space = rows[0]["figure"], rows[0]["method"]
    open_rows = sorted((row for row in rows if row["verdict"] != IMPROVED), key=lambda row: -row["second"])
    chance = next((row for row in rows if row["against"] == described["control"]), None)
    where = ", ".join(
        dict.fromkeys([METHOD_LABELS.get(space, space), *([f"blend {BLENDS[space]}"] if space in BLENDS else [])])
    )
    finding = f"{_upper(metric_label(metric))} {number(rows[0]['first'], metric)} ({where})"
    if chance is not None and chance["verdict"] != IMPROVED:
        against = f"; {_baseline(chance)} has {number(chance['second'], metric)}, {_significance(chance)}"
        advice = (
            "do not rely on it for this; check whether training converged (metrics.jsonl) and whether the test set is "
            "large enough (n)"
        )
        return Conclusion(_use(task, described), CHANCE, f"{finding}{against}.", _upper(advice), _baseline(chance))
    if open_rows:
        against = "; ".join(
            f"{_baseline(row)} {number(row['second'], metric)}{_ratio(row)}, {_significance(row)}" for row in open_rows
        )
        advice = ADVICE.get(open_rows[0]["against"], "use the baseline, or train on more data")
        return Conclusion(
            _use(task, described), NOT_BETTER, f"{finding}; {against}.", _upper(advice), _baseline(open_rows[0])
        )
    best = max(rows, key=lambda row: row["second"])
    advice = f"use it with blend={BLENDS[space]}" if space in BLENDS else "use it"
    finding += f"; the best baseline, {_baseline(best)}, has {number(best['second'], metric)}."
    return Conclusion(_use(task, described), BETTER, finding, _upper(advice), _baseline(best))


def _use(task: str, described: Mapping[str, Any]) -> str:
    for kind, use in (
        ("zero_shot_", "{} from the text of its labels"),
        ("probe_", "{} by a classifier on the vectors"),
    ):
        if task.startswith(kind):
            return use.format(task.removeprefix(kind))
    title: str = described["title"]
    return USES.get(task, title)


def _sentence(verdict: str, conclusions: Sequence[Conclusion]) -> str:
    uses = [one.use if verdict == BETTER else f"{one.use} ({one.baseline})" for one in conclusions]
    return f"{_upper(verdict)}: {'; '.join(uses)}." if uses else ""


def _served(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return "No gate was applied to this model; 'htcl evaluate --gate default' applies the shipped one."
    failed = sum(not bound["passed"] for bound in gate["results"])
    if not gate["passed"]:
        return f"The gate failed: {failed} of {len(gate['results'])} bounds do not hold. Do not serve this model."
    return f"The gate passed: all {len(gate['results'])} bounds hold. This model may be served."


def _stage_2(report: Mapping[str, Any]) -> str:
    """Gains and losses of stage 2, by the primary metric of each task."""
    if "preference" not in report["data"]["spaces"]:
        return (
            "The model has no stage 2 and contains no preferences of listeners; 'htcl finetune' trains it on an "
            "interaction log."
        )
    changes: dict[str, list[str]] = {IMPROVED: [], WORSE: []}
    for row in report["differences"]:
        task = report["tasks"][row["task"]]
        if row["verdict"] in changes and row["figure"] == primary_metric(task["methods"]["semantic"]):
            before, after = number(row["second"], row["figure"]), number(row["first"], row["figure"])
            changes[row["verdict"]].append(
                f"{_use(row['task'], task)} ({metric_label(row['figure'])} {before} → {after})"
            )
    gains, costs = ("; ".join(changes[verdict]) for verdict in (IMPROVED, WORSE))
    return (
        f"Stage 2 alone, compared with stage 1, significantly improves {gains or 'nothing'}, and significantly worsens "
        f"{costs or 'nothing'}."
    )


def _not_measured(report: Mapping[str, Any]) -> str:
    tasks = report["tasks"]
    missing = []
    if not any(tasks.get(task, {}).get("methods") for task in RECOMMENDATION):
        missing.append("recommendation (no interaction log, or too few users in the held-out period)")
    if not any(name.startswith(("zero_shot_", "probe_")) and task["methods"] for name, task in tasks.items()):
        missing.append("labels (no column of evaluate.probe_columns has enough values)")
    return f"Not measured: {'; '.join(missing)}." if missing else ""


def _baseline(row: Mapping[str, Any]) -> str:
    against: str = row["against"]
    return BASELINES.get(against, against)


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = row["second"] / row["first"] if row["first"] > 0 else 0
    return f" ({ratio:.1f} times as much)" if ratio >= 1.15 else ""


def _significance(row: Mapping[str, Any]) -> str:
    return "significantly better" if row["verdict"] == WORSE else "no significant difference"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
