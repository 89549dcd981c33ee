"""One indexed workspace for the tier, made by the real steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from htcl_ray.config import Config
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.index import build_index
from tests.worlds.small_workspace import small_config, write_features, write_models


@pytest.fixture(scope="session")
def indexed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Both stages; the application listens on a free port."""
    folder: Path = tmp_path_factory.mktemp("indexed")
    config = small_config(folder / "workspace", serve__port=0, serve__max_upload_bytes=2_000_000)
    write_features(config)
    write_models(config, folder)
    embed(config)
    build_index(config)
    return config
