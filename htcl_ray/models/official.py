"""The authors' published weights: a state dict saved by their training scripts, checked and renamed.

Their files hold one of three models: the wrapper of stage 1, the wrapper of stage 2, or an audio encoder alone, which
has no head and no text tower. The record of the model has `InputRecipe.OFFICIAL`, so it computes the same numbers as
the authors' code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from htcl_ray.config.sections import AudioRecipe, AudioSettings, ModelSettings, TextSettings
from htcl_ray.errors import ConfigError, InputError, MismatchError, first_fault
from htcl_ray.models.record import InputRecipe, ModelRecord, TextRecord

TOKENIZER = "bert-base-multilingual-uncased"
"""The tokenizer that the authors train with; texts are cut at MAX_TOKENS."""
MAX_TOKENS = 512
HEAD_WIDTH = 64
"""Of an attention head, in both towers: weights do not tell how many heads made them."""
POSITION_GROUPS = 16

PUBLISHED = {
    "C": 512,  # channels of the convolutions
    "D": 768,  # width of the audio Transformer
    "F": 3072,  # its feed-forward width
    "K": 31,  # kernel of the position convolution
    "i": 12,  # its layers
    "H1": 384,  # hidden widths of the audio and text heads
    "H2": 192,
    "O": 100,  # dimensions of the joint space
    "V": 105879,  # word pieces
    "T": 512,  # text positions
    "Y": 2,  # token types
    "E": 768,  # width of BERT
    "N": 3072,  # its feed-forward width
    "n": 12,  # its layers
}
"""Sizes of the published model, by the letters of the table. M is the recipe's mel bands, G is D / POSITION_GROUPS."""

