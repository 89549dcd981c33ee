"""Arguments of the clients: conversion of NumPy and torch values, invalid values, keys and proxies."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx
import numpy as np
import pytest
import torch

from htcl_ray.client import ArgumentError, AsyncClient, Client, NoResponseError, Play, Retries
from htcl_ray.client import calls as all_calls

pytestmark = pytest.mark.unit

KEY = "a-secret-key-0123456789"
NAN, HALF = float("nan"), "\ud800"
ONCE = Retries(attempts=1)
Send = Callable[..., httpx.Request]


def call(kind: type, transport: httpx.MockTransport, name: str, *args: Any, **kwargs: Any) -> Any:
    result = getattr(kind("http://server", transport=transport), name)(*args, **kwargs)
    return asyncio.run(result) if kind is AsyncClient else result


@pytest.fixture(params=["threads", "asyncio"])
def send(request: pytest.FixtureRequest) -> Send:
    """Return the request that a call sends."""

    def run(name: str, *args: Any, **kwargs: Any) -> httpx.Request:
        seen: list[httpx.Request] = []

        def respond(sent: httpx.Request) -> httpx.Response:
            sent.read()
            seen.append(sent)
            raise httpx.ReadTimeout("request recorded")

        transport = httpx.MockTransport(respond)

        with pytest.raises(NoResponseError):
            call(Client if request.param == "threads" else AsyncClient, transport, name, *args, **kwargs)
        return seen[0]

    return run


def test_numpy_and_torch_values_become_json(send: Send):
    vector = np.array([0.5, -1.25, 3.0], np.float32)
    for numbers in (
        vector,
        torch.tensor([0.5, -1.25, 3.0], requires_grad=True),
        list(vector),
        tuple(torch.tensor([0.5, -1.25, 3.0])),
    ):
        sent = send(
            "search", vector=numbers, k=np.int64(3), blend=np.float32(0.25), collapse_duplicates=np.bool_(False)
        )
        assert json.loads(sent.content) == {
            "vector": [0.5, -1.25, 3.0],
            "k": 3,
            "blend": 0.25,
            "collapse_duplicates": False,
        }
    sent = send(
        "search",
        "x",
        k=np.float64(3),
        max_per_artist=None,
        filter={"year": {"gte": np.int16(1990)}, "genre": np.array(["rock", "ü"])},
    )
    assert json.loads(sent.content) == {"text": "x", "k": 3, "filter": {"year": {"gte": 1990}, "genre": ["rock", "ü"]}}
    history = [Play(np.str_("a"), np.float32(0.5), np.int64(7)), Play("b", 2), "c"]  # type: ignore[arg-type]
    expected = [
        {"song_id": "a", "weight": 0.5, "timestamp": 7},
        {"song_id": "b", "weight": 2, "timestamp": None},
        {"song_id": "c", "weight": 1, "timestamp": None},
    ]
    for given in (history, tuple(history), iter(history)):
        assert json.loads(send("recommend", given, half_life_days=np.float64(2)).content) == {
            "history": expected,
            "half_life_days": 2,
        }
    assert json.loads(send("search", song_ids=np.array(["a", "b"])).content) == {"song_ids": ["a", "b"]}
    sent = send("similar", "a/b", k=np.uint8(4), filter={"genre": ("rock",)})
    assert (sent.url.raw_path.partition(b"?")[0], dict(sent.url.params)) == (
        b"/v1/songs/a%2Fb/similar",
        {"k": "4", "filter": '{"genre": ["rock"]}'},
    )
    assert json.loads(send("put_song", "a", metadata={"year": np.int32(1999), "tags": [np.str_("t")]}).content) == {
        "year": 1999,
        "tags": ["t"],
    }


NO_AUDIO = (None, np.zeros(9), 3, "a\0b", io.StringIO("x"))
NO_IDS = (123, None, "", HALF, "x" * 70_000)


def _identity(value: Any) -> str:
    """The same in every process of pytest-xdist."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


