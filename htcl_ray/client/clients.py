"""The two clients: the same calls, sent from a thread or from asyncio."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx
from pydantic import ValidationError

from htcl_ray.client import calls
from htcl_ray.client.calls import Call, Given
from htcl_ray.client.retries import Retries, retry_after
from htcl_ray.errors import NoAnswerError, RequestError

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

    `url`: of the application, `http://127.0.0.1:8000`; `key`: an API key, where one is needed; `timeout`: seconds that the server may
    take for one answer; `options`: of httpx's client, such as `verify` or `transport`.

    Calls raise RequestError for what the server refuses, NoAnswerError when there is no answer, and OSError for audio that cannot be
    read. What may pass by itself is sent again as `retries` says: every call gives the same when it is sent twice.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = TIMEOUT_SECONDS, retries: Retries | None = None, **options: Any
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._retries = retries or Retries()
        self._http: Http = self._open(base_url=url, headers=headers, timeout=timeout, **options)

    def _open(self, **options: Any) -> Http:
        raise NotImplementedError

    def _begin(self, call: Call[Given]) -> Any:
        return (self._retries if call.again else Retries(attempts=1)).begin()


class Client(Common[httpx.Client]):
    """For threads; several may share one. Close it, or use it as a context manager. What it is made with: see `Common`."""

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
            outcome = self._try(self._http.build_request(call.method, call.path, **parts))
            wait = attempts.wait_after(outcome)
            if wait is None:
                return _given(call, outcome)
            time.sleep(wait)

    def _try(self, request: httpx.Request) -> httpx.Response | httpx.TransportError:
        try:
            return self._http.send(request)
        except httpx.TransportError as error:
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
            outcome = await self._try(self._http.build_request(call.method, call.path, **parts))
            wait = attempts.wait_after(outcome)
            if wait is None:
                return _given(call, outcome)
            await asyncio.sleep(wait)

    async def _try(self, request: httpx.Request) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.send(request)
        except httpx.TransportError as error:
            return error


def _given(call: Call[Given], outcome: httpx.Response | httpx.TransportError) -> Given:
    """What the call gives. Raises RequestError and NoAnswerError."""
    what = f"{call.method} {call.path}"
    if isinstance(outcome, httpx.TransportError):
        reason = str(outcome) or "it took too long"
        raise NoAnswerError(f"{what} had no answer: {type(outcome).__name__}, {reason}") from outcome
    if outcome.is_success:
        try:
            return call.gives.model_validate_json(outcome.content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            said = f"{what} was answered with what this client does not understand: {place}: {first['msg']}; is it an HTCL server?"
            raise RequestError(outcome.status_code, "not_understood", said) from None
    try:
        body = outcome.json()["error"]
        code, message = str(body["code"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "error", f"{what} was answered with {outcome.status_code}: {outcome.text[:200]}"
    raise RequestError(outcome.status_code, code, message, retry_after(outcome))