TABLE = """
    tau                                          logit_scale.text                                -      1
    tau_1                                        logit_scale.text                                -      2
    tau_2                                        logit_scale.preference                          -      2
    tau_3                                        logit_scale.fusion                              -      2
    fusion_mlp.0.weight                          fusion.0.weight                                 2O,2O  2
    fusion_mlp.0.bias                            fusion.0.bias                                   2O     2
    fusion_mlp.3.weight                          fusion.2.weight                                 O,2O   2
    fusion_mlp.3.bias                            fusion.2.bias                                   O      2
    fusion_mlp.6.weight                          fusion.4.weight                                 O,O    2
    fusion_mlp.6.bias                            fusion.4.bias                                   O      2

    audio_model.                                 audio_encoder.
    cls_token                                    cls                                             1,1,D
    feature_extractor.layers.0.1.weight          convolutions.0.convolution.weight               C,M,5
    feature_extractor.layers.0.3.weight          convolutions.0.norm.weight                      C
    feature_extractor.layers.0.3.bias            convolutions.0.norm.bias                        C
    feature_extractor.layers.1.1.weight          convolutions.1.convolution.weight               C,C,3
    feature_extractor.layers.1.3.weight          convolutions.1.norm.weight                      C
    feature_extractor.layers.1.3.bias            convolutions.1.norm.bias                        C
    feature_extractor.layers.2.1.weight          convolutions.2.convolution.weight               C,C,3
    feature_extractor.layers.2.3.weight          convolutions.2.norm.weight                      C
    feature_extractor.layers.2.3.bias            convolutions.2.norm.bias                        C
    feature_projection.layer_norm.weight         projection_norm.weight                          C
    feature_projection.layer_norm.bias           projection_norm.bias                            C
    feature_projection.projection.weight         projection.weight                               D,C
    feature_projection.projection.bias           projection.bias                                 D
    pos_conv_embed.conv.bias                     position.convolution.bias                       D
    pos_conv_embed.conv.parametrizations.weight.original0  position.convolution.parametrizations.weight.original0  1,1,K
    pos_conv_embed.conv.parametrizations.weight.original1  position.convolution.parametrizations.weight.original1  D,G,K
    pos_conv_embed.layer_norm.weight             position.norm.weight                            D
    pos_conv_embed.layer_norm.bias               position.norm.bias                              D
    layer_norm.weight                            norm.weight                                     D
    layer_norm.bias                              norm.bias                                       D
    transformer_encoder.layers.{i}.self_attn.in_proj_weight     layers.{i}.attention_in.weight   3D,D
    transformer_encoder.layers.{i}.self_attn.in_proj_bias       layers.{i}.attention_in.bias     3D
    transformer_encoder.layers.{i}.self_attn.out_proj.weight    layers.{i}.attention_out.weight  D,D
    transformer_encoder.layers.{i}.self_attn.out_proj.bias      layers.{i}.attention_out.bias    D
    transformer_encoder.layers.{i}.linear1.weight               layers.{i}.feed_in.weight        F,D
    transformer_encoder.layers.{i}.linear1.bias                 layers.{i}.feed_in.bias          F
    transformer_encoder.layers.{i}.linear2.weight               layers.{i}.feed_out.weight       D,F
    transformer_encoder.layers.{i}.linear2.bias                 layers.{i}.feed_out.bias         D
    transformer_encoder.layers.{i}.norm1.weight                 layers.{i}.attention_norm.weight D
    transformer_encoder.layers.{i}.norm1.bias                   layers.{i}.attention_norm.bias   D
    transformer_encoder.layers.{i}.norm2.weight                 layers.{i}.feed_norm.weight      D
    transformer_encoder.layers.{i}.norm2.bias                   layers.{i}.feed_norm.bias        D

    audio_mlp.                                   audio_head.
    0.weight                                     0.weight                                        H1,D
    0.bias                                       0.bias                                          H1
    3.weight                                     2.weight                                        H2,H1
    3.bias                                       2.bias                                          H2
    6.weight                                     4.weight                                        O,H2
    6.bias                                       4.bias                                          O

    text_mlp.                                    text_head.
    0.weight                                     0.weight                                        H1,E
    0.bias                                       0.bias                                          H1
    3.weight                                     2.weight                                        H2,H1
    3.bias                                       2.bias                                          H2
    6.weight                                     4.weight                                        O,H2
    6.bias                                       4.bias                                          O

    text_model.                                  text_encoder.transformer.
    embeddings.word_embeddings.weight            embeddings.word_embeddings.weight               V,E
    embeddings.position_embeddings.weight        embeddings.position_embeddings.weight           T,E
    embeddings.token_type_embeddings.weight      embeddings.token_type_embeddings.weight         Y,E
    embeddings.LayerNorm.weight                  embeddings.LayerNorm.weight                     E
    embeddings.LayerNorm.bias                    embeddings.LayerNorm.bias                       E
    encoder.layer.{n}.attention.self.query.weight        encoder.layer.{n}.attention.self.query.weight        E,E
    encoder.layer.{n}.attention.self.query.bias          encoder.layer.{n}.attention.self.query.bias          E
    encoder.layer.{n}.attention.self.key.weight          encoder.layer.{n}.attention.self.key.weight          E,E
    encoder.layer.{n}.attention.self.key.bias            encoder.layer.{n}.attention.self.key.bias            E
    encoder.layer.{n}.attention.self.value.weight        encoder.layer.{n}.attention.self.value.weight        E,E
    encoder.layer.{n}.attention.self.value.bias          encoder.layer.{n}.attention.self.value.bias          E
    encoder.layer.{n}.attention.output.dense.weight      encoder.layer.{n}.attention.output.dense.weight      E,E
    encoder.layer.{n}.attention.output.dense.bias        encoder.layer.{n}.attention.output.dense.bias        E
    encoder.layer.{n}.attention.output.LayerNorm.weight  encoder.layer.{n}.attention.output.LayerNorm.weight  E
    encoder.layer.{n}.attention.output.LayerNorm.bias    encoder.layer.{n}.attention.output.LayerNorm.bias    E
    encoder.layer.{n}.intermediate.dense.weight          encoder.layer.{n}.intermediate.dense.weight          N,E
    encoder.layer.{n}.intermediate.dense.bias            encoder.layer.{n}.intermediate.dense.bias            N
    encoder.layer.{n}.output.dense.weight                encoder.layer.{n}.output.dense.weight                E,N
    encoder.layer.{n}.output.dense.bias                  encoder.layer.{n}.output.dense.bias                  E
    encoder.layer.{n}.output.LayerNorm.weight            encoder.layer.{n}.output.LayerNorm.weight            E
    encoder.layer.{n}.output.LayerNorm.bias              encoder.layer.{n}.output.LayerNorm.bias              E
    pooler.dense.weight                          pooler.dense.weight                             E,E
    pooler.dense.bias                            pooler.dense.bias                               E
"""
"""The authors' name, the name here, shape (- is a scalar), and the stage where only one has it. A line of two names
gives the prefixes of the lines below it; {i} and {n} count layers. An audio encoder alone has the names of the
audio_model section, without the prefix."""

