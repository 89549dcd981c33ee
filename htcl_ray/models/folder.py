"""A model folder on disk: model.safetensors, config.json, tokenizer/, README.md. Nothing in it is ever executed or unpickled."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.models.record import ModelRecord, TextRecord, parse_record
from htcl_ray.storage import file_sha256, fingerprint

WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer", "README.md"
HUB_FILES = [WEIGHTS, CONFIG, f"{TOKENIZER}/*", CARD]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model; a hub id is downloaded (only the files named above). Raises WorkspaceError."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if not HUB_ID.fullmatch(name):
        raise WorkspaceError(f"there is no model folder '{name}'; expected one with {WEIGHTS} and {CONFIG}, or a hub id such as name/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client's own errors, and those of its HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkspaceError(f"'{name}' is neither a model folder here nor a model on the hub ({reason})") from None


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
    """Fill `model` from `model.safetensors`. Raises MismatchError when a name or shape differs, naming both."""
    file = folder / WEIGHTS
    try:
        theirs = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WorkspaceError(f"{file} cannot be read ({str(error).splitlines()[0]}); expected the weights of the model") from None
    check_weights(model.state_dict(), theirs, str(file), str(folder / CONFIG))
    model.load_state_dict(theirs)


def check_weights(expected: dict[str, Tensor], given: dict[str, Tensor], file: str, config: str) -> None:
    """Raise MismatchError unless both have the same names and shapes."""
    for name, tensor in expected.items():
        if name not in given:
            raise MismatchError(f"{file} lacks {name}, which {config} says has shape {list(tensor.shape)}")
        if given[name].shape != tensor.shape:
            raise MismatchError(f"{file} has {name} of shape {list(given[name].shape)}, but {config} says {list(tensor.shape)}")
    extra = [name for name in given if name not in expected]
    if extra:
        raise MismatchError(f"{file} has {extra[0]} of shape {list(given[extra[0]].shape)}, which {config} does not know")


def read_tokenizer(folder: Path, text: TextRecord) -> Any | None:
    """The tokenizer of a model folder; None when it brings none and `text` names where one is."""
    from transformers import AutoTokenizer

    if text.settings.name_or_path is not None and not (folder / TOKENIZER).exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder / TOKENIZER), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WorkspaceError(f"{folder / TOKENIZER} cannot be read ({reason}); expected the model's tokenizer") from None


def write_folder(path: Path, record: ModelRecord, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """Write a model folder beside `path`, then rename it: `path` is never half a model. An older folder there is replaced.

    `tokenizer` None leaves it out: nothing was embedded yet, or there is no text tower.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}-{kind}-{uuid.uuid4().hex[:8]}") for kind in ("new", "old"))
    beside.mkdir()
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside / WEIGHTS, {"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(beside / TOKENIZER)
        (beside / CARD).write_text(model_card(record, sum(tensor.numel() for tensor in weights.values())), encoding="utf-8")
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def weights_fingerprint(folder: str | Path) -> str:
    """16 hex digits that change whenever the model would answer differently: weights, configuration, tokenizer."""
    folder = Path(folder)
    files = [folder / WEIGHTS, folder / CONFIG, *sorted((folder / TOKENIZER).glob("*"))]
    return fingerprint({file.relative_to(folder).as_posix(): file_sha256(file) for file in files})


def model_card(record: ModelRecord, parameters: int) -> str:
    """README.md of a model folder."""
    stage = {
        1: "stage 1: audio and text in one semantic space, learned from songs and their descriptions",
        2: "stage 2: a preference space, fine-tuned from a stage-1 model on songs that listeners like together",
    }[record.stage]
    audio = record.audio
    seconds = record.model.window_seconds
    windows = "" if seconds is None else f"; longer clips in windows of {seconds:g} s, averaged"
    text = "none: it hears, but cannot read"
    if record.text is not None:
        text = record.text.settings.name_or_path or "a BERT trained from scratch on the catalogue's texts"
    words = "" if record.text is None else '\ntexts = model.embed_text(["calm piano", "fast techno"])\nprint(texts @ song)'
    return f"""---
library_name: htcl-ray
tags: [music, audio, contrastive-learning]
---

# HTCL music model, {"semantic" if record.stage == 1 else "preference"} space

Hierarchical two-stage contrastive learning of music representations (arXiv 2505.23298), {stage}.

| | |
|---|---|
| Embedding | {record.model.dim} numbers, unit norm; compare by inner product |
| Audio | first {audio.clip_seconds:g} s, mono, {audio.sample_rate} Hz; {audio.n_mels} mel bands every {audio.hop_length} samples |
| Input | {record.input}{windows} |
| Audio encoder | {record.model.layers} layers, width {record.model.width} |
| Text encoder | {text} |
| Parameters | {parameters:,} |

```python
from htcl_ray.models import HTCL

model = HTCL.from_pretrained("path/to/this/folder")
song = model.embed_audio(waveform, sample_rate){words}
```

The model has heard only the catalogue that it was trained on; how well it does there is in `manifest.json` beside this file, when it
was made by `htcl pretrain` or `htcl finetune`. Similarities reflect that catalogue's descriptions and listeners, with their gaps.
"""
