"""Batches of songs as tensors; the next one is loaded while the current one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from htcl_ray.models.htcl import HTCL
from htcl_ray.models.towers.text import TextEncoder, Tokens
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.features import Frames
from htcl_ray.training.length_groups import GROUP_COST, encode_by_length, length_groups, padded_share
from htcl_ray.training.song_numbers import Rows, Songs, normalized_text
from htcl_ray.training.song_text import TextVariation, text_number

AUTOCAST = {"cuda": torch.bfloat16}
"""Kind of device → type of matrix products and convolutions in the towers; other devices use the weights' own."""
SAMPLE, SAMPLE_BATCH = 4096, 64
"""Number of training songs for the statistics of a tower's input, and of those read at once."""
AHEAD = 2
"""Number of batches that are loaded ahead of the one that is computed."""
LONG_TEXTS = 64
"""Number of songs with the most characters that are tokenized to determine the longest text."""


@dataclass(frozen=True)
class BatchRows:
    """One worker's part of one global batch, as song numbers."""

    step: int
    """Within the epoch, from 0."""
    first: int
    """Position of the part's first row in the global batch."""
    rows: Rows
    """[n, songs per row]."""

    @property
    def songs(self) -> Rows:
        """[S], S = n · songs per row: the first song of every row, then the second of every row."""
        return self.rows.T.reshape(-1)


@dataclass(frozen=True)
class Batch:
    """Songs of one worker's part of a batch, S of them."""

    features: Tensor
    """[S, longest, width] fp16; log-mel frames are in dB."""
    valid_frames: Tensor
    """[S] int64, on the CPU."""
    tokens: Tokens
    """[S, longest text]."""
    ids: Tensor
    """[S, 3] int64: song, duplicate group, normalised text."""
    text_lengths: Tensor | None = None
    """[S] int64, on the CPU: tokens of each text. None: of tokens on the CPU, counted when they leave it."""

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> Batch:
        """Songs `start` to `stop`."""
        tokens = {name: tensor[start:stop] for name, tensor in self.tokens.items()}
        text_lengths = None if self.text_lengths is None else self.text_lengths[start:stop]
        return Batch(
            self.features[start:stop], self.valid_frames[start:stop], tokens, self.ids[start:stop], text_lengths
        )

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU do not wait for each other."""
        tokens = {name: tensor.pin_memory() for name, tensor in self.tokens.items()}
        return replace(self, features=self.features.pin_memory(), tokens=tokens, ids=self.ids.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; valid frames and text lengths stay on the CPU, where lengths are decided."""
        tokens = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tokens.items()}
        features, ids = (tensor.to(device, non_blocking=True) for tensor in (self.features, self.ids))
        return Batch(features, self.valid_frames, tokens, ids, self.lengths_of_texts())

    def lengths_of_texts(self) -> Tensor:
        """Positions up to the last token of each text, int64 [S] on the CPU."""
        if self.text_lengths is not None:
            return self.text_lengths
        attended = self.tokens["attention_mask"]
        return (attended * torch.arange(1, attended.shape[1] + 1)).amax(dim=1)

    def padded_share(self, songs_at_once: int | None = None) -> float:
        """Share of the computed frames that are padding, 0 to 1, when so many songs are encoded at once (None: all).

        See `length_groups`.
        """
        cost, size = GROUP_COST[self.features.device.type], songs_at_once or len(self)
        parts = [(start, self.valid_frames[start : start + size]) for start in range(0, len(self), size)]
        groups = [start + group for start, lengths in parts for group in length_groups(lengths, cost)]
        return padded_share(self.valid_frames, groups)


