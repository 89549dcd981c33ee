"""`htcl evaluate --ablate` on a real cluster: three of its variants, trained, embedded, evaluated and compared with each
other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.cli import main
from htcl_ray.config import Config
from htcl_ray.models import HTCL
from htcl_ray.pipelines import ablate as step
from htcl_ray.pipelines.ablate import VARIANTS, ablate
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.schemas import EVENTS
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features, write_pairs

pytestmark = pytest.mark.ray

CHOSEN = ("full", "without stage 1", "shuffled captions")
"""The others change settings or data only: tests/unit/pipelines/test_ablate.py."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, in_process_training: None) -> Config:
    made = tiny_config(
        tmp_path_factory.mktemp("ablated"), **{"evaluate.resamples": 100, "pretrain.epochs": 2, "finetune.epochs": 1}
    )
    write_features(made)
    write_pairs(made)
    generator = np.random.default_rng(0)
    rows = [
        {
            "user_id": f"u{user}",
            "song_id": f"song-{song:04d}",
            "trigger_song_id": None,
            "value": 1.0,
            "timestamp": float(late),
            "held_out_user": user % 2 == 0,
            "period": "test" if late else "train",
        }
        for user in range(20)
        for late in (False, True)
        for song in generator.permutation(60)[:20].tolist()
    ]
    workspace = Workspace(made.workspace)
    workspace.write_table("events/events/part-0.parquet", pa.Table.from_pylist(rows, schema=EVENTS))
    workspace.finish("events/events", build_manifest("events", config={}, inputs={"features": "synthetic"}))
    return made


def test_variants_are_trained_apart_and_compared(config: Config, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(step, "VARIANTS", tuple(variant for variant in VARIANTS if variant.name in CHOSEN))
    pretrain(config)
    finetune(config)
    models = {kind: Workspace(config.workspace).children(f"models/{kind}") for kind in ("semantic", "preference")}
    result = ablate(config)
    tree = json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8"))
    assert [variant["name"] for variant in tree["variants"]] == [*CHOSEN, "chance"]
    assert {kind: Workspace(config.workspace).children(f"models/{kind}") for kind in models} == models, (
        "no variant can be served"
    )
    folders = sorted(Path(config.workspace).glob("ablations/*/*/models/*/*"))
    versions = {kind: [folder for folder in folders if folder.parent.name == kind] for kind in models}
    assert models["semantic"][0] in [folder.name for folder in versions["semantic"]], (
        "what is trained already is taken over"
    )
    untrained = [folder for folder in versions["semantic"] if folder.name.startswith("untrained-")]
    assert len(untrained) == 1
    assert HTCL.from_pretrained(untrained[0]).stage == 1
    cells = {variant["name"]: variant["figures"][0] for variant in tree["variants"]}
    assert cells["full"]["against_full"] is None
    assert {name for name, cell in cells.items() if cell["against_full"]} == set(CHOSEN[1:])
    assert "ablation 3 of 3: shuffled captions" in capsys.readouterr().out
    page = (Path(result.location) / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in CHOSEN)
    again = ablate(config)
    assert again.location == result.location
    assert again.seconds < result.seconds / 3, "variants that are done are not trained again"


def test_ablation_without_pairs_is_refused(tmp_path: Path, capsys):
    config = tiny_config(tmp_path)
    write_features(config)
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml"), "--ablate"]) == 2
    assert "the workspace holds no preference pairs" in capsys.readouterr().err
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml"), "--ablate", "--gate", "default"]) == 2
