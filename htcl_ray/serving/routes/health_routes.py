"""Whether the application is alive and ready, for those who run it."""

from __future__ import annotations

from fastapi import APIRouter

from htcl_ray.api.responses import Alive, Ready
from htcl_ray.serving.backend import Backend


def operation_routes(backend: Backend) -> APIRouter:
    """Probes of load balancers and people."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def healthz() -> Alive:
        """Alive."""
        return Alive()

    @router.get("/readyz")
    async def readyz() -> Ready:
        """Models and index are loaded; 503 until then."""
        await backend.check_ready()
        active = backend.live.active
        return Ready(index=active.version, songs=len(active.service.index))

    return router
