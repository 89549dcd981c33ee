"""The configuration of a run: sections, presets and loading."""

from htcl_ray.config.loading import PRESETS, Config, json_schema, resolve

__all__ = ["PRESETS", "Config", "json_schema", "resolve"]
