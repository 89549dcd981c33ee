"""The HTTP routes, as a FastAPI application over anything that encodes and searches."""

from __future__ import annotations

from fastapi import FastAPI

from htcl_ray import __version__
from htcl_ray.serving import failures
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.documented import EVERYWHERE
from htcl_ray.serving.guard import Guard
from htcl_ray.serving.index_routes import index_routes
from htcl_ray.serving.operation_routes import operation_routes
from htcl_ray.serving.search_routes import search_routes
from htcl_ray.serving.song_routes import song_routes
from htcl_ray.settings import ServeSettings


def create_app(backend: Backend, settings: ServeSettings) -> FastAPI:
    """The application."""
    app = FastAPI(title="HTCL music search", version=__version__, responses=EVERYWHERE)
    failures.install(app)
    app.add_middleware(Guard, settings=settings)
    for router in (search_routes(backend, settings), song_routes(backend, settings), index_routes(backend), operation_routes(backend)):
        app.include_router(router)
    return app
