"""Bookkeeping of a run, without Ray: the epoch to publish, and the lists of checkpoints that can be resumed from."""

from __future__ import annotations

import json
import math

import pytest

from htcl_ray.training.runs import best_epoch, is_resumable, score_order, worst_score

pytestmark = pytest.mark.unit

REPORTED: list[tuple[str, dict[str, float]]] = [
    ("a", {"epoch": 1, "loss": 3.0, "validation_recall@10": 0.2, "validation_median_rank": 4}),
    ("b", {"step": 3, **{metric: worst_score(metric) for metric in ("loss", "validation_recall@10")}}),
    ("c", {"step": 4}),
    ("d", {"epoch": 2, "loss": 2.0, "validation_recall@10": 0.5, "validation_median_rank": 3}),
    ("e", {"epoch": 3, "loss": 2.5, "validation_recall@10": 0.5, "validation_median_rank": 2}),
]


@pytest.mark.parametrize("reported", [REPORTED, REPORTED[::-1]])
@pytest.mark.parametrize(
    ("metric", "best"), [("loss", "d"), ("validation_recall@10", "d"), ("validation_median_rank", "e")]
)
def test_best_epoch_is_the_first_of_the_best_that_has_the_metric(
    reported: list[tuple[str, dict[str, float]]], metric: str, best: str
):
    checkpoint, metrics = best_epoch(reported, metric)
    assert checkpoint == best
    assert metrics == dict(REPORTED)[best]


def test_score_order_is_min_for_losses_and_ranks():
    assert [score_order(metric) for metric in ("loss", "validation_pair_median_rank")] == ["min", "min"]
    assert [score_order(metric) for metric in ("validation_recall@10", "validation_pair_ndcg@10")] == ["max", "max"]


def test_a_checkpoint_within_an_epoch_is_worse_than_every_epoch_also_after_it_was_stored_as_json():
    for metric, epoch in (("loss", 1e30), ("validation_median_rank", 1e6), ("validation_recall@10", 0.0)):
        stored = json.loads(json.dumps(worst_score(metric)))
        assert stored == worst_score(metric)
        assert math.isfinite(stored)
        assert stored > epoch if score_order(metric) == "min" else stored < epoch


def test_a_list_of_checkpoints_is_resumable_while_it_is_whole_and_its_folders_exist():
    names = ["checkpoint_1", "checkpoint_2"]
    whole = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}).encode()
    assert is_resumable(whole, names.__contains__)
    assert is_resumable(b'{"checkpoint_results": []}', names.__contains__)
    assert not is_resumable(whole, names[:1].__contains__), "a folder was removed"
    for damaged in (
        whole[:40],
        b"",
        b"[]",
        b"{}",
        b'{"checkpoint_results": [{}]}',
        b'{"checkpoint_results": 3}',
        b"\xff",
    ):
        assert not is_resumable(damaged, names.__contains__), damaged
