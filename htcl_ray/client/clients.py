"""Synchronous and asynchronous client with the same calls."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import ValidationError

from htcl_ray.client import calls
from htcl_ray.client.arguments import number
from htcl_ray.client.calls import Call, Response
from htcl_ray.client.retries import Attempts, Retries, retry_after
from htcl_ray.errors import ArgumentError, NoResponseError, RequestError, first_fault

TIMEOUT_SECONDS = 30.0
Arguments = ParamSpec("Arguments")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


def _sending(build: Callable[Arguments, Call[Response]]) -> Callable[Concatenate[Client, Arguments], Response]:
    """The method of `Client` that sends the request built by `build`."""

    def method(self: Client, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Response:
        return self._send(build(*args, **kwargs))

    functools.update_wrapper(method, build)
    return method


def _awaiting(
    build: Callable[Arguments, Call[Response]],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Response]]:
    """The method of `AsyncClient` that sends the request built by `build`."""

    async def method(self: AsyncClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Response:
        return await self._send(build(*args, **kwargs))

    functools.update_wrapper(method, build)
    return method


class BaseClient(Generic[Http]):
    """Constructor and errors of both clients.

    Args:
        url: address of the application, such as `http://127.0.0.1:8000`.
        key: API key, if the server needs one; surrounding white space is removed.
        timeout: seconds to wait for one response, or None for no limit.
        retries: policy for transient failures. All calls are idempotent, so a retry is safe.
        options: options of the httpx client, such as `verify`, `transport`, or `trust_env=False`, which ignores the
            proxies of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY).

    Calls raise ArgumentError for an argument that cannot be sent, as the constructor does, RequestError for an error
    response, NoResponseError when no response arrives, and OSError for audio that cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float | None = TIMEOUT_SECONDS,
        retries: Retries | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(retries, Retries | None):
            raise ArgumentError(f"retries is a {type(retries).__name__}; expected Retries(attempts=…)")
        self._retries = retries or Retries()
        given = {"base_url": _server(url), "headers": _authorization(key), "timeout": _timeout(timeout), **options}
        if "headers" in options:
            raise ArgumentError("headers is not an option of this client; give the API key as key")
        if options.get("trust_env", True) and not {"proxy", "transport", "mounts"} & {*options}:
            given |= _proxy(given["base_url"], options)
        try:
            self._http: Http = self._open(**given)
        except (ImportError, TypeError, ValueError, httpx.InvalidURL) as error:
            raise ArgumentError(
                f"the client cannot be made with {', '.join(options) or 'its arguments'}: {error}"
            ) from None

    def _open(self, **options: Any) -> Http:
        raise NotImplementedError

    def _request(self, call: Call[Response], parts: dict[str, Any]) -> httpx.Request:
        try:
            return self._http.build_request(call.method, call.path, **parts)
        except httpx.InvalidURL as error:  # httpx limits the length of a URL
            named = ", ".join(["song_id"] * call.path.startswith("/v1/songs/") + [*call.parameters])
            raise ArgumentError(f"{named} cannot be sent in an address ({error}); expected less text") from None

    def _begin(self, call: Call[Response]) -> Attempts:
        return (self._retries if call.retry else Retries(attempts=1)).begin()


class Client(BaseClient[httpx.Client]):
    """Synchronous, thread-safe client. Close it, or use it as a context manager. See `BaseClient` for arguments."""

    def _open(self, **options: Any) -> httpx.Client:
        return httpx.Client(**options)

    search = _sending(calls.search)
    search_audio = _sending(calls.search_audio)
    recommend = _sending(calls.recommend)
    embed_text = _sending(calls.embed_text)
    embed_audio = _sending(calls.embed_audio)
    song = _sending(calls.song)
    similar = _sending(calls.similar)
    put_song = _sending(calls.put_song)
    delete_song = _sending(calls.delete_song)
    index = _sending(calls.index)
    activate = _sending(calls.activate)
    ready = _sending(calls.ready)
    alive = _sending(calls.alive)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[Response]) -> Response:
        parts = call.read()
        attempts = self._begin(call)
        while True:
            outcome = self._try(self._request(call, parts))
            wait = attempts.wait_after(outcome)
            if wait is None:
                return _response(call, outcome)
            time.sleep(wait)

    def _try(self, request: httpx.Request) -> httpx.Response | httpx.RequestError:
        try:
            return self._http.send(request)
        except httpx.RequestError as error:
            return error


