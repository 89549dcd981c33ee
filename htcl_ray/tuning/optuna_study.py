"""The study in Optuna: rebuilt from the trial table, and a source of points that no trial has."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution

from htcl_ray.tuning.trials import Trial, same_point

NUMBER = "number"
"""User attribute of Optuna's trials: `Trial.number`."""
MAX_DUPLICATES = 50
"""Duplicate suggestions in a row after which the space counts as exhausted."""


def sampler(seed: int, number: int, attempt: int) -> optuna.samplers.BaseSampler:
    """The sampler for suggestion `attempt` of trial `number`.

    A suggestion is a function of these numbers and of the study alone, not of earlier suggestions, so a resumed search
    suggests the same points as an uninterrupted one.
    """
    (derived,) = np.random.SeedSequence([seed, number, attempt]).generate_state(1)
    with quiet_optuna():
        return optuna.samplers.TPESampler(seed=int(derived), constant_liar=True)


def optuna_study(
    trials: Iterable[Trial],
    space: Mapping[str, BaseDistribution],
    objectives: Sequence[str],
    *,
    storage: optuna.storages.BaseStorage | None = None,
) -> optuna.Study:
    """Build the study of these trials, in the order of their numbers; all objectives are maximised.

    A finished trial is complete, a stopped one pruned (with two objectives, which Optuna cannot prune: complete), and a
    failed one has no value. A running trial is enqueued: it is suggested next, with the same parameters.
    """
    with quiet_optuna():
        study = optuna.create_study(directions=["maximize"] * len(objectives), storage=storage)
        for trial in sorted(trials, key=lambda trial: trial.number):
            values = trial.values(objectives)
            if not trial.ended:
                study.enqueue_trial(trial.parameters, user_attrs={NUMBER: trial.number})
            if not trial.ended or (values is None and trial.state != "failed"):
                continue
            failed = trial.state == "failed"
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.FAIL if failed else end_state(trial.state == "stopped", objectives),
                    values=None if failed else values,
                    params=trial.parameters,
                    distributions=dict(space),
                    user_attrs={NUMBER: trial.number},
                    intermediate_values={}
                    if len(objectives) > 1
                    else {int(item["rows"]): item[objectives[0]] for item in trial.history},
                )
            )
    return study


def end_state(stopped: bool, objectives: Collection[str]) -> optuna.trial.TrialState:
    """Optuna's state for a trial that was measured and did not fail: pruned or complete."""
    return optuna.trial.TrialState.PRUNED if stopped and len(objectives) == 1 else optuna.trial.TrialState.COMPLETE


def suggest(
    study: optuna.Study,
    space: Mapping[str, BaseDistribution],
    trials: Collection[Trial],
    *,
    seed: int,
    number: int,
) -> optuna.trial.Trial | None:
    """Ask the study for an enqueued trial, or a point that no trial has; None when the space seems exhausted.

    `number`: of the next new trial. An enqueued trial has its own number as user attribute `NUMBER`. Duplicate points
    are reported to the study as failed.
    """
    for attempt in range(MAX_DUPLICATES):
        study.sampler = sampler(seed, number, attempt)
        suggestion = study.ask(dict(space))
        if NUMBER in suggestion.user_attrs or same_point(trials, suggestion.params) is None:
            return suggestion
        study.tell(suggestion, state=optuna.trial.TrialState.FAIL)
    return None


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Suppress Optuna's messages about single trials and its warnings about experimental features."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
