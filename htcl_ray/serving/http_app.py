"""The HTTP routes, as a FastAPI application over anything that encodes and searches."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from starlette.middleware import Middleware

from htcl_ray import __version__
from htcl_ray.config.sections import ServeSettings
from htcl_ray.serving import error_handlers
from htcl_ray.serving.api_keys import REQUEST_KEY, Authentication, Keys
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.middleware.admission import Admission, ReadToEnd
from htcl_ray.serving.middleware.client_address import ClientAddress
from htcl_ray.serving.middleware.cors import CrossOrigin
from htcl_ray.serving.middleware.rate_limit import RateLimit, TokenBuckets
from htcl_ray.serving.middleware.request_checks import MULTIPART_OVERHEAD_BYTES, Guard
from htcl_ray.serving.middleware.request_line import RequestLine
from htcl_ray.serving.middleware.request_log import Observed
from htcl_ray.serving.openapi_errors import EVERYWHERE
from htcl_ray.serving.prometheus import IngressMeasurements
from htcl_ray.serving.responses import AnswerHeaders
from htcl_ray.serving.routes.audio_routes import audio_routes
from htcl_ray.serving.routes.health_routes import operation_routes
from htcl_ray.serving.routes.index_routes import index_routes
from htcl_ray.serving.routes.page_routes import map_routes, page_routes
from htcl_ray.serving.routes.search_routes import search_routes
from htcl_ray.serving.routes.song_routes import song_routes
from htcl_ray.serving.signed_urls import SignedUrls, new_signing_key
from htcl_ray.serving.subsonic.subsonic_keys import SubsonicKeys
from htcl_ray.serving.subsonic.subsonic_routes import subsonic_routes


def create_app(
    backend: Backend,
    settings: ServeSettings,
    keys: Keys | None = None,
    measurements: IngressMeasurements | None = None,
    signing_key: bytes | None = None,
    front_token: str = "",
) -> FastAPI:
    """The application. `keys`: default those of the settings and the environment; raises ConfigError when they are not
    usable.

    `signing_key`: of the addresses of audio, the same for all replicas; default a new one. `front_token`: see
    `client_address.py`.
    """
    keys = Keys.from_settings(settings) if keys is None else keys
    signed_urls = SignedUrls(signing_key or new_signing_key())
    app = FastAPI(
        title="HTCL music search",
        version=__version__,
        responses=EVERYWHERE,
        middleware=_middleware(settings, keys, signed_urls, measurements, front_token),
        docs_url=None,  # their pages load scripts from other sites
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the client sent
    )
    error_handlers.install(app)
    reading = [Depends(REQUEST_KEY)] if keys.reads_need_key else []
    for router in (
        search_routes(backend, settings, measurements),
        audio_routes(backend, settings, signed_urls),
        song_routes(backend, settings),
        index_routes(backend),
        map_routes(backend),
    ):
        app.include_router(router, dependencies=reading)
    app.include_router(subsonic_routes(backend, measurements), dependencies=reading)
    app.include_router(page_routes(settings))
    app.include_router(operation_routes(backend))
    return app


def _middleware(
    settings: ServeSettings,
    keys: Keys,
    signed_urls: SignedUrls,
    measurements: IngressMeasurements | None,
    front_token: str,
) -> list[Middleware]:
    """From the outside in. What is rejected without looking further comes first; the body is read behind all of
    them.
    """
    layers = [
        Middleware(Observed, measurements=measurements),
        Middleware(AnswerHeaders),
        Middleware(RequestLine),
        Middleware(ReadToEnd, max_bytes=settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES),
        Middleware(ClientAddress, trusted_proxies=settings.trusted_proxies, token=front_token),
    ]
    if settings.allowed_origins:  # around the rejections, so that a page can read them
        layers.append(Middleware(CrossOrigin, origins=settings.allowed_origins))
    layers += [
        Middleware(Guard, settings=settings),
        Middleware(SubsonicKeys, keys=keys),
        Middleware(Authentication, keys=keys, signed_urls=signed_urls),
    ]
    if settings.requests_per_second is not None:  # behind the keys, because it counts by key
        buckets = TokenBuckets(settings.requests_per_second, settings.request_burst)
        layers.append(Middleware(RateLimit, buckets=buckets))
    most, seconds, receive_seconds = settings.most_in_progress, settings.request_seconds, settings.receive_seconds
    return [*layers, Middleware(Admission, most=most, seconds=seconds, receive_seconds=receive_seconds)]
