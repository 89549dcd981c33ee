"""Several positives a trigger: against a loop over entries, in any chunks, and where only one exists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.config import resolve
from htcl_ray.errors import ConfigError
from htcl_ray.losses import base
from htcl_ray.losses.stages import finetune_terms
from htcl_ray.training.song_numbers import directed_pair_codes, known_pair_codes
from tests.unit.losses.test_stages import PAIRS, SCALES, model, same_ids, task, vectors

pytestmark = pytest.mark.unit

BATCH = np.array([[0, 1], [0, 2], [3, 1], [4, 5], [5, 2], [0, 1]])
"""Repeated triggers and recalled songs, a pair twice, and song 5 on both sides."""
REJECTED = np.array([5, 1, 0, 5, 1, 5])
"""The second is a pair of the third trigger; the fourth trigger has none: its recalled song."""


def naive(audio: Tensor, songs: list[int], rejected: list[int], pairs: np.ndarray) -> Tensor:
    """The mean over queries and directions of the mean over positives of −log p(positive | it and the negatives)."""
    n = len(songs) // 2
    directed = {tuple(pair) for pair in pairs.tolist()}
    known = directed | {(b, a) for a, b in directed}
    unit, scale = F.normalize(audio, dim=1), np.exp(SCALES["preference"])
    total = torch.zeros((), dtype=audio.dtype)
    for forward in (True, False):
        queries = range(n) if forward else range(n, 2 * n)
        keys = [*range(n, 2 * n), *(range(2 * n, 3 * n) if rejected else [])] if forward else list(range(n))
        of = [*songs, *rejected]
        for query in queries:
            own = query + n if forward else query - n
            positives, negatives = [], []
            for key in keys:
                pair = (of[query], of[key]) if forward else (of[key], of[query])
                if key >= 2 * n and of[key] == of[key - n]:
                    continue
                if key == own or (pair in directed and key < 2 * n):
                    positives.append(key)
                elif of[key] != of[query] and (of[query], of[key]) not in known:
                    negatives.append(key)
            scores = unit @ unit[query] * scale
            for positive in positives:
                candidates = scores[[positive, *negatives]]
                total = total - torch.log_softmax(candidates, dim=0)[0] / len(positives)
    return total / (2 * n)


def preference(audio: Tensor, songs: Tensor, *, several: bool = True, with_rejected: bool = False) -> Tensor:
    known, positives = torch.from_numpy(known_pair_codes(PAIRS)), torch.from_numpy(directed_pair_codes(PAIRS))
    terms = finetune_terms(
        model(),
        audio,
        vectors(len(songs), 1),
        same_ids(songs),
        known,
        positives=positives if several else None,
        with_rejected=with_rejected,
    )
    return terms["preference"]


@pytest.mark.parametrize("with_rejected", [False, True])
@pytest.mark.parametrize("chunk_entries", [base.CHUNK_ENTRIES, 18])
def test_value_and_gradient_equal_a_loop_over_entries(
    with_rejected: bool, chunk_entries: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base, "CHUNK_ENTRIES", chunk_entries)
    rejected = REJECTED.tolist() if with_rejected else []
    songs = [*BATCH.T.reshape(-1).tolist(), *rejected]
    audio = vectors(len(songs)).requires_grad_()
    actual = preference(audio, torch.tensor(songs), with_rejected=with_rejected)
    expected = naive(audio, songs[:12], rejected, PAIRS)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(value, audio)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    one = preference(audio, torch.tensor(songs), several=False, with_rejected=with_rejected)
    assert abs(one - actual) > 0.01


def test_with_one_positive_each_it_is_the_cross_entropy():
    songs = torch.tensor([0, 3, 5, 2, 1, 0])  # (0, 2), (3, 1) and (5, 0), and (0, 1), but no (3, 0)
    audio = vectors(6)
    apart = torch.tensor([0, 5, 3, 2, 0, 1])[[0, 1, 3, 4]]  # (0, 2), (5, 0): no other pair between them
    torch.testing.assert_close(preference(audio[:4], apart), preference(audio[:4], apart, several=False))
    assert not torch.isclose(preference(audio, songs), preference(audio, songs, several=False))


def test_a_query_without_negatives_has_no_loss_and_a_gradient():
    """All keys are positives: two rows of one pair."""
    audio = vectors(4).requires_grad_()
    value = preference(audio, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value == 0
    assert not audio.grad.any()


def test_it_is_the_default_where_it_is_possible():
    songs = torch.from_numpy(BATCH.T.reshape(-1).copy())
    audio, text = vectors(12), vectors(12, 1)

    def value(**settings: object) -> Tensor:
        made = task(**settings)
        return made.terms(model(), audio, text, same_ids(songs))["preference"]

    several = preference(audio, songs)
    torch.testing.assert_close(value(mask_false_negatives=True), several)
    torch.testing.assert_close(value(mask_false_negatives=True, several_positives=True), several)
    one = preference(audio, songs, several=False)
    torch.testing.assert_close(value(mask_false_negatives=True, several_positives=False), one)
    for settings in ({}, {"mask_false_negatives": True, "popularity_correction": True}):
        assert not torch.isclose(value(**settings), several)


@pytest.mark.parametrize("other", ["loss=sigmoid", "mask_false_negatives=false", "popularity_correction=true"])
def test_it_is_refused_where_it_is_not_possible(other: str):
    with pytest.raises(ConfigError, match="several_positives needs loss=softmax, mask_false_negatives=true and"):
        resolve("demo", None, ["finetune.several_positives=true", f"finetune.{other}"])
    resolve("demo", None, [f"finetune.{other}"])
