"""The report of one evaluation: its figures as one table for people, as HTML, and as a phrase.

`report.json` (a figure that does not exist is null; every accuracy, rate and share is in [0, 1]):

    format_version, run, created, config, inputs, libraries
                       what was measured, by which code; `inputs` are the versions of the artifacts
    data               split, songs, unique_texts, artists, artists_also_in_training, training_songs
    spaces             names below: semantic (stage 1), and with stage 2 preference and blend_0.5
    semantic.SPACE.text_to_audio, .audio_to_text
                       queries, gallery, recall@K, mrr, median_rank, chance {recall@K, mrr, median_rank}
    semantic.SPACE.probe
                       column, accuracy, chance, classes, train_songs, test_songs, unseen_label_songs; or null
    recommendation     null without events, or when no held-out user can be asked
    recommendation.task
                       users, cold_songs, targets, history_songs, users_with_short_history, users_without_target,
                       events_of_unknown_songs
    recommendation.methods.METHOD
                       hit_rate@K, recall@K, ndcg@K, mrr, auc; METHOD is a space, random, popularity or shuffled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import rich.box
import yaml
from rich.table import Table

from htcl_ray.evaluation.measure import BLEND

CONTROLS = ("random", "popularity", "shuffled")
TITLES = {"semantic": "stage 1", "preference": "stage 2", BLEND: "blend 0.5", **{name: name for name in CONTROLS}}

DEFINITIONS = {
    "stage 1, stage 2, blend 0.5": "The semantic space, the preference space, and the mean of both scores. Text is encoded by the "
    "same model as the songs.",
    "text→audio, audio→text": "Each unique text of a held-out song asks for its songs among all held-out songs, and each of these "
    "songs for its text among the unique texts. Songs with the same text are one correct set. recall@k: share of queries with a correct "
    "answer among the first k. Random: the expectation of a random order.",
    "probe": "Accuracy of a logistic regression trained on the training songs' vectors and asked about the held-out songs. Random: "
    "always naming the commonest training label.",
    "cold songs": "Held-out songs, which no training pair contains, ranked for held-out users by inner product with the unit-norm mean "
    "of the vectors of what they liked before. Means over users. recall@k: share of a user's targets among the first k; HR@k: a target "
    "among them; AUC: probability that a target ranks above another candidate.",
    "random, popularity, shuffled": "A random order, the training popularity of the song's genre (both as the exact expectation over "
    "orders of ties), and the same vectors dealt out to the wrong songs.",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure for each column that has one, and how many questions it is the mean of."""

    task: str
    figure: str
    values: dict[str, float | None]
    n: str


def columns(report: Mapping[str, Any]) -> list[str]:
    """The table's value columns: the spaces, then the controls that apply."""
    return [*report["spaces"], *(CONTROLS if report["recommendation"] else CONTROLS[:1])]


def rows(report: Mapping[str, Any]) -> list[Row]:
    """The table's lines, grouped by task."""
    found = []
    spaces = {space: report["semantic"][space] for space in report["spaces"]}
    first = spaces["semantic"]
    for direction, title in (("text_to_audio", "text→audio"), ("audio_to_text", "audio→text")):
        n = f"{first[direction]['queries']} → {first[direction]['gallery']}"
        for figure in first[direction]["chance"]:
            values = {space: tasks[direction][figure] for space, tasks in spaces.items()}
            found.append(Row(title, _title(figure), {**values, "random": first[direction]["chance"][figure]}, n))
    if first["probe"]:
        values = {space: tasks["probe"]["accuracy"] for space, tasks in spaces.items()}
        n = f"{first['probe']['test_songs']} songs"
        found.append(Row("probe", first["probe"]["column"], {**values, "random": first["probe"]["chance"]}, n))
    if report["recommendation"]:
        methods, task = report["recommendation"]["methods"], report["recommendation"]["task"]
        for figure in methods["random"]:
            values = {name: methods[name][figure] for name in columns(report)}
            found.append(Row("cold songs", _title(figure), values, f"{task['users']} users → {task['cold_songs']}"))
    return found


def table(report: Mapping[str, Any]) -> Table:
    """The figures for a terminal, 80 columns wide."""
    heading = _heading(report)
    result = Table("", box=rich.box.SIMPLE, pad_edge=False, title=heading, title_justify="left", show_edge=False, min_width=len(heading))
    for name in columns(report):
        result.add_column(TITLES[name], justify="right", no_wrap=True)
    task = None
    for line in rows(report):
        if line.task != task:
            task = line.task
            result.add_section()
            result.add_row(task, style="bold")
        result.add_row(f"  {line.figure}", *(number(line.values.get(name), line.figure) for name in columns(report)))
    return result


def html(report: Mapping[str, Any]) -> str:
    """A self-contained page with the same figures, what they mean, and what they were measured on."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("htcl_ray.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        heading=_heading(report),
        phrase=phrase(report),
        columns=columns(report),
        titles=TITLES,
        rows=rows(report),
        number=number,
        definitions=DEFINITIONS,
        config=yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True),
    )


def phrase(report: Mapping[str, Any]) -> str:
    """The headline: text → audio of stage 1, and the probe and the recommendation of the last stage beside stage 1."""
    first = report["semantic"]["semantic"]
    last = "preference" if "preference" in report["spaces"] else "semantic"
    retrieval = first["text_to_audio"]
    parts = [f"text→audio median rank {retrieval['median_rank']:g} of {retrieval['gallery']}"]
    if first["probe"]:
        parts.append(
            _beside(f"{first['probe']['column']} probe", report["semantic"][last]["probe"]["accuracy"], first["probe"]["accuracy"], last)
        )
    if report["recommendation"]:
        methods = report["recommendation"]["methods"]
        figure = max((name for name in methods["random"] if name.startswith("ndcg@")), key=lambda name: int(name[5:]))
        parts.append(_beside(f"cold {_title(figure)}", methods[last][figure], methods["semantic"][figure], last))
    return ", ".join(parts)


def number(value: float | None, figure: str = "") -> str:
    """A figure as people read it: rates with three decimals, ranks with at most one."""
    if value is None:
        return "–"
    return f"{value:.1f}".removesuffix(".0") if "rank" in figure else f"{value:.3f}"


def _beside(name: str, value: float, first: float, last: str) -> str:
    return f"{name} {value:.2f}" + (f" (stage 1: {first:.2f})" if last != "semantic" else "")


def _title(figure: str) -> str:
    name, _, k = figure.partition("@")
    short = {"median_rank": "median rank", "mrr": "MRR", "hit_rate": "HR", "ndcg": "NDCG", "auc": "user AUC"}.get(name, name)
    return f"{short}@{k}" if k else short


def _heading(report: Mapping[str, Any]) -> str:
    data = report["data"]
    songs = f"{data['songs']} {data['split']} songs by {data['artists']} artists, {data['unique_texts']} unique texts"
    asked = report["recommendation"]
    return songs + (f"; {asked['task']['users']} users, {asked['task']['targets']} targets" if asked else "")
