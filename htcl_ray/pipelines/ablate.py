"""`htcl evaluate --ablate`: measure the contribution of each part of the method by training without it.

Every variant is trained with the given configuration except for the part that is left out, embedded, and evaluated on
the same held-out songs and users. Variants live in separate workspaces below `ablations/`, so that none is served by
mistake. When the command is repeated, finished variants are skipped and an interrupted one resumes.
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
from htcl_ray.extractors.families import feature_width, recorded_extractor
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate, read_metrics
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.schemas import FORMAT_VERSION, Split
from htcl_ray.training.joint_space import refuse_joint_space
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import MANIFEST, build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace


@dataclass(frozen=True)
class Variant:
    """The method without one of its parts, or trained on permuted data."""

    name: str
    """Name in the table."""
    stage_one: bool = True
    """False: stage 2 starts from an untrained model."""
    stage_two: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the configuration."""
    data: str = "true"
    """`shuffled_captions`: training texts randomly permuted across training songs. `shuffled_pairs`: recalled songs
    randomly permuted across triggers. The evaluation always uses the true data."""


WITHOUT_TEXT = {"finetune.text_loss_weight": 0.0, "finetune.fusion_loss_weight": 0.0}
WITHOUT_SHORT_TEXTS = {"pretrain.short_text_share": 0.0, "finetune.short_text_share": 0.0}
"""Short texts are made of a song's tags, which are not shuffled."""
VARIANTS = (
    Variant(FULL),
    Variant("without text", stage_one=False, settings=WITHOUT_TEXT),
    Variant("without stage 1", stage_one=False),
    Variant("without stage 2", stage_two=False),
    Variant("without the text term", settings={"finetune.text_loss_weight": 0.0}),
    Variant("without the preference term", settings={"finetune.preference_loss_weight": 0.0}),
    Variant("without the fusion term", settings={"finetune.fusion_loss_weight": 0.0}),
    Variant("shuffled captions", settings=WITHOUT_SHORT_TEXTS, data="shuffled_captions"),
    Variant("shuffled pairs", data="shuffled_pairs"),
)
"""The last two are controls, which measure chance."""


