"""Schemathesis against the running application, with a key that may write: what `/openapi.json` says is what is
responded to."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from benchmarks.conformance import schemathesis, summary
from htcl_ray.config import Config
from htcl_ray.serving.application import serving
from tests.worlds.small_workspace import song_id

pytestmark = pytest.mark.serve


def check_ids_and_head(url: str) -> None:
    """Through Ray Serve, whose scope has to carry the path as it was sent, and whose servers have to let HEAD pass."""
    with httpx.Client(base_url=url, timeout=60) as client:
        known = song_id(2)
        assert client.get(f"/v1/songs/{known}%2Fsimilar").json()["error"]["message"].count(f"'{known}/similar'") == 1
        assert client.get(f"/v1/songs/{known}/similar").json()["results"]
        for path in ("/", "/healthz", "/readyz", "/v1/index", f"/v1/songs/{known}", "/v1/nothing"):
            get, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers.get("content-length") == get.headers.get("content-length")


def test_every_response_conforms_to_the_documentation(indexed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where Schemathesis keeps files
    shutil.copytree(indexed.workspace, tmp_path / "workspace")
    keys = tmp_path / "keys.yaml"
    keys.write_text("[{name: tester, key: writes-too-0123456789, scopes: [write]}]")
    keys.chmod(0o600)
    config = indexed.with_overrides({"workspace": str(tmp_path / "workspace"), "serve.api_keys_file": str(keys)})
    with serving(config) as url:
        operations = sum(len(methods) for methods in httpx.get(f"{url}/openapi.json").json()["paths"].values())
        check_ids_and_head(url)
        known = {"authorization": "Bearer writes-too-0123456789"}
        assert httpx.delete(f"{url}/v1/songs/unknown", headers=known).status_code == 404  # so that the key is one
        status, output = schemathesis(url, "writes-too-0123456789", seed=1, examples=5)
    assert status == 0, output
    result = summary(output)
    assert result["operations"] == operations >= 16
    assert result["requests"] > 300
    assert not result["failures"]