OLDER_NAMES = {
    "audio_model.pos_conv_embed.conv.weight_g": "audio_model.pos_conv_embed.conv.parametrizations.weight.original0",
    "audio_model.pos_conv_embed.conv.weight_v": "audio_model.pos_conv_embed.conv.parametrizations.weight.original1",
}
"""What weight normalisation called its two factors before torch 2.0."""
NOT_WEIGHTS = "text_model.embeddings.position_ids"
"""0, 1, 2, …: part of a BERT's state before transformers 4.31."""
AUDIO_MODEL, TEXT_MODEL = "audio_model.", "text_model."


class Row(NamedTuple):
    """One line of the table."""

    official: str
    name: str
    shape: tuple[str, ...]
    stages: str
    """`1`, `2`, or both."""

    def named(self, number: int) -> tuple[str, str]:
        """Both names in a layer."""
        return self.official.format(i=number, n=number), self.name.format(i=number, n=number)

    @property
    def counter(self) -> str | None:
        """The letter of the layers that have this row."""
        return next((letter for letter in "in" if f"{{{letter}}}" in self.official), None)

    def matches(self, state: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The row's tensors by layer; 0 for a row outside layers."""
        pattern = re.compile(re.escape(self.official).replace(r"\{i\}", r"(\d+)").replace(r"\{n\}", r"(\d+)"))
        matches = [(pattern.fullmatch(name), tensor) for name, tensor in state.items()]
        return {int(match[1]) if self.counter else 0: tensor for match, tensor in matches if match}


def _rows() -> list[Row]:
    rows, prefixes = [], ["", ""]
    for line in TABLE.split("\n"):
        cells = line.split()
        if len(cells) == 2:
            prefixes = cells
        elif cells:
            shape = () if cells[2] == "-" else tuple(cells[2].split(","))
            rows.append(
                Row(prefixes[0] + cells[0], prefixes[1] + cells[1], shape, cells[3] if len(cells) == 4 else "12")
            )
    return rows


ROWS = _rows()


@dataclass(frozen=True)
class Official:
    """The content of a file of the authors: record and weights of a model here."""

    record: ModelRecord
    weights: dict[str, Tensor]
    """By the names of the model here."""


def read_official(
    path: Path,
    stage: int,
    *,
    text_config: Any = None,
    tokenizer: str = TOKENIZER,
    audio: AudioRecipe | None = None,
) -> Official:
    """Read and check a state dict of the authors; see `HTCL.from_official`.

    Raises ConfigError, InputError or MismatchError.
    """
    if stage not in (1, 2):
        raise ConfigError(f"stage is {stage!r}; expected 1 (audio ↔ text) or 2 (preference)")
    recipe = (audio or AudioRecipe()).model_dump(include=set(AudioRecipe.model_fields))
    audio = AudioSettings(**recipe, tower="transformer")
    state = read_state_dict(path)
    audio_only = not any(name.startswith((AUDIO_MODEL, TEXT_MODEL)) for name in state)
    if audio_only:
        state = {AUDIO_MODEL + name: tensor for name, tensor in state.items()}
    state = {OLDER_NAMES.get(name, name): tensor for name, tensor in state.items() if name != NOT_WEIGHTS}
    rows = [
        row for row in ROWS if str(stage) in row.stages and (row.official.startswith(AUDIO_MODEL) or not audio_only)
    ]
    if not any(row.matches(state) for row in rows if row.official.startswith(AUDIO_MODEL)):
        raise MismatchError(f"{path} holds no weights of the authors' audio encoder{_what_else(state)}; {EXPECTED}")

    sizes = sizes_of(state, rows) | {"M": audio.n_mels}
    text = None if audio_only else _text_record(path, sizes, text_config, tokenizer)
    if text is not None:
        sizes |= _text_sizes(text)
    model = _model_settings(path, sizes, audio_only)
    sizes["G"] = model.width // POSITION_GROUPS
    weights = _renamed(path, stage, state, rows, sizes, prefix=AUDIO_MODEL if audio_only else "")
    return Official(ModelRecord(stage=stage, input=InputRecipe.OFFICIAL, audio=audio, model=model, text=text), weights)


EXPECTED = "expected model-N.pth as their training scripts save it, or the state dict of an AudioModel"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, without executing anything in it.

    Raises InputError when it is not a plain state dict of finite numbers.
    """
    if not path.is_file():
        raise InputError(f"the file {path} does not exist; {EXPECTED}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception:  # a damaged file makes torch raise any error  # noqa: BLE001
        raise InputError(
            f"{path} is not a plain state dict of torch, and anything else in a pickle is never loaded; {EXPECTED}"
        ) from None
    if not isinstance(state, dict) or not state:
        raise InputError(
            f"{path} holds {'nothing' if state == {} else f'a {type(state).__name__}'}, not a state dict; {EXPECTED}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path} is not a plain state dict: {name!r} is a {type(value).__name__}, not a tensor; {EXPECTED}"
            )
    if all(name.startswith("module.") for name in state):  # saved from inside DistributedDataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    weights = {name: value for name, value in state.items() if name != NOT_WEIGHTS}
    wrong = [name for name, value in weights.items() if value.layout != torch.strided or not value.is_floating_point()]
    if wrong:
        raise InputError(f"{path} holds no dense floating-point numbers under {', '.join(wrong)}; {EXPECTED}")
    wrong = [name for name, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise InputError(
            f"{path} holds NaN or infinity under {', '.join(wrong)}; its training diverged, so take an earlier epoch"
        )
    return state


def sizes_of(state: Mapping[str, Tensor], rows: list[Row]) -> dict[str, int]:
    """Sizes by the letters of the table, by majority vote of the file's tensors, so that one wrong tensor is named."""
    votes = {letter: Counter({size: 1}) for letter, size in PUBLISHED.items()}
    for row in rows:
        layers = row.matches(state)
        if row.counter and layers:
            votes[row.counter][max(layers) + 1] += 2
        for tensor in layers.values():
            if tensor.ndim == len(row.shape):
                for letter, size in zip(row.shape, tensor.shape, strict=True):
                    if letter in votes:
                        votes[letter][size] += 2
    return {letter: counted.most_common(1)[0][0] for letter, counted in votes.items()}


def _size(dimension: str, sizes: Mapping[str, int]) -> int:
    """`5`, `D` or `3D` → a number."""
    factor, letter = re.fullmatch(r"(\d*)(\D.*)?", dimension).groups()  # type: ignore[union-attr]
    return int(factor or 1) * (sizes[letter] if letter else 1)


def _renamed(
    path: Path, stage: int, state: Mapping[str, Tensor], rows: list[Row], sizes: Mapping[str, int], prefix: str
) -> dict[str, Tensor]:
    """Rename the tensors. Raises MismatchError that lists every missing, unknown or misshaped one."""
    expected: dict[str, tuple[str, list[int]]] = {}
    for row in rows:
        for number in range(sizes[row.counter] if row.counter else 1):
            official, name = row.named(number)
            expected[official] = name, [_size(dimension, sizes) for dimension in row.shape]
    faults: list[tuple[str, object, object]] = []
    for name, (_, shape) in expected.items():
        if name not in state:
            faults.append((name, "absent", shape))
        elif list(state[name].shape) != shape:
            faults.append((name, list(state[name].shape), shape))
    faults += [(name, list(tensor.shape), "none") for name, tensor in state.items() if name not in expected]
    if faults:
        listed = ", ".join(f"{name.removeprefix(prefix)} {actual} (expected {shape})" for name, actual, shape in faults)
        other = 3 - stage
        only_in_other = {row.official for row in ROWS if row.stages == str(other)}
        hint = f"; it is a file of stage {other}, so say stage {other}" if only_in_other <= set(state) else ""
        what = "an audio encoder alone" if prefix else f"their stage {stage}"
        raise MismatchError(f"{path} does not fit {what} in {len(faults)} weight(s): {listed}{hint}")
    return {name: state[official] for official, (name, _) in expected.items()}


def _what_else(state: Mapping[str, Tensor]) -> str:
    names = [name.removeprefix(AUDIO_MODEL) for name in state]
    if any(name.startswith("encoder.layer.") for name in names):
        return ", only those of a text model, which is no model of audio"
    return f" (the first of its {len(names)} names is '{names[0]}')"


def _model_settings(path: Path, sizes: Mapping[str, int], audio_only: bool) -> ModelSettings:
    width = sizes["D"]
    if width % HEAD_WIDTH:
        raise MismatchError(
            f"the audio encoder in {path} is {width} wide; expected a multiple of {HEAD_WIDTH}, the width of its heads"
        )
    try:
        return ModelSettings(
            conv_channels=sizes["C"],
            width=width,
            layers=sizes["i"],
            heads=width // HEAD_WIDTH,
            feed_forward=sizes["F"],
            position_kernel=sizes["K"],
            position_groups=POSITION_GROUPS,
            head_hidden=() if audio_only else (sizes["H1"], sizes["H2"]),
            dim=width if audio_only else sizes["O"],
        )
    except ValidationError as error:
        raise MismatchError(
            f"the audio encoder in {path} is of a size that is not supported: {first_fault(error).message}"
        ) from None


def _text_record(path: Path, sizes: Mapping[str, int], text_config: Any, tokenizer: str) -> TextRecord:
    """The text tower as `text_config` says, or as the weights do."""
    from transformers import BertConfig

    if text_config is None and sizes["E"] % HEAD_WIDTH:
        raise MismatchError(
            f"the text tower in {path} is {sizes['E']} wide, no multiple of {HEAD_WIDTH}, the width of BERT's heads; "
            "give text_config= with its num_attention_heads"
        )
    if text_config is None:
        config = BertConfig(
            vocab_size=sizes["V"],
            hidden_size=sizes["E"],
            num_hidden_layers=sizes["n"],
            num_attention_heads=sizes["E"] // HEAD_WIDTH,
            intermediate_size=sizes["N"],
            max_position_embeddings=sizes["T"],
            type_vocab_size=sizes["Y"],
        )
    else:
        tree = dict(text_config if isinstance(text_config, Mapping) else text_config.to_dict())
        if tree.pop("model_type", "bert") != "bert":
            raise ConfigError(
                "text_config is not that of a BERT; expected a transformers BertConfig, or a dict with its keys"
            )
        config = BertConfig(**tree)
    settings = TextSettings(name_or_path=tokenizer, max_tokens=min(MAX_TOKENS, config.max_position_embeddings))
    return TextRecord(settings=settings, transformer=config.to_dict())


def _text_sizes(text: TextRecord) -> dict[str, int]:
    keys = {
        "V": "vocab_size",
        "T": "max_position_embeddings",
        "Y": "type_vocab_size",
        "E": "hidden_size",
        "N": "intermediate_size",
        "n": "num_hidden_layers",
    }
    return {letter: text.transformer[key] for letter, key in keys.items()}
