"""Uploading to and loading from the Hugging Face hub, with the hub's own client against a small hub on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from htcl_ray.config import resolve
from htcl_ray.errors import ConfigError, WorkspaceError
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece

pytestmark = pytest.mark.unit

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


def commit_of(branch: str) -> str:
    return branch.encode().hex().zfill(40)


class Hub:
    """Repositories by id: whether private, and the files of each branch. Responds with 401 without the token."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two packets: tests/worlds/object_store.py

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                if self.headers.get("authorization") != f"Bearer {TOKEN}":
                    return self.respond(401, {"error": "Invalid credentials in Authorization header"})
                return self.respond(*hub.reply(self.command, path, body))

            do_HEAD = do_POST = do_GET

            def respond(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Length": str(len(data)),
                    "Content-Type": "application/json",
                    **(headers or {}),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def create(self, repo_id: str, private: bool) -> None:
        self.private[repo_id] = private
        self.branches[repo_id, "main"] = {}

    def reply(self, method: str, path: str, body: bytes) -> tuple:
        if path == "/api/repos/create":
            request = json.loads(body)
            repo_id = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            if repo_id in self.private:
                return 409, {"error": "exists", "url": f"{self.url}/{repo_id}"}
            self.create(repo_id, request.get("private", False) or request.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo_id = next((name for name in self.private if f"/{name}/" in f"{path}/"), "")
        action, _, rest = path.partition(f"{repo_id}/")[2].partition("/")
        if not repo_id:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if action == "branch":
            if (repo_id, rest) in self.branches:
                return 409, {"error": "exists"}
            self.branches[repo_id, rest] = dict(self.branches[repo_id, "main"])
            return 200, {}
        if action == "preupload":
            return 200, {
                "files": [
                    {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
            }
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.branches[repo_id, rest][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{repo_id}/commit/{'0' * 40}"}
        revision = rest.partition("/")[0] if action in ("revision", "resolve", "tree") else "main"
        revision = next((branch for _, branch in self.branches if revision == commit_of(branch)), revision)
        files = self.branches.get((repo_id, revision))
        if files is None:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        if action == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
            ]
        if action == "resolve":
            data = files[rest.partition("/")[2]]
            return 200, data, {"ETag": f'"{len(data)}"', "X-Repo-Commit": commit_of(revision)}
        siblings = [{"rfilename": name} for name in files]
        return 200, {"id": repo_id, "private": self.private[repo_id], "sha": commit_of(revision), "siblings": siblings}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def model() -> HTCL:
    sizes = {
        "width": 32,
        "layers": 1,
        "heads": 2,
        "feed_forward": 32,
        "position_groups": 4,
        "dim": 16,
        "conv_channels": 16,
    }
    small = {
        **{f"model.{name}": size for name, size in sizes.items()},
        "text.width": 32,
        "text.layers": 1,
        "license": "cc-by-nc-4.0",
    }
    config = resolve("demo").with_overrides(small)
    return HTCL.untrained(config, train_wordpiece(["calm piano", "fast techno"], config.text.vocab_size)).eval()


FILES = {"README.md", "config.json", "model.safetensors"}


def test_a_new_repository_is_private(hub: Hub, model: HTCL):
    model.push_to_hub("someone/model", token=TOKEN)
    assert hub.private == {"someone/model": True}
    assert set(hub.branches["someone/model", "main"]) >= FILES
    model.push_to_hub("someone/model", token=TOKEN)


def test_a_public_one_is_made_only_on_request(hub: Hub, model: HTCL):
    model.push_to_hub("someone/model", private=False, token=TOKEN)
    assert hub.private == {"someone/model": False}
    assert set(hub.branches["someone/model", "main"]) >= FILES


def test_a_private_model_does_not_go_into_a_public_repository(hub: Hub, model: HTCL):
    hub.create("someone/model", private=False)
    with pytest.raises(WorkspaceError, match="private=False"):
        model.push_to_hub("someone/model", token=TOKEN)
    assert hub.branches == {("someone/model", "main"): {}}


def test_a_revision_is_a_branch_of_its_own(hub: Hub, model: HTCL):
    model.push_to_hub("someone/model", revision="nightly", token=TOKEN)
    assert not hub.branches["someone/model", "main"]
    assert set(hub.branches["someone/model", "nightly"]) >= FILES
    model.push_to_hub("someone/model", revision="nightly", token=TOKEN)
    loaded = HTCL.from_pretrained("someone/model", revision="nightly", token=TOKEN)
    assert torch.equal(loaded.embed_text(["calm piano"]), model.embed_text(["calm piano"]))
    with pytest.raises(WorkspaceError, match="at revision 'weekly'"):
        HTCL.from_pretrained("someone/model", revision="weekly", token=TOKEN)


def test_the_token_is_in_no_message(hub: Hub, model: HTCL):
    for wrong, said in (("hf_wrongwrongwrongwrongwrongwrong", "someone/model"), (f"{TOKEN}\nX: y", "token")):
        with pytest.raises(WorkspaceError, match=said) as caught:
            model.push_to_hub("someone/model", token=wrong)
        assert wrong not in str(caught.value)
        assert TOKEN not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not hub.private
    model.push_to_hub("someone/model", token=f"{TOKEN}\n")
    assert hub.private


def test_a_folder_has_no_revision(model: HTCL, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(WorkspaceError, match="no revision 'main'"):
        HTCL.from_pretrained(tmp_path / "model", revision="main")


def test_the_card_names_license_and_pipeline_tag(hub: Hub, model: HTCL):
    model.push_to_hub("someone/model", token=TOKEN)
    card = ModelCard(hub.branches["someone/model", "main"]["README.md"].decode(), ignore_metadata_errors=False)
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "cc-by-nc-4.0",
        "feature-extraction",
        "htcl-ray",
    )
    assert model.to_stage_2(0.1, 0).record.license == "cc-by-nc-4.0"


def test_the_license_is_unknown_until_it_is_set():
    assert resolve("paper").license == "unknown"
    for wrong in ("", "Apache 2.0", "mit\ntags: x"):
        with pytest.raises(ConfigError, match="license"):
            resolve("demo").with_overrides({"license": wrong})
