"""The terms of both stages where their value is known otherwise: the published loss, the softmax over all songs,
rejected songs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.config.sections import FinetuneSettings
from htcl_ray.losses.base import ContrastiveLoss
from htcl_ray.losses.contrastive import InfoNCE, SigmoidLoss
from htcl_ray.losses.stages import Side, finetune_terms, pretrain_terms
from htcl_ray.training.song_numbers import Pairs, known_pair_codes
from htcl_ray.training.stage_tasks import finetune_task

pytestmark = pytest.mark.unit

SCALES = {"text": 2.0, "preference": 1.0, "fusion": 1.5}
PAIRS = np.array([[0, 1], [0, 2], [3, 1], [4, 5], [5, 0], [5, 2]])
WEIGHTS = np.array([3.0, 1.0, 2.0, 4.0, 1.0, 2.0])
SONGS = 6
CATALOGUE = np.array([0, 1, 2, 3, 4, 5, 7, 8, 11, 12])
"""All training songs: some are in no pair."""


def model(loss: str = "softmax") -> Any:
    """The part of a model that the terms use: losses with known parameters, and any fusion."""

    def loss_of(term: str) -> ContrastiveLoss:
        scale = torch.tensor(SCALES[term], dtype=torch.float64)
        return SigmoidLoss(scale, -scale) if loss == "sigmoid" else InfoNCE(scale)

    return SimpleNamespace(loss=loss_of, fuse=lambda audio, text: audio * 0.3 + text.flip(1))


def vectors(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same_ids(songs: Tensor) -> Tensor:
    return songs[:, None].expand(-1, 3)


def published(a: Tensor, b: Tensor, name: str) -> Tensor:
    """The authors' loss: cross entropy of the whole matrix, both ways."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T * torch.tensor(SCALES[name]).exp()
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def test_unmasked_terms_equal_the_published_loss():
    """Although songs come twice, pairs are known and a song is on both sides."""
    songs = torch.tensor([0, 0, 3, 4, 1, 2, 1, 0])
    audio, text, ids = vectors(8), vectors(8, 1), same_ids(songs)
    first = pretrain_terms(model(), audio, text, ids, masked=False)
    torch.testing.assert_close(first["text"], published(audio, text, "text"))
    known = torch.from_numpy(known_pair_codes(PAIRS))
    fused = model().fuse(audio, text)
    expected = {
        "text": published(audio, text, "text"),
        "preference": published(audio[:4], audio[4:], "preference"),
        "fusion": (published(audio[:4], fused[4:], "fusion") + published(audio[4:], fused[:4], "fusion")) / 2,
    }
    actual = finetune_terms(model(), audio, text, ids, known, masked=False)
    masked = finetune_terms(model(), audio, text, ids, known)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
        assert masked[name] < value - 0.01


def task(**settings: Any) -> Any:
    rejected, weights = np.array([[0, 5], [3, 0], [3, 2]]), np.array([1.0, 1.0, 3.0])
    pairs = Pairs(PAIRS, WEIGHTS, PAIRS[:0], 0, rejected, weights, 0)
    settings = {"mask_false_negatives": False, "rehearsal_songs_per_pair": 0, **settings}
    return finetune_task(pairs, CATALOGUE, FinetuneSettings(**settings), torch.device("cpu"))


