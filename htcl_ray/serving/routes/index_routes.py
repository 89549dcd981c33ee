"""The index that is served, and switching to another."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException

from htcl_ray.api.requests import ActivateRequest
from htcl_ray.api.responses import Activated, ServedIndexResponse
from htcl_ray.errors import IndexRefusedError
from htcl_ray.index.live.live_index import SwitchInProgress, describe_served
from htcl_ray.serving.api_keys import write_access
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.json_body import JSON, takes
from htcl_ray.serving.openapi_errors import BUSY, JSON_ONLY, NO_INDEX, WRITES
from htcl_ray.serving.storage_calls import with_storage
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.paths import is_uri

SWITCH_SECONDS = "5"


def index_routes(backend: Backend) -> APIRouter:
    """What is served."""
    router = APIRouter(tags=["index"])

    @router.get("/v1/index")
    async def index() -> ServedIndexResponse:
        """What is served: the index's manifest, in which paths and URIs are cut to their last names, and the updates
        since it was built.
        """
        served = describe_served(backend.live)
        return served.model_copy(update={"manifest": _last_names(served.manifest)})

    @router.post(
        "/v1/index/activate",
        responses={**WRITES, **NO_INDEX, **BUSY, **JSON_ONLY},
        dependencies=[Depends(write_access), takes(JSON)],
    )
    async def activate(request: ActivateRequest) -> Activated:
        """Serve another index of the workspace. No request fails meanwhile; one that is refused leaves the old one in
        place.
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
    """The tree with the last name only of every absolute path and URI in it."""
    if isinstance(tree, dict):
        return {name: _last_names(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_last_names(value) for value in tree]
    is_place = isinstance(tree, str) and (tree.startswith("/") or is_uri(tree))
    return without_credentials(tree).rstrip("/").rpartition("/")[2] if is_place else tree
