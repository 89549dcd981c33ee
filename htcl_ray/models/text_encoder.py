"""The text tower: any BERT-like model of transformers, pretrained or from scratch. Code from a model's folder or hub page is never run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htcl_ray.errors import ConfigError, InputError, MismatchError
from htcl_ray.models.record import TextRecord
from htcl_ray.models.vocabulary import SPECIAL_TOKENS
from htcl_ray.settings import TextSettings

Tokens = dict[str, Tensor]
"""`input_ids` and `attention_mask`, int64 [B, S]."""


class TextEncoder(nn.Module):
    """Texts → one vector each, pooled as `settings.pooling` says. A pooler that is not used is taken off the transformer."""

    def __init__(self, transformer: nn.Module, tokenizer: Any | None, settings: TextSettings) -> None:
        super().__init__()
        if settings.pooling != "pooler" and getattr(transformer, "pooler", None) is not None:
            transformer.pooler = None  # type: ignore[assignment]
        self.transformer = transformer
        self.loaded_tokenizer = tokenizer
        """None until `tokenizer` is first asked for, when that of `settings.name_or_path` is to be used."""
        self.settings = settings

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded now if it has not been. Raises ConfigError or MismatchError."""
        if self.loaded_tokenizer is None:
            self.loaded_tokenizer = _tokenizer_from_name(self.settings.name_or_path, self.transformer.config.vocab_size)  # type: ignore[union-attr, arg-type]
        return self.loaded_tokenizer

    @property
    def width(self) -> int:
        """Size of the vector."""
        return int(self.transformer.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def record(self) -> TextRecord:
        """What `config.json` says about this tower."""
        return TextRecord(settings=self.settings, transformer=self.transformer.config.to_dict())  # type: ignore[union-attr, operator]

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Padded to the longest of `texts`, cut at `max_tokens`."""
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.settings.max_tokens, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens [B, S] → [B, width]."""
        output = self.transformer(**tokens)
        hidden = output.last_hidden_state
        if self.settings.pooling == "mean":
            attended = tokens["attention_mask"][:, :, None].to(hidden.dtype)
            return (hidden * attended).sum(dim=1) / attended.sum(dim=1).clamp(min=1)
        pooled = getattr(output, "pooler_output", None)
        return hidden[:, 0] if pooled is None else pooled


class NoTextEncoder(TextEncoder):
    """Stands where a text tower would in a model that is an audio encoder alone: it has no weights, and words are refused."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.loaded_tokenizer = None

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Raise InputError."""
        raise InputError("this model is an audio encoder alone and has no text tower; expected sound, or a model of both to embed words")


def text_encoder_from_name(settings: TextSettings) -> TextEncoder:
    """The pretrained model and tokenizer called `settings.name_or_path`: a local folder or a hub name. Raises ConfigError.

    Every weight that is used must be there: transformers would draw missing ones at random and only log it.
    """
    from transformers import AutoModel, AutoTokenizer

    name = settings.name_or_path
    _check_length(settings)
    try:
        transformer, found = AutoModel.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unusable(name, error) from None
    encoder = TextEncoder(transformer, tokenizer, settings)
    missing = sorted(set(found["missing_keys"]) & set(transformer.state_dict()))
    if missing and all(key.startswith("pooler.") for key in missing):
        raise ConfigError(
            f"the text model '{name}' has no weights for its pooler, but text.pooling is pooler; set text.pooling=mean or text.pooling=cls"
        )
    if missing:
        raise ConfigError(f"the text model '{name}' has no weights for {missing[0]} and {len(missing) - 1} others; expected all of them")
    return encoder


def text_encoder_from_scratch(settings: TextSettings, vocabulary: str) -> TextEncoder:
    """A small BERT with random weights. `vocabulary` is what `train_wordpiece` returned."""
    from transformers import BertConfig

    tokenizer = _fast_tokenizer(vocabulary)
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
        # BERT's 0.02 is for 768 wide. Narrow towers started with it give nearly the same vector for every text, and contrastive
        # training stays on that plateau for most of a short run.
        initializer_range=settings.width**-0.5,
    )
    return TextEncoder(transformer_from_config(config.to_dict()), tokenizer, settings)


def text_encoder_from_record(record: TextRecord, tokenizer: Any | None) -> TextEncoder:
    """The tower that `config.json` describes, with random weights."""
    return TextEncoder(transformer_from_config(record.transformer), tokenizer, record.settings)


def transformer_from_config(tree: dict[str, Any]) -> nn.Module:
    """A transformers model with random weights from its configuration, `model_type` included. Raises ConfigError."""
    from transformers import AutoConfig, AutoModel

    tree = copy.deepcopy(tree)
    model_type = tree.pop("model_type", None)
    tree.pop("auto_map", None)  # names code of the model's author
    try:
        config = AutoConfig.for_model(model_type, **tree)
    except ValueError:
        raise ConfigError(f"the text model is of type '{model_type}', which this transformers does not know; install a newer one") from None
    return AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)


def check_text_settings(settings: TextSettings) -> None:
    """Raise ConfigError unless the configured pretrained text model can be used. A local folder is loaded; a hub model is only found."""
    if settings.name_or_path is None:
        return
    if Path(settings.name_or_path).is_dir():
        text_encoder_from_name(settings)
    else:
        _check_length(settings)


def _check_length(settings: TextSettings) -> None:
    """Raise ConfigError unless the model can be found and takes `max_tokens` tokens."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unusable(settings.name_or_path, error) from None
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and settings.max_tokens > limit:
        raise ConfigError(f"text.max_tokens is {settings.max_tokens}, but the text model '{settings.name_or_path}' takes at most {limit}")


def _tokenizer_from_name(name: str | None, vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"words cannot be embedded yet, because the tokenizer '{name}' cannot be loaded ({reason}); make it reachable, "
            "or import the weights again with the folder of a copy as tokenizer (htcl import-official: --set text.name_or_path=FOLDER)"
        ) from None
    if len(tokenizer) > vocabulary:
        raise MismatchError(f"the tokenizer '{name}' has {len(tokenizer)} tokens, but the text tower knows {vocabulary}")
    return tokenizer


def _unusable(name: str | None, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ConfigError(
        f"the text model '{name}' cannot be loaded ({reason}); expected a hub name or folder of a BERT-like model "
        "with safetensors weights, or text.name_or_path=null to train one from scratch"
    )


def _fast_tokenizer(vocabulary: str) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary), pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )
