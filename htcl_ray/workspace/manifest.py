"""Manifests of artifacts: their content, their format version, and the hashes that they record."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from htcl_ray.errors import MismatchError
from htcl_ray.schemas import FORMAT_VERSION
from htcl_ray.workspace.credentials import tree_without_credentials

MANIFEST = "manifest.json"
DESCRIPTIONS = ("README.md", "evaluation.json")
"""Files of a model that describe its evaluation; they may change after the model was trained."""
LIBRARIES = ("htcl-ray", "ray", "torch", "transformers", "pyarrow", "librosa", "faiss-cpu", "numpy")
"""Libraries whose installed versions every manifest records."""


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that are equal if and only if the JSON forms of `parts` are equal."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a local file's bytes as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_manifest(
    kind: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Return the content of a `manifest.json`: the artifact's kind, configuration, inputs, libraries and quality.

    Credentials in the URIs of `config` are removed. `extra` is added as further keys.
    """
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "config": tree_without_credentials(config),
        "inputs": dict(inputs),
        "quality": dict(quality or {}),
        "libraries": {name: _installed_version(name) for name in LIBRARIES},
        **extra,
    }


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_format(manifest: Mapping[str, Any], where: str) -> None:
    """Raise MismatchError unless a manifest has the format version that this code reads."""
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "install a newer one" if newer else "make it again, or choose another workspace"
        raise MismatchError(f"{where} has format version {version}, but this htcl-ray reads {FORMAT_VERSION}; {remedy}")
