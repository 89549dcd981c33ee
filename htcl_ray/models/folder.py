"""A model folder on disk: weights, config.json, tokenizer/, evaluation.json, README.md.

Nothing in a model folder is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.models.card import Evaluation, evaluation_of, model_card
from htcl_ray.models.record import ModelRecord, TextRecord, parse_record
from htcl_ray.models.towers.text import check_tokenizer
from htcl_ray.models.weights import read_weights
from htcl_ray.workspace.manifest import MANIFEST, file_sha256, fingerprint
from htcl_ray.workspace.storage import Workspace

WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer", "README.md"
EVALUATION = "evaluation.json"
HUB_FILES = [WEIGHTS, CONFIG, f"{TOKENIZER}/*", EVALUATION, CARD]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(path_or_hub_id: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a model; of a hub id, only `HUB_FILES` are downloaded. Raises WorkspaceError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise WorkspaceError(
                f"{folder} is a folder, which has no revision '{revision}'; leave revision out, or give a hub id"
            )
        return folder
    name = str(path_or_hub_id)
    if not HUB_ID.fullmatch(name):
        raise WorkspaceError(
            f"the model folder '{name}' does not exist; expected one with {WEIGHTS} and {CONFIG}, "
            "or a hub id such as name/model"
        )
    from huggingface_hub import snapshot_download

    token = _checked(token)
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, revision=revision, token=token))
    except Exception as error:  # the hub client's own errors, and those of its HTTP library  # noqa: BLE001
        where = "" if revision is None else f" at revision '{revision}'"
        raise WorkspaceError(
            f"'{name}' is neither a model folder here nor a model on the hub{where} ({_reason(error, token)})"
        ) from None


def upload_folder(folder: Path, repo_id: str, private: bool, revision: str | None, token: str | None) -> None:
    """Upload a model folder to the hub; see `HTCL.push_to_hub`. Raises WorkspaceError."""
    from huggingface_hub import HfApi

    token = _checked(token)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo_id).private
        if not is_public:
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision)
    except Exception as error:  # as in find_folder  # noqa: BLE001
        raise WorkspaceError(
            f"the model cannot be uploaded to the hub as '{repo_id}' ({_reason(error, token)})"
        ) from None
    if is_public:
        raise WorkspaceError(
            f"the repository '{repo_id}' exists and everybody may read it; push with private=False, or choose another"
        )


def _checked(token: str | None) -> str | None:
    """Strip a token of the hub. Raises WorkspaceError, which does not show it, when it cannot be in a header."""
    if token is not None and not re.fullmatch("[!-~]+", token.strip()):
        raise WorkspaceError(
            "token holds characters that no token of the hub has; expected printable ASCII characters without spaces"
        )
    return None if token is None else token.strip()


def _reason(error: Exception, token: str | None) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return reason.replace(token, "***") if token else reason


def read_record(folder: Path) -> ModelRecord:
    """The checked `config.json`. Raises WorkspaceError or MismatchError."""
    file = folder / CONFIG
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise WorkspaceError(f"{file} does not exist; expected a model folder with {WEIGHTS} and {CONFIG}") from None
    except ValueError:
        raise MismatchError(f"{file} is not JSON; it was changed or damaged") from None
    return parse_record(tree, str(file))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill `model` from `model.safetensors`. Raises WorkspaceError or MismatchError; see `read_weights`."""
    model.load_state_dict(read_weights(folder / WEIGHTS, model.state_dict(), str(folder / CONFIG)))


def read_tokenizer(folder: Path, text: TextRecord) -> Any | None:
    """Read and check the tokenizer of a model folder; None without one when `text` names another source.

    Raises WorkspaceError or MismatchError.
    """
    from transformers import AutoTokenizer

    if text.settings.name_or_path is not None and not (folder / TOKENIZER).exists():
        return None
    where = folder / TOKENIZER
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(where), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file makes transformers and tokenizers raise any error  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkspaceError(f"{where} cannot be read ({reason}); expected the model's tokenizer") from None
    check_tokenizer(tokenizer, text.transformer, f"the tokenizer in {where}")
    return tokenizer


