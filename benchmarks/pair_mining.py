"""Compare the pairs that stage 2 samples under two weightings: sums of occurrences, and users with shrinkage.

    python -m benchmarks.pair_mining [--grid]

Uses two worlds with known true neighbours, which need neither audio nor training:

* long-tailed: plays of 20,000 songs with Zipf popularity (exponent 0.9) by 4,000 users, 30 % of them independent of
  taste, and one account that plays the same 40 songs 20,000 times. A song's taste vector is hidden; each session
  follows one of the user's three tastes.
* sample: the feedback log of the sample world for three seeds. A song's vector is its true utility to each user.

Two songs are true neighbours if their cosine is in the top percent of random pairs. "Before" is the earlier formula:
sum of the occurrences / sqrt(positives of trigger · positives of song). "After" counts users, saturates repetitions and
shrinks small support. Prints tables and writes benchmarks/results/pair_mining.json; `--grid` prints the same metrics
for other settings and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from htcl_ray.config.sections import PairSettings
from htcl_ray.demo_world.listeners import make_tastes, simulate
from htcl_ray.demo_world.world import make_world
from htcl_ray.interactions.pairs import draws_by_support, finish_pairs, partial_pairs, positives
from htcl_ray.schemas import EVENTS, Feedback, Split

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """A log and its ground truth."""

    events: pa.Table
    vectors: Floats
    """[songs, d], unit norm."""
    looped: int
    """Number of songs, from song 0, that one account plays in a loop; 0 without such an account."""

    @property
    def songs(self) -> pa.Table:
        return pa.table(
            {
                "song_id": [name(song) for song in range(len(self.vectors))],
                "split": [Split.TRAIN.value] * len(self.vectors),
            }
        )


def name(song: int) -> str:
    return f"s{song:05d}"


def long_tailed_world(seed: int = 0, songs: int = 20_000, users: int = 4_000, noise: float = 0.3) -> World:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((songs, 8)))
    popularity = rng.permutation(np.arange(1, songs + 1) ** -0.9)
    by_popularity = np.cumsum(popularity)
    rows: list[tuple[str, int, float]] = []
    for user in range(users):
        sessions = 1 + rng.poisson(5 * rng.lognormal(0, 0.7))
        tastes = unit(rng.standard_normal((3, 8)))
        by_taste = np.cumsum(popularity * np.exp(6 * tastes @ vectors.T), axis=1)
        start = rng.uniform(0, 90 * 86400, sessions)
        for session in range(sessions):
            plays = 1 + rng.poisson(8)
            chosen = by_taste[rng.integers(3)]
            wanted = np.searchsorted(chosen, rng.random(plays) * chosen[-1])
            noisy = np.searchsorted(by_popularity, rng.random(plays) * by_popularity[-1])
            played = np.where(rng.random(plays) < noise, noisy, wanted)
            rows += [(f"u{user}", int(song), start[session] + 200.0 * play) for play, song in enumerate(played)]
    looped = 40
    rows += [("bot", play % looped, 200.0 * play) for play in range(20_000)]
    return World(as_events(rows), vectors, looped)


def sample_world(seed: int) -> World:
    world = make_world(songs=1000, artists=200, seed=seed)
    tastes = make_tastes(world, users=600)
    log = simulate(world, tastes)
    liked = np.isin(log.feedback, [Feedback.COMPLETE, Feedback.LIKE, Feedback.COLLECT, Feedback.SHARE])
    columns = zip(log.user[liked].tolist(), log.song[liked].tolist(), log.trigger[liked].tolist(), strict=True)
    events = as_events([(f"u{user}", song, 0.0) for user, song, _ in columns])
    triggers = pa.array([name(song) for song in log.trigger[liked].tolist()], pa.string())
    utility = tastes.utility(world)
    vectors = unit((utility - utility.mean(axis=1, keepdims=True)).T)
    return World(events.set_column(2, "trigger_song_id", triggers).cast(EVENTS), vectors, 0)


def as_events(rows: list[tuple[str, int, float]]) -> pa.Table:
    users, songs, seconds = zip(*rows, strict=True)
    columns = {
        "user_id": pa.array(users),
        "song_id": pa.array([name(song) for song in songs]),
        "trigger_song_id": pa.nulls(len(rows), pa.string()),
        "value": pa.array(np.ones(len(rows), np.float32)),
        "timestamp": pa.array(seconds, pa.float64()),
        "held_out_user": pa.repeat(False, len(rows)),
        "period": pa.repeat(Split.TRAIN.value, len(rows)),
    }
    return pa.table(columns).cast(EVENTS)


def unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def mine(world: World, settings: PairSettings) -> pa.Table:
    partial = partial_pairs(world.events, world.songs, 0.0, settings)
    popularity = positives(world.events, world.songs, settings)
    return finish_pairs(partial, world.songs["song_id"].combine_chunks(), popularity, settings)[0]


def mine_as_before(world: World) -> pa.Table:
    """Weight pairs by sum of occurrences / sqrt(positives · positives), and keep the heaviest 100 of each trigger.

    Each repetition of a user counts in full.
    """
    songs, most = len(world.vectors), 100
    sums = PairSettings(
        max_occurrences_per_user=None,
        support_discount=0,
        popularity_exponent=0,
        max_pairs_per_song=None,
        repetition_saturation=1e9,
    )
    pairs = mine(world, sums)
    positive = np.zeros(songs)
    for column in ("song_id", "trigger_song_id"):
        positive += np.bincount(numbers(world.events[column].drop_null()), minlength=songs)
    trigger, song = (numbers(pairs[column]) for column in ("trigger_song_id", "song_id"))
    weight = pairs["weight"].to_numpy() / np.sqrt(positive[trigger] * positive[song])
    order = np.lexsort((song, -weight, trigger))
    place = np.arange(len(order)) - np.searchsorted(trigger[order], trigger[order])
    kept = np.sort(order[place < most])
    return pairs.set_column(pairs.schema.get_field_index("weight"), "weight", pa.array(weight)).take(pa.array(kept))


def numbers(ids: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.array([int(song[1:]) for song in ids.to_pylist()], dtype=np.int64)


def measure(world: World, pairs: pa.Table) -> dict[str, float]:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, len(world.vectors), (2, 200_000))
    threshold = np.quantile((world.vectors[first] * world.vectors[second]).sum(axis=1)[first != second], 0.99)
    trigger, song = (numbers(pairs[column]) for column in ("trigger_song_id", "song_id"))
    share = pairs["weight"].to_numpy() / pairs["weight"].to_numpy().sum()
    cosine = (world.vectors[trigger] * world.vectors[song]).sum(axis=1)
    drawn = np.bincount(np.concatenate([trigger, song]), np.tile(share / 2, 2))
    by_support = draws_by_support(pairs)
    draws = {f"draws of support {band}": weight / sum(by_support.values()) for band, weight in by_support.items()}
    if world.looped:
        in_loop = (trigger < world.looped) & (song == (trigger + 1) % world.looped)
        draws["draws of the looping account's pairs"] = float(share[in_loop].sum())
    return {
        "pairs": float(len(share)),
        **draws,
        "drawn pairs that are true neighbours": float(share[cosine >= threshold].sum()),
        "mean cosine of drawn pairs": float((share * cosine).sum()),
        "effective pairs": effective(share),
        "effective songs": effective(drawn),
    }


def effective(shares: Floats) -> float:
    """Compute the perplexity of shares, exp of their entropy."""
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def mean_of(results: list[dict[str, float]]) -> dict[str, float]:
    return {metric: float(np.mean([one[metric] for one in results])) for metric in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="print metrics of other settings")
    options = parser.parse_args()
    worlds = {"long-tailed": [long_tailed_world()], "sample": [sample_world(seed) for seed in range(3)]}
    if options.grid:
        grid(worlds)
        return
    result = {}
    for kind, of_kind in worlds.items():
        before = mean_of([measure(world, mine_as_before(world)) for world in of_kind])
        after = mean_of([measure(world, mine(world, PairSettings())) for world in of_kind])
        table = Table(f"{kind} world", "before", "after")
        for metric in before:
            table.add_row(metric, f"{before[metric]:,.3f}", f"{after[metric]:,.3f}")
        Console().print(table)
        result[kind] = {"before": before, "after": after}
    settings = PairSettings().model_dump(mode="json")
    print(f"written: {write_result('pair_mining', {'settings': settings, 'worlds': result})}")


def grid(worlds: dict[str, list[World]]) -> None:
    for kind, of_kind in worlds.items():
        console = Console(width=200)
        rows = [("before", mean_of([measure(world, mine_as_before(world)) for world in of_kind]))]
        for discount, offset, support in itertools.product((0.9, 0.98, 0.99, 1), (0, 10), (1,)):
            settings = PairSettings(support_discount=discount, popularity_offset=offset, min_support=support)
            rows.append(
                (
                    f"d {discount} k {offset} min {support}",
                    mean_of([measure(world, mine(world, settings)) for world in of_kind]),
                )
            )
        table = Table(kind, *(metric.removeprefix("draws of ") for metric in rows[0][1]))
        for label, metrics in rows:
            cells = (f"{value:,.3f}" if value < 100 else f"{value:,.0f}" for value in metrics.values())
            table.add_row(label, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
