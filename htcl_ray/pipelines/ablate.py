"""`htcl evaluate --ablate`: what each part of the method is worth, by training without it.

Every variant is trained with the configuration as it is but for the part that is left out, embedded, and evaluated on
the same held-out songs and users. Variants live in workspaces of their own below `ablations/`, so that none is ever
served by mistake; a variant that is done is skipped, and one that was interrupted goes on, when the command is given
again.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, WorkspaceError
from htcl_ray.evaluation.report.ablation_table import FULL, ablation_table, ablation_tree
from htcl_ray.evaluation.report.comparison_page import ablation_html
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate, read_figures
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.schemas import FORMAT_VERSION, Split
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import MANIFEST, build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace


@dataclass(frozen=True)
class Variant:
    """The method without one of its parts, or with one that learned from wrong data."""

    name: str
    """As the table shows it."""
    stage_one: bool = True
    """False starts stage 2 from an untrained model."""
    stage_two: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Over the configuration."""
    data: str = "true"
    """`shuffled_captions`: training texts dealt out to the wrong training songs. `shuffled_pairs`: recalled songs dealt
    out to the wrong triggers. Evaluation asks about the true data in every case."""


WITHOUT_TEXT = {"finetune.text_loss_weight": 0.0, "finetune.fusion_loss_weight": 0.0}
VARIANTS = (
    Variant(FULL),
    Variant("without text", stage_one=False, settings=WITHOUT_TEXT),
    Variant("without stage 1", stage_one=False),
    Variant("without stage 2", stage_two=False),
    Variant("without the text term", settings={"finetune.text_loss_weight": 0.0}),
    Variant("without the preference term", settings={"finetune.preference_loss_weight": 0.0}),
    Variant("without the fusion term", settings={"finetune.fusion_loss_weight": 0.0}),
    Variant("shuffled captions", data="shuffled_captions"),
    Variant("shuffled pairs", data="shuffled_pairs"),
)
"""The last two are controls: what they gain, chance gains."""


