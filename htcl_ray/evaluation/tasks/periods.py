"""What came before the evaluated period, and which songs were liked in training then."""

from __future__ import annotations

import numpy as np
import pandas as pd

from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.schemas import Split


def periods_before(events: pd.DataFrame, split: str) -> list[str] | None:
    """Periods that end before the evaluated one begins; None when the log has no times."""
    if events["timestamp"].isna().all():
        return None
    order = [Split.TRAIN, Split.VALIDATION, Split.TEST]
    return [str(period) for period in order[: order.index(Split(split))]]


def training_positives(songs: Songs, events: pd.DataFrame, split: str) -> pd.DataFrame:
    """Positive events of users who are not held out, on songs of the train split, in the periods before that of
    `split`.
    """
    training = {song for song, of in zip(songs.ids, songs.splits, strict=True) if of == Split.TRAIN}
    counted = (events["value"] > 0) & ~events["held_out_user"].astype(bool) & events["song_id"].isin(training)
    earlier = periods_before(events, split)
    if earlier is not None:
        counted &= events["period"].isin(earlier)
    return events[counted]


def hot_songs(songs: Songs, events: pd.DataFrame, split: str) -> np.ndarray:
    """Bool [songs]: songs with training positives; none of them when the log has no times, for then nothing comes
    later.
    """
    if periods_before(events, split) is None:
        return np.zeros(len(songs.ids), dtype=bool)
    return pd.Index(songs.ids).isin(training_positives(songs, events, split)["song_id"])
