"""Audio towers by the name in configurations and model records. Imports no torch.

To add a tower, write a subclass of `htcl_ray.models.towers.base.AudioTower` and name it in `TOWERS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from htcl_ray.models.towers.base import AudioTower

Extractor = Literal["log_mel", "pretrained", "vectors"]
"""Source of the features of a song; see `audio.extractor`."""


@dataclass(frozen=True)
class TowerEntry:
    """An audio tower of the registry."""

    module: str
    class_name: str
    extractors: tuple[Extractor, ...]
    """Extractors whose features the tower takes."""
    settings: str | None = None
    """Section below `model` with the sizes of the tower. None: the keys of `model` itself."""
    licence: str | None = None
    """Licence of the pretrained weights that the tower starts from. None: its weights start at random."""


TOWERS = {
    "transformer": TowerEntry("htcl_ray.models.towers.transformer", "TransformerTower", ("log_mel",)),
    "cnn": TowerEntry("htcl_ray.models.towers.cnn", "CnnTower", ("log_mel",), settings="cnn"),
    "mlp": TowerEntry("htcl_ray.models.towers.mlp", "MlpTower", ("vectors", "pretrained"), settings="mlp"),
    "window_transformer": TowerEntry(
        "htcl_ray.models.towers.window_transformer",
        "WindowTransformerTower",
        ("pretrained", "vectors"),
        settings="window_transformer",
    ),
    "residual": TowerEntry(
        "htcl_ray.models.towers.residual", "ResidualTower", ("pretrained", "vectors"), settings="residual"
    ),
}

DEFAULT_TOWERS: dict[Extractor, str] = {"log_mel": "transformer", "pretrained": "window_transformer", "vectors": "mlp"}
"""Tower of each extractor without `audio.tower`. The catalogue brings one vector a song, a pretrained encoder makes one
for each window."""

if TYPE_CHECKING:
    TowerName = str
else:
    TowerName = Literal[tuple(TOWERS)]
    """A key of `TOWERS`, as a type that pydantic checks."""


def tower_class(name: TowerName) -> type[AudioTower]:
    """The class of a tower, imported now."""
    entry = TOWERS[name]
    return cast("type[AudioTower]", getattr(importlib.import_module(entry.module), entry.class_name))