def ablate(config: Config) -> StepResult:
    """Train and evaluate every variant, and write reports/ablation-<fingerprint>/. Raises InputError before anything is
    trained.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    reports, figures = {}, {}
    for variant, ours, version in train_variants(config):
        result = evaluate(ours, version)
        reports[variant.name] = _version(result.location)
        figures[variant.name] = read_figures(Workspace(ours.workspace), reports[variant.name])
    tree = ablation_tree(figures)
    path = f"reports/ablation-{fingerprint(reports)}"
    manifest = build_manifest("ablation", config=config.model_dump(mode="json"), inputs=reports)
    tree = {"created": manifest["created"], "config": manifest["config"], "reports": reports, **tree}
    workspace.write_json(f"{path}/report.json", tree)
    workspace.write_bytes(f"{path}/report.html", ablation_html(tree).encode())
    workspace.finish(path, manifest)
    Console().print(ablation_table(tree))
    return StepResult("ablate", workspace.uri_of(path), f"{len(VARIANTS)} variants", time.monotonic() - started)


def train_variants(config: Config) -> list[tuple[Variant, Config, str]]:
    """Train and embed every variant; returns each with the configuration and the model version that evaluate it."""
    config = config.with_overrides({"gate.require": "off"})  # what is compared here is served by nobody
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config)
    pairs, events = (
        inputs.pairs(workspace, config, features.version),
        inputs.events(workspace, config, features.version),
    )
    if pairs is None or events is None:
        raise ConfigError(
            "ablations compare both stages, and the workspace holds no preference pairs of these features; name the log table(s) in "
            "data.interactions and run 'htcl preprocess'"
        )
    made = []
    for number, variant in enumerate(VARIANTS, 1):
        started = time.monotonic()
        print(f"ablation {number} of {len(VARIANTS)}: {variant.name}", flush=True)
        target = prepare(workspace, variant.data, features, pairs, events, config.evaluate.seed)
        ours = config.with_overrides({**variant.settings, "workspace": target.location})
        version = _train(ours, target, variant)
        embed(ours, version)
        print(f"ablation {number} of {len(VARIANTS)}: {variant.name}: {time.monotonic() - started:.0f} s", flush=True)
        made.append((variant, ours, version))
    return made


def _train(config: Config, workspace: Workspace, variant: Variant) -> str:
    semantic = _version(pretrain(config).location) if variant.stage_one else _untrained(config, workspace)
    return _version(finetune(config, semantic).location) if variant.stage_two else semantic


def _version(location: str) -> str:
    return location.rstrip("/").rsplit("/", 1)[-1]


def _untrained(config: Config, workspace: Workspace) -> str:
    """A semantic model with the weights that stage 1 would begin with."""
    from htcl_ray.models import HTCL
    from htcl_ray.models.towers.vocabulary import train_wordpiece

    features = inputs.features(workspace, config)
    made_of = {name: getattr(config, name).model_dump(mode="json") for name in ("audio", "text", "model")}
    version = "untrained-" + fingerprint(
        FORMAT_VERSION, features.version, made_of, config.pretrain.seed, config.pretrain.loss
    )
    path = f"models/semantic/{version}"
    if workspace.manifest(path) is not None:
        return version
    vocabulary = None
    if config.text.name_or_path is None:
        songs = workspace.read_tables(features.path, ["text", "split"]).to_pylist()
        vocabulary = train_wordpiece(
            [song["text"] for song in songs if song["split"] == Split.TRAIN], config.text.vocab_size
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        HTCL.untrained(config, vocabulary).save_pretrained(folder)
        manifest = build_manifest(
            "semantic", config=config.model_dump(mode="json"), inputs={"features": features.version}
        )
        workspace.publish(folder, path, manifest)
    return version


def prepare(
    workspace: Workspace, data: str, features: Artifact, pairs: Artifact, events: Artifact, seed: int
) -> Workspace:
    """A workspace below `ablations/` with these inputs, the training texts or pairs shuffled if `data` says so.

    It also has the models that were trained on what it does not shuffle, which need not be trained again.
    """
    target = Workspace(workspace.location_of(f"ablations/{fingerprint(features.version, pairs.version, seed)}/{data}"))
    wrong = {"shuffled_captions": (features.path, "text"), "shuffled_pairs": (pairs.path, "song_id")}.get(
        data, (None, "")
    )
    copied = [features.path, events.path, f"negatives/{pairs.version}", pairs.path]
    trained = {"true": ("models/semantic", "models/preference"), "shuffled_pairs": ("models/semantic",)}
    for kind in trained.get(data, ()):
        copied += [
            f"{kind}/{name}"
            for name, made in workspace.finished(kind)
            if made["inputs"].get("features") == features.version
        ]
    for path in copied:
        manifest = workspace.manifest(path)
        if manifest is None or target.manifest(path) is not None:
            continue
        if path == wrong[0]:
            _shuffle(workspace, target, path, wrong[1], seed)
        else:
            _copy(workspace, target, path)
        target.finish(path, manifest)
    return target


def _copy(source: Workspace, target: Workspace, path: str) -> None:
    """An artifact without its manifest: hard links where they work, since artifacts are never changed in place."""
    for info in source.fs.get_file_info(pafs.FileSelector(source.full(path), recursive=True)):
        name = info.path.removeprefix(source.full(path) + "/")
        if info.type != pafs.FileType.File or name == MANIFEST:
            continue
        there = target.full(f"{path}/{name}")
        target.fs.create_dir(os.path.dirname(there), recursive=True)
        if not (source.is_local and _link(info.path, there)):
            pafs.copy_files(info.path, there, source_filesystem=source.fs, destination_filesystem=target.fs)


def _link(source: str, target: str) -> bool:
    try:
        Path(target).unlink(missing_ok=True)
        os.link(source, target)
    except OSError:  # another disk, or one without links
        return False
    return True


def _shuffle(source: Workspace, target: Workspace, path: str, column: str, seed: int) -> None:
    """Copies of the tables in which the values of the training rows' `column` are exchanged by one permutation of its
    distinct values.

    So each value stays as frequent as it was, and no row keeps its own unless chance says so.
    """
    table = source.read_tables(path, [column, "split"])
    values = np.array(table[column].to_pylist(), dtype=object)
    distinct = np.unique(values[np.array(table["split"].to_pylist()) == Split.TRAIN].astype(str))
    if len(distinct) < 2:
        raise WorkspaceError(
            f"{source.uri_of(path)} has {len(distinct)} training {column}(s); expected at least 2 to shuffle"
        )
    other = dict(zip(distinct.tolist(), np.random.default_rng(seed).permutation(distinct).tolist(), strict=True))
    for name in source.children(path):
        if not name.endswith(".parquet"):
            continue
        with source.fs.open_input_file(source.full(f"{path}/{name}")) as file:
            rows = pq.read_table(file)
        splits = rows["split"].to_pylist()
        found = [
            other[value] if split == Split.TRAIN else value
            for value, split in zip(rows[column].to_pylist(), splits, strict=True)
        ]
        place = rows.schema.get_field_index(column)
        target.write_table(
            f"{path}/{name}", rows.set_column(place, rows.schema.field(column), pa.array(found, pa.string()))
        )
