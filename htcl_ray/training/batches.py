"""From song numbers to tensors, and the next batch loaded while this one is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from htcl_ray.models.htcl import HTCL
from htcl_ray.models.text_encoder import TextEncoder, Tokens
from htcl_ray.training.frames import Frames
from htcl_ray.training.songs import Rows, Songs


@dataclass(frozen=True)
class Batch:
    """Songs of one worker's part of a batch, S of them."""

    mel: Tensor
    """[S, longest, n_mels] fp16 in dB."""
    valid_frames: Tensor
    """[S] int64, on the CPU."""
    tokens: Tokens
    """[S, longest text]."""
    ids: Tensor
    """[S, 3] int64: song, duplicate group, normalised text."""

    def __len__(self) -> int:
        return len(self.mel)

    def part(self, start: int, stop: int) -> Batch:
        """Songs `start` to `stop`."""
        tokens = {name: tensor[start:stop] for name, tensor in self.tokens.items()}
        return Batch(self.mel[start:stop], self.valid_frames[start:stop], tokens, self.ids[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; valid frames stay on the CPU, where lengths are decided."""
        tokens = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tokens.items()}
        mel, ids = (tensor.to(device, non_blocking=True) for tensor in (self.mel, self.ids))
        return Batch(mel, self.valid_frames, tokens, ids)


@dataclass(frozen=True)
class BatchLoader:
    """Loads batches by song number."""

    songs: Songs
    frames: Frames
    text_encoder: TextEncoder

    def load(self, rows: Rows) -> Batch:
        """The songs of `rows` [S], in that order."""
        mel, valid = self.frames.batch(rows)
        tokens = self.text_encoder.tokenize([self.songs.texts[row] for row in rows.tolist()])
        return Batch(torch.from_numpy(mel), torch.from_numpy(valid), tokens, torch.from_numpy(self.songs.ids[rows]))

    def stream(self, batches: Sequence[Rows]) -> Iterator[Batch]:
        """The batches in order, one loaded ahead in a thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(self.load, batches[0]) if batches else None
            for position in range(len(batches)):
                assert ahead is not None
                batch = ahead.result()
                if position + 1 < len(batches):
                    ahead = pool.submit(self.load, batches[position + 1])
                yield batch


def encode(model: HTCL, batch: Batch) -> tuple[Tensor, Tensor]:
    """Audio and text [S, dim], not normalised, at least fp32; the towers compute in bf16 on a GPU."""
    device = batch.mel.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        audio, text = model.encode_audio(batch.mel, batch.valid_frames), model.encode_text(batch.tokens)
    wide = torch.promote_types(audio.dtype, torch.float32)
    return audio.to(wide), text.to(wide)
