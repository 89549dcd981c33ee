"""The HTTP application: routes and middleware, as a FastAPI application over any `Backend`."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray import __version__
from htcl_ray.config.sections import ServeSettings
from htcl_ray.serving import error_responses
from htcl_ray.serving.api_keys import REQUEST_KEY, Authentication, Keys
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.haproxy import HEADERS
from htcl_ray.serving.middleware.admission import Admission, DrainBody, RateLimit, TokenBuckets
from htcl_ray.serving.middleware.client_address import ClientAddress
from htcl_ray.serving.middleware.request_checks import MULTIPART_OVERHEAD_BYTES, CrossOrigin, RequestChecks
from htcl_ray.serving.middleware.request_line import RequestLine
from htcl_ray.serving.observability import IngressMetrics, RequestObserver
from htcl_ray.serving.routes.audio_routes import audio_routes
from htcl_ray.serving.routes.operation_routes import index_routes, probe_routes
from htcl_ray.serving.routes.page_routes import map_routes, page_routes
from htcl_ray.serving.routes.search_routes import search_routes
from htcl_ray.serving.routes.song_routes import song_routes
from htcl_ray.serving.signed_urls import SignedUrls, new_signing_key
from htcl_ray.serving.subsonic.subsonic_routes import SubsonicKeys, subsonic_routes


def create_app(
    backend: Backend,
    settings: ServeSettings,
    keys: Keys | None = None,
    metrics: IngressMetrics | None = None,
    signing_key: bytes | None = None,
    front_token: str = "",
) -> FastAPI:
    """Create the application.

    `keys`: default those of the settings or the environment; raises ConfigError when these are invalid. `signing_key`:
    of signed URLs, the same for all replicas; default a new one. `front_token`: secret of this application's HAProxy,
    see `client_address.py`.
    """
    keys = Keys.from_settings(settings) if keys is None else keys
    signed_urls = SignedUrls(signing_key or new_signing_key())
    app = FastAPI(
        title="HTCL music search",
        version=__version__,
        responses=error_responses.EVERYWHERE,
        middleware=_middleware(settings, keys, signed_urls, metrics, front_token),
        docs_url=None,  # FastAPI's documentation pages load scripts from other sites
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host header of the client
    )
    error_responses.install(app)
    reading = [Depends(REQUEST_KEY)] if keys.reads_need_key else []
    for router in (
        search_routes(backend, settings, metrics),
        audio_routes(backend, settings, signed_urls),
        song_routes(backend, settings),
        index_routes(backend),
        map_routes(backend),
        subsonic_routes(backend, metrics),
    ):
        app.include_router(router, dependencies=reading)
    app.include_router(page_routes(settings))
    app.include_router(probe_routes(backend))
    return app


class DefaultHeaders:
    """ASGI middleware that adds `HEADERS` to every response whose route did not set them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _middleware(
    settings: ServeSettings,
    keys: Keys,
    signed_urls: SignedUrls,
    metrics: IngressMetrics | None,
    front_token: str,
) -> list[Middleware]:
    """Middleware from outermost to innermost: cheap rejections first, and the body is read behind all of them."""
    layers = [
        Middleware(RequestObserver, metrics=metrics),
        Middleware(DefaultHeaders),
        Middleware(RequestLine),
        Middleware(DrainBody, max_bytes=settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES),
        Middleware(ClientAddress, trusted_proxies=settings.trusted_proxies, token=front_token),
    ]
    if settings.allowed_origins:  # outside the rejections, so that a page of these origins can read them
        layers.append(Middleware(CrossOrigin, origins=settings.allowed_origins))
    layers += [
        Middleware(RequestChecks, settings=settings),
        Middleware(SubsonicKeys, keys=keys),
        Middleware(Authentication, keys=keys, signed_urls=signed_urls),
    ]
    if settings.requests_per_second is not None:  # behind authentication, because it counts by key
        buckets = TokenBuckets(settings.requests_per_second, settings.request_burst)
        layers.append(Middleware(RateLimit, buckets=buckets))
    most, seconds, receive_seconds = settings.most_in_progress, settings.request_seconds, settings.receive_seconds
    return [*layers, Middleware(Admission, max_requests=most, seconds=seconds, receive_seconds=receive_seconds)]
