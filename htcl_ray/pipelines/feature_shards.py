"""Shards of features: the songs of a shard, decoded and converted, or with their given vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from htcl_ray.catalog.quarantine import rejected_rows
from htcl_ray.catalog.songs import duplicate_group, vector_group
from htcl_ray.config import Config
from htcl_ray.errors import AudioError
from htcl_ray.extractors.families import ExtractorRecord
from htcl_ray.extractors.song_features import AudioFeatures
from htcl_ray.interactions.splits import group_split
from htcl_ray.schemas import METADATA, QUARANTINE, features_schema
from htcl_ray.workspace.storage import Workspace

SONGS_AT_ONCE = 16
"""Songs that are decoded before a pretrained encoder embeds their windows together."""


class ShardWriter:
    """Writes the shards that are numbered in a batch of Ray Data, as the function of a task or as an actor."""

    def __init__(
        self,
        workspace: Workspace,
        config: Config,
        features: str,
        quarantine: str,
        songs: Any,
        shard_size: int,
        extractor: ExtractorRecord | None = None,
        device: str = "cpu",
    ) -> None:
        """`songs`: reference of the table of all songs, of which a shard is `shard_size` rows."""
        self._workspace, self._config, self._songs, self._size = workspace, config, songs, shard_size
        self._features, self._quarantine = features, quarantine
        self._audio = None
        if config.audio.extractor != "vectors":
            self._audio = AudioFeatures(config.audio.recipe, extractor, device)
        self._extractor = extractor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards; return their numbers of songs."""
        import ray

        table = ray.get(self._songs)
        counts = []
        for shard in batch["shard"].tolist():
            rows = table.slice(shard * self._size, self._size)
            features, rejected = make_shard(rows, self._config, self._audio, self._extractor)
            if rejected.num_rows:  # before the features, whose file marks the shard as done
                self._workspace.write_table(f"{self._quarantine}/{shard_name(shard)}", rejected)
            self._workspace.write_table(f"{self._features}/{shard_name(shard)}", features)
            counts.append(rows.num_rows)
        return {"songs": np.array(counts)}


def shard_name(shard: int) -> str:
    """File name of a shard, in features and in quarantine. Names sort in the order of song ids."""
    return f"shard-{shard:07d}.parquet"


def make_shard(
    songs: pa.Table, config: Config, audio: AudioFeatures | None, extractor: ExtractorRecord | None = None
) -> tuple[pa.Table, pa.Table]:
    """Convert songs to rows of `features_schema`, and rows of QUARANTINE for the rejected ones.

    `audio`: None for given vectors, of which none is rejected here.
    """
    if audio is None:
        return _of_vectors(songs, config), QUARANTINE.empty_table()
    return _of_audio(songs, config, audio, extractor)


def _of_audio(
    songs: pa.Table, config: Config, audio: AudioFeatures, extractor: ExtractorRecord | None
) -> tuple[pa.Table, pa.Table]:
    from htcl_ray.audio import check_audible, decode_clip  # loads audio libraries, which planning does not need

    decoding = audio.decoding
    kept, features, rejected = [], [], [QUARANTINE.empty_table()]
    derived: list[tuple[int, str, float, str]] = []
    described = songs.select(["song_id", "audio_path", "split", "source", "row"]).to_pylist()
    batch_size = config.embed.batch_size
    for start in range(0, len(described), SONGS_AT_ONCE):
        waveforms = {}
        for i, song in enumerate(described[start : start + SONGS_AT_ONCE], start):
            try:
                waveform, decoded_share = decode_clip(song["audio_path"], decoding)
                check_audible(waveform, decoding)
            except AudioError as error:
                rejected.append(_rejected(song, error))
                continue
            waveforms[i] = waveform
            group = duplicate_group(waveform)
            split = song["split"] or group_split(f"recording:{group}", config.data.split_shares).value
            derived.append((i, split, decoded_share, group))
        for i, frames in _embedded(audio, waveforms, batch_size):
            if isinstance(frames, AudioError):
                rejected.append(_rejected(described[i], frames))
                derived = [row for row in derived if row[0] != i]
            else:
                kept.append(i)
                features.append(frames)
    if extractor is None:
        longest, width = decoding.max_frames, decoding.n_mels
    else:
        longest, width = extractor.max_windows(decoding.clip_seconds), extractor.width
    stacked = np.zeros((len(features), longest, width), dtype=np.float16)
    for padded, frames in zip(stacked, features, strict=True):
        padded[:] = frames.min()
        padded[: len(frames)] = frames
    _, splits, shares, groups = zip(*derived, strict=True) if derived else ((), (), (), ())
    valid = [len(frames) for frames in features]
    table = _table(songs.take(pa.array(kept, pa.int64())), stacked, valid, splits, shares, groups)
    return table, pa.concat_tables(rejected)


def _embedded(
    audio: AudioFeatures, waveforms: dict[int, np.ndarray], batch_size: int
) -> list[tuple[int, np.ndarray | AudioError]]:
    """Features by song; if embedding all at once fails, they are embedded one by one, to find the song at fault."""
    try:
        return list(zip(waveforms, audio(list(waveforms.values()), batch_size), strict=True))
    except AudioError:
        each: list[tuple[int, np.ndarray | AudioError]] = []
        for i, waveform in waveforms.items():
            try:
                each.append((i, audio([waveform], batch_size)[0]))
            except AudioError as error:
                each.append((i, error))
        return each


def _of_vectors(songs: pa.Table, config: Config) -> pa.Table:
    column = songs["vector"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(songs), column.type.list_size)
    groups = [vector_group(vector) for vector in vectors]
    shares = config.data.split_shares
    splits = [
        split or group_split(f"recording:{group}", shares).value
        for split, group in zip(songs["split"].to_pylist(), groups, strict=True)
    ]
    stacked = vectors.astype(np.float16)[:, None]
    return _table(songs, stacked, [1] * len(songs), splits, [1.0] * len(songs), groups)


def _table(
    songs: pa.Table,
    stacked: np.ndarray,
    valid: Sequence[int],
    splits: Sequence[str],
    shares: Sequence[float],
    groups: Sequence[str],
) -> pa.Table:
    """Rows of `features_schema`; `stacked` is [songs, frames, width]."""
    schema = features_schema(*stacked.shape[1:])
    columns = {name: songs[name].combine_chunks() for name in ("song_id", "text", "audio_path", *METADATA.names)}
    storage = pa.FixedSizeListArray.from_arrays(pa.array(stacked.reshape(-1)), stacked.shape[1] * stacked.shape[2])
    columns["features"] = pa.ExtensionArray.from_storage(schema.field("features").type, storage)
    derived = {"valid_frames": valid, "split": splits, "decoded_share": shares, "duplicate_group": groups}
    columns |= {name: pa.array(values, schema.field(name).type) for name, values in derived.items()}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _rejected(song: dict[str, Any], error: AudioError) -> pa.Table:
    detail = f"{song['audio_path']}: {error.detail}"
    return rejected_rows([song["song_id"]], [song["row"]], song["source"], error.reason, detail)
