"""The record of a study (study.json): everything that has to stay the same while the study lasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from htcl_ray.config import Config
from htcl_ray.config.sections import NOT_IN_MODEL, Dimension
from htcl_ray.errors import ConfigError
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.space import Space

FILE = "study.json"


def study_record(
    config: Config,
    space: Space,
    budgets: Mapping[str, Budget],
    gallery: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """The record of a study. `gallery`: description of the validation gallery; `inputs`: versions by kind."""
    return {
        "stage": config.tune.stage,
        "space": {
            key: dimension.model_dump(mode="json", exclude_defaults=True) for key, dimension in sorted(space.items())
        },
        "objectives": list(config.tune.judged_by),
        "metric": config.tune.metric,
        "rows": {name: [budget.rows_per_report, budget.reports] for name, budget in budgets.items()},
        "inputs": dict(inputs),
        "gallery": dict(gallery),
        "configuration": _fixed_settings(config, space),
    }


def check_same_study(recorded: Mapping[str, Any], current: Mapping[str, Any], location: str) -> None:
    """Check that a command continues the recorded study. Raises ConfigError with the first difference."""
    before, now = _flat(recorded), _flat(current)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"the study in {location} was begun with {name} {before.get(name)}, and this command says "
                f"{now.get(name)}; name another study with tune.study, or search as before"
            )


def _fixed_settings(config: Config, space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Configured values that determine a model and are not searched: equal in every trial."""
    sections = {name: getattr(config, name) for name in ("audio", "model", "text")}
    sections |= {name: getattr(config, name).resolved() for name in config.tune.stages}
    tree = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
        if f"{section}.{key}" not in space
        and not (section in config.tune.stages and key in (*NOT_IN_MODEL, "epochs", "best_metric"))
    }


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with one entry for each value; the space is one entry."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        inner = value if isinstance(value, dict) and name != "space" else {"": value}
        flat |= {" ".join(filter(None, (name, key))): of_key for key, of_key in inner.items()}
    return flat