def test_popularity_correction_gives_the_softmax_over_all_songs():
    """A batch that holds every pair as often as its weight says is the limit of drawing. Its gradient must be
    exactly that of −log softmax over the songs, each of them once, however often it is in the batch."""
    batch = torch.from_numpy(np.repeat(PAIRS, WEIGHTS.astype(int), axis=0).T.copy())
    audio, text = vectors(SONGS).requires_grad_(), vectors(SONGS, 1).requires_grad_()
    songs = batch.reshape(-1)

    def gradients(correct: bool) -> dict[str, tuple[Tensor, ...]]:
        terms = task(popularity_correction=correct).terms(model(), audio[songs], text[songs], same_ids(songs))
        return {
            name: torch.autograd.grad(term, [audio, text], retain_graph=True, allow_unused=True)
            for name, term in terms.items()
        }

    def softmax(first: Tensor, second: Tensor, pairs: np.ndarray, name: str) -> Tensor:
        """Mean over pairs of −log p(second | first), candidates being the songs that any pair has in that place."""
        candidates = sorted(set(pairs[:, 1].tolist()))
        total = torch.zeros((), dtype=torch.float64)
        for (a, b), weight in zip(pairs.tolist(), WEIGHTS.tolist(), strict=True):
            scores = torch.stack([F.cosine_similarity(first[a], second[c], dim=0) for c in candidates]) * np.exp(
                SCALES[name]
            )
            total = total - weight / WEIGHTS.sum() * torch.log_softmax(scores, dim=0)[candidates.index(b)]
        return total

    def both_ways(first: Tensor, second: Tensor, pairs: np.ndarray, name: str) -> Tensor:
        return (softmax(first, second, pairs, name) + softmax(second, first, pairs[:, ::-1], name)) / 2

    fused = model().fuse(audio, text)
    expected = {
        "preference": both_ways(audio, audio, PAIRS, "preference"),
        "fusion": (both_ways(audio, fused, PAIRS, "fusion") + both_ways(audio, fused, PAIRS[:, ::-1], "fusion")) / 2,
    }
    corrected, plain = gradients(True), gradients(False)
    for name, term in expected.items():
        wanted = torch.autograd.grad(term, [audio, text], retain_graph=True, allow_unused=True)
        for gradient, uncorrected, wanted_gradient in zip(corrected[name], plain[name], wanted, strict=True):
            if wanted_gradient is None:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, wanted_gradient, atol=1e-12, rtol=0)
                assert (uncorrected - wanted_gradient).abs().max() > 1e-3
    for gradient, uncorrected in zip(corrected["text"], plain["text"], strict=True):
        assert torch.equal(gradient, uncorrected)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_explicit_negatives_are_candidates_of_every_trigger_only(loss: str):
    pairs, rejected = (
        torch.tensor([[0, 1], [4, 5], [3, 1]]),
        torch.tensor([2, 5, 0]),
    )  # the second trigger has none: its recalled song
    songs, ids = torch.cat([pairs.T.reshape(-1), rejected]), same_ids(torch.cat([pairs.T.reshape(-1), rejected]))
    audio, text = vectors(9).requires_grad_(), vectors(9, 1).requires_grad_()
    known = torch.from_numpy(known_pair_codes(PAIRS))
    without = finetune_terms(model(loss), audio[:6], text[:6], ids[:6], known)
    actual = finetune_terms(model(loss), audio, text, ids, known, with_rejected=True)
    assert torch.equal(actual["text"], without["text"])
    assert torch.equal(actual["fusion"], without["fusion"])
    assert actual["preference"] > without["preference"]
    gradient, of_text = torch.autograd.grad(sum(actual.values()), [audio, text])
    assert gradient[6].abs().max() > 0  # (0, 2) is a known pair, but 4 and 3 see song 2
    assert gradient[8].abs().max() > 0
    assert not gradient[7].any()  # stands for nothing
    assert not of_text[6:].any()
    nothing = same_ids(torch.cat([songs[:6], songs[3:6]]))
    same = finetune_terms(model(loss), audio, text, nothing, known, with_rejected=True)
    torch.testing.assert_close(same["preference"], without["preference"], atol=1e-12, rtol=0)


def test_side_widens_half_precision():
    assert (
        Side.of(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int64)).own.dtype == torch.float32
    )


def test_task_with_explicit_negatives_has_three_songs_per_row():
    with_them = task(explicit_negatives=True)
    assert with_them.songs_per_row == 3
    order = with_them.order(2)
    assert np.array_equal(order[:, :2], task().order(2))
    assert np.array_equal(order, task(explicit_negatives=True).order(2))
    allowed = {0: {5}, 3: {0, 2}}
    for trigger, recalled, rejected in order.tolist():
        assert rejected in allowed.get(trigger, {recalled})


@pytest.mark.parametrize("with_rejected", [False, True])
def test_rehearsed_songs_enter_the_text_term_only(with_rejected: bool):
    rejected = 3 if with_rejected else 0
    songs = torch.tensor([0, 3, 4, 1, 2, 5, *[13, 14, 15][:rejected], 9, 8, 7, 6, 10, 11])
    audio, text = (vectors(len(songs), seed) for seed in (1, 2))
    without = finetune_terms(
        model(), *(v[: 6 + rejected] for v in (audio, text, same_ids(songs))), None, with_rejected=with_rejected
    )
    actual = finetune_terms(model(), audio, text, same_ids(songs), None, with_rejected=with_rejected, rehearsed=2)
    assert torch.equal(actual["preference"], without["preference"])
    assert torch.equal(actual["fusion"], without["fusion"])
    named = [*range(6), *range(6 + rejected, len(songs))]
    torch.testing.assert_close(actual["text"], published(audio[named], text[named], "text"))


def test_rehearsal_covers_the_whole_training_catalogue():
    """Every training song comes equally often, whatever pairs draw; the pairs are those without rehearsal; an epoch can
    be repeated."""
    rehearsing = task(rehearsal_songs_per_pair=2, pairs_per_epoch=5)
    assert rehearsing.songs_per_row == 4
    assert task(rehearsal_songs_per_pair=2, explicit_negatives=True).order(0).shape[1] == 5
    orders = [rehearsing.order(epoch) for epoch in range(3)]
    for epoch, order in enumerate(orders):
        assert np.array_equal(order, rehearsing.order(epoch))
        assert np.array_equal(order[:, :2], task(pairs_per_epoch=5).order(epoch))
        assert sorted(order[:, 2:].reshape(-1)) == sorted(CATALOGUE)
    assert not np.array_equal(orders[0][:, 2:], orders[1][:, 2:])
    other = task(rehearsal_songs_per_pair=2, pairs_per_epoch=5, seed=1).order(0)
    assert not np.array_equal(orders[0][:, 2:], other[:, 2:])
