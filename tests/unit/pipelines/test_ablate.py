"""Inputs of ablation variants and the table of their metrics; the ray tier trains them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config import resolve
from htcl_ray.evaluation.report.ablation_table import ablation_table, ablation_tree
from htcl_ray.evaluation.report.comparison_page import ablation_html
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.pipelines.ablate import VARIANTS, prepare
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit

SPLITS = ("train", "train", "train", "validation", "test")


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    created = Workspace(str(tmp_path / "workspace"))

    def finish(path: str, **inputs: str) -> None:
        created.finish(path, build_manifest("test", config={}, inputs=inputs))

    songs = [
        {"song_id": f"s{i:02}", "text": f"text {i // 2}", "split": SPLITS[i % 5], "features": float(i)}
        for i in range(40)
    ]
    created.write_table("features/f/shard-0.parquet", pa.Table.from_pylist(songs[:20]))
    created.write_table("features/f/shard-1.parquet", pa.Table.from_pylist(songs[20:]))
    pairs = [
        {"trigger_song_id": f"s{i:02}", "song_id": f"s{(i * 7) % 40:02}", "split": SPLITS[i % 5], "weight": 1.0}
        for i in range(40)
    ]
    created.write_table("pairs/p/part-0.parquet", pa.Table.from_pylist(pairs))
    created.write_table("negatives/p/part-0.parquet", pa.Table.from_pylist(pairs[:3]))
    created.write_table("events/e/part-0.parquet", pa.table({"user_id": ["u"]}))
    for path in ("features/f", "pairs/p", "negatives/p", "events/e"):
        finish(path)
    created.write_bytes("models/semantic/m/tokenizer/vocab.txt", b"words")
    created.write_bytes("models/semantic/other/model.safetensors", b"0")
    finish("models/semantic/m", features="f")
    finish("models/semantic/other", features="elsewhere")
    return created


def prepared(workspace: Workspace, data: str) -> Workspace:
    named = [Artifact(path, path[-1], workspace.manifest(path)) for path in ("features/f", "pairs/p", "events/e")]
    return prepare(workspace, data, *named, seed=0)


def test_true_workspace_has_the_same_inputs_and_their_models(workspace: Workspace):
    target = prepared(workspace, "true")
    for path in ("features/f", "pairs/p", "negatives/p", "events/e"):
        assert target.read_tables(path).equals(workspace.read_tables(path))
        assert target.manifest(path) == workspace.manifest(path)
    assert target.read_bytes("models/semantic/m/tokenizer/vocab.txt") == b"words"
    assert target.children("models/semantic") == ["m"]
    target.write_bytes("models/semantic/m/tokenizer/vocab.txt", b"changed")
    assert workspace.read_bytes("models/semantic/m/tokenizer/vocab.txt") == b"words", (
        "a link must not let changes through"
    )


@pytest.mark.parametrize(
    ("data", "path", "column"), [("shuffled_captions", "features/f", "text"), ("shuffled_pairs", "pairs/p", "song_id")]
)
def test_shuffling_changes_only_training_rows_of_one_column(workspace: Workspace, data: str, path: str, column: str):
    before, target = workspace.read_tables(path).to_pandas(), prepared(workspace, data)
    after = target.read_tables(path).to_pandas()
    training = (before["split"] == "train").to_numpy()
    assert after[~training].equals(before[~training])
    assert after.drop(columns=column).equals(before.drop(columns=column))
    counts = [sorted(Counter(table.loc[training, column]).values()) for table in (before, after)]
    assert counts[0] == counts[1], "the distribution of frequencies is unchanged"
    assert (after.loc[training, column].to_numpy() == before.loc[training, column].to_numpy()).mean() < 0.4
    trained = {"shuffled_captions": [], "shuffled_pairs": ["semantic"]}
    assert target.children("models") == trained[data], (
        "models that were trained on true data do not belong to shuffled data"
    )
    for other in {"features/f", "pairs/p", "events/e"} - {path}:
        assert target.read_tables(other).equals(workspace.read_tables(other))


def test_preparing_again_changes_nothing(workspace: Workspace):
    first = prepared(workspace, "shuffled_captions").read_tables("features/f")
    assert prepared(workspace, "shuffled_captions").read_tables("features/f").equals(first)


def test_every_variant_has_a_valid_configuration_and_a_unique_name():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    for variant in VARIANTS:
        settings = resolve("demo").with_overrides(dict(variant.settings)).finetune
        assert settings.text_loss_weight + settings.preference_loss_weight + settings.fusion_loss_weight > 0


def test_table_contains_differences_from_the_full_method():
    draws = bootstrap.draw([f"u{i}" for i in range(60)], 400, seed=0)
    values = np.random.default_rng(0).random(60)

    def metrics_of(shift: float, method: str = "preference") -> dict:
        return {
            ("cold", method, "ndcg@10"): bootstrap.mean(values + shift, draws),
            ("cold", "semantic", "ndcg@10"): bootstrap.mean(values - 0.3, draws),
            ("cold", "random", "ndcg@10"): bootstrap.mean(values - 0.2, draws),
        }

    noise = np.random.default_rng(1).normal(0, 0.3, 60)
    metrics = {
        "full": metrics_of(0),
        "worse": metrics_of(-0.2),
        "alike": {("cold", "preference", "ndcg@10"): bootstrap.mean(values + noise - noise.mean(), draws)},
        "without stage 2": {("cold", "semantic", "ndcg@10"): bootstrap.mean(values - 0.3, draws)},
    }
    tree = ablation_tree(metrics)
    assert [column["title"] for column in tree["columns"]] == ["cold NDCG@10"]
    cells = {variant["name"]: variant["figures"][0] for variant in tree["variants"]}
    assert cells["full"]["against_full"] is None
    assert cells["worse"]["against_full"]["value"] == pytest.approx(-0.2)
    assert cells["worse"]["against_full"]["verdict"] == "worse"
    assert cells["alike"]["against_full"]["verdict"] == "not shown"
    assert cells["without stage 2"]["against_full"]["value"] == pytest.approx(-0.3)
    assert list(cells) == ["full", "worse", "alike", "without stage 2", "chance"]
    assert cells["full"]["against_chance"]["verdict"] == "improved"
    assert cells["worse"]["against_chance"]["verdict"] == "not shown"
    page = ablation_html({"created": "now", **tree})
    assert page.count("not above chance") == 1
    assert f"{values.mean():.3f}" in page
    assert "-0.200 (-0.200 to -0.200) worse" in page
    assert ablation_table(tree).row_count == 5
