"""musicnn, a convolutional music tagger (Pons and Serra 2019, arXiv:1909.06654), as a pretrained encoder.

Shapes that listeners know are built in: vertical filters over 40 % and 70 % of the mel bands for timbre, horizontal
ones of three lengths for rhythm. Batch norm uses the statistics that the weights bring, so no statistics are taken over
the rows of a batch. The vector of a window is the normalised output of the layer before the last, 200 numbers.

`python -m htcl_ray.extractors.musicnn WHEEL_FOLDER OUT` converts the published weights, which `make pretrained-audio`
does.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from htcl_ray.audio.log_mel import mel_power
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import InputError
from htcl_ray.extractors.base import FloatArray, Inputs, PretrainedExtractor
from htcl_ray.extractors.tensorflow_checkpoint import read_checkpoint
from htcl_ray.models.weights import read_weights

SAMPLE_RATE = 16_000
HOP, N_FFT, N_MELS = 256, 512, 96
COMPRESSION = 10_000.0
"""Factor of the mel power before its logarithm."""
UNITS, TAGS = 200, 50
TIMBRE = ((7, 38, 204), (7, 67, 204))
"""Frames, mel bands and number of the vertical filters: 40 % and 70 % of the bands."""
RHYTHM = ((128, 51), (64, 51), (32, 51))
"""Frames and number of the horizontal filters."""
MIDDLE_FRAMES, MIDDLE = 7, 64
NORM_EPSILON = 1e-3
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Musicnn(nn.Module):
    """Log-compressed mel spectrogram [batch, frames, 96] → vectors [batch, 200] and logits of the tags [batch, 50]."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = _norm2d(1)
        shapes = [*TIMBRE, *((frames, 1, count) for frames, count in RHYTHM)]
        self.front = nn.ModuleList(nn.Conv2d(1, count, (frames, bands)) for frames, bands, count in shapes)
        self.front_frames = [frames for frames, _, _ in shapes]
        self.front_norms = nn.ModuleList(_norm2d(count) for _, _, count in shapes)
        width = sum(count for _, _, count in shapes)
        self.middle = nn.ModuleList(
            nn.Conv1d(inputs, MIDDLE, MIDDLE_FRAMES, padding=MIDDLE_FRAMES // 2) for inputs in (width, MIDDLE, MIDDLE)
        )
        self.middle_norms = nn.ModuleList(nn.BatchNorm1d(MIDDLE, eps=NORM_EPSILON) for _ in range(3))
        pooled = 2 * (width + 3 * MIDDLE)
        self.pooled_norm = nn.BatchNorm1d(pooled, eps=NORM_EPSILON)
        self.dense = nn.Linear(pooled, UNITS)
        self.dense_norm = nn.BatchNorm1d(UNITS, eps=NORM_EPSILON)
        self.tags = nn.Linear(UNITS, TAGS)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and logits of windows of any number of frames."""
        image = self.input_norm(mel[:, None])
        parts = []
        for conv, norm, frames in zip(self.front, self.front_norms, self.front_frames, strict=True):
            padded = F.pad(image, (0, 0, (frames - 1) // 2, frames // 2))
            parts.append(norm(F.relu(conv(padded))).amax(dim=3))
        features = torch.cat(parts, dim=1)
        first = self.middle_norms[0](F.relu(self.middle[0](features)))
        second = first + self.middle_norms[1](F.relu(self.middle[1](first)))
        third = second + self.middle_norms[2](F.relu(self.middle[2](second)))
        stacked = torch.cat([features, first, second, third], dim=1)
        pooled = torch.stack([stacked.amax(dim=2), stacked.mean(dim=2)], dim=2).flatten(1)
        vectors: Tensor = self.dense_norm(F.relu(self.dense(self.pooled_norm(pooled))))
        return vectors, self.tags(vectors)


def _norm2d(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=NORM_EPSILON)


class MusicnnExtractor(PretrainedExtractor):
    """musicnn, over windows of one spectrogram of the whole clip."""

    def load(self, folder: Path) -> nn.Module:
        """The model with the weights that `convert` wrote."""
        model = Musicnn()
        expected = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        model.load_state_dict(read_weights(folder / WEIGHTS, expected, str(folder / CONFIG)))
        return model

    def windows(self, waveform: FloatArray) -> list[Inputs]:
        """Windows of the clip's spectrogram. A clip that is shorter than a window is repeated."""
        mel = log_compressed(waveform)
        length = self.record.window_samples // HOP
        if len(mel) < length:
            mel = np.tile(mel, (-(-length // len(mel)), 1))
        starts = [round(start / HOP) for start in self.record.starts(len(waveform))]
        return [{"mel": mel[start : start + length]} for start in starts]

    def prepare(self, window: FloatArray) -> Inputs:
        """The spectrogram of a window."""
        return {"mel": log_compressed(window)}

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors [batch, 200]."""
        vectors: Tensor = self.model(inputs["mel"])[0]
        return vectors

    @torch.inference_mode()
    def tag_scores(self, vectors: FloatArray) -> FloatArray:
        """The last layer of the model, a sigmoid over 50 tags."""
        model = cast("Musicnn", self.model)
        scores: FloatArray = model.tags(torch.from_numpy(vectors).to(self.device)).sigmoid().cpu().numpy()
        return scores


def log_compressed(waveform: FloatArray) -> FloatArray:
    """Mel power of a mono waveform at 16 kHz, log-compressed, [frames, 96]."""
    compressed: FloatArray = np.log10(1 + COMPRESSION * mel_power(waveform, _RECIPE))
    return compressed


_RECIPE = AudioRecipe(sample_rate=SAMPLE_RATE, n_fft=N_FFT, hop_length=HOP, n_mels=N_MELS)


def convert(package: Path, out: Path) -> None:
    """Convert the MSD weights of the unpacked package `musicnn` to a folder that `audio.name_or_path` takes.

    None of the package's code is run: its list of tags is read as a literal. Raises InputError.
    """
    checkpoint = package / "MSD_musicnn"
    given = read_checkpoint(checkpoint / ".index", checkpoint / ".data-00000-of-00001")
    model = Musicnn()
    weights = {}
    norms = [model.input_norm, *model.front_norms, *model.middle_norms, model.pooled_norm, model.dense_norm]
    convolutions, dense = [*model.front, *model.middle], [model.dense, model.tags]
    names = {module: name for name, module in model.named_modules()}
    try:
        for number, module in enumerate(norms):
            for part, source in _NORM_NAMES.items():
                weights[f"{names[module]}.{part}"] = given[f"{_numbered('batch_normalization', number)}/{source}"]
        for number, module in enumerate(convolutions):
            kernel = given[f"{_numbered('conv2d', number)}/kernel"]  # height, width, inputs, outputs
            if isinstance(module, nn.Conv1d):  # its inputs are the width of an image
                weights[f"{names[module]}.weight"] = kernel[:, :, 0].transpose(2, 1, 0)
            else:
                weights[f"{names[module]}.weight"] = kernel.transpose(3, 2, 0, 1)
            weights[f"{names[module]}.bias"] = given[f"{_numbered('conv2d', number)}/bias"]
        for number, module in enumerate(dense):
            weights[f"{names[module]}.weight"] = given[f"{_numbered('dense', number)}/kernel"].T
            weights[f"{names[module]}.bias"] = given[f"{_numbered('dense', number)}/bias"]
        tree = ast.parse((package / "configuration.py").read_text(encoding="utf-8"))
        literals = {
            statement.targets[0].id: statement.value
            for statement in tree.body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
        tags = ast.literal_eval(literals["MSD_LABELS"])
    except (KeyError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{package} is not the unpacked package musicnn 0.1.0: {error!r}") from None
    config = {
        "model_type": "musicnn",
        "units": UNITS,
        "sampling_rate": SAMPLE_RATE,
        "license": "isc",
        "tags": tags,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}, out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_NORM_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
"""Names of the parts of a batch norm in torch, and in TensorFlow."""


def _numbered(kind: str, number: int) -> str:
    """TensorFlow's name of the layer of a kind with this number, in the order of their construction."""
    return f"{kind}_{number}" if number else kind


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        sys.exit(str(error))
