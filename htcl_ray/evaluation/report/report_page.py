"""The report as a self-contained HTML page: the verdict, and folded below it all metrics, plots and settings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from htcl_ray.evaluation.metrics import headline_metrics, lower_is_better, metric_label
from htcl_ray.evaluation.report import plots
from htcl_ray.evaluation.report.conclusions import draw_conclusions
from htcl_ray.evaluation.report.report_tree import (
    IMPROVED,
    METHOD_LABELS,
    NOT_SIGNIFICANT,
    WORSE,
    heading_of,
    number,
)

DEFINITIONS = {
    "stage 1, stage 2, blend 0.5": (
        "The semantic space, the preference space, and the mean of both scores. Text is encoded by the same model "
        "as the songs."
    ),
    "verdict": (
        "For each task, the primary metric of the space that is best by it (chosen on these same songs) is compared "
        "with methods that need no model. Better or significant: the paired 95 % confidence interval of the "
        "difference excludes 0."
    ),
    "interval, °": (
        "95 % confidence interval from 1,000 (or as configured) bootstrap resamples of whole artists; for "
        "recommendation, of users and of artists with all their songs. A metric marked ° does not differ "
        "significantly from the control of the task: the paired interval of the difference contains 0."
    ),
    "text→audio, audio→text": (
        "Each unique text of a held-out song is a query for its songs among all held-out songs, and each of these "
        "songs a query for its text among the unique texts. Songs with the same text form one correct set. "
        "recall@k: share of queries with a correct item among the first k."
    ),
    "zero-shot": ("The label whose text is nearest to the song is predicted; nothing is trained on labels."),
    "probe": (
        "Logistic regression, and the nearest training songs (kNN), on frozen vectors. Without 'folds': trained on "
        "the training songs and tested on held-out artists. With 'folds': trained and tested within the held-out "
        "songs, cross-validated with all songs of an artist in one fold, so that no song of the model's training is "
        "used."
    ),
    "cold, hot": (
        "Cold-start songs are in the held-out split: no training pair contains them, and no method sees earlier "
        "events on them. Hot songs have events of training users. A user is the unit-norm mean of the vectors of "
        "their earlier positive songs; the targets are their later positive songs. New users are in no training "
        "pair, known users are."
    ),
    "user AUC, item AUC": (
        "User AUC: probability that a song the user liked ranks above another one. Item AUC: for each cold-start "
        "song, the probability that a user who liked it scores higher than one who did not, averaged over songs. A "
        "method that knows only the popularity of songs has an item AUC of 0.5."
    ),
    "random, shuffled, popularity, log-mel, genre labels, artist mean, item-kNN, ALS": (
        "A random order (exact expectation), the vectors randomly permuted across songs, positive training events "
        "(for cold-start songs: of their genre), mean and standard deviation of the raw mel bands, genre labels as "
        "vectors, for cold-start songs the mean vector of the artist's training songs (of its genre's, where the "
        "artist has none), and two collaborative methods that see training users and no audio."
    ),
}


def html(report: Mapping[str, Any], verdict: Mapping[str, Any] | None = None) -> str:
    """Render the page; `verdict`: content of gate.json."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(title=lambda name: METHOD_LABELS.get(name, name), metric=metric_label, plain=plain)
    template = environment.from_string(
        resources.files("htcl_ray.evaluation.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        heading=heading_of(report),
        conclusions=draw_conclusions(report, verdict),
        summary=summary(report),
        number=number,
        plots=_plots(report["pictures"]),
        verdict=verdict,
        definitions=DEFINITIONS,
        config=yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True),
    )


def plain(value: Any) -> str:
    """Format a value of report.json for people."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{str(name).replace('_', ' ')} {plain(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def summary(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Headline metrics by verdict on stage 2 against stage 1, or without stage 2 on stage 1 against the controls.

    One line for each metric.
    """
    lines: dict[str, list[str]] = {IMPROVED: [], WORSE: [], NOT_SIGNIFICANT: []}
    of_task = {
        name: headline_metrics(list(task["methods"].get("semantic", {}))) for name, task in report["tasks"].items()
    }
    for row in report["differences"]:
        if row["figure"] in of_task[row["task"]]:
            title = f"{report['tasks'][row['task']]['title']}, {metric_label(row['figure'])}"
            before, after = number(row["second"], row["figure"]), number(row["first"], row["figure"])
            between = "" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f})"
            lines[row["verdict"]].append(f"{title}: {before} → {after}{between}")
    if report["differences"]:
        return lines
    for task_name, task in report["tasks"].items():
        for name in of_task[task_name]:
            own, control = task["methods"]["semantic"][name], task["methods"].get(task["control"], {}).get(name)
            if control is not None and own["shown"] is not None:
                line = f"{task['title']}, {metric_label(name)}: {number(own['value'], name)}, {task['control']} "
                better = (own["value"] < control["value"]) == lower_is_better(name)
                lines[NOT_SIGNIFICANT if not own["shown"] else IMPROVED if better else WORSE].append(
                    line + number(control["value"], name)
                )
    return lines


def _plots(data: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    drawings = []
    if data.get("recall_curves"):
        drawings.append(
            ("Recall of text-to-audio retrieval at k", plots.recall_curves(data["recall_curves"], METHOD_LABELS))
        )
    if data.get("blend_curve"):
        names = {name: metric_label(name) for name in data["blend_curve"][0]["cold"]}
        drawings.append(
            (
                "Cold-start metrics by blend of semantic and preference",
                plots.blend_curve(data["blend_curve"], list(names), names),
            )
        )
    if data.get("genre_agreement"):
        drawings.append(("Genre agreement of nearest songs", plots.genre_bars(data["genre_agreement"], METHOD_LABELS)))
    if data.get("map"):
        drawings.append(("The held-out songs on a map (t-SNE of the last stage)", plots.song_map(data["map"])))
    if data.get("similarities"):
        drawings.append(
            (
                "Similarity of songs to their own text and to other texts",
                plots.similarity_histograms(data["similarities"], METHOD_LABELS),
            )
        )
    # The SVG is generated here, and matplotlib escapes every text in it.
    return [(caption, Markup(svg.replace("<svg ", f'<svg aria-label="{caption}" ', 1))) for caption, svg in drawings]
