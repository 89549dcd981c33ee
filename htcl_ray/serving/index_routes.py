"""The index that is served, and switching to another."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException

from htcl_ray.retrieval.http_updates import Activated, ActivateRequest, ServedIndexResponse
from htcl_ray.retrieval.live_index import SwitchUnderWay
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.documented import BUSY, NO_INDEX, WRITES
from htcl_ray.serving.keys import write_access
from htcl_ray.serving.storage_calls import with_storage

SWITCH_SECONDS = "5"


def index_routes(backend: Backend) -> APIRouter:
    """What is served."""
    router = APIRouter(tags=["index"])

    @router.get("/v1/index")
    async def index() -> ServedIndexResponse:
        """What is served: the index's manifest, and the updates since it was built."""
        return ServedIndexResponse.of(backend.live)

    @router.post("/v1/index/activate", responses={**WRITES, **NO_INDEX, **BUSY}, dependencies=[Depends(write_access)])
    async def activate(request: ActivateRequest) -> Activated:
        """Serve another index of the workspace. No request fails meanwhile; one that is refused leaves the old one in place."""
        try:
            await with_storage(backend.live.activate, request.version)
        except SwitchUnderWay:
            raise HTTPException(429, "another index is being loaded; try again", {"Retry-After": SWITCH_SECONDS}) from None
        active = backend.live.active
        return Activated(version=active.version, activated_at=active.activated_at, songs=len(active.service.index))

    return router
