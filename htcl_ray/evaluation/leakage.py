"""What training and evaluation share: songs, artists, recordings, users and times, and whether that makes the figures
worthless.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.errors import LeakageError
from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.schemas import Split

EXAMPLES = 5


def leakage(
    songs: Songs, events: pd.DataFrame | None, pairs: pd.DataFrame | None, settings: EvaluateSettings
) -> dict[str, Any]:
    """The leakage report: for each kind `training`, `held_out` and `shared` counts, `examples`, and `forbidden`.

    songs             of the training pairs, against the held-out split
    artists           credited in the train split, against the held-out split; parsed here, not by the code that makes the splits
    joint_credits     the same where credits are also split at '&', 'and' and ',', which may divide names: counted, never forbidden
    duplicate_groups  the same recording in both: its held-out copies are left out of the evaluation (`without_copies`)
    users             whose events may be in training pairs, against held-out users
    times             training pairs that last occurred after the training period

    `events`: columns of schemas.EVENTS, `pairs`: of schemas.PAIRS; kinds that need what is None are left out. Raises
    LeakageError for a shared song, artist, user or time, unless `evaluate.allowed_overlaps` names the kind.
    """
    training, held_out = songs.splits == Split.TRAIN, songs.splits == settings.split
    credited = [_artist_names(cell) for cell in songs.metadata["artist"].to_pylist()]
    found = {
        "songs": _overlap(_paired_songs(pairs), [songs.ids[row] for row in np.flatnonzero(held_out)]),
        "artists": _overlap(
            *([name for row in np.flatnonzero(rows) for name in credited[row][0]] for rows in (training, held_out))
        ),
        "joint_credits": _overlap(
            *([name for row in np.flatnonzero(rows) for name in credited[row][1]] for rows in (training, held_out))
        )
        | {"forbidden": False},
        "duplicate_groups": _overlap(
            *([songs.duplicate_groups[row] for row in np.flatnonzero(rows)] for rows in (training, held_out))
        ),
    }
    found["duplicate_groups"] |= {
        "forbidden": False,
        "songs_left_out": int((held_out & ~without_copies(songs, settings.split)).sum()),
    }
    if events is not None:
        held = events["held_out_user"].to_numpy(dtype=bool)
        found["users"] = _overlap(events.loc[~held, "user_id"], events.loc[held, "user_id"])
        found["times"] = _later_pairs(events, pairs)
    for kind, overlap in found.items():
        if kind in settings.allowed_overlaps:
            overlap["forbidden"] = False
        if overlap["forbidden"] and overlap["shared"]:
            raise LeakageError(_sentence(kind, overlap, settings.split))
    return found


_CERTAIN = re.compile(r";|(?:^|[\s(\[])(?:featuring|feat|ft)(?=[.\s])\.?", re.IGNORECASE)
_POSSIBLE = re.compile(r"\s(?:&|and|x|with|vs)\s|[,+]", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"(various|unknown|diverse|varios|verschiedene)( \w+)?|anonymous|traditional|v ?a|n ?a|none|")


def _artist_names(cell: str | None) -> tuple[set[str], set[str]]:
    """Names that an artist cell credits for certain, and those that it may credit, as `_plain` writes them."""
    certain = _CERTAIN.split(cell or "")
    possible = [name for part in certain for name in (part, *_POSSIBLE.split(part))]
    found, more = (
        {key for key in map(_plain, names) if not _PLACEHOLDER.fullmatch(key)} for names in (certain, possible)
    )
    return found, more


def _plain(name: str) -> str:
    """Letters, digits and marks of a name in lower case, without the diacritics of Latin, Greek and Cyrillic."""
    decomposed = [
        letter for letter in unicodedata.normalize("NFKD", name.casefold()) if not "\u0300" <= letter <= "\u036f"
    ]
    return " ".join(
        "".join(letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in decomposed).split()
    )


def without_copies(songs: Songs, split: str) -> np.ndarray:
    """Bool [songs]: false for songs of the held-out split whose recording is in the train split too."""
    groups = np.asarray(songs.duplicate_groups)
    return (songs.splits != split) | ~np.isin(groups, groups[songs.splits == Split.TRAIN])


def _paired_songs(pairs: pd.DataFrame | None) -> list[str]:
    if pairs is None:
        return []
    training = pairs[pairs["split"] == Split.TRAIN]
    return [*training["trigger_song_id"], *training["song_id"]]


def _overlap(training: Iterable[str], held_out: Iterable[str]) -> dict[str, Any]:
    ours, theirs = set(training), set(held_out)
    shared = sorted(ours & theirs)
    counts = {"training": len(ours), "held_out": len(theirs), "shared": len(shared)}
    return {**counts, "examples": shared[:EXAMPLES], "forbidden": True}


def _later_pairs(events: pd.DataFrame, pairs: pd.DataFrame | None) -> dict[str, Any]:
    in_training = events.loc[events["period"] == Split.TRAIN, "timestamp"]
    training = pairs[pairs["split"] == Split.TRAIN] if pairs is not None else None
    if training is None or in_training.isna().all():
        counts = {"training": 0 if training is None else len(training), "held_out": 0, "shared": 0}
        return {**counts, "examples": [], "forbidden": True}
    late = training[training["last_timestamp"] > in_training.max()]
    examples = [f"{trigger} → {song}" for trigger, song in zip(late["trigger_song_id"], late["song_id"], strict=True)]
    later = int((events["period"] != Split.TRAIN).sum())
    return {
        "training": len(training),
        "held_out": later,
        "shared": len(late),
        "examples": examples[:EXAMPLES],
        "forbidden": True,
    }


def _sentence(kind: str, overlap: dict[str, Any], split: str) -> str:
    what = {
        "songs": f"{overlap['shared']} of the {split} songs are in training pairs",
        "artists": f"{overlap['shared']} of {overlap['held_out']} artists of the {split} split are in the train split too",
        "users": f"{overlap['shared']} users are both held out and in training",
        "times": f"{overlap['shared']} of {overlap['training']} training pairs last occurred after the training period",
    }[kind]
    remedy = {
        "artists": "give each artist one split in data.split_column or leave it out, and run every step again",
        "songs": "run 'htcl preprocess' and 'htcl finetune' again",
        "users": "run 'htcl preprocess' again",
        "times": "run 'htcl preprocess' and 'htcl finetune' again",
    }[kind]
    allow = f", or accept it with evaluate.allowed_overlaps=[{kind}]" if kind in ("artists", "times") else ""
    return f"{what} (for instance {overlap['examples'][0]}), so the figures would flatter the model; {remedy}{allow}"
