"""Embedding as `htcl embed` does it: songs/s of full clips in each precision, how far the vectors are from fp32, and
text queries/s.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import synthetic_songs
from benchmarks.gpu.units import Part, Precision, embedding_precision, precisions_of
from htcl_ray.models.flops import ForwardFlops, peak_tflops
from htcl_ray.pipelines.embed import embed_table
from htcl_ray.schemas import features_schema
from htcl_ray.search.encoder import SongEncoder

SONGS = {"cuda": 512, "cpu": 16}
TEXTS = {"cuda": 1024, "cpu": 32}
REPEATS = 3
COMPARED = 64
"""Songs whose vectors are compared with fp32."""


def run(part: Part) -> None:
    """Songs in every precision of the device, then texts."""
    with tempfile.TemporaryDirectory() as scratch:
        size = "paper" if part.on_gpu else "demo"
        world = synthetic_songs.make_world(Path(scratch) / "frames", size, SONGS[part.kind], "full")
        model = synthetic_songs.make_model(world, 1, part.device).eval()
        encoder = SongEncoder(model, None, {"semantic": None, "preference": None})
        features = features_table(world, SONGS[part.kind])
        with embedding_precision("fp32", part.device):
            exact = _vectors(embed_table(features.slice(0, COMPARED), encoder, world.config.embed.batch_size))
        flops = ForwardFlops(model, world.config.audio.max_frames, min(64, world.config.text.max_tokens))
        peak = peak_tflops(torch.cuda.get_device_name()) if part.on_gpu else None

        def songs(precision: Precision) -> dict[str, Any]:
            batch_size = world.config.embed.batch_size
            with embedding_precision(precision, part.device):
                vectors = _vectors(embed_table(features.slice(0, len(exact)), encoder, batch_size))
                started = time.perf_counter()
                for _ in range(REPEATS):
                    embed_table(features, encoder, batch_size)
                seconds = (time.perf_counter() - started) / REPEATS
            frames = features["valid_frames"].to_pylist()
            tflops = flops.of(frames, []) / seconds / 1e12
            values = {
                "songs_per_second": len(features) / seconds,
                "model_tflops": tflops,
                "mfu": tflops / peak if peak else None,
                "largest_difference": float(np.abs(vectors - exact).max()),
                "least_cosine": float((vectors * exact).sum(axis=1).min()),
            }
            line = f"{values['songs_per_second']:,.0f} songs/s, largest difference {values['largest_difference']:.1e}"
            return {**values, "line": f"{line}, least cosine {values['least_cosine']:.6f}"}

        def texts() -> dict[str, Any]:
            queries = world.songs.texts[: TEXTS[part.kind]]
            queries = (queries * -(-TEXTS[part.kind] // len(queries)))[: TEXTS[part.kind]]
            encoder.encode_texts(queries[:1])
            rates = {}
            for name, at_once in (("batched", len(queries)), ("one_by_one", 1)):
                chosen = queries if at_once > 1 else queries[: len(queries) // 8]
                started = time.perf_counter()
                for start in range(0, len(chosen), at_once):
                    encoder.encode_texts(chosen[start : start + at_once])
                rates[name] = len(chosen) / (time.perf_counter() - started)
            return {
                **rates,
                "line": f"{rates['batched']:,.0f} texts/s in batches, {rates['one_by_one']:,.0f}/s one by one (fp32)",
            }

        part.run(
            {
                **{f"songs, {precision}": functools.partial(songs, precision) for precision in precisions_of(part)},
                "texts": texts,
            }
        )


def features_table(world: synthetic_songs.World, songs: int) -> pa.Table:
    """The columns of the features that embedding reads, as `htcl preprocess` stores them."""
    mels, frames = world.frames.batch(np.arange(songs))
    recipe = world.config.audio
    padded = np.zeros((songs, recipe.max_frames, recipe.n_mels), np.float16)
    padded[:, : mels.shape[1]] = mels
    schema = features_schema(recipe.max_frames, recipe.n_mels)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(padded.reshape(-1)), recipe.max_frames * recipe.n_mels)
    log_mel = pa.ExtensionArray.from_storage(schema.field("features").type, storage)
    valid = pa.array(frames, schema.field("valid_frames").type)
    return pa.table({"song_id": world.songs.song_ids[:songs], "features": log_mel, "valid_frames": valid})


def _vectors(table: pa.Table) -> np.ndarray:
    column = table["semantic"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)
