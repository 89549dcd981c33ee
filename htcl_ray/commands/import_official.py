"""`htcl import-official`: conversion of the authors' `model-N.pth` into a model folder, optionally in a workspace."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, WorkspaceError
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.manifest import MANIFEST, build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace

SPACES = {1: "semantic", 2: "preference"}


def import_official(config: Config, file: Path, folder: str, stage: int, parent: str | None = None) -> None:
    """Write the model folder `folder` atomically, and print a description of the model and the next command.

    `config.audio`: the log-mel recipe with which the weights were trained; `config.text.name_or_path`: the tokenizer;
    `parent`: version of the stage-1 model of the same workspace from which a stage-2 model was fine-tuned. Raises
    WorkspaceError for a folder that exists or cannot be written.
    """
    space = SPACES[stage]
    if "://" in folder:
        raise WorkspaceError(
            f"OUT is {folder}; expected a local folder: import into one, then copy it where you want it"
        )
    out = Path(os.path.abspath(os.path.expanduser(folder)))
    in_workspace = _check_place(config, out, stage, parent)

    from htcl_ray.models import HTCL, official

    tokenizer = config.text.name_or_path or official.TOKENIZER
    model = HTCL.from_official(file, stage, tokenizer=tokenizer, audio=config.audio)
    if model.record.text is not None and Path(tokenizer).is_dir():
        _ = model.text_encoder.tokenizer  # load it, so that the model folder gets a copy
    temporary = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        model.save_pretrained(temporary)
        files = {
            path.relative_to(temporary).as_posix(): file_sha256(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        record = model.record.model_dump(mode="json")
        text = record["text"]["settings"] if record["text"] else config.model_dump(mode="json")["text"]
        manifest = build_manifest(
            space,
            config=config.model_dump(mode="json") | {"audio": record["audio"], "model": record["model"], "text": text},
            inputs={"official": file_sha256(file), "model": parent},
            files=files,
        )
        Workspace(str(temporary)).write_json(MANIFEST, manifest)
        temporary.rename(out)
    except OSError as error:
        raise WorkspaceError(f"{out} cannot be written ({error.strerror or error}); choose another OUT") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    settings, recipe = model.record.model, model.recipe
    kind = (
        f"stage-{stage} model"
        if model.record.text is not None
        else f"audio encoder alone (stage {stage}), which cannot embed text"
    )
    print(f"imported: {kind}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters → {out}")
    print(f"  audio    {settings.layers} layers, width {settings.width}, {settings.dim} dimensions; ", end="")
    clip = f"first {recipe.clip_seconds:g} s at {recipe.sample_rate} Hz"
    print(f"{clip}, padded to {recipe.max_frames} frames as the authors do")
    if model.record.text is not None:
        where = (
            "in the folder" if model.text_encoder.loaded_tokenizer is not None else "loaded when text is first embedded"
        )
        layers = model.record.text.transformer["num_hidden_layers"]
        print(f"  text     {layers} layers; tokenizer {tokenizer}, {where}")
    if in_workspace:
        workspace = without_credentials(config.workspace)
        print(f"next: htcl embed --workspace {workspace} --model {out.name}, on features of the same audio settings")
    else:
        print(f'next: HTCL.from_pretrained("{out}").embed_audio(waveform, sample_rate) in Python; ', end="")
        print(f"or give WORKSPACE/models/{space}/NAME as OUT, and the steps of that workspace find it")


def _check_place(config: Config, out: Path, stage: int, parent: str | None) -> bool:
    """Raise an error for an unusable output folder; return whether it is a model folder of the workspace."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise WorkspaceError(f"{out} exists already; choose another OUT, or remove it first")
    workspace = Workspace(config.workspace)
    models = Path(workspace.uri) / "models"
    inside = workspace.is_local and out.parent.parent == models and out.parent.name in SPACES.values()
    if inside and out.parent.name != SPACES[stage]:
        raise WorkspaceError(
            f"{out.parent} is for the other stage; expected {models / SPACES[stage] / out.name} for stage {stage}"
        )
    if parent is not None and not (inside and stage == 2):
        raise ConfigError(
            f"--parent is for a stage-2 model in a workspace; expected --stage 2 and OUT below {models / 'preference'}"
        )
    if inside and stage == 2:
        known = [name for name, _ in workspace.finished("models/semantic")]
        if parent not in known:
            given = "needs --parent" if parent is None else f"has no stage-1 model '{parent}' as --parent"
            listed = ", ".join(known) or "none yet: import or train stage 1 first"
            raise WorkspaceError(
                f"a stage-2 model in the workspace {workspace.uri} {given}; its stage-1 models: {listed}"
            )
    return inside
