"""Calls that read or write the workspace, away from the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from htcl_ray.serving.haproxy import RETRY

Result = TypeVar("Result")


async def with_storage(call: Callable[..., Result], *arguments: object) -> Result:
    """The result of a call that runs in a thread; 503 when the storage fails."""
    try:
        return await run_in_threadpool(call, *arguments)
    except OSError as error:
        raise HTTPException(503, "the workspace cannot be read or written now; try again", RETRY) from error
