"""The configuration of a run: its sections, its presets, and how it is loaded."""

from htcl_ray.config.loading import PRESETS, Config, json_schema, resolve

__all__ = ["PRESETS", "Config", "json_schema", "resolve"]
