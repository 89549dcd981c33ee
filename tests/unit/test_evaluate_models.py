"""The evaluation step with real, tiny models: each space's text comes from that stage's own text tower."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.models import HTCL
from htcl_ray.pipelines.evaluate import evaluate
from htcl_ray.retrieval.encoder import SongEncoder
from htcl_ray.schemas import embeddings_schema
from htcl_ray.storage import Workspace, build_manifest
from tests.small_workspace import small_config, write_features, write_models

pytestmark = pytest.mark.unit


def test_both_stages_answer_with_their_own_towers(tmp_path: Path):
    config = small_config(tmp_path / "workspace")
    workspace = Workspace(config.workspace)
    write_features(config, songs_per_shard=20)
    write_models(config, tmp_path)
    shard = "features/features-1/shard-00000.parquet"
    table = workspace.read_tables("features/features-1")
    splits = pa.array(["test" if row % 2 else "train" for row in range(len(table))])
    workspace.write_table(shard, table.set_column(table.schema.get_field_index("split"), table.schema.field("split"), splits))
    folders = [Path(workspace.full(path)) for path in ("models/semantic/semantic-0", "models/preference/preference-0")]
    mels = np.stack([row.to_numpy() for row in table["log_mel"].chunk(0)])
    vectors = SongEncoder.load(*folders).encode_mel(mels, np.array(table["valid_frames"].to_pylist()))
    assert vectors.preference is not None
    columns = {"song_id": table["song_id"], "semantic": list(vectors.semantic), "preference": list(vectors.preference)}
    workspace.write_table("embeddings/e/part-0.parquet", pa.table(columns, schema=embeddings_schema(config.model.dim)))
    inputs = {"features": "features-1", "semantic": "semantic-0", "preference": "preference-0"}
    workspace.finish("embeddings/e", build_manifest("embeddings", config=config.model_dump(mode="json"), inputs=inputs))

    result = evaluate(config)

    report = json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8"))
    texts = table["text"].to_pylist()[1::2]
    assert len(set(texts)) == len(texts)
    for folder, space, songs in zip(folders, ("semantic", "preference"), (vectors.semantic, vectors.preference), strict=True):
        scores = HTCL.from_pretrained(folder).embed_text(texts).detach().numpy() @ songs[1::2].T
        ranks = [1 + (row > row[i]).sum() for i, row in enumerate(scores)]
        assert report["semantic"][space]["text_to_audio"]["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
        assert report["semantic"][space]["text_to_audio"]["queries"] == 7
    assert report["recommendation"] is None
    assert report["semantic"]["semantic"]["probe"]["train_songs"] == 7
