"""Ranking metrics against ir-measures (trec_eval): ties, empty relevant sets, and k larger than the list."""

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
    """Means of ir-measures over queries with these scores, [queries, documents], and the same relevant documents."""
    measures = {f"{name}@{k}": measure @ k for name, measure in PEERS.items() for k in KS} | {"mrr": RR}
    scores = np.atleast_2d(scores)
    judged = [ir_measures.Qrel(f"q{q}", f"d{i}", int(r)) for q in range(len(scores)) for i, r in enumerate(relevant)]
    ranked = [
        ir_measures.ScoredDoc(f"q{q}", f"d{i}", float(s)) for q, row in enumerate(scores) for i, s in enumerate(row)
    ]
    means = ir_measures.calc_aggregate(list(measures.values()), judged, ranked)
    return {name: means[measure] for name, measure in measures.items()}


@pytest.mark.parametrize("seed", range(8))
def test_metrics_without_ties_equal_the_peer(seed: int):
    generator = np.random.default_rng(seed)
    scores, relevant = generator.permutation(30).astype(float), generator.random(30) < 0.2
    relevant[generator.integers(30)] = True
    peers = peer(scores, relevant)
    order, wanted = [np.argsort(-scores)], [set(np.flatnonzero(relevant).tolist())]
    functions = {"recall": metrics.recall_at_k, "ndcg": metrics.ndcg_at_k, "hit_rate": metrics.hit_rate_at_k}
    actual = {f"{name}@{k}": function(order, wanted, k)[0] for name, function in functions.items() for k in KS}
    assert {**actual, "mrr": metrics.mrr(order, wanted)[0]} == pytest.approx(peers)
    expected = one_query(scores, relevant, KS)
    assert {name: expected[name] for name in peers} == pytest.approx(peers)


def test_metrics_with_ties_equal_the_mean_of_the_peer_over_random_orders():
    generator = np.random.default_rng(0)
    scores, relevant = generator.integers(0, 4, 20).astype(float), generator.random(20) < 0.3
    peers = peer(scores + generator.random((1500, 20)) * 1e-3, relevant)
    actual = one_query(scores, relevant, KS)
    for name, mean in peers.items():
        assert actual[name] == pytest.approx(mean, abs=0.03), name


def test_query_without_a_relevant_document_is_nan_where_the_peer_returns_0():
    """trec_eval includes such a query in the mean as 0; here it is nan and excluded from the mean and from n."""
    assert peer(np.arange(5.0), np.zeros(5, dtype=bool))["ndcg@10"] == 0
    assert np.isnan(metrics.ndcg_at_k([[0, 1, 2]], [set()], 10)[0])
    assert np.isnan(one_query(np.arange(5.0), np.zeros(5, dtype=bool), (10,))["ndcg@10"])
