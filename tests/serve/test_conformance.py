"""Schemathesis against the running application, with a key that may write: what `/openapi.json` says is what is answered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.conformance import schemathesis, summary
from htcl_ray.config import Config
from htcl_ray.serving.application import serving

pytestmark = pytest.mark.serve


def test_every_answer_is_as_documented(indexed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(indexed.workspace, tmp_path / "workspace")
    monkeypatch.setenv("HTCL_API_KEYS", "[{name: tester, key: writes-too-0123456789, scopes: [write]}]")
    monkeypatch.chdir(tmp_path)
    with serving(indexed.with_overrides({"workspace": str(tmp_path / "workspace")})) as url:
        status, output = schemathesis(url, "writes-too-0123456789", seed=1, examples=10)
    assert status == 0, output
    found = summary(output)
    assert found["operations"] == 15
    assert found["requests"] > 300
    assert not found["failures"]
