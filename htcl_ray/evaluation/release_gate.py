"""Verdicts of gates on models and indexes: stored with the evidence in the artifact, and verified before it is used.

`gate.json` in the artifact's folder holds every bound with its measured value, and the SHA-256 of the judged files. The
manifest holds the verdict and the SHA-256 of `gate.json`. A verdict is valid when all hashes agree and the measured
values yield it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from htcl_ray.config.sections import Require
from htcl_ray.errors import GateError, MismatchError, WorkspaceError
from htcl_ray.evaluation.gate import BoundResult, GateVerdict
from htcl_ray.schemas import FORMAT_VERSION
from htcl_ray.workspace.artifacts import Artifact, Models
from htcl_ray.workspace.manifest import DESCRIPTIONS
from htcl_ray.workspace.storage import Workspace

EVIDENCE = "gate.json"
BLOCK = 1 << 20
AGAIN = "judge it again with 'htcl evaluate --gate'"


def record_verdicts(
    workspace: Workspace, models: Models, index: Artifact | None, verdict: GateVerdict, report_run: str
) -> None:
    """Write the verdict into the judged model (the preference model of a pair of models) and into its index, if any."""
    preference = models.preference.version if models.preference else None
    together = {
        "semantic": models.semantic.version,
        "preference": preference,
        "index": index.version if index else None,
    }
    for artifact in (models.preference or models.semantic, index):
        if artifact is not None:
            record_verdict(workspace, artifact.path, verdict, report_run, together)


def record_verdict(
    workspace: Workspace, path: str, verdict: GateVerdict, report_run: str, others: Mapping[str, str | None]
) -> None:
    """Write `gate.json` into an artifact's folder, and the verdict into its manifest, which is written last.

    `report_run`: the evaluation; `others`: versions of the models and the index that were judged together. Raises
    WorkspaceError when the artifact does not exist.
    """
    manifest = workspace.manifest(path)
    if manifest is None:
        raise WorkspaceError(f"{workspace.uri_of(path)} does not exist or is unfinished, so it cannot be judged")
    evidence = {
        "format_version": FORMAT_VERSION,
        "report": report_run,
        "judged_together": dict(others),
        "passed": verdict.passed,
        "bounds": [result.as_json() for result in verdict.results],
        "files": _judged_files(manifest),
    }
    workspace.write_json(f"{path}/{EVIDENCE}", evidence)
    files = {**manifest.get("files", {}), EVIDENCE: _sha256(workspace, f"{path}/{EVIDENCE}")}
    workspace.finish(path, {**manifest, "files": files, "gate": {"passed": verdict.passed, "report": report_run}})


def check_verdict(workspace: Workspace, path: str, manifest: Mapping[str, Any]) -> bool | None:
    """Whether an artifact passed its gate; None when no gate has judged it.

    Raises MismatchError when a file does not have the hash in the manifest, when the evidence is missing or about other
    files, and when the measured values do not yield the verdict.
    """
    verdict = read_verdict(workspace, path, manifest)
    return None if verdict is None else verdict.passed


def read_verdict(workspace: Workspace, path: str, manifest: Mapping[str, Any]) -> GateVerdict | None:
    """The verified verdict on an artifact; see `check_verdict`."""
    where = workspace.uri_of(path)
    if "gate" not in manifest:
        if workspace.exists(f"{path}/{EVIDENCE}"):
            raise MismatchError(f"{where} holds {EVIDENCE}, but its manifest names no verdict; {AGAIN}")
        return None
    gate = manifest["gate"]
    claimed = gate.get("passed") if isinstance(gate, dict) else gate
    if EVIDENCE not in manifest.get("files", {}) or not workspace.exists(f"{path}/{EVIDENCE}"):
        raise MismatchError(
            f"the manifest of {where} says that its gate gave {_word(claimed)}, but {EVIDENCE} is missing; {AGAIN}"
        )
    _check_hashes(workspace, path, manifest)
    verdict = _read_evidence(workspace, path, manifest)
    if claimed is not verdict.passed or not verdict.results:
        raise MismatchError(
            f"the manifest of {where} says that its gate gave {_word(claimed)}, but the values in {EVIDENCE} give "
            f"{_word(verdict.passed)}; {AGAIN}"
        )
    return verdict


def _check_hashes(workspace: Workspace, path: str, manifest: Mapping[str, Any]) -> None:
    """Raise MismatchError unless the files of an artifact have the hashes in its manifest."""
    for name, recorded in manifest.get("files", {}).items():
        if workspace.exists(f"{path}/{name}"):
            actual = _sha256(workspace, f"{path}/{name}")
            if actual != recorded:
                where = f"{workspace.uri_of(path)}/{name}"
                raise MismatchError(f"{where} has SHA-256 {actual}, but its manifest says {recorded}; {AGAIN}")


def _read_evidence(workspace: Workspace, path: str, manifest: Mapping[str, Any]) -> GateVerdict:
    """The verdict that the values in `gate.json` yield. Raises MismatchError when they are about other files."""
    where = f"{workspace.uri_of(path)}/{EVIDENCE}"
    evidence = workspace.read_json(f"{path}/{EVIDENCE}")
    try:
        verdict = GateVerdict(tuple(BoundResult.from_json(item) for item in evidence["bounds"]))
        judged = evidence["files"]
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{where} is not what a gate writes ({str(error).splitlines()[0]}); {AGAIN}") from None
    for name, recorded in _judged_files(manifest).items():
        if judged.get(name) != recorded:
            raise MismatchError(f"{where} judged {name} with SHA-256 {judged.get(name)}, but it is {recorded}; {AGAIN}")
    return verdict


def check_gates(workspace: Workspace, models: Models, index: Artifact | None, require: Require) -> None:
    """Raise GateError when `require` forbids the index, if one is given, or one of the models.

    `unjudged` applies to the model of the last stage; a semantic model with a preference model must only not have
    failed. A verdict that was edited raises MismatchError for every value of `require`.
    """
    last = "unjudged" if require == "unjudged" else "failed"
    for kind, artifact, needed in (
        ("index", index, last),
        ("preference model", models.preference, last),
        ("semantic model", models.semantic, "failed" if models.preference else last),
    ):
        verdict = None if artifact is None else read_verdict(workspace, artifact.path, artifact.manifest)
        if artifact is None or require == "off" or (verdict is not None and verdict.passed):
            continue
        if verdict is not None:
            first = verdict.failed[0]
            measured = first.note or "not measured" if first.value is None else f"measured {_measured(first)}"
            raise GateError(
                f"the gate of {kind} {artifact.version} failed: {first.bound.description}, {measured}; use another, "
                "or this one all the same with --set gate.require=off"
            )
        if needed == "unjudged":
            raise GateError(
                f"no gate has judged {kind} {artifact.version}, and gate.require is unjudged; "
                "run 'htcl evaluate --gate default', or use it all the same with --set gate.require=failed"
            )


def _judged_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: sha256 for name, sha256 in manifest.get("files", {}).items() if name not in (EVIDENCE, *DESCRIPTIONS)}


def _sha256(workspace: Workspace, path: str) -> str:
    digest = hashlib.sha256()
    with workspace.fs.open_input_stream(workspace.full(path)) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _word(passed: Any) -> str:
    return "passed" if passed is True else "failed" if passed is False else f"'{passed}'"


def _measured(result: BoundResult) -> str:
    interval = "" if result.low is None or result.high is None else f" [{result.low:.4g}, {result.high:.4g}]"
    return f"{result.value:.4g}{interval}"
