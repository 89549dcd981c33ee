"""Reading and checking model weights: nothing that a damaged file holds gets into a model."""

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
"""RoBERTa and its like carry zeros under this name."""


def read_weights(file: Path, expected: Mapping[str, Tensor], config: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, with the names, shapes and types of `expected`, all of them usable numbers.

    `config`: the file that `expected` follows from. Raises WorkspaceError for a file that cannot be read and
    MismatchError for weights that do not fit or are damaged.
    """
    try:
        given = load_file(file)
    except Exception as error:  # OSError, SafetensorError, and what torch raises for the types and sizes that a damaged header declares
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkspaceError(
            f"{file} cannot be read ({reason}); expected the weights of the model, so copy it again"
        ) from None
    for name, tensor in expected.items():
        if name not in given:
            raise MismatchError(f"{file} lacks {name}, which {config} says has shape {list(tensor.shape)}")
        found = given[name]
        if found.shape != tensor.shape:
            raise MismatchError(
                f"{file} has {name} of shape {list(found.shape)}, but {config} says {list(tensor.shape)}"
            )
        if found.dtype not in FLOATS:
            raise MismatchError(
                f"{file} has {name} of type {str(found.dtype).removeprefix('torch.')}; expected floating-point numbers"
            )
        given[name] = found.to(tensor.dtype)
    extra = [name for name in given if name not in expected]
    if extra:
        raise MismatchError(
            f"{file} has {extra[0]} of shape {list(given[extra[0]].shape)}, which {config} does not know"
        )
    check_numbers(given, str(file))
    return given


def check_numbers(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise MismatchError for NaN, for infinity, and for a weight matrix or the scale of a normalisation that is zero
    throughout.

    Biases may be zero. `where` begins the message.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (
            float(bound) for bound in torch.aminmax(tensor)
        )  # both NaN when there is one; a quarter of the time of isfinite
        if not -torch.inf < low <= high < torch.inf:
            raise MismatchError(f"{where} holds NaN or infinity under {name}; {ADVICE}")
        never_zero = (tensor.ndim > 1 and UNUSED_BY_SOME_MODELS not in name) or name.endswith("norm.weight")
        if never_zero and low == high == 0:
            raise MismatchError(f"{where} holds nothing but zeros under {name}; {ADVICE}")
