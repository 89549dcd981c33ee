"""Ranking metrics beside ir-measures (trec_eval) on random rankings: ties, empty relevant sets, and k larger than the
list."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, Success, nDCG

from htcl_ray.evaluation import metrics
from htcl_ray.evaluation.metrics import expected_metrics

pytestmark = pytest.mark.unit

KS = (1, 3, 10, 50)
PEERS = {"recall": R, "ndcg": nDCG, "hit_rate": Success}


def one_query(scores: np.ndarray, relevant: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in expected_metrics(scores[None], relevant[None], ks).items()}


def peer(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Figures of one query; documents without a relevant one have no figure there."""
    wanted = {f"{name}@{k}": measure @ k for name, measure in PEERS.items() for k in KS} | {"mrr": RR}
    judged = [ir_measures.Qrel("q", f"d{i}", int(r)) for i, r in enumerate(relevant)]
    ranked = [ir_measures.ScoredDoc("q", f"d{i}", float(score)) for i, score in enumerate(scores)]
    found = ir_measures.calc_aggregate(list(wanted.values()), judged, ranked)
    return {name: found[measure] for name, measure in wanted.items()}


@pytest.mark.parametrize("seed", range(8))
def test_without_ties_every_figure_is_the_peers(seed: int):
    generator = np.random.default_rng(seed)
    scores, relevant = generator.permutation(30).astype(float), generator.random(30) < 0.2
    relevant[generator.integers(30)] = True
    theirs = peer(scores, relevant)
    order, wanted = [np.argsort(-scores)], [set(np.flatnonzero(relevant).tolist())]
    functions = {"recall": metrics.recall_at_k, "ndcg": metrics.ndcg_at_k, "hit_rate": metrics.hit_rate_at_k}
    ours = {f"{name}@{k}": function(order, wanted, k)[0] for name, function in functions.items() for k in KS}
    assert {**ours, "mrr": metrics.mrr(order, wanted)[0]} == pytest.approx(theirs)
    expected = one_query(scores, relevant, KS)
    assert {name: expected[name] for name in theirs} == pytest.approx(theirs)


def test_with_ties_ours_is_the_mean_of_the_peer_over_random_orders_of_the_tied():
    generator = np.random.default_rng(0)
    scores, relevant = generator.integers(0, 4, 20).astype(float), generator.random(20) < 0.3
    drawn = [peer(scores + generator.random(20) * 1e-3, relevant) for _ in range(2500)]
    ours = one_query(scores, relevant, KS)
    for name in drawn[0]:
        assert ours[name] == pytest.approx(np.mean([one[name] for one in drawn]), abs=0.03), name


def test_a_query_without_a_relevant_document_has_no_figure_where_the_peer_says_0():
    """trec_eval averages such a query in as 0; ours is nan, and left out of the mean and of its n."""
    assert peer(np.arange(5.0), np.zeros(5, dtype=bool))["ndcg@10"] == 0
    assert np.isnan(metrics.ndcg_at_k([[0, 1, 2]], [set()], 10)[0])
    assert np.isnan(one_query(np.arange(5.0), np.zeros(5, dtype=bool), (10,))["ndcg@10"])
