"""The text tower: any BERT-like model of transformers, pretrained or from scratch.

Code from a model's folder or hub page is never executed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from htcl_ray.config.sections import TextSettings
from htcl_ray.errors import ConfigError, InputError, MismatchError
from htcl_ray.models.record import TextRecord
from htcl_ray.models.towers.text_coverage import known_share
from htcl_ray.models.towers.vocabulary import SPECIAL_TOKENS
from htcl_ray.models.weights import check_numbers

Tokens = dict[str, Tensor]
"""`input_ids` and `attention_mask`, int64 [B, S]."""
SPECIAL = ("pad", "bos", "eos", "cls", "sep")
"""Special tokens whose ids a transformers configuration may state."""
PADDED_ROWS = 128
"""Embedding rows without a token that every text tower may have; larger ones may have as many as tokens."""
PROBED_TOKENS = 256
UNKNOWN_TEXT = "\u2042 \u13a0 qxzj"
"""Text that is in hardly any vocabulary; a WordPiece tokenizer without [UNK] fails on it."""
MAX_UNKNOWN_SHARE = 0.5
"""Largest accepted share of unknown tokens in a catalogue's song texts."""


class TextEncoder(nn.Module):
    """Text tower: maps texts to one vector each, pooled as `settings.pooling` says; an unused pooler is removed."""

    def __init__(self, transformer: nn.Module, tokenizer: Any | None, settings: TextSettings) -> None:
        super().__init__()
        if settings.pooling != "pooler" and getattr(transformer, "pooler", None) is not None:
            transformer.pooler = None  # type: ignore[assignment]
        self.transformer = transformer
        self.loaded_tokenizer = tokenizer
        """None until `tokenizer` is first used, if it is that of `settings.name_or_path`."""
        self.settings = settings

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded now if it has not been. Raises ConfigError or MismatchError."""
        if self.loaded_tokenizer is None:
            self.loaded_tokenizer = tokenizer_from_name(self.settings.name_or_path, self.record.transformer)
        return self.loaded_tokenizer

    @property
    def width(self) -> int:
        """Size of the vector."""
        return int(self.transformer.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def record(self) -> TextRecord:
        """The record of this tower in `config.json`."""
        return TextRecord(settings=self.settings, transformer=self.transformer.config.to_dict())  # type: ignore[union-attr, operator]

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Tokenize texts, padded to the longest of them and cut at `max_tokens`."""
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.settings.max_tokens, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def coverage(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Share of the letters, digits and symbols of each text that the vocabulary knows: [n], 0 to 1.

        It is 0 for a text without any. A character is unknown in an [UNK] token, and as a piece of its own inside a
        longer word: WordPiece spells out a word of which it knows nothing. Such a piece is known where a character is a
        syllable or a word (Han, kana, Hangul). What `max_tokens` cuts off does not count. A tokenizer without offsets
        (not a fast one) gives the share of tokens that are not [UNK].
        """
        tokenizer, special = self.tokenizer, set(self.tokenizer.all_special_ids)
        fast = tokenizer.is_fast
        encoded = tokenizer(
            list(texts), truncation=True, max_length=self.settings.max_tokens, return_offsets_mapping=fast
        )
        if not fast:
            unknown, others = tokenizer.unk_token_id, special - {tokenizer.unk_token_id}
            read = [[number for number in ids if number not in others] for ids in encoded["input_ids"]]
            return np.array([1 - ids.count(unknown) / len(ids) if ids else 0.0 for ids in read])
        return np.array(
            [
                known_share(text, encoded.word_ids(row), [number not in special for number in ids], offsets)
                for row, (text, ids, offsets) in enumerate(
                    zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
                )
            ]
        )

    def compile_parts(self) -> list[nn.Module]:
        """The layers, which share one compilation: that of a whole Transformer takes minutes."""
        layers = next((module for module in self.transformer.modules() if isinstance(module, nn.ModuleList)), None)
        return [self.transformer] if layers is None else list(layers)

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens [B, S] → [B, width]."""
        output = self.transformer(**tokens)
        hidden: Tensor = output.last_hidden_state
        if self.settings.pooling == "mean":
            attended = tokens["attention_mask"][:, :, None].to(hidden.dtype)
            return (hidden * attended).sum(dim=1) / attended.sum(dim=1).clamp(min=1)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        return hidden[:, 0] if pooled is None else pooled


class NoTextEncoder(TextEncoder):
    """Null text tower of a model that is an audio encoder alone: no weights, and InputError for texts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.loaded_tokenizer = None

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Raise InputError."""
        raise InputError(
            "this model is an audio encoder alone and has no text tower; "
            "expected audio, or a model of both to embed text"
        )


def text_encoder_from_name(settings: TextSettings) -> TextEncoder:
    """Load the pretrained model and tokenizer of `settings.name_or_path`, a local folder or a hub name.

    Raises ConfigError or MismatchError, also when a weight that is used is missing: transformers draws missing weights
    at random and only logs it.
    """
    from transformers import AutoModel, AutoTokenizer

    from htcl_ray.models.towers.joint_text import joint_family, joint_text_from_name

    name = settings.name_or_path
    family = joint_family(_check_length(settings))
    if family is not None:
        return joint_text_from_name(settings, family)
    try:
        transformer, loading = AutoModel.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers and safetensors raise any error  # noqa: BLE001
        raise unusable(name, error) from None
    check_tokenizer(tokenizer, transformer.config.to_dict(), f"the tokenizer of the text model '{name}'")
    encoder = TextEncoder(transformer, tokenizer, settings)
    missing = sorted(set(loading["missing_keys"]) & set(transformer.state_dict()))
    if missing and all(key.startswith("pooler.") for key in missing):
        raise ConfigError(
            f"the text model '{name}' has no weights for its pooler, but text.pooling is pooler; "
            "set text.pooling=mean or text.pooling=cls"
        )
    if missing:
        raise ConfigError(
            f"the text model '{name}' has no weights for {missing[0]} and {len(missing) - 1} others; "
            "expected all of them"
        )
    check_numbers(transformer.state_dict(), f"the text model '{name}'")
    return encoder


def text_encoder_from_scratch(settings: TextSettings, vocabulary: str) -> TextEncoder:
    """Build a small BERT with random weights; `vocabulary` is the JSON that `train_wordpiece` returns."""
    from transformers import BertConfig

    tokenizer = fast_tokenizer(vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        max_position_embeddings=settings.max_tokens,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        pad_token_id=tokenizer.pad_token_id,
        # BERT's 0.02 is for 768 wide. Narrow towers started with it give nearly the same vector for every text, and
        # contrastive training stays on that plateau for most of a short run.
        initializer_range=settings.width**-0.5,
    )
    return TextEncoder(transformer_from_config(config.to_dict()), tokenizer, settings)


def text_encoder_from_record(record: TextRecord, tokenizer: Any | None) -> TextEncoder:
    """Build the tower that a record describes, with random weights."""
    if record.joint is not None:
        from htcl_ray.models.towers.joint_text import joint_text_from_record

        return joint_text_from_record(record, tokenizer)
    return TextEncoder(transformer_from_config(record.transformer), tokenizer, record.settings)


def transformer_from_config(tree: dict[str, Any]) -> nn.Module:
    """Build a transformers model with random weights from its configuration and `model_type`. Raises ConfigError."""
    from transformers import AutoConfig, AutoModel

    tree = copy.deepcopy(tree)
    model_type = tree.pop("model_type", None)
    tree.pop("auto_map", None)  # names code of the model's author
    try:
        config = AutoConfig.for_model(model_type, **tree)
    except ValueError:
        raise ConfigError(
            f"the text model is of type '{model_type}', which this transformers does not know; install a newer one"
        ) from None
    try:
        model: nn.Module = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        return model
    except Exception as error:  # sizes that contradict each other make models raise any error  # noqa: BLE001
        raise ConfigError(
            f"the text model's configuration describes no {model_type} model ({_reason(error)}); "
            "expected the one that its weights are of"
        ) from None


def check_text_settings(settings: TextSettings) -> TextEncoder | None:
    """Raise ConfigError or MismatchError unless the configured pretrained text model can be used.

    A local folder is loaded and returned. Of a hub model only the configuration and the tokenizer are read.
    """
    from transformers import AutoTokenizer

    name = settings.name_or_path
    if name is None:
        return None
    if Path(name).is_dir():
        return text_encoder_from_name(settings)
    config = _check_length(settings)
    config = getattr(config, "text_config", config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # as in text_encoder_from_name  # noqa: BLE001
        raise unusable(name, error) from None
    check_tokenizer(tokenizer, config.to_dict(), f"the tokenizer of the text model '{name}'")
    return None


def _check_length(settings: TextSettings) -> Any:
    """The configuration of the model. Raises ConfigError unless it can be loaded and takes `max_tokens` tokens."""
    from transformers import AutoConfig

    from htcl_ray.models.towers.joint_text import max_tokens

    try:
        config = AutoConfig.from_pretrained(settings.name_or_path, trust_remote_code=False)
    except Exception as error:  # as in text_encoder_from_name  # noqa: BLE001
        raise unusable(settings.name_or_path, error) from None
    limit = max_tokens(getattr(config, "text_config", config))
    if limit is not None and settings.max_tokens > limit:
        raise ConfigError(
            f"text.max_tokens is {settings.max_tokens}, "
            f"but the text model '{settings.name_or_path}' takes at most {limit}"
        )
    return config


def tokenizer_from_name(name: str | None, transformer: Mapping[str, Any]) -> Any:
    """Load the tokenizer of a model folder without one. `transformer`: the configuration of the text tower."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # as in text_encoder_from_name  # noqa: BLE001
        raise ConfigError(
            f"text cannot be embedded yet, because the tokenizer '{name}' cannot be loaded ({_reason(error)}); make it "
            "reachable, or import the weights again with the folder of a copy as tokenizer "
            "(htcl import-official: --set text.name_or_path=FOLDER)"
        ) from None
    check_tokenizer(tokenizer, transformer, f"the tokenizer '{name}'")
    return tokenizer


def check_tokenizer(tokenizer: Any, transformer: Mapping[str, Any], where: str) -> None:
    """Raise MismatchError unless a tokenizer can be that of a text tower with this configuration.

    transformers makes a tokenizer of special tokens alone when a folder has no tokenizer files, and such a one gives
    every text of n words the same tokens. `where` begins the message.
    """
    vocabulary, special, rows = (
        tokenizer.get_vocab(),
        set(tokenizer.all_special_ids),
        int(transformer.get("vocab_size") or 0),
    )
    tokens = [token for token, number in vocabulary.items() if number not in special]
    files = "copy the tokenizer's files (tokenizer.json, vocab.txt, …) from where the text model came from"
    if not tokens:
        raise MismatchError(
            f"{where} has no vocabulary, only {len(vocabulary)} special tokens, so its files are missing; {files}"
        )
    if max(vocabulary.values()) >= rows or rows - len(vocabulary) > max(PADDED_ROWS, rows // 2):
        raise MismatchError(
            f"{where} has {len(vocabulary)} tokens, but the text tower knows {rows}, so they do not belong together; "
            f"{files}"
        )
    if tokenizer.pad_token_id is None:
        raise MismatchError(
            f"{where} has no padding token, so texts cannot be embedded together; expected that of a BERT-like model"
        )
    defaults = _default_config(transformer)
    for name in SPECIAL:
        stated, own = transformer.get(f"{name}_token_id"), getattr(tokenizer, f"{name}_token_id", None)
        # Converted models keep defaults of their class, which state nothing: MiniLM's padding id is 0, and 1 in its
        # tokenizer.
        if None not in (stated, own) and stated not in (own, defaults.get(f"{name}_token_id")):
            raise MismatchError(
                f"{where} has {name}_token_id {own}, but the text tower's configuration says {stated}; {files}"
            )
    probed = [tokenizer.convert_tokens_to_string([token]) for token in tokens[:: max(1, len(tokens) // PROBED_TOKENS)]]
    try:
        encoded = tokenizer([*probed, UNKNOWN_TEXT], add_special_tokens=False)["input_ids"][:-1]
    except Exception as error:  # the tokenizers library raises nothing more specific  # noqa: BLE001
        raise MismatchError(f"{where} cannot tokenize texts ({_reason(error)}); {files}") from None
    if len({tuple(ids) for ids in encoded if set(ids) - special}) < min(2, len(tokens)):
        raise MismatchError(
            f"{where} does not recognise its own vocabulary: every text becomes '{tokenizer.unk_token}'; {files}"
        )


def check_song_texts(tokenizer: Any, texts: Sequence[str], settings: TextSettings) -> None:
    """Raise ConfigError when a tokenizer cannot tell the texts of a catalogue, no two of which are equal, apart."""
    if len(texts) < 2:
        return
    encoded = tokenizer(list(texts), truncation=True, max_length=settings.max_tokens)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    tokens = [number for ids in encoded for number in ids if number not in special]
    unknown = tokens.count(tokenizer.unk_token_id) / max(1, len(tokens))
    another = "another text.name_or_path" if settings.name_or_path is not None else "a larger text.vocab_size"
    if unknown > MAX_UNKNOWN_SHARE:
        raise ConfigError(
            f"{unknown:.0%} of the tokens of the song texts are unknown to the tokenizer, "
            f"for instance in '{texts[0][:80]}'; expected at most {MAX_UNKNOWN_SHARE:.0%}: choose {another}"
        )
    different = len({tuple(ids) for ids in encoded})
    if different < len(texts) / 2:
        raise ConfigError(
            f"{len(texts)} different song texts become only {different} different sequences of tokens, "
            f"for instance '{texts[0][:80]}'; expected at least half as many: raise text.max_tokens "
            f"({settings.max_tokens}), put what differs first with data.text_columns, or choose {another}"
        )


def _default_config(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The default configuration of the same type of model."""
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.for_model(str(transformer.get("model_type"))).to_dict())
    except ValueError:
        return {}


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def unusable(name: str | None, error: Exception) -> ConfigError:
    """The error of a text model that cannot be loaded."""
    return ConfigError(
        f"the text model '{name}' cannot be loaded ({_reason(error)}); expected a hub name or folder of a BERT-like "
        "model with safetensors weights and its tokenizer, or text.name_or_path=null to train one from scratch"
    )


def fast_tokenizer(vocabulary: str) -> Any:
    """Build the tokenizer of a text tower from scratch; `vocabulary` is the JSON that `train_wordpiece` returns."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary),
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
    )
