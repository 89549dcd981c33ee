"""The two clients: the same calls, sent from a thread or from asyncio."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import ValidationError

from htcl_ray.client import calls
from htcl_ray.client.arguments import number
from htcl_ray.client.calls import Call, Given
from htcl_ray.client.retries import Retries, retry_after
from htcl_ray.errors import ArgumentError, NoResponseError, RequestError, first_fault

TIMEOUT_SECONDS = 30.0
Asked = ParamSpec("Asked")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


def _sending(build: Callable[Asked, Call[Given]]) -> Callable[Concatenate[Client, Asked], Given]:
    """The method of `Client` that sends what `build` makes."""

    @functools.wraps(build)
    def method(self: Client, *args: Asked.args, **kwargs: Asked.kwargs) -> Given:
        return self._send(build(*args, **kwargs))

    return method


def _awaiting(build: Callable[Asked, Call[Given]]) -> Callable[Concatenate[AsyncClient, Asked], Awaitable[Given]]:
    """The method of `AsyncClient` that sends what `build` makes."""

    @functools.wraps(build)
    async def method(self: AsyncClient, *args: Asked.args, **kwargs: Asked.kwargs) -> Given:
        return await self._send(build(*args, **kwargs))

    return method


class Common(Generic[Http]):
    """What both clients are made with.

    `url`: of the application, `http://127.0.0.1:8000`; `key`: an API key, where one is needed, without the white space
    around it; `timeout`: seconds that the server may take for one response, or None; `options`: of httpx's client, such
    as `verify`, `transport` or `trust_env=False`, which ignores the proxies that the environment names (HTTP_PROXY,
    HTTPS_PROXY, ALL_PROXY, NO_PROXY).

    Calls raise ArgumentError for an argument that cannot be sent, as the constructor does, RequestError for what the
    server refuses, NoResponseError when there is no response, and OSError for audio that cannot be read. What may pass by
    itself is sent again as `retries` says: every call gives the same when it is sent twice.
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

    def _request(self, call: Call[Given], parts: dict[str, Any]) -> httpx.Request:
        try:
            return self._http.build_request(call.method, call.path, **parts)
        except httpx.InvalidURL as error:  # longer than any server takes
            named = ", ".join(["song_id"] * call.path.startswith("/v1/songs/") + [*call.parameters])
            raise ArgumentError(f"{named} cannot be sent in an address ({error}); expected less text") from None

    def _begin(self, call: Call[Given]) -> Any:
        return (self._retries if call.again else Retries(attempts=1)).begin()


class Client(Common[httpx.Client]):
    """For threads; several may share one. Close it, or use it as a context manager. What it is made with: see
    `Common`.
    """

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
        """Give the connections back."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[Given]) -> Given:
        parts = call.read()
        attempts = self._begin(call)
        while True:
            outcome = self._try(self._request(call, parts))
            wait = attempts.wait_after(outcome)
            if wait is None:
                return _given(call, outcome)
            time.sleep(wait)

    def _try(self, request: httpx.Request) -> httpx.Response | httpx.RequestError:
        try:
            return self._http.send(request)
        except httpx.RequestError as error:
            return error


class AsyncClient(Common[httpx.AsyncClient]):
    """For asyncio. Close it, or use it as an asynchronous context manager. What it is made with: see `Common`."""

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
        """Give the connections back."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, call: Call[Given]) -> Given:
        parts = await asyncio.to_thread(call.read) if call.audio is not None else call.read()
        attempts = self._begin(call)
        while True:
            outcome = await self._try(self._request(call, parts))
            wait = attempts.wait_after(outcome)
            if wait is None:
                return _given(call, outcome)
            await asyncio.sleep(wait)

    async def _try(self, request: httpx.Request) -> httpx.Response | httpx.RequestError:
        try:
            return await self._http.send(request)
        except httpx.RequestError as error:
            return error


def _server(url: str) -> httpx.URL:
    """The address of a server. Raises ArgumentError."""
    try:
        parsed = httpx.URL(url)
    except (TypeError, httpx.InvalidURL):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 1) > 65535:
        raise ArgumentError("url is not the address of a server; expected one such as http://127.0.0.1:8000")
    return parsed


def _authorization(key: str | None) -> dict[str, str]:
    """The header of an API key. Raises ArgumentError, which never shows the key."""
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
    """Options of httpx for the proxy that the environment names for this server alone: httpx opens those of all
    servers, needed or not.

    Raises ArgumentError when that proxy cannot be used. The message does not show its address, which may hold a
    password.
    """
    proxies = getproxies()
    direct = (
        "*" in re.split(r"[,\s]+", proxies.get("no", "")) or proxy_bypass(url.netloc.decode()) or proxy_bypass(url.host)
    )
    proxy = None if direct else proxies.get(url.scheme) or proxies.get("all")
    if not proxy:  # the files of certificates that the environment names still count
        verify = httpx.create_ssl_context(options.get("verify", True), options.get("cert"), trust_env=True)
        return {"trust_env": False, "verify": verify, "cert": None} if url.scheme == "https" else {"trust_env": False}
    way = "set NO_PROXY for this host, or make the client with trust_env=False"
    try:
        checked = httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
    except (ValueError, httpx.InvalidURL):
        raise ArgumentError(
            f"url is {url.host}, for which the environment names a proxy that is not http://, https:// or socks5://; {way}"
        ) from None
    if checked.url.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ArgumentError(
            f"url is {url.host}, for which the environment names a SOCKS proxy; run pip install 'httpx[socks]' for it, {way}"
        )
    return {"proxy": checked}


def _given(call: Call[Given], outcome: httpx.Response | httpx.RequestError) -> Given:
    """What the call gives. Raises RequestError and NoResponseError."""
    what = f"{call.method} {call.path}"
    if isinstance(outcome, httpx.RequestError):
        reason = str(outcome) or "it took too long"
        raise NoResponseError(f"{what} had no answer: {type(outcome).__name__}, {reason}") from outcome
    if outcome.is_success:
        try:
            return call.gives.model_validate_json(outcome.content)
        except ValidationError as error:
            said = f"{what} was answered with what this client does not understand: {first_fault(error)}; is it an HTCL server?"
            raise RequestError(outcome.status_code, "not_understood", said) from None
    try:
        body = outcome.json()["error"]
        code, message = str(body["code"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "error", f"{what} was answered with {outcome.status_code}: {outcome.text[:200]}"
    raise RequestError(outcome.status_code, code, message, retry_after(outcome))