CALLS: list[tuple[str, tuple, dict[str, Any]]] = [
    *(
        ("k", ("search", "x"), {"k": value})
        for value in ("5", 2.5, True, NAN, float("inf"), 10**400, [1], datetime.date(2024, 1, 1))
    ),
    *(("blend", ("search_audio", b"x"), {"blend": value}) for value in ("half", NAN, False, {})),
    *(("filter", ("similar", "a"), {"filter": value}) for value in ("genre", [1], {1: "a"}, 3)),
    ("filter.genre", ("search", "x"), {"filter": {"genre": {"a"}}}),
    ("filter.year.gte", ("search", "x"), {"filter": {"year": {"gte": NAN}}}),
    ("filter.genre[1]", ("search", "x"), {"filter": {"genre": ["a", HALF]}}),
    ("max_per_artist", ("recommend", ["a"]), {"max_per_artist": "all"}),
    ("collapse_duplicates", ("search", "x"), {"collapse_duplicates": "yes"}),
    ("limit", ("search", "x"), {"limit": 3}),
    *(("text", ("search", value), {}) for value in (3, b"x", HALF, ["x"])),
    *(("text", ("embed_text", value), {}) for value in (None, 3, HALF)),
    *(("song_id", ("search",), {"song_id": value}) for value in (3, "", HALF)),
    *(("song_ids", ("search",), {"song_ids": value}) for value in ("abc", b"abc", {"a": 1}, 3)),
    ("song_ids[1]", ("search",), {"song_ids": ["a", NAN]}),
    ("negative_song_ids", ("search",), {"song_id": "a", "negative_song_ids": "b"}),
    ("negative_song_ids[0]", ("search",), {"song_id": "a", "negative_song_ids": [None]}),
    *(
        ("vector", ("search",), {"vector": value})
        for value in ("0.1", 3, np.float32(1), np.datetime64("2024-01-01", "ns"))
    ),
    ("vector[0]", ("search",), {"vector": np.zeros((2, 3))}),
    ("vector[1]", ("search",), {"vector": np.array([0, np.inf])}),
    *(("history", ("recommend", value), {}) for value in ("abc", 3, {"a": 1}, None)),
    *(("history[0]", ("recommend", [value]), {}) for value in (3, ("a", 1), {"song_id": "a"}, None)),
    ("history[1].song_id", ("recommend", ["a", Play(3)]), {}),  # type: ignore[arg-type]
    *(("history[0].weight", ("recommend", [Play("a", value)]), {}) for value in (NAN, "1", None)),
    *(
        ("history[0].timestamp", ("recommend", [Play("a", 1, value)]), {})
        for value in (datetime.datetime(2024, 1, 1), np.datetime64("2024-01-01", "ns"), "2024-01-01", NAN)
    ),
    *(
        ("half_life_days", ("recommend", ["a"]), {"half_life_days": value})
        for value in ("30", datetime.timedelta(30), NAN)
    ),
    *(("audio", ("search_audio", value), {}) for value in NO_AUDIO),
    *(("audio", ("embed_audio", value), {}) for value in NO_AUDIO),
    ("audio", ("put_song", "a", np.zeros(9)), {}),
    *(("metadata", ("put_song", "a", None, value), {}) for value in ("title", ["a"], {3: "a"})),
    ("metadata.year", ("put_song", "a", b"x", {"year": NAN}), {}),
    ("metadata.title", ("put_song", "a", None, {"title": datetime.date(2024, 1, 1)}), {}),
    *(("song_id", (name, value), {}) for name in ("song", "similar", "put_song", "delete_song") for value in NO_IDS),
    *(("version", ("activate", value), {}) for value in (3, None, HALF)),
]


@pytest.mark.parametrize(("argument", "given", "options"), CALLS, ids=_identity)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_invalid_value_raises_and_names_the_argument(kind: type, argument: str, given: tuple, options: dict[str, Any]):
    def respond(sent: httpx.Request) -> httpx.Response:
        raise AssertionError("it was sent")

    with pytest.raises(ArgumentError) as caught:
        call(kind, httpx.MockTransport(respond), *given, **options)
    assert argument in str(caught.value)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


def test_every_call_with_arguments_has_a_case():
    takes_none = {"index", "ready", "alive", "close"}
    public = {name for name in dir(Client) if not name.startswith("_")} - takes_none
    assert public == {given[0] for _, given, _ in CALLS}
    assert set(all_calls.OPTION_CHECKS) == set(all_calls.SearchKeywords.__annotations__)