@dataclass(frozen=True)
class BatchLoader:
    """Loads batches by song number."""

    songs: Songs
    frames: Frames
    text_encoder: TextEncoder
    augmentation: Augmentation | None
    """Augmentation of the clips of `stream`; None leaves them unchanged."""
    text_variation: TextVariation | None = None
    """Variation of the texts of `stream`; None leaves them unchanged."""

    def load(self, songs: Rows) -> Batch:
        """Songs [S] with their whole clips, in that order."""
        return self._batch(songs, *self.frames.batch(songs))

    def load_first_windows(self, songs: Rows) -> Batch:
        """Songs [S] with as much of each clip as the model sees at a time, from its start: the same every time."""
        lengths = self.frames.lengths(songs)
        if self.augmentation is not None and self.augmentation.window is not None:
            lengths = lengths.clip(max=self.augmentation.window)
        return self._batch(songs, *self.frames.batch(songs, np.stack([np.zeros_like(lengths), lengths], axis=1)))

    def load_for_training(self, part: BatchRows, epoch: int) -> Batch:
        """The songs of `part`, cropped, shifted and masked, with varied texts; page-locked if the machine has a GPU."""
        batch = self._vary_texts(self._load_augmented(part, epoch), part, epoch)
        return batch.pinned() if torch.cuda.is_available() else batch

    def _load_augmented(self, part: BatchRows, epoch: int) -> Batch:
        songs, augmentation = part.songs, self.augmentation
        if augmentation is None:
            return self.load(songs)
        randoms = augmentation.generators(epoch, part.step, part.first, *part.rows.shape)
        lengths = self.frames.lengths(songs).tolist()
        crops = [augmentation.crop(random, length) for random, length in zip(randoms, lengths, strict=True)]
        features, valid = self.frames.batch(songs, np.array(crops, dtype=np.int64))
        for random, clip, count in zip(randoms, features, valid.tolist(), strict=True):
            augmentation.alter(random, clip[:count])
        return self._batch(songs, features, valid)

    def _vary_texts(self, batch: Batch, part: BatchRows, epoch: int) -> Batch:
        """The batch with training texts, and the ids of these texts in place of those of the songs' own."""
        variation, songs = self.text_variation, self.songs
        if variation is None or not variation.active:
            return batch
        randoms = variation.generators(epoch, part.step, part.first, *part.rows.shape)
        texts = [
            variation.draw(random, songs.texts[song], songs.tags[song] if songs.tags else ())
            for random, song in zip(randoms, part.songs.tolist(), strict=True)
        ]
        numbers = torch.tensor([text_number(normalized_text(text)) for text in texts])
        ids = torch.cat([batch.ids[:, :2], numbers[:, None]], dim=1)
        return replace(batch, tokens=self.text_encoder.tokenize(texts), ids=ids)

    def stream(self, parts: Sequence[BatchRows], epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, for training, in order; a thread loads AHEAD of them before they are needed."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = deque(pool.submit(self.load_for_training, part, epoch) for part in parts[:AHEAD])
            for position in range(len(parts)):
                batch = ahead.popleft().result()
                if position + AHEAD < len(parts):
                    ahead.append(pool.submit(self.load_for_training, parts[position + AHEAD], epoch))
                yield batch

    def sample(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and valid frames of at most `SAMPLE` training songs, evenly spaced, in batches."""
        train = self.songs.train
        chosen = train[np.linspace(0, len(train) - 1, min(len(train), SAMPLE)).astype(np.int64)]
        for start in range(0, len(chosen), SAMPLE_BATCH):
            features, valid = self.frames.batch(chosen[start : start + SAMPLE_BATCH])
            yield torch.from_numpy(features), torch.from_numpy(valid)

    def longest(self) -> Batch:
        """One song of the largest size in training: the longest clip, cropped to the window, with the longest text."""
        train = self.songs.train
        song = self.load_first_windows(train[[self.frames.lengths(train).argmax()]])
        texts = sorted((self.songs.texts[song] for song in train.tolist()), key=len)[-LONG_TEXTS:]
        tokens = self.text_encoder.tokenize(texts)  # padded to the longest of them
        longest = int(tokens["attention_mask"].sum(dim=1).argmax())
        return replace(song, tokens={name: tensor[longest : longest + 1] for name, tensor in tokens.items()})

    def _batch(self, songs: Rows, features: npt.NDArray[np.float16], valid: Rows) -> Batch:
        tokens = self.text_encoder.tokenize([self.songs.texts[song] for song in songs.tolist()])
        return Batch(
            torch.from_numpy(features), torch.from_numpy(valid), tokens, torch.from_numpy(self.songs.ids[songs])
        )


def encode(model: HTCL, batch: Batch) -> tuple[Tensor, Tensor]:
    """Encode audio and text, each [S, dim], not normalised, at least fp32; towers compute in the `AUTOCAST` type.

    Songs of similar length are encoded together, and so are texts, each for themselves; see `length_groups`.
    """
    device = batch.features.device
    dtype = AUTOCAST.get(device.type)

    def encode_audio(songs: Tensor | None, longest: int) -> Tensor:
        if songs is None:
            return model.encode_audio(batch.features, batch.valid_frames)
        return model.encode_audio(batch.features[songs.to(device), :longest], batch.valid_frames[songs])

    def encode_text(songs: Tensor | None, longest: int) -> Tensor:
        if songs is None:
            return model.encode_text(batch.tokens)
        chosen = songs.to(device)
        return model.encode_text({name: tensor[chosen, :longest] for name, tensor in batch.tokens.items()})

    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        audio = encode_by_length(encode_audio, batch.valid_frames, device)
        text = encode_by_length(encode_text, batch.lengths_of_texts(), device)
    wide = torch.promote_types(audio.dtype, torch.float32)
    return audio.to(wide), text.to(wide)
