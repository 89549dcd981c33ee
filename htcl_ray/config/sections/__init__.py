"""The sections of a configuration: every key with its type, range, default and description."""

from htcl_ray.config.sections.base import Names, Settings, nearest
from htcl_ray.config.sections.data import CatalogSettings, DataSettings, PairSettings
from htcl_ray.config.sections.model import AudioRecipe, AudioSettings, ModelSettings, TextSettings
from htcl_ray.config.sections.serve import ServeSettings
from htcl_ray.config.sections.steps import (
    EmbedSettings,
    EvaluateSettings,
    GateSettings,
    IndexSettings,
    RaySettings,
    Require,
)
from htcl_ray.config.sections.training import (
    NOT_IN_MODEL,
    BestMetric,
    FinetuneSettings,
    HealthSettings,
    PretrainSettings,
    StageSettings,
    TrackingSettings,
)
from htcl_ray.config.sections.tune import Dimension, Objective, TuneSettings

__all__ = [
    "NOT_IN_MODEL",
    "AudioRecipe",
    "AudioSettings",
    "BestMetric",
    "CatalogSettings",
    "DataSettings",
    "Dimension",
    "EmbedSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "GateSettings",
    "HealthSettings",
    "IndexSettings",
    "ModelSettings",
    "Names",
    "Objective",
    "PairSettings",
    "PretrainSettings",
    "RaySettings",
    "Require",
    "ServeSettings",
    "Settings",
    "StageSettings",
    "TextSettings",
    "TrackingSettings",
    "TuneSettings",
    "nearest",
]
