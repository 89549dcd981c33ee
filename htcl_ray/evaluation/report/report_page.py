"""The report as one page that opens offline: the verdict, and folded behind it every metric, the plots, and how to
repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from htcl_ray.evaluation.report import plots
from htcl_ray.evaluation.report.conclusions import draw_conclusions
from htcl_ray.evaluation.report.report_tree import (
    IMPROVED,
    NOT_SHOWN,
    TITLES,
    WORSE,
    figure_title,
    heading_of,
    headline_figures,
    number,
)
from htcl_ray.evaluation.task_result import lower_is_better

DEFINITIONS = {
    "stage 1, stage 2, blend 0.5": "The semantic space, the preference space, and the mean of both scores. Text is encoded by the same "
    "model as the songs.",
    "verdict": "Of each task the first metric of the space that is best by it, chosen on these same songs, against methods that need no "
    "model. Better or significant: the paired 95 % interval of the difference excludes 0.",
    "interval, °": "95 % of 1,000 (or as configured) resamples of whole artists, for recommendation of users and of artists with all their "
    "songs. A metric marked ° does not differ significantly from the task's control: the paired interval of the difference contains 0.",
    "text→audio, audio→text": "Each unique text of a held-out song asks for its songs among all held-out songs, and each of these songs "
    "for its text among the unique texts. Songs with the same text are one correct set. recall@k: share of queries with a correct answer "
    "among the first k.",
    "zero-shot": "A label is named by the text that is nearest to the song; nothing is trained on labels.",
    "probe": "Logistic regression, and the nearest training songs (kNN), on vectors. Without 'folds' trained on the training songs and "
    "asked about held-out artists; with 'folds' trained and asked among the held-out songs alone, no artist in two folds, so that it "
    "never saw a song that the model trained on.",
    "cold, hot": "Cold songs are in the held-out split: no training pair contains them, and every method is told nothing of their past. "
    "Hot songs have training listeners. A user is the unit-norm mean of the vectors of what they liked before; the questions are what "
    "they liked next. New users are in no training pair, known users are.",
    "user AUC, item AUC": "User AUC: probability that a song the user liked ranks above another one. Item AUC: for each cold song, the "
    "probability that a user who liked it scores higher than one who did not, mean over songs. A method that only knows which songs are "
    "popular has an item AUC of 0.5.",
    "random, shuffled, popularity, log-mel, genre labels, item-kNN, ALS": "A random order (exact expectation), the vectors randomly "
    "permuted across songs, positive training events (for cold songs: of their genre), mean and deviation of the raw mel bands, "
    "genre labels as vectors, and two collaborative methods that see training listeners and no audio.",
}


def html(report: Mapping[str, Any], verdict: Mapping[str, Any] | None = None) -> str:
    """The page; `verdict`: of a gate, as `Verdict.model_dump()` gives it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(title=lambda name: TITLES.get(name, name), figure=figure_title, plain=plain)
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
    """A value of report.json for people."""
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
    """What improved, what got worse and what is not shown from stage 1 to stage 2, a line a figure; without stage 2,
    against controls.
    """
    lines: dict[str, list[str]] = {IMPROVED: [], WORSE: [], NOT_SHOWN: []}
    of_task = {
        name: headline_figures(list(task["methods"].get("semantic", {}))) for name, task in report["tasks"].items()
    }
    for row in report["differences"]:
        if row["figure"] in of_task[row["task"]]:
            title = f"{report['tasks'][row['task']]['title']}, {figure_title(row['figure'])}"
            before, after = number(row["second"], row["figure"]), number(row["first"], row["figure"])
            between = "" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f})"
            lines[row["verdict"]].append(f"{title}: {before} → {after}{between}")
    if report["differences"]:
        return lines
    for task_name, task in report["tasks"].items():
        for name in of_task[task_name]:
            found, control = task["methods"]["semantic"][name], task["methods"].get(task["control"], {}).get(name)
            if control is not None and found["shown"] is not None:
                line = f"{task['title']}, {figure_title(name)}: {number(found['value'], name)}, {task['control']} "
                better = (found["value"] < control["value"]) == lower_is_better(name)
                lines[NOT_SHOWN if not found["shown"] else IMPROVED if better else WORSE].append(
                    line + number(control["value"], name)
                )
    return lines


def _plots(pictures: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    found = []
    if pictures.get("recall_curves"):
        found.append(
            ("How far down the list the song of a text stands", plots.recall_curves(pictures["recall_curves"], TITLES))
        )
    if pictures.get("blend_curve"):
        names = {name: figure_title(name) for name in pictures["blend_curve"][0]["cold"]}
        found.append(("From semantic to preference", plots.blend_curve(pictures["blend_curve"], list(names), names)))
    if pictures.get("genre_agreement"):
        found.append(("Which genres stay together", plots.genre_bars(pictures["genre_agreement"], TITLES)))
    if pictures.get("map"):
        found.append(("The held-out songs on a map (t-SNE of the last stage)", plots.song_map(pictures["map"])))
    if pictures.get("similarities"):
        found.append(
            ("Songs and texts: own against others", plots.similarity_histograms(pictures["similarities"], TITLES))
        )
    # Our own SVG; every text in it was escaped by matplotlib.
    return [(caption, Markup(drawn.replace("<svg ", f'<svg aria-label="{caption}" ', 1))) for caption, drawn in found]
