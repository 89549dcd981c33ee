"""The gradient of one batch, in one pass or in micro-batches with the same result."""

from __future__ import annotations

import torch

from htcl_ray.losses.collectives import sum_gradients
from htcl_ray.losses.stages import Terms, total_loss
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.randomness import get_rng_state, set_rng_state
from htcl_ray.training.stage_tasks import Task


def compute_gradients(model: HTCL, batch: Batch, task: Task, micro_batch_size: int | None = None) -> Terms:
    """Fill every parameter's gradient with that of the loss of the global batch; return this worker's share of each
    term.

    `micro_batch_size`: rows encoded at a time, so memory does not grow with the batch; None encodes all at once.
    Gradients must be empty before.
    """
    songs_at_once = (micro_batch_size or len(batch)) * task.songs_per_row
    if songs_at_once >= len(batch):
        terms = task.terms(model, *encode(model, batch), batch.ids)
        total_loss(terms, task.weights).backward()
    else:
        terms = _two_passes(model, batch, task, songs_at_once)
    sum_gradients(model.parameters())
    return {name: term.detach() for name, term in terms.items()}


def _two_passes(model: HTCL, batch: Batch, task: Task, songs_at_once: int) -> Terms:
    """Cached-embedding gradients: encode, take the loss's gradient of the embeddings, encode again and hand it on.

    The second encoding replays the first one's random numbers, so dropout is the same in both. The scheme is GradCache
    (arXiv 2101.06983), but the first encoding records its graph too and drops it at once: what is computed for a
    gradient may use other kernels than what is not, above all when compiled, and those may draw or round otherwise.
    """
    parts = [batch.part(start, start + songs_at_once) for start in range(0, len(batch), songs_at_once)]
    device = batch.mel.device
    states, encoded = [], []
    for part in parts:
        states.append(get_rng_state(device))
        encoded.append([vectors.detach() for vectors in encode(model, part)])
    after = get_rng_state(device)
    audio, text = (torch.cat(vectors).requires_grad_() for vectors in zip(*encoded, strict=True))
    terms = task.terms(model, audio, text, batch.ids)
    total_loss(terms, task.weights).backward()
    assert audio.grad is not None
    assert text.grad is not None
    for part, state, *gradients in zip(
        parts, states, audio.grad.split(songs_at_once), text.grad.split(songs_at_once), strict=True
    ):
        set_rng_state(state, device)
        torch.autograd.backward(encode(model, part), gradients)
    set_rng_state(after, device)
    return terms
