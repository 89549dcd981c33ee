"""Reading and checking model weights, so that damaged files never become part of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from htcl_ray.errors import MismatchError, WorkspaceError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ADVICE = "the model was damaged or its training diverged, so copy it again or choose another one"
UNUSED_BY_SOME_MODELS = "token_type_embeddings"
"""RoBERTa and similar models have zeros under this name."""


def read_weights(file: Path, expected: Mapping[str, Tensor], config: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, with the names, shapes and types of `expected`, all of them finite.

    `config`: the file that `expected` follows from. Raises WorkspaceError for a file that cannot be read and
    MismatchError for weights that do not fit or are damaged.
    """
    try:
        given = load_file(file)
    except Exception as error:  # a damaged header makes safetensors and torch raise any error  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkspaceError(
            f"{file} cannot be read ({reason}); expected the weights of the model, so copy it again"
        ) from None
    for name, tensor in expected.items():
        if name not in given:
            raise MismatchError(f"{file} lacks {name}, which {config} says has shape {list(tensor.shape)}")
        loaded = given[name]
        if loaded.shape != tensor.shape:
            raise MismatchError(
                f"{file} has {name} of shape {list(loaded.shape)}, but {config} says {list(tensor.shape)}"
            )
        if loaded.dtype not in FLOATS:
            raise MismatchError(
                f"{file} has {name} of type {str(loaded.dtype).removeprefix('torch.')}; expected floating-point numbers"
            )
        given[name] = loaded.to(tensor.dtype)
    extra = [name for name in given if name not in expected]
    if extra:
        raise MismatchError(
            f"{file} has {extra[0]} of shape {list(given[extra[0]].shape)}, which {config} does not know"
        )
    check_numbers(given, str(file))
    return dict(given)


def check_numbers(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise MismatchError for NaN, infinity, and a weight matrix or normalisation scale of zeros only.

    Biases may be zero. `where` begins the message.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Both bounds are NaN if any number is; takes a quarter of the time of isfinite.
        low, high = (float(bound) for bound in torch.aminmax(tensor))
        if not -torch.inf < low <= high < torch.inf:
            raise MismatchError(f"{where} holds NaN or infinity under {name}; {ADVICE}")
        never_zero = (tensor.ndim > 1 and UNUSED_BY_SOME_MODELS not in name) or name.endswith("norm.weight")
        if never_zero and low == high == 0:
            raise MismatchError(f"{where} holds nothing but zeros under {name}; {ADVICE}")
