"""Check the documentation: commands, flags, configuration keys, requests, imports and links exist, and the site builds."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from docs import generate
from htcl_ray import cli
from htcl_ray.api.requests import EmbedTextRequest, RecommendRequest, SearchRequest
from htcl_ray.config import Config, resolve
from htcl_ray.config.sections import Settings
from tests.architecture.test_dashboard import EXPORTED
from tests.conftest import REPOSITORY
from tests.worlds.documented_commands import PAGES, Shown, blocks, commands, spans

pytestmark = pytest.mark.unit

COMMANDS = [shown for page in PAGES for shown in commands(page)]
SECTIONS = [
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
]
KEY = re.compile(rf"({'|'.join(SECTIONS)})\.(\w+)(?:\.\w+)?(?:=.*)?")
FILE_SUFFIXES = {"py", "yaml", "html", "json", "jsonl", "md", "faiss", "pth", "parquet"}
REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/search": SearchRequest,
    "/v1/recommend": RecommendRequest,
    "/v1/embeddings": EmbedTextRequest,
}


def by_page(path: Path) -> str:
    return path.name


def test_pages_contain_commands():
    assert len(COMMANDS) > 40
    shown = {shown.words[0] for shown in COMMANDS}
    assert shown >= set(cli.COMMANDS) - {"demo"}  # documented as `make demo`


@pytest.mark.parametrize("shown", sorted(set(COMMANDS), key=str), ids=str)
def test_a_documented_command_parses(shown: Shown):
    """Subcommand and flags exist, and every --set has a valid key and value."""
    options = cli.build_parser().parse_args(shown.words)
    resolve(options.preset or "paper", None, options.assignments)


COMMON_FLAGS = {"--preset", "--config", "--set", "--workspace", "--help"}


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_flags_in_prose_exist(page: Path):
    for span in spans(page):
        words = span.split()
        if words[:1] != ["htcl"] or len(words) < 2 or words[1].startswith("-"):
            continue
        assert words[1] in cli.COMMANDS, f"{page.name}: `{span}`"
        flags = COMMON_FLAGS | {flag.split()[0] for flag, _ in generate.flags_of(words[1])}
        for word in words[2:]:
            assert not word.startswith("-") or word.partition("=")[0] in flags, f"{page.name}: `{span}`: {word}"


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_configuration_keys_in_prose_exist(page: Path):
    for span in spans(page):
        for word in span.replace("'", " ").split():
            match = KEY.fullmatch(word)
            if match and match[2] not in FILE_SUFFIXES:
                fields = Config.model_fields[match[1]].annotation.model_fields  # type: ignore[union-attr]
                assert match[2] in fields, f"{page.name}: `{span}`: {word}"


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_documented_requests_are_valid(page: Path):
    for block in blocks(page, "bash"):
        for path, body in re.findall(r"localhost:8000(/v1/\w+) [^\n]*?-d '(\{.*?\})'", block, re.DOTALL):
            REQUESTS[path].model_validate(json.loads(body))


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_documented_python_parses_and_its_imports_exist(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("htcl_ray"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), block


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_documented_configuration_is_valid(page: Path):
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and set(content) <= set(SECTIONS):
            Config.model_validate(content)


@pytest.mark.parametrize("page", PAGES, ids=by_page)
def test_documented_metrics_are_exported(page: Path):
    exported = set(EXPORTED) | {name.removesuffix("_bucket") for name in EXPORTED}
    named = set(re.findall(r"\bray_(?:htcl|serve)_\w+", page.read_text(encoding="utf-8")))
    assert named <= exported, f"{page.name}: {sorted(named - exported)}"


def test_documented_client_methods_exist():
    from htcl_ray.client import AsyncClient, Client

    page = REPOSITORY / "docs" / "client.md"
    text = page.read_text(encoding="utf-8")
    named = {*re.findall(r"\bclient\.(\w+)\(", text), *re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)}
    assert len(named) >= 10
    assert all(hasattr(client, name) for client in (Client, AsyncClient) for name in named)


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_pages_are_up_to_date(page: str):
    assert (REPOSITORY / "docs" / page).read_text(encoding="utf-8") == generate.generated(page), (
        "run: python docs/generate.py"
    )


def test_the_readme_is_short_and_its_screenshot_small():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 160
    assert (REPOSITORY / "docs" / "page.png").stat().st_size <= 300_000


def test_the_merge_of_generated_pages_is_configured():
    attributes = (REPOSITORY / ".gitattributes").read_text(encoding="utf-8")
    assert all(f"docs/{page} merge=union" in attributes for page in generate.PAGES)


def test_every_page_is_in_the_navigation():
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    shown = {path for entry in yaml.safe_load(text)["nav"] for path in entry.values()}
    assert shown == {page.name for page in PAGES[1:]}


def test_the_site_builds_without_warnings(tmp_path: Path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        "mkdocs.yml",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert pages >= {page.name.replace(".md", ".html") for page in PAGES[1:]}
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?:[^"]+)"', page.read_text())
        assert not loaded, f"{page.name} loads external resources: {loaded}"
