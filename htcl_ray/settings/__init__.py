"""The sections of a configuration: every knob with its type, range, default and meaning."""

from htcl_ray.settings.data import AudioRecipe, DataSettings, PairSettings
from htcl_ray.settings.model import ModelSettings, TextSettings
from htcl_ray.settings.section import Names, Settings, nearest
from htcl_ray.settings.steps import EmbedSettings, EvaluateSettings, IndexSettings, RaySettings, ServeSettings
from htcl_ray.settings.training import (
    LOWER_IS_BETTER,
    BestMetric,
    FinetuneSettings,
    HealthSettings,
    PretrainSettings,
    StageSettings,
    TrackingSettings,
)

__all__ = [
    "LOWER_IS_BETTER",
    "AudioRecipe",
    "BestMetric",
    "DataSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "HealthSettings",
    "IndexSettings",
    "ModelSettings",
    "Names",
    "PairSettings",
    "PretrainSettings",
    "RaySettings",
    "ServeSettings",
    "Settings",
    "StageSettings",
    "TextSettings",
    "TrackingSettings",
    "nearest",
]
