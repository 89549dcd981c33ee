"""API keys (stand-in)."""

from __future__ import annotations

from fastapi import Request
from starlette.exceptions import HTTPException


async def write_access(request: Request) -> None:
    """FastAPI dependency of every route that changes something: 401 unless the request's key has scope write."""
    key = request.scope.get("state", {}).get("key")
    if key is None or "write" not in key.scopes:
        raise HTTPException(401, "an API key with scope write is needed: send it as 'Authorization: Bearer KEY'")
