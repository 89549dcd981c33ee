"""The record of a study: settings that must not change while the study lasts."""

from __future__ import annotations

from typing import Any

import pytest

from htcl_ray.config import Config, resolve
from htcl_ray.errors import ConfigError
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.space import search_space
from htcl_ray.tuning.study_folder import check_same_study, study_record

pytestmark = pytest.mark.unit
INPUTS = {"features": "f1", "pairs": "p1"}
GALLERY = {"songs": 3, "pairs": 2, "fingerprint": "abc"}


def config(**changes: Any) -> Config:
    space = {"tune.space": {"pretrain.temperature": [0.1, 0.2]}}
    return resolve("demo").with_overrides(
        {**space, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def record(config: Config, **changes: Any) -> dict[str, Any]:
    space = search_space(config, {"pretrain": 1000, "finetune": 1000})
    facts = {"budgets": {"pretrain": Budget(64, 3)}, "gallery": GALLERY, "inputs": INPUTS} | changes
    return study_record(config, space, **facts)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (
            record(config(tune__space={"pretrain.temperature": [0.1, 0.3]})),
            "space {'pretrain.temperature': {'values': [0.1, 0.2]}}, and this command says "
            "{'pretrain.temperature': {'values': [0.1, 0.3]}}",
        ),
        (record(config(pretrain__seed=5)), "configuration pretrain.seed 0, and this command says 5"),
        (record(config(tune__metric="ndcg@10")), "metric recall@10, and this command says ndcg@10"),
        (record(config(), inputs={**INPUTS, "pairs": "p2"}), "inputs pairs p1, and this command says p2"),
        (record(config(), inputs={"features": "f1"}), "inputs pairs p1, and this command says None"),
        (
            record(config(), gallery={**GALLERY, "fingerprint": "abd"}),
            "gallery fingerprint abc, and this command says abd",
        ),
        (
            record(config(), budgets={"pretrain": Budget(64, 4)}),
            r"rows pretrain [64, 3], and this command says [64, 4]",
        ),
    ],
)
def test_another_study_is_refused_with_the_first_difference(changed: dict[str, Any], difference: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_study(record(config()), changed, "/w/runs/tune/pretrain")
    assert str(caught.value) == (
        f"the study in /w/runs/tune/pretrain was begun with {difference}; name another study with tune.study, "
        "or search as before"
    )


def test_settings_that_do_not_change_a_trial_may_change() -> None:
    before = record(config())
    for changes in (
        {"tune__trials": 99},
        {"pretrain__num_workers": 4},
        {"pretrain__epochs": 7},
        {"pretrain__best_metric": "loss"},
        {"pretrain__temperature": 0.15},
        {"finetune__seed": 5},
        {"evaluate__seed": 5},
    ):
        check_same_study(before, record(config(**changes)), "here")
