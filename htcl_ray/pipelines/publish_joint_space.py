"""The joint space of a pretrained audio-text model as the semantic model of a workspace. Starts no Ray."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from htcl_ray.config import Config
from htcl_ray.extractors.families import check_encoder, recorded_extractor
from htcl_ray.training.joint_space import joint_model, joint_space
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace


def publish_joint_space(workspace: Workspace, config: Config, features: Artifact, version: str) -> StepResult:
    """Publish the joint space as the semantic model `version`, unless it exists. Raises as `joint_space`."""
    started = time.monotonic()
    record = joint_space(config)
    check_encoder(record, recorded_extractor(features.manifest), f"the joint space of {record.name_or_path}")
    path = f"models/semantic/{version}"
    skipped = workspace.manifest(path) is not None
    if not skipped:
        workspace.check_writable()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            joint_model(config).save_pretrained(folder)
            files = {
                file.relative_to(folder).as_posix(): file_sha256(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
            manifest = build_manifest(
                "semantic",
                config=config.model_dump(mode="json"),
                inputs={"features": features.version, "joint_space": record.fingerprint},
                files=files,
            )
            workspace.publish(folder, path, manifest)
    summary = f"semantic model: joint space of {record.name_or_path}, {record.width} numbers, not trained"
    return StepResult("pretrain", workspace.uri_of(path), summary, time.monotonic() - started, skipped)
