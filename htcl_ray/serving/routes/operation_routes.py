"""Operation of the service: liveness and readiness probes, the served index, and activating another one."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException

from htcl_ray.api.requests import ActivateRequest
from htcl_ray.api.responses import Activated, Alive, Ready, ServedIndexResponse
from htcl_ray.errors import IndexRefusedError
from htcl_ray.index.live.live_index import SwitchInProgress, describe_served
from htcl_ray.serving.api_keys import write_access
from htcl_ray.serving.backend import Backend, with_storage
from htcl_ray.serving.error_responses import BUSY, JSON_ONLY, NO_INDEX, WRITES
from htcl_ray.serving.request_body import JSON, takes
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.paths import is_uri

SWITCH_SECONDS = "5"


def probe_routes(backend: Backend) -> APIRouter:
    """Routes for load balancers and supervisors; they need no key."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def healthz() -> Alive:
        """Liveness probe: the process responds."""
        return Alive()

    @router.get("/readyz")
    async def readyz() -> Ready:
        """Readiness probe: the models and the index are loaded; 503 until then."""
        await backend.check_ready()
        active = backend.live.active
        return Ready(index=active.version, songs=len(active.service.index))

    return router


def index_routes(backend: Backend) -> APIRouter:
    """Routes of the served index."""
    router = APIRouter(tags=["index"])

    @router.get("/v1/index")
    async def index() -> ServedIndexResponse:
        """Return the manifest of the served index, and the updates that were applied since it was built.

        Paths and URIs in the manifest are cut to their last names.
        """
        served = describe_served(backend.live)
        return served.model_copy(update={"manifest": _last_names(served.manifest)})

    @router.post(
        "/v1/index/activate",
        responses={**WRITES, **NO_INDEX, **BUSY, **JSON_ONLY},
        dependencies=[Depends(write_access), takes(JSON)],
    )
    async def activate(request: ActivateRequest) -> Activated:
        """Serve another index of the workspace, without downtime.

        If the index is refused, the previous one stays in place.
        """
        try:
            await with_storage(backend.live.activate, request.version)
        except IndexRefusedError as error:
            raise type(error)(str(error).replace(backend.live.workspace.uri, "workspace")) from None
        except SwitchInProgress:
            raise HTTPException(
                429, "another index is being loaded; try again", {"Retry-After": SWITCH_SECONDS}
            ) from None
        active = backend.live.active
        return Activated(version=active.version, activated_at=active.activated_at, songs=len(active.service.index))

    return router


def _last_names(tree: Any) -> Any:
    """The tree with every absolute path and URI in it cut to its last name."""
    if isinstance(tree, dict):
        return {name: _last_names(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_last_names(value) for value in tree]
    is_place = isinstance(tree, str) and (tree.startswith("/") or is_uri(tree))
    return without_credentials(tree).rstrip("/").rpartition("/")[2] if is_place else tree