def ablate(config: Config) -> StepResult:
    """Train and evaluate every variant, and write reports/ablation-<fingerprint>/.

    Raises InputError before anything is trained.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    reports, metrics = {}, {}
    for variant, variant_config, version in train_variants(config):
        result = evaluate(variant_config, version)
        reports[variant.name] = _version(result.location)
        metrics[variant.name] = read_metrics(Workspace(variant_config.workspace), reports[variant.name])
    tree = ablation_tree(metrics)
    path = f"reports/ablation-{fingerprint(reports)}"
    manifest = build_manifest("ablation", config=config.model_dump(mode="json"), inputs=reports)
    tree = {"created": manifest["created"], "config": manifest["config"], "reports": reports, **tree}
    workspace.write_json(f"{path}/report.json", tree)
    workspace.write_bytes(f"{path}/report.html", ablation_html(tree).encode())
    workspace.finish(path, manifest)
    Console().print(ablation_table(tree))
    return StepResult("ablate", workspace.uri_of(path), f"{len(VARIANTS)} variants", time.monotonic() - started)


def train_variants(config: Config) -> list[tuple[Variant, Config, str]]:
    """Train and embed every variant; return each with its configuration and the version of its model."""
    refuse_joint_space(config, "htcl evaluate --ablate")
    config = config.with_overrides({"gate.require": "off"})  # variants are never served
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config)
    pairs, events = (
        inputs.pairs(workspace, config, features.version),
        inputs.events(workspace, config, features.version),
    )
    if pairs is None or events is None:
        raise ConfigError(
            "ablations compare both stages, and the workspace holds no preference pairs of these features; name the "
            "log table(s) in data.interactions and run 'htcl preprocess'"
        )
    trained = []
    for number, variant in enumerate(VARIANTS, 1):
        started = time.monotonic()
        print(f"ablation {number} of {len(VARIANTS)}: {variant.name}", flush=True)
        target = prepare(workspace, variant.data, features, pairs, events, config.evaluate.seed)
        variant_config = config.with_overrides({**variant.settings, "workspace": target.location})
        version = _train(variant_config, target, variant)
        embed(variant_config, version)
        print(f"ablation {number} of {len(VARIANTS)}: {variant.name}: {time.monotonic() - started:.0f} s", flush=True)
        trained.append((variant, variant_config, version))
    return trained


def _train(config: Config, workspace: Workspace, variant: Variant) -> str:
    semantic = _version(pretrain(config).location) if variant.stage_one else _untrained(config, workspace)
    return _version(finetune(config, semantic).location) if variant.stage_two else semantic


def _version(location: str) -> str:
    return location.rstrip("/").rsplit("/", 1)[-1]


def _untrained(config: Config, workspace: Workspace) -> str:
    """Publish a semantic model with the initial weights of stage 1, and return its version."""
    from htcl_ray.models import HTCL
    from htcl_ray.models.towers.vocabulary import train_wordpiece
    from htcl_ray.training.song_text import vocabulary_texts

    features = inputs.features(workspace, config)
    sections = {"audio": config.audio.resolved(), "text": config.text, "model": config.model}
    settings = {name: section.model_dump(mode="json") for name, section in sections.items()}
    version = "untrained-" + fingerprint(
        FORMAT_VERSION, features.version, settings, config.pretrain.seed, config.pretrain.loss
    )
    path = f"models/semantic/{version}"
    if workspace.manifest(path) is not None:
        return version
    vocabulary = None
    if config.text.name_or_path is None:
        songs = workspace.read_tables(features.path, ["text", "split"]).to_pylist()
        texts = [song["text"] for song in songs if song["split"] == Split.TRAIN]
        vocabulary = train_wordpiece(vocabulary_texts(texts, config.pretrain), config.text.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        width, extractor = feature_width(features.manifest), recorded_extractor(features.manifest)
        HTCL.untrained(config, vocabulary, feature_width=width, extractor=extractor).save_pretrained(folder)
        manifest = build_manifest(
            "semantic", config=config.model_dump(mode="json"), inputs={"features": features.version}
        )
        workspace.publish(folder, path, manifest)
    return version


def prepare(
    workspace: Workspace, data: str, features: Artifact, pairs: Artifact, events: Artifact, seed: int
) -> Workspace:
    """A workspace below `ablations/` with these inputs; `data` selects shuffled training texts or pairs.

    Models that were trained on data that is not shuffled are copied too, so that they are not trained again.
    """
    target = Workspace(workspace.location_of(f"ablations/{fingerprint(features.version, pairs.version, seed)}/{data}"))
    shuffled_path, column = {
        "shuffled_captions": (features.path, "text"),
        "shuffled_pairs": (pairs.path, "song_id"),
    }.get(data, (None, ""))
    copied = [features.path, events.path, f"negatives/{pairs.version}", pairs.path]
    reusable = {"true": ("models/semantic", "models/preference"), "shuffled_pairs": ("models/semantic",)}
    for kind in reusable.get(data, ()):
        copied += [
            f"{kind}/{name}"
            for name, manifest in workspace.finished(kind)
            if manifest["inputs"].get("features") == features.version
        ]
    for path in copied:
        manifest = workspace.manifest(path)
        if manifest is None or target.manifest(path) is not None:
            continue
        if path == shuffled_path:
            _shuffle(workspace, target, path, column, seed)
        else:
            _copy(workspace, target, path)
        target.finish(path, manifest)
    return target


def _copy(source: Workspace, target: Workspace, path: str) -> None:
    """Copy an artifact without its manifest, by hard links where possible: artifacts never change in place."""
    for info in source.fs.get_file_info(pafs.FileSelector(source.full(path), recursive=True)):
        name = info.path.removeprefix(source.full(path) + "/")
        if info.type != pafs.FileType.File or name == MANIFEST:
            continue
        copy = target.full(f"{path}/{name}")
        target.fs.create_dir(os.path.dirname(copy), recursive=True)
        if not (source.is_local and _link(info.path, copy)):
            pafs.copy_files(info.path, copy, source_filesystem=source.fs, destination_filesystem=target.fs)


def _link(source: str, target: str) -> bool:
    try:
        Path(target).unlink(missing_ok=True)
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        return False
    return True


def _shuffle(source: Workspace, target: Workspace, path: str, column: str, seed: int) -> None:
    """Copy tables with the distinct values of `column` in the training rows randomly permuted.

    Equal values stay equal, so the distribution of their frequencies is unchanged.
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
        permuted = [
            other[value] if split == Split.TRAIN else value
            for value, split in zip(rows[column].to_pylist(), splits, strict=True)
        ]
        place = rows.schema.get_field_index(column)
        target.write_table(
            f"{path}/{name}", rows.set_column(place, rows.schema.field(column), pa.array(permuted, pa.string()))
        )
