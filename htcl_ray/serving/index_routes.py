"""The index that is served."""

from __future__ import annotations

from fastapi import APIRouter

from htcl_ray.retrieval.http import IndexResponse
from htcl_ray.serving.backend import Backend


def index_routes(backend: Backend) -> APIRouter:
    """What is served."""
    router = APIRouter(tags=["index"])

    @router.get("/v1/index")
    async def index() -> IndexResponse:
        """What is served: the index's manifest."""
        served = backend.service.index
        return IndexResponse(
            version=backend.index_version,
            songs=len(served),
            dim=served.dim,
            has_preference=served.has_preference,
            model_versions=served.model_versions,
            manifest=served.manifest,
        )

    return router
