"""Leakage checks: songs, artists, recordings, users and times that training and evaluation share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.errors import LeakageError
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.schemas import Split

EXAMPLES = 5


def leakage(
    songs: EvaluatedSongs, events: pd.DataFrame | None, pairs: pd.DataFrame | None, settings: EvaluateSettings
) -> dict[str, Any]:
    """The leakage report: for each kind the counts `training`, `held_out` and `shared`, `examples`, and `forbidden`.

    songs             of the training pairs, against the held-out split
    artists           credited in the train split, against the held-out split; parsed independently of the code that
                      makes the splits
    joint_credits     the same with credits also split at '&', 'and' and ',', which may divide names: never forbidden
    duplicate_groups  duplicate recordings in both splits; the evaluation excludes the held-out ones (`without_copies`)
    users             whose events may be in training pairs, against held-out users
    times             training pairs that last occurred after the training period

    `events`: columns of schemas.EVENTS, `pairs`: of schemas.PAIRS; kinds whose input is None are omitted. Raises
    LeakageError for a shared song, artist, user or time, unless `evaluate.allowed_overlaps` names the kind.
    """
    training, held_out = songs.splits == Split.TRAIN, songs.splits == settings.split
    credited = [_artist_names(cell) for cell in songs.metadata["artist"].to_pylist()]
    report = {
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
    report["duplicate_groups"] |= {
        "forbidden": False,
        "songs_left_out": int((held_out & ~without_copies(songs, settings.split)).sum()),
    }
    if events is not None:
        held = events["held_out_user"].to_numpy(dtype=bool)
        report["users"] = _overlap(events.loc[~held, "user_id"], events.loc[held, "user_id"])
        report["times"] = _later_pairs(events, pairs)
    for kind, overlap in report.items():
        if kind in settings.allowed_overlaps:
            overlap["forbidden"] = False
        if overlap["forbidden"] and overlap["shared"]:
            raise LeakageError(_sentence(kind, overlap, settings.split))
    return report


_CERTAIN = re.compile(r";|(?:^|[\s(\[])(?:featuring|feat|ft)(?=[.\s])\.?", re.IGNORECASE)
_POSSIBLE = re.compile(r"\s(?:&|and|x|with|vs)\s|[,+]", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"(various|unknown|diverse|varios|verschiedene)( \w+)?|anonymous|traditional|v ?a|n ?a|none|")


def _artist_names(cell: str | None) -> tuple[set[str], set[str]]:
    """Names that an artist cell certainly credits, and names that it possibly credits, normalised by `_plain`."""
    certain = _CERTAIN.split(cell or "")
    possible = [name for part in certain for name in (part, *_POSSIBLE.split(part))]
    certain_names, possible_names = (
        {key for key in map(_plain, names) if not _PLACEHOLDER.fullmatch(key)} for names in (certain, possible)
    )
    return certain_names, possible_names


def _plain(name: str) -> str:
    """Lower-case letters, digits and marks of a name, without Latin, Greek and Cyrillic diacritics."""
    decomposed = [
        letter for letter in unicodedata.normalize("NFKD", name.casefold()) if not "\u0300" <= letter <= "\u036f"
    ]
    return " ".join(
        "".join(letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in decomposed).split()
    )


def without_copies(songs: EvaluatedSongs, split: str) -> np.ndarray:
    """False for songs of the held-out split with a duplicate recording in the train split; bool [songs]."""
    groups = np.asarray(songs.duplicate_groups)
    kept: np.ndarray = (songs.splits != split) | ~np.isin(groups, groups[songs.splits == Split.TRAIN])
    return kept


def _paired_songs(pairs: pd.DataFrame | None) -> list[str]:
    if pairs is None:
        return []
    training = pairs[pairs["split"] == Split.TRAIN]
    return [*training["trigger_song_id"], *training["song_id"]]


def _overlap(training: Iterable[str], held_out: Iterable[str]) -> dict[str, Any]:
    in_training, in_held_out = set(training), set(held_out)
    shared = sorted(in_training & in_held_out)
    counts = {"training": len(in_training), "held_out": len(in_held_out), "shared": len(shared)}
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
    finding = {
        "songs": f"{overlap['shared']} of the {split} songs are in training pairs",
        "artists": f"{overlap['shared']} of {overlap['held_out']} artists of the {split} split are in the train split "
        "too",
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
    return f"{finding} (for instance {overlap['examples'][0]}), so the metrics would be too high; {remedy}{allow}"
