"""Events → preference pairs and explicit negatives (songs rejected after a trigger song), with Ray Data.

Two shuffles: by user, to count the positives of each song and to mine the pairs of a user, and by trigger song, to add
up the evidence of all users. The driver holds one number for each song.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from htcl_ray.cluster import connection
from htcl_ray.config import Config
from htcl_ray.interactions.pairs import draws_by_support, finish_negatives, finish_pairs, partial_pairs, positives
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.pipelines.events import LogPlan, read_songs
from htcl_ray.schemas import PAIRS, Split
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

EVENTS_PER_BUCKET = 1 << 20
"""Events in a partition of the shuffles, on average."""


def make_pairs(workspace: Workspace, config: Config, plan: LogPlan, features_version: str) -> None:
    """Mine preference pairs and explicit negatives from the events, and write both artifacts."""
    connection.connect(config)
    import ray
    import ray.data

    kinds = ("pairs", "negatives")
    for kind in kinds:
        workspace.remove(f"{kind}/{plan.pairs_version}")
    manifest = workspace.manifest(f"events/{plan.events_version}")
    assert manifest is not None, "pairs are mined from finished events"
    quality = manifest["quality"]
    train_end = quality["period_ends"][0]
    songs = read_songs(workspace, features_version)
    shared_songs = ray.put(songs)
    buckets = max(1, math.ceil(quality["events"] / EVENTS_PER_BUCKET))
    folder = f"events/{plan.events_version}"
    names = [f"{folder}/{name}" for name in workspace.children(folder) if name.endswith(".parquet")]
    files = ray.data.from_items([{"file": name} for name in names], override_num_blocks=min(len(names), 4096))

    read = functools.partial(_read_events, workspace=workspace, buckets=buckets)
    by_user = files.map_batches(read, batch_size=1).groupby("bucket", num_partitions=buckets)
    count = functools.partial(_count_positives, songs=shared_songs, config=config)
    popularity = np.zeros(songs.num_rows, dtype=np.float64)
    for batch in by_user.map_groups(count, batch_format="pyarrow").iter_batches(batch_size=None, prefetch_batches=0):
        np.add.at(popularity, batch["song"], batch["count"])

    mine = functools.partial(_mine_users, songs=shared_songs, newest=train_end or 0.0, config=config, buckets=buckets)
    shared_popularity = ray.put(popularity)
    finish = functools.partial(
        _finish_triggers,
        songs=shared_songs,
        popularity=shared_popularity,
        config=config,
        workspace=workspace,
        version=plan.pairs_version,
    )
    partial = by_user.map_groups(mine, batch_format="pyarrow")
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    drawn: Counter[str] = Counter()
    for batch in (
        partial.groupby("bucket", num_partitions=buckets)
        .map_groups(finish, batch_format="pyarrow")
        .iter_batches(batch_size=None, prefetch_batches=0)
    ):
        for text in batch["counts"].tolist():
            counted = json.loads(text)
            drawn.update(counted.pop("drawn"))
            for kind in kinds:
                counts[kind].update(counted[kind])
    inputs = {"features": features_version, "events": plan.events_version, "log": plan.log}
    for kind in reversed(kinds):  # pairs last, so that finished pairs imply finished negatives
        _finish(
            workspace, config, kind, plan.pairs_version, counts[kind], drawn if kind == "pairs" else Counter(), inputs
        )


def _finish(
    workspace: Workspace,
    config: Config,
    kind: str,
    version: str,
    counts: Counter[str],
    drawn: Counter[str],
    inputs: dict[str, str],
) -> None:
    """Print the counts, and finish the artifact of pairs or negatives. `drawn`: see `draws_by_support`."""
    path = f"{kind}/{version}"
    splits = {split: counts.pop(split, 0) for split in Split}
    by_split = ", ".join(f"{split} {count:,}" for split, count in splits.items())
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
    print(f"preprocess  {sum(splits.values()):,} {kind} ({by_split}); dropped: {dropped or 'none'}", flush=True)
    if not sum(splits.values()):
        workspace.write_table(f"{path}/part-00000.parquet", PAIRS.empty_table())
    measured: dict[str, Any] = {kind: sum(splits.values()), "splits": splits, "dropped": dict(sorted(counts.items()))}
    if total := sum(drawn.values()):
        shares = {band: round(weight / total, 6) for band, weight in drawn.items()}
        measured["draws_by_support"] = shares
        by_support = ", ".join(f"support {band} {share:.1%}" for band, share in shares.items())
        print(f"preprocess  stage 2 draws training pairs by weight: {by_support}", flush=True)
    workspace.finish(path, build_manifest(kind, config=config.model_dump(mode="json"), inputs=inputs, quality=measured))


def _count_positives(events: pa.Table, *, songs: Any, config: Config) -> pa.Table:
    """Songs and their numbers of positives among the events of some users. Runs in a Ray task."""
    import ray

    total = positives(events, ray.get(songs), config.pairs)
    counted = np.flatnonzero(total)
    return pa.table({"song": counted, "count": total[counted]})


def _read_events(batch: dict[str, Any], *, workspace: Workspace, buckets: int) -> Iterator[pa.Table]:
    """Events of files, with the bucket of their user. Runs in a Ray task."""
    for name in batch["file"].tolist():
        events = _read_file(workspace, name)
        yield events.append_column("bucket", _buckets(events["user_id"], buckets, "user bucket"))


def _mine_users(events: pa.Table, *, songs: Any, newest: float, config: Config, buckets: int) -> pa.Table:
    """Evidence of some users for pairs, with the bucket of the trigger song. Runs in a Ray task."""
    import ray

    partial = partial_pairs(events.drop_columns(["bucket"]), ray.get(songs), newest, config.pairs)
    return partial.append_column("bucket", _buckets(partial["trigger_song_id"], buckets, "trigger bucket"))


def _finish_triggers(
    partial: pa.Table, *, songs: Any, popularity: Any, config: Config, workspace: Workspace, version: str
) -> dict[str, Sequence[str]]:
    """Add up the evidence for the trigger songs of a bucket, and write its pairs and negatives. Runs in a Ray task.

    Returns counts as JSON.
    """
    import ray

    bucket = partial["bucket"][0].as_py()
    partial = partial.drop_columns(["bucket"])
    finished = {
        "pairs": finish_pairs(partial, ray.get(songs)["song_id"].combine_chunks(), ray.get(popularity), config.pairs),
        "negatives": finish_negatives(partial, config.pairs),
    }
    for kind, (table, _) in finished.items():
        if table.num_rows:
            workspace.write_table(f"{kind}/{version}/part-{bucket:05d}.parquet", table)
    counts = {kind: {**Counter(table["split"].to_pylist()), **dropped} for kind, (table, dropped) in finished.items()}
    return {"counts": [json.dumps({**counts, "drawn": draws_by_support(finished["pairs"][0])})]}


def _read_file(workspace: Workspace, name: str) -> pa.Table:
    return pq.read_table(workspace.full(name), filesystem=workspace.fs)


def _buckets(keys: pa.ChunkedArray, buckets: int, purpose: str) -> pa.Array:
    """Bucket of each key, from its hash. `purpose`: salt of the hash."""
    codes = keys.combine_chunks().dictionary_encode()
    of_key = np.array(
        [int(hash_fraction(key, purpose) * buckets) for key in codes.dictionary.to_pylist()], dtype=np.int64
    )
    return pa.array(of_key[codes.indices.to_numpy(zero_copy_only=False)] if len(codes) else of_key)