def write_folder(
    path: Path, record: ModelRecord, weights: dict[str, Tensor], tokenizer: Any, evaluation: Evaluation | None
) -> None:
    """Write a model folder next to `path`, then rename it, so that `path` is never half a model; replace an older one.

    `tokenizer` is None when no text was embedded yet and in models without a text tower; none is then written.
    `evaluation` is written if it belongs to these weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}-{kind}-{uuid.uuid4().hex[:8]}") for kind in ("new", "old"))
    new.mkdir()
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            new / WEIGHTS,
            {"format": "pt"},
        )
        (new / CONFIG).write_text(
            json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(new / TOKENIZER)
        if evaluation is not None and evaluation.weights != file_sha256(new / WEIGHTS):
            evaluation = None
        if evaluation is not None:
            (new / EVALUATION).write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
        card = model_card(record, sum(tensor.numel() for tensor in weights.values()), evaluation)
        (new / CARD).write_text(card, encoding="utf-8")
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def weights_fingerprint(folder: str | Path) -> str:
    """Fingerprint (16 hex digits) of the files that decide a model's vectors: weights, configuration, tokenizer.

    Raises WorkspaceError when one of these files cannot be read, MismatchError when the folder's manifest records
    another SHA-256 of it.
    """
    folder = Path(folder)
    files = [folder / WEIGHTS, folder / CONFIG, *sorted((folder / TOKENIZER).glob("*"))]
    try:
        actual = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    except OSError as error:
        raise WorkspaceError(
            f"{error.filename} cannot be read ({error.strerror}); expected a model folder, so copy it again"
        ) from None
    recorded = _recorded(folder)
    for name in sorted({*actual, *recorded} if recorded else ()):
        if actual.get(name) != recorded.get(name):
            has, said = (
                f"SHA-256 {digests[name][:16]}…" if name in digests else "no such file"
                for digests in (actual, recorded)
            )
            raise MismatchError(
                f"{folder / name} was changed or damaged after the model was made ({has}, but its {MANIFEST} "
                f"records {said}); copy the model again, or choose another one"
            )
    return fingerprint(actual)


def _recorded(folder: Path) -> dict[str, str]:
    """SHA-256 that the manifest of a workspace's model records for the files of `weights_fingerprint`; may be empty."""
    if not (folder / MANIFEST).is_file():
        return {}
    files = Workspace(str(folder)).read_json(MANIFEST).get("files") or {}
    return {name: sha for name, sha in files.items() if name in (WEIGHTS, CONFIG) or name.startswith(f"{TOKENIZER}/")}


def write_evaluation(
    workspace: Workspace, path: str, tasks: Iterable[TaskResult], report: str, data: Mapping[str, Any]
) -> None:
    """Write `evaluation.json` and a README.md with its metrics into a model of the workspace, then update its manifest.

    `report`: version of the report; `data`: the data of the evaluation, with `split` and `songs`. Raises WorkspaceError
    when the model does not exist.
    """
    manifest = workspace.manifest(path)
    if manifest is None:
        raise WorkspaceError(
            f"{workspace.uri_of(path)} does not exist or is unfinished, so nothing was written into it"
        )
    folder = workspace.local_copy(path)
    evaluation = evaluation_of(tasks, report, data, file_sha256(folder / WEIGHTS))
    written = {
        EVALUATION: (evaluation.model_dump_json(indent=2) + "\n").encode(),
        CARD: model_card(read_record(folder), _parameters(folder), evaluation).encode(),
    }
    for name, content in written.items():
        workspace.write_bytes(f"{path}/{name}", content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
    workspace.finish(path, {**manifest, "files": {**manifest.get("files", {}), **hashes}})


def _parameters(folder: Path) -> int:
    """Number of parameters in `model.safetensors`, from its header."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - safe_open is not a dict
