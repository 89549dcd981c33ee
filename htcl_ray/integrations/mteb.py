"""Adapter for the audio benchmarks of mteb: `mteb.evaluate(mteb_model("path/to/model"), tasks)`.

Requires the extra `mteb`. Tasks from the Hugging Face Hub decode their audio with torchcodec, which is installed by
`pip install 'datasets[audio]'` and requires FFmpeg; tasks whose data sets contain arrays require neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from htcl_ray.errors import ConfigError
from htcl_ray.models import HTCL
from htcl_ray.models.folder import find_folder

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ModuleNotFoundError:
    raise ConfigError("mteb is not installed here; run: pip install 'htcl-ray[mteb]'") from None


class MtebModel(AbsEncoder):  # type: ignore[misc]  # the library has no types
    """An `HTCL` model with mteb's encoder protocol, cosine similarity, and without instructions."""

    def __init__(self, model: HTCL, revision: str, name: str = "htcl-ray/HTCL") -> None:
        """`revision` distinguishes weights in mteb's cache of results; `name` is `organisation/model`."""
        self.model = model
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=sum(tensor.numel() for tensor in model.parameters()),
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=model.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=["audio"] if model.record.text is None else ["audio", "text"],
            experiment_kwargs={"stage": model.stage},
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], **task: Any) -> np.ndarray:
        """Embed batches of `audio`, `text` or both as unit-norm float32 vectors [rows, dim].

        Rows with both are the normalised sum of their two vectors. An audio item has `array` (floats [samples] or
        [channels, samples]) and `sampling_rate`: a dict, or a decoder of the datasets library. Raises InputError for
        text when the model is an audio encoder alone, and ConfigError for batches without audio and text.
        """
        parts = [self._encode_batch(batch) for batch in inputs]
        return torch.cat(parts).numpy() if parts else np.empty((0, self.model.dim), dtype=np.float32)

    def _encode_batch(self, batch: Mapping[str, Any]) -> torch.Tensor:
        vectors = []
        if "audio" in batch:
            vectors.append(self._encode_audio(batch["audio"]))
        if "text" in batch:
            vectors.append(self.model.embed_text(list(batch["text"])))
        if not vectors:
            raise ConfigError(f"the task gives batches of {', '.join(batch)}; expected audio or text")
        return vectors[0] if len(vectors) == 1 else torch.nn.functional.normalize(vectors[0] + vectors[1], dim=1)

    def _encode_audio(self, items: Sequence[Any]) -> torch.Tensor:
        return torch.stack(
            [
                self.model.embed_audio(np.asarray(item["array"], dtype=np.float32), item["sampling_rate"])
                for item in items
            ]
        )


def mteb_model(path_or_hub_id: str | Path, device: str = "cpu") -> MtebModel:
    """Load a model from a folder or the hub for `mteb.evaluate`. Raises WorkspaceError or MismatchError."""
    folder = find_folder(path_or_hub_id)
    model = HTCL.from_pretrained(folder).to(device)
    return MtebModel(model, str(model.fingerprint), f"htcl-ray/{folder.resolve().name}")
