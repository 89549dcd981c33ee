"""The verdict of a gate on a model or index: written beside it with its evidence, and checked before anything is
served.

`gate.json` in the artifact's folder holds every bound with what was measured, and the SHA-256 of the files that were
judged. The manifest holds the SHA-256 of `gate.json` and the verdict. A verdict is believed when all of them agree and
the measured values give it.
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
    """Write the verdict into the model that was judged (the preference model if there is one) and into its index, if
    there is one.
    """
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
    WorkspaceError when there is no such artifact.
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
    """Whether the gate let an artifact through; None when none has judged it.

    Raises MismatchError when a file is not the one that the manifest names, when the evidence is missing or is of other
    files, and when the verdict is not what the measured values give.
    """
    verdict = read_verdict(workspace, path, manifest)
    return None if verdict is None else verdict.passed


def read_verdict(workspace: Workspace, path: str, manifest: Mapping[str, Any]) -> GateVerdict | None:
    """The checked verdict on an artifact; see `check_verdict`."""
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
    for name, recorded in manifest.get("files", {}).items():
        if workspace.exists(f"{path}/{name}"):
            found = _sha256(workspace, f"{path}/{name}")
            if found != recorded:
                raise MismatchError(f"{where}/{name} has SHA-256 {found}, but its manifest says {recorded}; {AGAIN}")
    evidence = workspace.read_json(f"{path}/{EVIDENCE}")
    try:
        verdict = GateVerdict(tuple(BoundResult.from_json(item) for item in evidence["bounds"]))
        judged = evidence["files"]
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(
            f"{where}/{EVIDENCE} is not what a gate writes ({str(error).splitlines()[0]}); {AGAIN}"
        ) from None
    for name, recorded in _judged_files(manifest).items():
        if judged.get(name) != recorded:
            raise MismatchError(
                f"{where}/{EVIDENCE} judged {name} with SHA-256 {judged.get(name)}, but it is {recorded}; {AGAIN}"
            )
    if claimed is not verdict.passed or not verdict.results:
        raise MismatchError(
            f"the manifest of {where} says that its gate gave {_word(claimed)}, but the values in {EVIDENCE} give "
            f"{_word(verdict.passed)}; {AGAIN}"
        )
    return verdict


def check_gates(workspace: Workspace, models: Models, index: Artifact | None, require: Require) -> None:
    """Raise GateError when `require` forbids the index, if one is given, or one of the models.

    Of a semantic model behind a preference model it is asked only that it has not failed: the model of the last stage
    is judged. A verdict that was edited raises MismatchError whatever `require` is.
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
                f"the gate of {kind} {artifact.version} failed: {first.bound.description}, {measured}; use another, or this one all the same "
                "with --set gate.require=off"
            )
        if needed == "unjudged":
            raise GateError(
                f"no gate has judged {kind} {artifact.version}, and gate.require is unjudged; run 'htcl evaluate --gate default', or "
                "use it all the same with --set gate.require=failed"
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
