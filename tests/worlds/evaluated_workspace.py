"""A workspace with short audio, untrained models, a log and an index: all inputs of an evaluation, within seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile

from htcl_ray.audio import log_mel
from htcl_ray.config import Config
from htcl_ray.index.vectors import Vectors
from htcl_ray.pipelines.embed import plan
from htcl_ray.pipelines.index import build_index
from htcl_ray.schemas import EVENTS, METADATA, PAIRS, embeddings_schema, features_schema
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import GENRES, small_config, song_id, sound, text_of, write_models

SONGS = 40
USERS = 24
SPLITS = ("train", "test")

ENCODER = {
    "name_or_path": "some/encoder",
    "family": "clap",
    "fingerprint": "0123456789abcdef",
    "width": 512,
    "sample_rate": 48_000,
    "window_seconds": 10.0,
    "hop_seconds": 10.0,
    "licence": "apache-2.0",
}
"""Record of an encoder in the manifest of the features, of which the report states the licence."""


def split_of(i: int) -> str:
    return SPLITS[i % 2]


def write_evaluated(
    folder: Path, tmp: Path, *, preference: bool = True, log: bool = True, index: bool = True, **overrides: object
) -> Config:
    """Everything from features to index; audio files lie below `tmp`."""
    config = small_config(folder, evaluate__resamples=100, **overrides)
    workspace = Workspace(config.workspace)
    write_split_features(config, tmp / "audio")
    write_models(config, tmp, preference=preference)
    if log:
        workspace.write_table("events/events-1/part-0.parquet", events())
        workspace.finish(
            "events/events-1",
            build_manifest("events", config=config.model_dump(mode="json"), inputs={"features": "features-1"}),
        )
        workspace.write_table("pairs/pairs-1/part-0.parquet", pairs())
        workspace.finish(
            "pairs/pairs-1",
            build_manifest("pairs", config=config.model_dump(mode="json"), inputs={"features": "features-1"}),
        )
    write_embeddings(config)
    if index:
        build_index(config)
    return config


def write_split_features(config: Config, audio: Path) -> None:
    """Half of the songs train, half test; genres, tags, and four artists on each side."""
    recipe, workspace = config.audio, Workspace(config.workspace)
    audio.mkdir(parents=True)
    mels = np.zeros((SONGS, recipe.max_frames, recipe.n_mels), dtype=np.float16)
    valid = []
    for i in range(SONGS):
        waveform = sound(i, recipe)
        soundfile.write(audio / f"{i}.wav", waveform, recipe.sample_rate, subtype="FLOAT")
        values = log_mel(waveform, recipe.sample_rate, recipe)
        mels[i] = values.min()
        mels[i, : len(values)] = values
        valid.append(len(values))
    columns = {
        "song_id": [song_id(i) for i in range(SONGS)],
        "text": [text_of(i) for i in range(SONGS)],
        "features": pa.FixedShapeTensorArray.from_numpy_ndarray(mels),
        "valid_frames": pa.array(valid, pa.int32()),
        "split": [split_of(i) for i in range(SONGS)],
        "decoded_share": pa.array([1.0] * SONGS, pa.float32()),
        "duplicate_group": [f"group-{i}" for i in range(SONGS)],
        "audio_path": [str(audio / f"{i}.wav") for i in range(SONGS)],
        **{name: pa.nulls(SONGS, METADATA.field(name).type) for name in METADATA.names},
        "artist": [f"{split_of(i)} artist {i // 2 % 4}" for i in range(SONGS)],
        "genre": pa.array([[GENRES[i % 3]] for i in range(SONGS)]),
        "tags": pa.array([[GENRES[i % 3], f"number {i % 2}"] for i in range(SONGS)]),
    }
    table = pa.table(columns, schema=features_schema(recipe.max_frames, recipe.n_mels))
    for shard in range(2):
        workspace.write_table(f"features/features-1/shard-{shard:05d}.parquet", table.slice(shard * 20, 20))
    manifest = build_manifest("features", config=config.model_dump(mode="json"), inputs={}, extractor=ENCODER)
    workspace.finish("features/features-1", manifest)


def write_embeddings(config: Config, model: str | None = None) -> None:
    """What `htcl embed` would write, without Ray."""
    workspace = Workspace(config.workspace)
    job = plan(workspace, config, model)
    ids, vectors = (
        workspace.read_tables(job.features.path).sort_by("song_id")["song_id"].to_pylist(),
        encode_features(config, model),
    )
    order = np.random.default_rng(0).permutation(len(ids))
    columns = {
        "song_id": [ids[i] for i in order],
        "semantic": list(vectors.semantic[order]),
        "preference": None if vectors.preference is None else list(vectors.preference[order]),
    }
    schema = embeddings_schema(config.model.dim)
    arrays = [
        pa.nulls(len(ids), field.type) if columns[field.name] is None else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    workspace.write_table(f"{job.path}/part-0.parquet", pa.Table.from_arrays(arrays, schema=schema))
    quality, dim = {"songs": len(ids)}, config.model.dim
    workspace.finish(
        job.path,
        build_manifest(
            "embeddings", config=config.model_dump(mode="json"), inputs=job.inputs, quality=quality, dim=dim
        ),
    )


def encode_features(config: Config, model: str | None = None) -> Vectors:
    """The vectors of all songs, in the order of their ids."""
    workspace = Workspace(config.workspace)
    job = plan(workspace, config, model)
    table = workspace.read_tables(job.features.path).sort_by("song_id")
    encoder = SongEncoder.from_workspace(workspace, *job.models.paths)
    mels = table["features"].combine_chunks().to_numpy_ndarray()
    return encoder.encode_features(mels, np.array(table["valid_frames"].to_pylist()))


def grow(config: Config, songs: int = 4) -> None:
    """A later catalogue, features-2 in place of features-1: so many test songs more, by known artists, which the log
    does not know."""
    workspace = Workspace(config.workspace)
    table = workspace.read_tables("features/features-1").sort_by("song_id")
    more = table.filter(pc.equal(table["split"], "test")).slice(0, songs)
    for column, values in (
        ("song_id", "new-{}"),
        ("duplicate_group", "new group {}"),
        ("text", "rock number {} by nobody"),
    ):
        place = more.schema.get_field_index(column)
        more = more.set_column(place, more.schema.field(column), pa.array([values.format(i) for i in range(songs)]))
    workspace.write_table("features/features-2/shard-00000.parquet", pa.concat_tables([table, more]))
    workspace.finish(
        "features/features-2", build_manifest("features", config=config.model_dump(mode="json"), inputs={})
    )
    for kind, rows in (("events", events()), ("pairs", pairs())):
        workspace.write_table(f"{kind}/{kind}-2/part-0.parquet", rows)
        workspace.finish(
            f"{kind}/{kind}-2",
            build_manifest(kind, config=config.model_dump(mode="json"), inputs={"features": "features-2"}),
        )
    workspace.remove(
        "features/features-1"
    )  # a configuration without a catalogue determines features only where there is one set of them


def events() -> pa.Table:
    """Users like one genre: half of each user's events come before the evaluated period, and half of the users are held
    out."""
    generator = np.random.default_rng(1)
    rows = []
    for user in range(USERS):
        for number, song in enumerate(generator.permutation(SONGS)[:30].tolist()):
            late = number >= 15
            rows.append(
                {
                    "user_id": f"u{user:02}",
                    "song_id": song_id(song),
                    "trigger_song_id": None,
                    "value": 1.0 if song % 3 == user % 3 else -1.0,
                    "timestamp": 9.0 if late else 1.0,
                    "held_out_user": user % 2 == 0,
                    "period": "test" if late else "train",
                }
            )
    return pa.Table.from_pylist(rows, schema=EVENTS)


def pairs() -> pa.Table:
    """A few training pairs of training songs."""
    rows = [
        {"trigger_song_id": song_id(i), "song_id": song_id(i + 6), "weight": 1.0, "support": 1, "split": "train"}
        | {"first_timestamp": 1.0, "last_timestamp": 1.0}
        for i in range(0, 30, 2)
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)
