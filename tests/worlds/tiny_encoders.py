"""Tiny pretrained encoders: random models of the real architectures of transformers, in folders as a hub has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "[PAD]",
    "<s>",
    "</s>",
    "[UNK]",
    "calm",
    "slow",
    "fast",
    "loud",
    "piano",
    "guitar",
    "drums",
    "rock",
    "jazz",
    "song",
    "music",
    "a",
    "with",
    "and",
    "by",
    "of",
    "the",
]
"""Vocabulary of the text towers, with the ids that their configurations state."""


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words for a model with 50 of them."""
    kept = {
        word: number for number, word in enumerate([*WORDS, *(f"word{number}" for number in range(50 - len(WORDS)))])
    }
    whole = Tokenizer(models.WordLevel(kept, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(folder)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Save a model with random numbers also where a fresh one has zeros or ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)


def clap(folder: Path) -> None:
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    audio = {
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "spec_size": 64,
        "num_mel_bins": 32,
        "patch_stride": [4, 4],
        "window_size": 4,
        "projection_dim": 12,
    }
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    save(transformers.ClapModel(config), folder)
    tokenizer(folder)
    transformers.ClapFeatureExtractor(
        feature_size=32, max_length_s=2, truncation="rand_trunc", hop_length=960
    ).save_pretrained(folder)


def ast(folder: Path) -> None:
    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64, num_mel_bins=32
    )
    save(transformers.ASTModel(config), folder)
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)


def whisper(folder: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        num_mel_bins=40,
        max_source_positions=100,
    )
    save(transformers.WhisperModel(config), folder)
    transformers.WhisperFeatureExtractor(feature_size=40, chunk_length=2).save_pretrained(folder)


SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def wav2vec2(folder: Path) -> None:
    save(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH)), folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)


def hubert(folder: Path) -> None:
    save(transformers.HubertModel(transformers.HubertConfig(**SPEECH)), folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=24_000).save_pretrained(folder)


def pe_audio(folder: Path) -> None:
    text = {
        "model_type": "modernbert",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "dac_config": {
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 16,
            "downsampling_ratios": [2, 8, 10, 12],
            "codebook_dim": 4,
            "hidden_size": 64,
        },
    }
    save(transformers.PeAudioModel(transformers.PeAudioConfig(text_config=text, audio_config=audio)), folder)
    tokenizer(folder)
    transformers.PeAudioFeatureExtractor(sampling_rate=48_000).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "clap": clap,
    "audio-spectrogram-transformer": ast,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "hubert": hubert,
    "pe_audio": pe_audio,
}
