"""Pretrained encoders on disk or on the hub: which families are known, what their files state, and their fingerprint.

Imports neither torch nor transformers, so that a plan can be made without them. Code from a model's folder or hub page
is never executed, and weights are read from safetensors files only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from htcl_ray.config.sections import AudioRecipe, Settings
from htcl_ray.errors import ConfigError, MismatchError
from htcl_ray.workspace.manifest import file_sha256, fingerprint

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "*processor_config.json", "README.md"]
CONFIG, CARD = "config.json", "README.md"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files with the settings of a processor; the second, of processors with several parts, has the audio part below
`feature_extractor`."""


class ExtractorRecord(Settings):
    """The pretrained encoder that made features: enough to load it again, and to refuse another."""

    name_or_path: str
    """Name on the hub or local folder, as configured."""
    family: str
    """Key of `FAMILIES`."""
    fingerprint: str
    """Hash of its weights and configuration."""
    width: int = Field(gt=0)
    """Size of the vector of a window."""
    sample_rate: int = Field(gt=0)
    """Sample rate of its input, in Hz."""
    window_seconds: float = Field(gt=0)
    """Length of a window."""
    hop_seconds: float = Field(gt=0)
    """Distance between the starts of windows."""
    licence: str | None = None
    """Licence of its weights, as its model card states it."""

    @property
    def window_samples(self) -> int:
        """Number of samples of a window."""
        return round(self.window_seconds * self.sample_rate)

    def starts(self, samples: int) -> list[int]:
        """First sample of each window of a waveform: whole windows only, and at least one, which may be shorter."""
        hop = self.hop_seconds * self.sample_rate
        count = max(0, int((samples - self.window_samples) // hop)) + 1
        return [round(number * hop) for number in range(count)]

    def max_windows(self, clip_seconds: float) -> int:
        """Number of windows of a clip of full length."""
        return len(self.starts(round(clip_seconds * self.sample_rate)))


def feature_width(manifest: Mapping[str, Any]) -> int:
    """Size of the vector of a frame of the features with this manifest: of log-mel frames, the number of bands."""
    return int(manifest.get("feature_width") or manifest["config"]["audio"]["n_mels"])


def recorded_extractor(manifest: Mapping[str, Any]) -> ExtractorRecord | None:
    """The pretrained encoder that made the features with this manifest; None for other features."""
    tree = manifest.get("extractor")
    return None if tree is None else ExtractorRecord.model_validate(tree)


def check_encoder(of_model: ExtractorRecord | None, of_features: ExtractorRecord | None, model: str) -> None:
    """Raise MismatchError when a model was trained on vectors of another encoder than the features.

    `model` begins the message.
    """
    if of_model is not None and of_features is not None and of_model.fingerprint != of_features.fingerprint:
        raise MismatchError(
            f"{model} was trained on vectors of the audio model {of_model.fingerprint}, but the features were made "
            f"with {of_features.fingerprint}; train a model on these features, or make them with that audio model"
        )


@dataclass(frozen=True)
class Family:
    """A kind of encoder. The functions take the content of its `config.json` and of its processor's file."""

    module: str
    """Module with the class of its extractor."""
    class_name: str
    width: Callable[[Mapping[str, Any]], int]
    window_seconds: float = 10.0
    """Default of `audio.window_seconds`."""
    max_seconds: Callable[[Mapping[str, Any]], float | None] = lambda processor: None
    """Longest window that its processor takes whole, by the processor's file."""
    joint: bool = False
    """Whether its vectors are those of a space that it shares with a text tower of its own."""
    tags: Callable[[Mapping[str, Any]], Sequence[str]] = lambda config: ()
    """Tags whose probabilities it gives from the vector of a window; see `PretrainedExtractor.tag_scores`."""


_TRANSFORMERS = "htcl_ray.extractors.transformers_audio"
AST_HOP_SECONDS = 0.01
FAMILIES: dict[str, Family] = {
    "musicnn": Family(
        "htcl_ray.extractors.musicnn",
        "MusicnnExtractor",
        lambda config: int(config["units"]),
        window_seconds=2.992,
        tags=lambda config: [str(tag) for tag in config["tags"]],
    ),
    "clap": Family(
        _TRANSFORMERS,
        "ClapExtractor",
        lambda config: int(config["projection_dim"]),
        max_seconds=lambda processor: float(processor.get("max_length_s", 10)),
        joint=True,
    ),
    "audio-spectrogram-transformer": Family(
        _TRANSFORMERS,
        "AstExtractor",
        lambda config: int(config["hidden_size"]),
        max_seconds=lambda processor: float(processor.get("max_length", 1024)) * AST_HOP_SECONDS,
    ),
    "whisper": Family(
        _TRANSFORMERS,
        "WhisperExtractor",
        lambda config: int(config["d_model"]),
        max_seconds=lambda processor: float(processor.get("chunk_length", 30)),
    ),
    "wav2vec2": Family(_TRANSFORMERS, "Wav2Vec2Extractor", lambda config: int(config["hidden_size"])),
    "hubert": Family(_TRANSFORMERS, "HubertExtractor", lambda config: int(config["hidden_size"])),
    "pe_audio": Family(
        _TRANSFORMERS, "PeAudioExtractor", lambda config: int(config["text_config"]["hidden_size"]), joint=True
    ),
}
"""Known kinds of encoders, by `model_type` in their `config.json`."""
JOINT_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.joint)


def find_extractor(recipe: AudioRecipe) -> tuple[Path, ExtractorRecord]:
    """Find the encoder of `audio.name_or_path`: its local folder and its record.

    Raises ConfigError for a missing or unknown encoder, one that needs its own code, one without safetensors, and a
    window that is longer than its processor takes.
    """
    name = recipe.name_or_path
    if name is None:
        raise ConfigError(
            "audio.extractor is pretrained, but audio.name_or_path is not set; set it to a model of the Hugging Face "
            f"Hub or a local folder, of one of the kinds {', '.join(FAMILIES)}"
        )
    folder = _folder(name)
    config = _read_json(folder / CONFIG)
    kind = str(config.get("model_type"))
    if "auto_map" in config:
        raise ConfigError(
            f"the audio model {name} needs code of its own, which is never run; choose a model of one of the kinds "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES.get(kind)
    if family is None:
        raise ConfigError(
            f"the audio model {name} is of the kind '{kind}', which is not known; expected one of {', '.join(FAMILIES)}"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"the audio model {name} has no weights in safetensors, and no other format is read; convert it, or choose "
            "another model"
        )
    processor = config if kind == "musicnn" else _processor(folder, name)
    try:
        width, sample_rate = family.width(config), int(processor["sampling_rate"])
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{folder} is no model of the kind '{kind}': its configuration lacks {error}") from None
    window = recipe.window_seconds or family.window_seconds
    longest = family.max_seconds(processor)
    if longest is not None and window > longest:
        raise ConfigError(
            f"audio.window_seconds is {window:g}, but the audio model {name} takes at most {longest:g} s at once"
        )
    record = ExtractorRecord(
        name_or_path=name,
        family=kind,
        fingerprint=_fingerprint([*weights, *(folder / file for file in (CONFIG, *PROCESSOR_FILES))]),
        width=width,
        sample_rate=sample_rate,
        window_seconds=window,
        hop_seconds=recipe.hop_seconds or window,
        licence=config.get("license") or _licence(folder / CARD),
    )
    return folder, record


def tags_of_encoder(folder: Path, record: ExtractorRecord) -> list[str]:
    """Tags of the encoder in a folder that `find_extractor` returned, in the order of their scores; empty without any.

    Raises MismatchError when its configuration lacks them.
    """
    try:
        return list(FAMILIES[record.family].tags(_read_json(folder / CONFIG)))
    except (KeyError, TypeError) as error:
        raise MismatchError(f"{folder} is no model of the kind '{record.family}': it lacks {error}") from None


def _folder(name: str) -> Path:
    """The local folder of a model, downloaded from the hub unless it is one. Raises ConfigError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client's own errors, and those of its HTTP library  # noqa: BLE001
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"audio.name_or_path is '{name}', which is neither a local folder nor a model of the hub ({reason})"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{file} does not exist; expected the folder of an audio model") from None
    except ValueError:
        raise ConfigError(f"{file} is not JSON; it was changed or damaged") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} is no JSON object; expected the configuration of an audio model")
    return tree


def _processor(folder: Path, name: str) -> dict[str, Any]:
    """Settings of the processor's audio part."""
    for file in PROCESSOR_FILES:
        if (folder / file).is_file():
            tree = _read_json(folder / file)
            audio = tree.get("feature_extractor", tree)
            if isinstance(audio, dict) and "sampling_rate" in audio:
                return audio
    raise ConfigError(
        f"the audio model {name} has no settings of its processor; expected {PROCESSOR_FILES[0]} with a sampling_rate"
    )


def _licence(card: Path) -> str | None:
    """The licence in the front matter of a model card, or None."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        licence = yaml.safe_load(parts[1])["license"] if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    return licence if isinstance(licence, str) else None


def _fingerprint(files: list[Path]) -> str:
    """Hash of the contents of the files that exist."""
    return fingerprint(*((file.name, _sha256(file, *_state(file))) for file in files if file.is_file()))


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file that is in this state; every step of a run needs it."""
    return file_sha256(file)