def test_file_names_without_utf_8_are_sent(send: Send, tmp_path: Path):
    file = tmp_path / "caf\udce9.wav"
    file.write_bytes(b"audio")
    assert b"audio" in send("search_audio", file).content
    nameless = io.BytesIO(b"audio")
    nameless.name = ""  # type: ignore[misc]
    assert b'filename="audio"' in send("search_audio", nameless).content


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {}\t", "{} "])
def test_key_is_stripped(kind: type, around: str):
    sent: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json={"status": "ok"})

    client = kind("http://127.0.0.1:9", key=around.format(KEY), transport=httpx.MockTransport(respond))
    result = client.alive()
    if kind is AsyncClient:
        asyncio.run(result)
    assert sent[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "key",
    [f"{KEY}\nX-Other: 1", f"{KEY} b", f"{KEY}\0", f"{KEY}ключ", f"{KEY}é", KEY.encode(), 3, f"\ufeff{KEY}", " \n"],
)
def test_invalid_key_raises_without_showing_it(kind: type, key: Any):
    with pytest.raises(ArgumentError, match=r"key (holds|is)") as caught:
        kind("http://127.0.0.1:9", key=key, retries=ONCE, trust_env=False)
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        *(
            ("url", {"url": value})
            for value in (
                None,
                3,
                "",
                "127.0.0.1:8000",
                "localhost:8000",
                "ftp://host",
                "http://",
                "http://[::1",
                "http://h:99999",
            )
        ),
        *(("timeout", {"timeout": value}) for value in ("30", 0, -1, NAN, datetime.timedelta(1))),
        ("retries", {"retries": 3}),
        ("headers", {"headers": {"Authorization": "Bearer x"}}),
        ("no_such_option", {"no_such_option": 1}),
        ("proxy", {"proxy": "socks9://127.0.0.1:9"}),
    ],
    ids=str,
)
def test_invalid_constructor_argument_is_named(argument: str, options: dict[str, Any]):
    for kind in (Client, AsyncClient):
        with pytest.raises(ArgumentError, match=argument):
            kind(**{"url": "http://127.0.0.1:9"} | options)


@pytest.mark.parametrize(
    ("name", "value"), [("attempts", 0), ("attempts", 1.5), ("seconds", -1), ("first_wait", "1"), ("longest_wait", NAN)]
)
def test_invalid_retries_are_named(name: str, value: Any):
    with pytest.raises(ArgumentError, match=name):
        Retries(**{name: value})


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    return monkeypatch


@pytest.fixture
def opened_proxies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of the HTTP and SOCKS proxies that httpx opens."""
    opened: list[str] = []
    for name in ("HTTPProxy", "AsyncHTTPProxy", "SOCKSProxy", "AsyncSOCKSProxy"):

        def open_proxy(*, proxy_url: Any, **options: Any) -> None:
            opened.append(f"{proxy_url.scheme.decode()}://{proxy_url.host.decode()}:{proxy_url.port}")

        monkeypatch.setattr(httpcore, name, open_proxy)
    return opened


@pytest.mark.parametrize(
    "proxy", ["socks5://user:pass-word@127.0.0.1:9", "socks5h://127.0.0.1:9", "socks://127.0.0.1:9", "gopher://proxy"]
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_unused_proxy_is_not_opened(kind: type, no_proxies: pytest.MonkeyPatch, opened_proxies: list[str], proxy: str):
    no_proxies.setenv("ALL_PROXY", proxy)
    for host, exempt in [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "x, localhost"),
        ("[::1]", "::1"),
        ("a.example.com", ".example.com"),
        ("b", "*"),
    ]:
        no_proxies.setenv("NO_PROXY", exempt)
        kind(f"http://{host}:8000")
        kind(f"https://{host}:8000")
    assert opened_proxies == []
    no_proxies.delenv("NO_PROXY")
    kind("http://elsewhere", trust_env=False)
    with pytest.raises(ArgumentError, match="trust_env=False") as caught:
        kind("http://elsewhere")
    assert "pass-word" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_proxy_of_the_scheme_is_used(kind: type, no_proxies: pytest.MonkeyPatch, opened_proxies: list[str]):
    no_proxies.setenv("HTTP_PROXY", "127.0.0.1:81")
    no_proxies.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    no_proxies.setenv("NO_PROXY", "other")
    kind("http://elsewhere")
    assert set(opened_proxies) == {"http://127.0.0.1:81"}
    with pytest.raises(ArgumentError, match="httpx\\[socks\\]"):
        kind("https://elsewhere")
