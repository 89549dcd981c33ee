"""Compare responses of the running application with brute-force NumPy over the vectors of its index.

    python -m benchmarks.exact_responses [--songs 20000] [--requests 1000] [--seed 0]

Serves an index of random unit vectors with `htcl serve` and sends random requests: by song, songs with negatives,
vector, text, audio clip and history, each with a random k, blend, filter and `max_per_artist`. For each request, NumPy
scores all songs, excludes the seeds, applies the filter and the cap, and sorts. Counts the responses whose songs
differ, or whose scores differ by more than 1e-5. Texts and clips are encoded in this process. Writes
benchmarks/results/exact_responses.json and fails when a response differs.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import write_result
from benchmarks.served_world import GENRES, config_of, make_world, recording, song_id
from htcl_ray.audio import decode
from htcl_ray.search.service import SearchService

KINDS = ("song", "songs", "vector", "text", "recording", "history")
TOLERANCE = 1e-5
ARTISTS = 1999
"""Number of artists in `served_world.make_world`."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare responses with brute-force NumPy.")
    parser.add_argument("--songs", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        make_world(workspace, options.songs)
        service = SearchService.open(config_of(workspace))
        vectors = service.index.vectors_of([song_id(row) for row in range(options.songs)])
        assert vectors.preference is not None
        halves = np.stack([vectors.semantic, vectors.preference]).astype(np.float64)
        command = [
            str(Path(sys.executable).with_name("htcl")),
            "serve",
            "--preset",
            "demo",
            "--workspace",
            str(workspace),
        ]
        settings = ("serve.port=0", "serve.metrics_port=0")
        command += [word for setting in settings for word in ("--set", setting)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            url = next(match[1] for line in process.stdout if (match := re.search(r"at (http://\S+);", line)))
            result = compare(url, service, halves, options.requests, options.seed)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
    print(result)
    print(write_result("exact_responses", {"songs": options.songs, "seed": options.seed, **result}))
    if result["different"]:
        raise SystemExit(f"{result['different']} responses differ from brute force")


def compare(url: str, service: SearchService, halves: NDArray[np.float64], requests: int, seed: int) -> dict[str, Any]:
    """Send the requests; return their counts by kind, the number of differences and the largest score difference."""
    rng, different, largest = np.random.default_rng(seed), 0, 0.0
    kinds: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for number in range(requests):
            kind = KINDS[int(rng.integers(len(KINDS)))]
            kinds[kind] += 1
            options = random_options(rng)
            query, seeds, response = send(client, service, halves, kind, rng, options, number)
            response.raise_for_status()
            results = response.json()["results"]
            rows, scores = brute_force(halves, query, seeds, options)
            actual = np.array([result["score"] for result in results])
            largest = max(
                largest, float(np.abs(actual - scores).max(initial=0)) if len(actual) == len(scores) else np.inf
            )
            same = [result["song_id"] for result in results] == [song_id(row) for row in rows]
            different += not (same and len(actual) == len(scores) and np.allclose(actual, scores, atol=TOLERANCE))
    return {"requests": dict(kinds), "different": different, "largest_score_difference": largest}


def random_options(rng: np.random.Generator) -> dict[str, Any]:
    """Draw k and blend, and sometimes a filter and a cap per artist."""
    options: dict[str, Any] = {"k": int(rng.integers(1, 60)), "blend": round(float(rng.random()), 3)}
    if rng.random() < 0.5:
        first = int(rng.integers(1960, 2010))
        options["filter"] = {
            "genre": [GENRES[int(rng.integers(len(GENRES)))]],
            "year": {"gte": first, "lte": first + int(rng.integers(3, 30))},
        }
    if rng.random() < 0.3:
        options["max_per_artist"] = int(rng.integers(1, 3))
    return options


def send(
    client: httpx.Client,
    service: SearchService,
    halves: NDArray[np.float64],
    kind: str,
    rng: np.random.Generator,
    options: dict[str, Any],
    number: int,
) -> tuple[NDArray[np.float64], list[int], httpx.Response]:
    """Send one request; return the query's vectors [2, dim] of any norm, the excluded rows and the response."""
    chosen = [int(row) for row in rng.choice(halves.shape[1], 5, replace=False)]
    ids = [song_id(row) for row in chosen]
    encoder = service.encoder
    assert encoder is not None
    if kind == "song":
        return halves[:, chosen[0]], chosen[:1], client.post("/v1/search", json={"song_id": ids[0], **options})
    if kind == "songs":
        query = _unit(halves[:, chosen[:3]].mean(axis=1) - 0.5 * halves[:, chosen[3:]].mean(axis=1))
        body = {"song_ids": ids[:3], "negative_song_ids": ids[3:], **options}
        return query, chosen, client.post("/v1/search", json=body)
    if kind == "history":
        weights = rng.uniform(0.5, 3, 5)
        query = _unit(np.einsum("s,hsd->hd", weights, halves[:, chosen]))
        history = [{"song_id": name, "weight": float(weight)} for name, weight in zip(ids, weights, strict=True)]
        return query, chosen, client.post("/v1/recommend", json={"history": history, **options})
    if kind == "vector":
        query = rng.normal(size=(2, halves.shape[2]))
        return _unit(query), [], client.post("/v1/search", json={"vector": query.ravel().tolist(), **options})
    if kind == "text":
        text = f"{GENRES[number % len(GENRES)]} calm piano number {number}"
        encoded = encoder.encode_texts([text])
        response = client.post("/v1/search", json={"text": text, **options})
    else:
        data = recording(number)
        encoded = encoder.encode_waveforms([decode(data, encoder.recipe)])
        form = {name: (value if name != "filter" else json.dumps(value)) for name, value in options.items()}
        response = client.post("/v1/search/audio", files={"file": ("clip.wav", data)}, data=form)
    assert encoded.preference is not None
    return np.stack([encoded.semantic[0], encoded.preference[0]]).astype(np.float64), [], response


def brute_force(
    halves: NDArray[np.float64], query: NDArray[np.float64], seeds: list[int], options: dict[str, Any]
) -> tuple[list[int], NDArray[np.float64]]:
    """Return rows and scores of the best songs, best first."""
    blend = options["blend"]
    scores = (1 - blend) * halves[0] @ query[0] + blend * halves[1] @ query[1]
    conditions = options.get("filter")
    taken: Counter[int] = Counter()
    rows: list[int] = []
    for row in np.argsort(-scores, kind="stable"):
        year, genre, artist = 1960 + int(row) % 60, GENRES[int(row) % len(GENRES)], int(row) % ARTISTS
        fits = not conditions or (
            genre in conditions["genre"] and conditions["year"]["gte"] <= year <= conditions["year"]["lte"]
        )
        if row in seeds or not fits or taken[artist] >= options.get("max_per_artist", len(scores)):
            continue
        taken[artist] += 1
        rows.append(int(row))
        if len(rows) == options["k"]:
            break
    return rows, scores[rows]


def _unit(query: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(query / np.linalg.norm(query, axis=1, keepdims=True))


if __name__ == "__main__":
    main()
