"""The search space: which configuration keys a trial may change, and the values that it may give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError
from htcl_ray.settings import NOT_IN_MODEL, Dimension

Space = dict[str, Dimension]
Parameters = dict[str, Any]
"""Dotted configuration key → value."""
FIXED = {
    "epochs": "every trial sees tune.samples rows",
    "songs_per_epoch": "every trial sees tune.samples rows",
    "pairs_per_epoch": "every trial sees tune.samples rows",
    "seed": "trials are compared with the same seed",
    "best_metric": "trials are compared by tune.objectives",
    **{name: "it changes where and how a stage runs, not what it learns" for name in NOT_IN_MODEL},
}


def search_space(config: Config, rows: Mapping[str, int]) -> Space:
    """`tune.space`, or the default space of the stages, checked. `rows`: training songs or pairs of a stage. Raises ConfigError."""
    space = config.tune.space or default_space(config, rows)
    for key, dimension in space.items():
        _check(config, key, dimension)
    return dict(space)


def default_space(config: Config, rows: Mapping[str, int]) -> Space:
    """For each stage: initial temperature, fixed or learned, and, around the configured ones, four batch sizes and learning rates."""
    space: Space = {}
    for name in config.tune.stages:
        stage = getattr(config, name)
        smallest = max(stage.batch_size // 2, 2)
        smallest += -smallest % stage.num_workers
        space |= {
            f"{name}.temperature": Dimension(low=0.02, high=0.5, log=True),
            f"{name}.learn_temperature": Dimension(values=(True, False)),
            f"{name}.learning_rate": Dimension(low=stage.learning_rate / 10, high=stage.learning_rate * 10, log=True),
        }
        sizes = tuple(smallest * 2**power for power in range(4) if smallest * 2**power <= rows[name])
        if len(sizes) > 1:
            space[f"{name}.batch_size"] = Dimension(values=sizes)
    return space


def _check(config: Config, key: str, dimension: Dimension) -> None:
    ends = dimension.values if dimension.values is not None else (dimension.low, dimension.high)
    _value_of(config, key)
    section, _, name = key.partition(".")
    stages = config.tune.stages
    searched = (*stages, *(("model", "text") if "pretrain" in stages else ()))
    if section not in searched:
        raise ConfigError(
            f"tune.space names {key}, which no trial of tune.stage={config.tune.stage} reads anew; expected keys of {', '.join(searched)}"
        )
    if section in stages and name in FIXED:
        raise ConfigError(f"tune.space names {key}, but {FIXED[name]}; take it out of the space")
    if name == "batch_size" and dimension.values is None:
        raise ConfigError(f"tune.space.{key} is a range; expected a list of values, since trials of all batch sizes see equally many rows")
    workers = getattr(config, section).num_workers if section in stages else 1
    for value in ends:
        if name == "batch_size" and isinstance(value, int) and value % workers:
            raise ConfigError(
                f"tune.space.{key} has {value}, which {section}.num_workers ({workers}) does not divide; expected multiples of {workers}"
            )
        try:
            with_parameters(config, {key: _as_type(config, key, dimension, value)})
        except ConfigError as error:
            raise ConfigError(f"tune.space cannot give {key} the value {value}: {error}") from None


def _value_of(config: Config, key: str) -> Any:
    """The configured value of a dotted key. Raises ConfigError with the nearest valid key, also for a whole section."""
    try:
        config.with_overrides({key: None})
    except ConfigError as error:
        if not str(error).startswith("configuration key"):
            raise ConfigError(f"tune.space: {error}") from None
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _as_type(config: Config, key: str, dimension: Dimension, value: Any) -> Any:
    return int(value) if _is_integer_range(config, key, dimension) else value


def _is_integer_range(config: Config, key: str, dimension: Dimension) -> bool:
    """Whether a range is of whole numbers: the configured value and both ends are."""
    if dimension.low is None or dimension.high is None:
        return False
    return type(_value_of(config, key)) is int and dimension.low.is_integer() and dimension.high.is_integer()


def with_parameters(config: Config, parameters: Mapping[str, Any]) -> Config:
    """The configuration with a trial's values.

    A batch larger than the configured one is encoded in parts of the configured one's size, so that no batch size fails for memory.
    """
    changes = dict(parameters)
    for name in config.tune.stages:
        stage = getattr(config, name)
        size = parameters.get(f"{name}.batch_size")
        if isinstance(size, int) and not isinstance(size, bool) and stage.micro_batch_size != "auto":
            fits = stage.micro_batch_size or stage.batch_size // stage.num_workers
            local = size // stage.num_workers
            if local >= 1:
                changes[f"{name}.micro_batch_size"] = None if local <= fits and stage.micro_batch_size is None else min(local, fits)
    return config.with_overrides(changes)


def distributions(config: Config, space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """The space as Optuna has it."""
    found: dict[str, BaseDistribution] = {}
    for key, dimension in space.items():
        if dimension.values is not None:
            found[key] = CategoricalDistribution(dimension.values)
            continue
        assert dimension.low is not None
        assert dimension.high is not None
        if _is_integer_range(config, key, dimension):
            found[key] = IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            found[key] = FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return found


def configured_point(config: Config, space: Mapping[str, Dimension]) -> Parameters | None:
    """The configuration as it is, as a point of the space; None when it lies outside."""
    point = {key: _value_of(config, key) for key in space}
    for key, dimension in space.items():
        value = point[key]
        if dimension.values is not None:
            if value not in dimension.values:
                return None
        elif not isinstance(value, int | float) or not dimension.low <= value <= dimension.high:  # type: ignore[operator]
            return None
    return point