class AsyncClient(BaseClient[httpx.AsyncClient]):
    """Client for asyncio. Close it, or use it as an asynchronous context manager. See `BaseClient` for arguments."""

    def _open(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(**options)

    search = _awaiting(calls.search)
    search_audio = _awaiting(calls.search_audio)
    recommend = _awaiting(calls.recommend)
    embed_text = _awaiting(calls.embed_text)
    embed_audio = _awaiting(calls.embed_audio)
    song = _awaiting(calls.song)
    similar = _awaiting(calls.similar)
    put_song = _awaiting(calls.put_song)
    delete_song = _awaiting(calls.delete_song)
    index = _awaiting(calls.index)
    activate = _awaiting(calls.activate)
    ready = _awaiting(calls.ready)
    alive = _awaiting(calls.alive)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: Call[Response]) -> Response:
        parts = await asyncio.to_thread(call.read) if call.audio is not None else call.read()
        attempts = self._begin(call)
        while True:
            outcome = await self._try(self._request(call, parts))
            wait = attempts.wait_after(outcome)
            if wait is None:
                return _response(call, outcome)
            await asyncio.sleep(wait)

    async def _try(self, request: httpx.Request) -> httpx.Response | httpx.RequestError:
        try:
            return await self._http.send(request)
        except httpx.RequestError as error:
            return error


def _server(url: str) -> httpx.URL:
    """The parsed address of a server. Raises ArgumentError."""
    try:
        parsed = httpx.URL(url)
    except (TypeError, httpx.InvalidURL):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 1) > 65535:
        raise ArgumentError("url is not the address of a server; expected one such as http://127.0.0.1:8000")
    return parsed


def _authorization(key: str | None) -> dict[str, str]:
    """The header that carries an API key. Raises ArgumentError, whose message never contains the key."""
    if key is None or key == "":
        return {}
    if not isinstance(key, str):
        raise ArgumentError(f"key is a {type(key).__name__}; expected the API key as a text")
    stripped = key.strip()
    if not re.fullmatch("[!-~]+", stripped):
        raise ArgumentError(
            "key holds characters that no API key has; expected printable ASCII characters without spaces inside"
        )
    return {"Authorization": f"Bearer {stripped}"}


def _timeout(timeout: Any) -> Any:
    if timeout is None or isinstance(timeout, httpx.Timeout):
        return timeout
    seconds = number(timeout, "timeout")
    if seconds <= 0:
        raise ArgumentError(f"timeout is {seconds}; expected seconds above 0, or None for no limit")
    return seconds


def _proxy(url: httpx.URL, options: dict[str, Any]) -> dict[str, Any]:
    """Options of httpx for this server's proxy from the environment; httpx itself would open proxies of all servers.

    Raises ArgumentError when the proxy cannot be used. The message does not contain its address, which may hold a
    password.
    """
    proxies = getproxies()
    direct = (
        "*" in re.split(r"[,\s]+", proxies.get("no", "")) or proxy_bypass(url.netloc.decode()) or proxy_bypass(url.host)
    )
    proxy = None if direct else proxies.get(url.scheme) or proxies.get("all")
    if not proxy:  # certificates that the environment names are still used
        verify = httpx.create_ssl_context(options.get("verify", True), options.get("cert"), trust_env=True)
        return {"trust_env": False, "verify": verify, "cert": None} if url.scheme == "https" else {"trust_env": False}
    advice = "set NO_PROXY for this host, or make the client with trust_env=False"
    try:
        checked = httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
    except (ValueError, httpx.InvalidURL):
        raise ArgumentError(
            f"url is {url.host}, for which the environment names a proxy that is not http://, https:// or socks5://; "
            f"{advice}"
        ) from None
    if checked.url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ArgumentError(
            f"url is {url.host}, for which the environment names a SOCKS proxy; run pip install 'httpx[socks]' for it, "
            f"{advice}"
        )
    return {"proxy": checked}


def _response(call: Call[Response], outcome: httpx.Response | httpx.RequestError) -> Response:
    """The typed response. Raises RequestError and NoResponseError."""
    name = f"{call.method} {call.path}"
    if isinstance(outcome, httpx.RequestError):
        reason = str(outcome) or "it took too long"
        raise NoResponseError(f"{name} had no response: {type(outcome).__name__}, {reason}") from outcome
    if outcome.is_success:
        try:
            return call.response.model_validate_json(outcome.content)
        except ValidationError as error:
            message = (
                f"the response to {name} is not what this client expects: {first_fault(error)}; is it an HTCL server?"
            )
            raise RequestError(outcome.status_code, "not_understood", message) from None
    try:
        body = outcome.json()["error"]
        code, message = str(body["code"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "error", f"{name} returned {outcome.status_code}: {outcome.text[:200]}"
    raise RequestError(outcome.status_code, code, message, retry_after(outcome))
