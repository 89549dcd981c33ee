"""`htcl demo`: the sentence that compares the model with an oracle. The whole command: tests/end_to_end/test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from htcl_ray.commands.demo import against_oracle

pytestmark = pytest.mark.unit


def test_the_score_of_the_oracle_is_printed_with_the_models(tmp_path: Path):
    scores = {"semantic": 0.06, "preference": 0.151, "log_mel": 0.04, "genre": 0.05, "random": 0.03}
    scores |= {"artist_mean": 0.07, "oracle": 0.365}
    methods = {
        name: {"ndcg@1": {"value": 0.0}, "ndcg@10": {"value": value}, "mrr": {"value": 1.0}}
        for name, value in scores.items()
    }
    (tmp_path / "report.json").write_text(json.dumps({"tasks": {"cold": {"methods": methods}}}))
    assert against_oracle(str(tmp_path)) == (
        "NDCG@10 of cold-start songs for new users: stage 2 0.151, stage 1 0.060, raw log-mel statistics 0.040, "
        "genre labels 0.050, artist mean 0.070, chance 0.030, an oracle that knows the true traits 0.365"
    )
