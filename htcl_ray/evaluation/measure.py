"""All figures of one evaluation: catalogue, vectors and log in; tasks, leakage report and what the plots show out."""

from __future__ import annotations

import numpy as np
import pandas as pd

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.leakage import leakage, without_copies
from htcl_ray.evaluation.report.plot_data import pictures
from htcl_ray.evaluation.task_result import Measured
from htcl_ray.evaluation.tasks.recommendation import blend_curve, recommendation_tasks
from htcl_ray.evaluation.tasks.semantic import Encode, semantic_tasks
from htcl_ray.schemas import Split


def measure(
    songs: Songs, encode: Encode, log: pd.DataFrame | None, pairs: pd.DataFrame | None, settings: EvaluateSettings
) -> Measured:
    """Semantic and recommendation tasks of every space of `songs`, with controls and baselines beside them.

    `log`: columns of schemas.EVENTS, `pairs`: columns of schemas.PAIRS; None when there are none. Raises LeakageError
    when training saw what is evaluated.
    """
    found = leakage(songs, log, pairs, settings)
    kept = without_copies(songs, settings.split)
    asked = songs.without(~kept & (songs.splits == settings.split))
    held_out = np.flatnonzero(asked.splits == settings.split)
    tasks = semantic_tasks(asked, encode, settings)
    curve = None
    if log is not None:
        tasks += recommendation_tasks(asked, log, settings)
        curve = blend_curve(asked, log, settings) or None
    data = {
        "split": settings.split,
        "songs": len(held_out),
        "copies_left_out": len(songs.ids) - len(asked.ids),
        "unique_texts": len({asked.texts[row] for row in held_out}),
        "artists": len({asked.artists[row] for row in held_out}),
        "training_songs": int((asked.splits == Split.TRAIN).sum()),
        "spaces": list(asked.spaces),
    }
    return Measured(data, found, tasks, {**pictures(asked, encode, settings), "blend_curve": curve})
