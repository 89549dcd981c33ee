"""The search space: the configuration keys that trials change, and their values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from htcl_ray.config import Config
from htcl_ray.config.sections import NOT_IN_MODEL, Dimension, Settings, StageSettings, nearest
from htcl_ray.errors import ConfigError

Space = dict[str, Dimension]
Parameters = dict[str, Any]
"""Dotted configuration key → value."""
NOT_SEARCHED = {
    "epochs": "every trial sees tune.samples rows",
    "songs_per_epoch": "every trial sees tune.samples rows",
    "pairs_per_epoch": "every trial sees tune.samples rows",
    "batch_size_per_worker": "batches are searched by their global size, batch_size",
    "seed": "trials are compared with the same seed",
    "best_metric": "trials are compared by tune.objectives",
    **{name: "it changes where and how a stage runs, not what it learns" for name in NOT_IN_MODEL},
}
"""Keys of a stage that trials cannot change → the reason."""


def search_space(config: Config, rows: Mapping[str, int]) -> Space:
    """`tune.space`, or the default space of the stages, checked and with values of the types of their keys.

    `rows`: training songs or pairs by stage. Raises ConfigError.
    """
    space = config.tune.space or default_space(config, rows)
    space = {key: _checked(config, key, dimension) for key, dimension in space.items()}
    _check_combinations(config, space)
    return space


def default_space(config: Config, rows: Mapping[str, int]) -> Space:
    """Temperature, whether it is learned, learning rate and batch size of each stage, around the configured values."""
    space: Space = {}
    for name in config.tune.stages:
        stage = getattr(config, name)
        smallest = max(stage.global_batch_size // 2, 2)
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


def _checked(config: Config, key: str, dimension: Dimension) -> Dimension:
    """Check a dimension; its values get the type of their key: `1` becomes True for a switch, 1.0 for a rate."""
    _check_key(config, key)
    section, _, name = key.partition(".")
    if name == "batch_size":
        _check_batch_sizes(dimension, key, getattr(config, section).num_workers)
    if isinstance(_value_of(config, key), bool) and dimension.values is None:
        raise ConfigError(f"tune.space.{key} is a range, but {key} is true or false; expected [true, false]")
    typed = []
    for value in _ends(config, key, dimension):
        try:
            typed.append(_value_of(with_parameters(config, {key: value}), key))
        except ConfigError as error:
            raise ConfigError(f"tune.space cannot give {key} the value {value}: {error}") from None
    if dimension.values is None:
        return dimension
    if len(set(typed)) < len(typed):
        raise ConfigError(
            f"tune.space.{key} is {list(dimension.values)}, of which two are the same value of {key}; "
            "expected all different"
        )
    return Dimension(values=tuple(typed))


def _check_key(config: Config, key: str) -> None:
    value = _value_of(config, key)
    section, _, name = key.partition(".")
    stages = config.tune.stages
    searched = (*stages, *(("model", "text") if "pretrain" in stages else ()))
    is_tower = key == "audio.tower" and "pretrain" in stages  # the only key of `audio` that features do not depend on
    if section not in searched and not is_tower:
        raise ConfigError(
            f"tune.space names {key}, which trials of tune.stage={config.tune.stage} cannot change; "
            f"expected keys of {', '.join(searched)}"
        )
    reason = NOT_SEARCHED.get(name.partition(".")[0]) if section in stages else None
    if reason:
        raise ConfigError(f"tune.space names {key}, but {reason}; take it out of the space")
    if isinstance(value, Settings):
        raise ConfigError(
            f"tune.space names {key}, which is a section; expected its keys, such as "
            f"{key}.{next(iter(type(value).model_fields))}"
        )


def _check_batch_sizes(dimension: Dimension, key: str, workers: int) -> None:
    if dimension.values is None:
        raise ConfigError(
            f"tune.space.{key} is a range; expected a list of values, since trials of all batch sizes see equally many "
            "rows"
        )
    for value in dimension.values:
        if type(value) is not int:
            raise ConfigError(f"tune.space.{key} has {value!r}; expected whole numbers")
        if value % workers:
            raise ConfigError(
                f"tune.space.{key} has {value}, which {key.partition('.')[0]}.num_workers ({workers}) does not divide; "
                f"expected multiples of {workers}"
            )


def _check_combinations(config: Config, space: Space) -> None:
    """Check all pairs of keys for values that contradict each other. Raises ConfigError."""
    for (first, one), (second, other) in itertools.combinations(space.items(), 2):
        for a, b in itertools.product(_ends(config, first, one), _ends(config, second, other)):
            try:
                with_parameters(config, {first: a, second: b})
            except ConfigError as error:
                raise ConfigError(
                    f"tune.space can give {first} the value {a} and {second} the value {b}, which contradict each "
                    f"other: {error}"
                ) from None


def _ends(config: Config, key: str, dimension: Dimension) -> tuple[Any, ...]:
    """The values of a list, or the two ends of a range."""
    if dimension.low is None or dimension.high is None:
        return dimension.values or ()
    return tuple(_as_type(config, key, dimension, end) for end in (dimension.low, dimension.high))


def _value_of(config: Config, key: str) -> Any:
    """The configured value or section of a dotted key. Raises ConfigError with the nearest valid key."""
    value: Any = config
    before = ""
    for name in key.split("."):
        below = [f"{before}{known}" for known in type(value).model_fields] if isinstance(value, Settings) else []
        if f"{before}{name}" not in below:
            hint = nearest(f"{before}{name}", below) if below else f"{before[:-1]} is a value, not a section"
            raise ConfigError(f"tune.space names {key}, but no configuration key has this name; {hint}")
        is_batch_size = name == "batch_size" and isinstance(value, StageSettings)
        value = value.global_batch_size if is_batch_size else getattr(value, name)
        before += f"{name}."
    return value


def _as_type(config: Config, key: str, dimension: Dimension, value: Any) -> Any:
    return int(value) if _is_integer_range(config, key, dimension) else value


def _is_integer_range(config: Config, key: str, dimension: Dimension) -> bool:
    """Whether the configured value and both ends of a range are whole numbers."""
    if dimension.low is None or dimension.high is None:
        return False
    return type(_value_of(config, key)) is int and dimension.low.is_integer() and dimension.high.is_integer()


def with_parameters(config: Config, parameters: Mapping[str, Any]) -> Config:
    """The configuration with the parameters of a trial.

    A batch that is larger than the configured one is encoded in micro-batches of the configured size, so that it needs
    no more memory.
    """
    changes = dict(parameters)
    for name in config.tune.stages:
        stage = getattr(config, name)
        size = parameters.get(f"{name}.batch_size")
        if isinstance(size, int) and not isinstance(size, bool) and stage.micro_batch_size != "auto":
            fits = stage.micro_batch_size or stage.global_batch_size // stage.num_workers
            local = size // stage.num_workers
            if local >= 1:
                changes[f"{name}.micro_batch_size"] = (
                    None if local <= fits and stage.micro_batch_size is None else min(local, fits)
                )
    return config.with_overrides(changes)


def distributions(config: Config, space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """Optuna's form of the space."""
    converted: dict[str, BaseDistribution] = {}
    for key, dimension in space.items():
        if dimension.values is not None:
            converted[key] = CategoricalDistribution(dimension.values)
            continue
        assert dimension.low is not None
        assert dimension.high is not None
        if _is_integer_range(config, key, dimension):
            converted[key] = IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            converted[key] = FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return converted


def configured_point(config: Config, space: Mapping[str, Dimension]) -> Parameters | None:
    """The unchanged configuration as a point of the space; None when it lies outside the space."""
    point = {key: _value_of(config, key) for key in space}
    for key, dimension in space.items():
        value = point[key]
        if dimension.values is not None:
            if value not in dimension.values:
                return None
        elif not isinstance(value, int | float) or not dimension.low <= value <= dimension.high:  # type: ignore[operator]
            return None
    return point
