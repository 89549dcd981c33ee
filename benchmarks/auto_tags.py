"""Estimated genre and tags of real audio against what is stated about it, for several minimum scores.

    python -m benchmarks.auto_tags ../shared/data [--write]

The scores are those of musicnn's last layer for the given vectors of the shared clips. What is stated is little: of the
88 pieces of music, 82 are called `game soundtrack`, which is no tag; the others are Folk, Jazz and Classical, and their
tags say whether they are sung. No clip of ESC-10 is music, so each of its estimated genres is wrong. Mood is not stated.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environment import write_result
from htcl_ray.catalog.auto_tags import estimated_values
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.extractors.base import load_extractor
from htcl_ray.extractors.families import find_extractor, tags_of_encoder
from htcl_ray.schemas import TAG_COLUMNS

MIN_SCORES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
GENRES = {"Folk": {"folk"}, "Jazz": {"jazz"}, "Classical": set()}
"""Stated genre → tags of the tagger that are right; it has none of classical music."""
SUNG = {"Spanish", "vocal"}
"""Stated tags of pieces with singing; the others with a stated genre are instrumental."""
VOCAL, INSTRUMENTAL = {"female vocalists", "male vocalists"}, {"instrumental"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", default=".models/musicnn")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/auto_tags.json")
    options = parser.parse_args()
    recipe = AudioRecipe(extractor="pretrained", name_or_path=options.encoder)
    extractor = load_extractor(recipe)
    tags = tags_of_encoder(*find_extractor(recipe))
    scores, songs = {}, {}
    for name in ("music", "esc10"):
        table = pq.read_table(options.data / f"{name}_vectors.parquet")
        scores[name] = extractor.tag_scores(np.array(table["vector"].to_pylist(), np.float32))
        empty = {column: pa.nulls(len(table), pa.list_(pa.string())) for column in TAG_COLUMNS}
        songs[name] = pa.table({"song_id": table["song_id"], **empty})
    with open(options.data / "music.csv", encoding="utf-8", newline="") as file:
        stated = {row["song_id"]: row for row in csv.DictReader(file)}
    rows = []
    for min_score in MIN_SCORES:
        estimated = {name: estimated_values(songs[name], scores[name], tags, min_score).to_pylist() for name in songs}
        rows.append({"min_score": min_score, **measures(estimated, stated)})
        print(rows[-1])
    if options.write:
        print(f"written: {write_result('auto_tags', {'encoder': 'musicnn', 'by_min_score': rows})}")


def measures(estimated: dict[str, list[dict[str, Any]]], stated: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Precision and recall on the pieces whose genre is stated, and shares of all clips with estimated values."""
    values = []
    for song in estimated["music"]:
        about = stated[song["song_id"]]
        if about["genre"] in GENRES:
            sung = about["tags"] in SUNG
            voice = set(song["tags"] or ()) & (VOCAL | INSTRUMENTAL)
            genre = set(song["genre"] or ())
            values.append(
                (
                    len(genre & GENRES[about["genre"]]),
                    len(genre),
                    len(GENRES[about["genre"]]),
                    len(voice & (VOCAL if sung else INSTRUMENTAL)),
                    len(voice),
                    1,
                )
            )
    right, given, existing, right_voice, given_voice, pieces = np.array(values).sum(axis=0).tolist()
    return {
        "genre": {"right": right, "estimated": given, "stated": existing},
        "singing_or_none": {"right": right_voice, "estimated": given_voice, "stated": pieces},
        "share_of_music_with": _shares(estimated["music"]),
        "share_of_esc10_with": _shares(estimated["esc10"]),
        "values_a_piece_of_music": round(
            float(np.mean([sum(len(song[column] or ()) for column in TAG_COLUMNS) for song in estimated["music"]])), 2
        ),
    }


def _shares(songs: list[dict[str, Any]]) -> dict[str, float]:
    return {column: round(float(np.mean([song[column] is not None for song in songs])), 3) for column in TAG_COLUMNS}


if __name__ == "__main__":
    main()
