"""Suggestions of the study: enqueued trials first, no duplicate points, an end of small spaces."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from htcl_ray.tuning.optuna_study import NUMBER, optuna_study, suggest
from htcl_ray.tuning.trials import Trial

pytestmark = pytest.mark.unit
TWO_POINTS: dict[str, BaseDistribution] = {"a": CategoricalDistribution((1, 2))}


def test_a_space_of_two_points_is_exhausted_after_two_trials() -> None:
    trials: list[Trial] = []
    study = optuna_study(trials, TWO_POINTS, ["semantic"])
    for _ in range(3):
        suggestion = suggest(study, TWO_POINTS, trials, seed=0, number=len(trials))
        if suggestion is not None:
            trials.append(Trial(len(trials), suggestion.params))
    assert sorted(trial.parameters["a"] for trial in trials) == [1, 2]
    states = [trial.state for trial in study.trials]
    assert states.count(optuna.trial.TrialState.RUNNING) == 2
    assert set(states) == {optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.FAIL}, "duplicates have failed"


def test_a_running_trial_is_suggested_again_with_its_number() -> None:
    trials = [Trial(0, {"a": 2}, "failed"), Trial(1, {"a": 1})]
    study = optuna_study(trials, TWO_POINTS, ["semantic"])
    suggestion = suggest(study, TWO_POINTS, trials, seed=0, number=2)
    assert suggestion is not None
    assert (suggestion.params, suggestion.user_attrs[NUMBER]) == ({"a": 1}, 1)
    assert suggest(study, TWO_POINTS, trials, seed=0, number=2) is None


def test_suggestions_depend_on_seed_and_number_alone() -> None:
    space: dict[str, BaseDistribution] = {"a": FloatDistribution(0, 1)}

    def point(seed: int, number: int) -> float:
        suggestion = suggest(optuna_study([], space, ["semantic"]), space, [], seed=seed, number=number)
        assert suggestion is not None
        return float(suggestion.params["a"])

    points = [point(seed, number) for seed in (0, 1) for number in (0, 1)]
    assert points == [point(seed, number) for seed in (0, 1) for number in (0, 1)]
    assert len(set(points)) == 4
