"""The sections of a configuration: every knob with its type, range, default and meaning."""

from htcl_ray.settings.data import AudioRecipe, DataSettings, PairSettings
from htcl_ray.settings.model import ModelSettings, TextSettings
from htcl_ray.settings.section import Names, Settings, nearest
from htcl_ray.settings.serve import ServeSettings
from htcl_ray.settings.steps import EmbedSettings, EvaluateSettings, GateSettings, IndexSettings, RaySettings, Require
from htcl_ray.settings.training import (
    LOWER_IS_BETTER,
    NOT_IN_MODEL,
    BestMetric,
    FinetuneSettings,
    HealthSettings,
    PretrainSettings,
    StageSettings,
    TrackingSettings,
)
from htcl_ray.settings.tune import Dimension, Objective, TuneSettings

__all__ = [
    "LOWER_IS_BETTER",
    "NOT_IN_MODEL",
    "AudioRecipe",
    "BestMetric",
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
