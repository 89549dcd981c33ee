"""The HTCL model of one stage: two towers, their heads, and, from stage 2 on, the fusion network."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htcl_ray.config import Config
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import ConfigError, InputError
from htcl_ray.extractors.families import ExtractorRecord
from htcl_ray.extractors.song_features import AudioFeatures
from htcl_ray.losses.base import ContrastiveLoss, parameters_of
from htcl_ray.losses.registry import LossName, loss_class
from htcl_ray.models import folder as model_folder
from htcl_ray.models.card import Evaluation, read_evaluation
from htcl_ray.models.feature_checks import check_features
from htcl_ray.models.official import TOKENIZER, read_official
from htcl_ray.models.pooling import cut, mean_direction, window_starts
from htcl_ray.models.record import InputRecipe, ModelRecord
from htcl_ray.models.towers.registry import tower_class
from htcl_ray.models.towers.text import (
    NoTextEncoder,
    TextEncoder,
    Tokens,
    text_encoder_from_name,
    text_encoder_from_record,
    text_encoder_from_scratch,
)
from htcl_ray.models.weights import ADVICE, check_numbers

MIN_TEMPERATURE = 0.01
TERMS = {1: ("text",), 2: ("text", "preference", "fusion")}
"""Loss terms of each stage; each has its own temperature."""
EMBED_BATCH = 32
UNIT_NORM_TOLERANCE = 1e-3


class HTCL(nn.Module):
    """Audio and text → vectors of one space.

    `stage`: 1 is the semantic space, 2 the preference space. `dim`: size of a vector. `recipe`: how a song becomes the
    features that the model expects. A `record` without text is an audio encoder alone: it has no heads and raises
    InputError for text. The `embed_*` methods give unit-norm float32 tensors on the CPU; training uses the `encode_*`
    methods.
    """

    def __init__(
        self, record: ModelRecord, text_encoder: TextEncoder, temperature: float = 0.074, batch_size: int = 32
    ) -> None:
        """Draw the weights at random; `temperature` and `batch_size` (global) give the loss's initial parameters."""
        super().__init__()
        settings, tower = record.model, record.audio.tower_name
        if record.input is InputRecipe.OFFICIAL and settings.window_seconds is not None:
            raise ConfigError(
                f"model.window_seconds is {settings.window_seconds:g}, but the official input recipe takes full clips; "
                "set it to null"
            )
        if record.input is InputRecipe.OFFICIAL and tower != "transformer":
            raise ConfigError(f"audio.tower is {tower}, but the official input recipe needs the tower transformer")
        self.record = record
        self.evaluation: Evaluation | None = None
        """The evaluation of the weights that were loaded."""
        self.fingerprint: str | None = None
        """`weights_fingerprint` of the folder that the model was loaded from."""
        self.audio_encoder = tower_class(tower)(record)
        self.text_encoder = text_encoder
        both = record.text is not None
        self.audio_head = (
            mlp([self.audio_encoder.width, *settings.head_hidden, settings.dim]) if both else nn.Identity()
        )
        self.text_head = mlp([text_encoder.width, *settings.head_hidden, settings.dim]) if both else nn.Identity()
        self.fusion = (
            mlp([2 * settings.dim, 2 * settings.dim, settings.dim, settings.dim])
            if both and record.stage == 2
            else None
        )
        self.loss_class = loss_class(record.loss)
        terms = TERMS[record.stage] if both else ()
        for name, value in self.loss_class.initial_parameters(temperature, batch_size).items():
            self.register_module(name, nn.ParameterDict({term: nn.Parameter(torch.tensor(value)) for term in terms}))

    def loss_parameters(self, name: str) -> nn.ParameterDict:
        """A learned parameter of the loss, such as `logit_scale`, by loss term."""
        parameters = self.get_submodule(name)
        assert isinstance(parameters, nn.ParameterDict)
        return parameters

    def loss(self, term: str) -> ContrastiveLoss:
        """The loss of a term with the term's learned parameters."""
        return self.loss_class(*(self.loss_parameters(name)[term] for name in parameters_of(self.loss_class)))

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.record.model.dim

    @property
    def stage(self) -> int:
        """1 (semantic space) or 2 (preference space)."""
        return self.record.stage

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.audio_encoder.device

    @functools.cached_property
    def recipe(self) -> AudioRecipe:
        """How a song becomes the features that this model expects."""
        return self.record.audio.recipe

    @property
    def window_frames(self) -> int | None:
        """Frames of a training crop and of an embedding window, or None: clips are taken whole."""
        seconds = self.record.model.window_seconds
        return None if seconds is None else self.recipe.frames_of(seconds)

    @classmethod
    def untrained(
        cls,
        config: Config,
        vocabulary: str | None = None,
        input_recipe: InputRecipe = InputRecipe.MASKED,
        feature_width: int | None = None,
        text_encoder: TextEncoder | None = None,
        extractor: ExtractorRecord | None = None,
    ) -> HTCL:
        """Build a stage-1 model to train, with random weights from `pretrain.seed`.

        The text tower is pretrained if `text.name_or_path` is set; otherwise it needs `vocabulary`, the JSON that
        `train_wordpiece` returns. `feature_width`: size of the vector of one frame of features (default: the mel bands
        of log-mel frames). `text_encoder`: an existing text tower, in place of a new one. `extractor`: the pretrained
        encoder that made the features.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.pretrain.seed)
            if text_encoder is not None:
                pass
            elif config.text.name_or_path is not None:
                text_encoder = text_encoder_from_name(config.text)
            else:
                assert vocabulary is not None, "a text tower from scratch needs a vocabulary"
                text_encoder = text_encoder_from_scratch(config.text, vocabulary)
            stage = config.pretrain
            record = ModelRecord(
                stage=1,
                input=input_recipe,
                loss=stage.loss,
                audio=config.audio.resolved(),
                feature_width=feature_width,
                extractor=extractor,
                model=config.model,
                text=text_encoder.record,
                license=config.license,
            )
            return cls(record, text_encoder, stage.temperature, stage.global_batch_size)

    def to_stage_2(self, temperature: float, seed: int, *, loss: LossName = "softmax", batch_size: int = 32) -> HTCL:
        """Build a stage-2 model that starts from this one: towers, heads, and the loss parameters of audio ↔ text.

        The fusion network and the loss parameters of the new terms are new: temperatures begin at `temperature`, a bias
        where `loss` puts it for a global batch of `batch_size` rows. Loss parameters that the new loss does not have
        are dropped. Shares the text tower with this model, which should not be used
        afterwards. Raises InputError for an audio encoder alone.
        """
        if self.record.text is None:
            raise InputError(
                "this model is an audio encoder alone; expected a stage-1 model with heads and a text tower"
            )
        record = self.record.model_copy(update={"stage": 2, "loss": loss})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = HTCL(record, self.text_encoder, temperature, batch_size)
        new = model.state_dict()
        model.load_state_dict({**new, **{name: value for name, value in self.state_dict().items() if name in new}})
        return model

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, revision: str | None = None, token: str | None = None) -> HTCL:
        """Load a model folder or a model on the hub, in evaluation mode.

        Weights that are not finite or zero are refused, and so are files that differ from the SHA-256 that the folder's
        manifest records. `revision`: a branch, tag or commit of the hub's repository; `token`: of the hub, for a
        private one (default: that of its client). Raises WorkspaceError or MismatchError.
        """
        folder = model_folder.find_folder(path_or_hub_id, revision, token)
        record = model_folder.read_record(folder)
        fingerprint = model_folder.weights_fingerprint(folder)
        tokenizer = None if record.text is None else model_folder.read_tokenizer(folder, record.text)
        model = cls._from_record(record, tokenizer)
        model_folder.load_weights(model, folder)
        model.fingerprint = fingerprint
        model.evaluation = read_evaluation(folder / model_folder.EVALUATION)
        return model.eval()

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        stage: int,
        *,
        text_config: Any = None,
        tokenizer: str = TOKENIZER,
        audio: AudioRecipe | None = None,
    ) -> HTCL:
        """Load the authors' state dict (`model-N.pth` of their stage 1 or 2), in evaluation mode.

        The model computes the same numbers as their code. A file of their `AudioModel` alone gives a model whose
        vectors are the encoder's own (`dim` is its width) and which raises InputError for text. Sizes are those of the
        weights, with attention heads 64 wide as published; `text_config` (a `BertConfig` or a dict of its keys) states
        those of the text tower instead. `tokenizer` is a hub name or a local folder, loaded only when text is embedded.
        `audio` is how the log-mels that the weights were trained on were made (default: as published). Raises
        InputError.
        """
        official = read_official(
            Path(path).expanduser(), stage, text_config=text_config, tokenizer=tokenizer, audio=audio
        )
        check_numbers(official.weights, str(path))
        model = cls._from_record(official.record, None)
        model.load_state_dict(official.weights)
        return model.eval()

    @classmethod
    def _from_record(cls, record: ModelRecord, tokenizer: Any | None) -> HTCL:
        """Build a model of this description, with weights that are to be overwritten."""
        return cls(record, NoTextEncoder() if record.text is None else text_encoder_from_record(record.text, tokenizer))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model folder atomically, with the evaluation unless the weights have changed since."""
        model_folder.write_folder(
            Path(path), self.record, self.state_dict(), self.text_encoder.loaded_tokenizer, self.evaluation
        )

    def push_to_hub(
        self, repo_id: str, private: bool = True, revision: str | None = None, token: str | None = None
    ) -> None:
        """Upload the model folder to the repository `repo_id` of the Hugging Face hub, which is created if missing.

        `private`: only its owner may read it; a public repository that exists already is refused unless this is False.
        `revision`: the branch, created if missing (default: main). `token`: of the hub (default: that of its client).
        Raises WorkspaceError.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "model")
            model_folder.upload_folder(Path(scratch) / "model", repo_id, private, revision, token)

    def encode_audio(self, features: Tensor, valid_frames: Tensor) -> Tensor:
        """Features [B, F, W], valid_frames [B] int64 on the CPU → [B, dim], not normalised, with gradient."""
        embeddings: Tensor = self.audio_head(self.audio_encoder(features, valid_frames))
        return embeddings

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Tokens [B, S] → [B, dim], not normalised, with gradient."""
        embeddings: Tensor = self.text_head(self.text_encoder(tokens))
        return embeddings

    def fuse(self, audio: Tensor, text: Tensor) -> Tensor:
        """Stage 2: encoded audio and text of the same songs, both [B, dim] and not normalised → [B, dim]."""
        assert self.fusion is not None, "a stage-1 model has no fusion network"
        embeddings: Tensor = self.fusion(torch.cat([audio, text], dim=1))
        return embeddings

    def temperatures(self) -> dict[str, float]:
        """Return the temperature of each loss term."""
        scales = self.loss_parameters("logit_scale")
        return {term: math.exp(-scales[term].item()) for term in TERMS[self.stage] if term in scales}

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Keep every temperature at or above 0.01."""
        for scale in self.loss_parameters("logit_scale").values():
            scale.clamp_(max=-math.log(MIN_TEMPERATURE))

    def embed_audio(self, waveform: Any, sample_rate: float) -> Tensor:
        """Embed a waveform, floats [samples] or [channels, samples] at `sample_rate` Hz, as a vector [dim].

        Only the first `recipe.clip_seconds` are used. Raises InputError for other types and shapes, [samples, channels]
        included, for an impossible sample rate, and for a model of given vectors; AudioError for less than
        `recipe.min_seconds` of audio (too_short) and for NaN, infinite or absurdly large samples (not_finite).
        """
        from htcl_ray.audio.log_mel import mono_at

        audio = self.audio_features
        clip = mono_at(waveform, sample_rate, audio.decoding)
        return self.embed_features(torch.as_tensor(audio([clip])[0])[None])[0]

    @functools.cached_property
    def audio_features(self) -> AudioFeatures:
        """Waveforms → features, for models that take audio. Raises QueryError for a model of given vectors."""
        return AudioFeatures(self.recipe, self.record.extractor, str(self.device))

    def embed_mel(self, mel: Tensor, valid_frames: Tensor | None = None) -> Tensor:
        """Embed log-mels [B, F, M] in dB, as `log_mel` gives them, with valid_frames [B] (default: all F), as [B, dim].

        See `embed_features`. Raises InputError also for a model of other features than log-mel frames.
        """
        self._refuse_other_features("embed_mel")
        return self.embed_features(mel, valid_frames)

    def embed_features(
        self, features: Tensor, valid_frames: Tensor | None = None, batch_size: int = EMBED_BATCH
    ) -> Tensor:
        """Embed features [B, F, W] of the model's extractor with valid_frames [B] (default: all F), as [B, dim].

        `batch_size`: clips, or windows of long clips, that are encoded at a time. Features of fp16 are converted on the
        model's device. Frames after a song's valid ones are ignored, and neither they nor the other songs change its
        vector. A clip of log-mel frames longer than the model's window is embedded in windows (see `window_starts`),
        and its vector is the normalised mean of their unit-norm vectors. Raises InputError for other types and shapes
        and when a vector is not finite or has no direction, AudioError (not_finite) for values that no features have in
        a valid frame.
        """
        device, dtype = self.device, self.audio_encoder.dtype
        features, valid = check_features(features, valid_frames, self.record, device)
        window = self.window_frames
        starts = [window_starts(count, window) for count in valid.tolist()]
        clips = torch.arange(len(features)).repeat_interleave(
            torch.tensor([len(of_clip) for of_clip in starts], dtype=torch.int64)
        )
        first = torch.tensor(list(itertools.chain.from_iterable(starts)), dtype=torch.int64)
        lengths = valid[clips] if window is None else valid[clips].clamp(max=window)
        parts = []
        with self._inference():
            for start in range(0, len(clips), batch_size):
                batch = slice(start, start + batch_size)
                whole = window is None or len(clips) == len(features)
                windows = features[batch] if whole else cut(features, first[batch], lengths[batch], clips[batch])
                parts.append(self.encode_audio(windows.to(dtype), lengths[batch]))
        vectors = self._unit_norm(parts)
        return vectors if len(clips) == len(features) else self._checked(mean_direction(vectors, clips, len(features)))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as [n, dim]. Raises InputError when a vector is not finite or has no direction."""
        if isinstance(texts, str):
            raise InputError("embed_text got one string; expected a list of texts")
        device = self.device
        with self._inference():
            parts = []
            for start in range(0, len(texts), EMBED_BATCH):
                tokens = self.text_encoder.tokenize(texts[start : start + EMBED_BATCH])
                parts.append(self.encode_text({name: tensor.to(device) for name, tensor in tokens.items()}))
        return self._unit_norm(parts)

    def _refuse_other_features(self, method: str) -> None:
        """Raise InputError unless the features of this model are log-mel frames."""
        extractor = self.recipe.extractor
        if extractor != "log_mel":
            raise InputError(
                f"{method} takes log-mel frames, but this model was trained on features of "
                f"audio.extractor={extractor}; call embed_features, or embed_audio with a waveform"
            )

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Turn dropout and gradients off; restore the mode afterwards."""
        was_training = self.training
        if was_training:
            self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if was_training:
                self.train()

    def _unit_norm(self, parts: list[Tensor]) -> Tensor:
        if not parts:
            return torch.empty(0, self.dim)
        return self._checked(F.normalize(torch.cat(parts).float(), dim=1).cpu())

    def _checked(self, vectors: Tensor) -> Tensor:
        """Return the vectors unchanged. Raises InputError when one is not finite or not of unit norm."""
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        wrong = ~((lengths - 1).abs() < UNIT_NORM_TOLERANCE)  # true for a NaN
        if wrong.any():
            row = int(wrong.nonzero()[0])
            what = "zero" if lengths[row] < UNIT_NORM_TOLERANCE else "not finite"
            raise InputError(f"the stage-{self.stage} model gives input {row} a vector that is {what}; {ADVICE}")
        return vectors


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Stack linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
