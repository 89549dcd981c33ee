"""What the deployment files say, as data: the commands in their text and comments, and the versions that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

LAUNCHER = ("cluster.yaml", "deploy/cluster-local.yaml", "deploy/autoscaling-local.yaml")
KUBERAY = ("deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayjob.yaml", "deploy/kuberay/rayservice.yaml")
FILES = (*LAUNCHER, *KUBERAY, "deploy/Containerfile")
GUIDE = "docs/cluster.md"


def text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


def lines(name: str) -> list[str]:
    """The file's lines without comment signs; a line that ends with a backslash is one with the next, and so is a
    folded entrypoint."""
    source = text(name)
    if name.endswith(".yaml") and "entrypoint" in load(name).get("spec", {}):
        source += "\n" + load(name)["spec"]["entrypoint"]
        source = re.sub(r"entrypoint: >-\n(\s{4}.*\n)+", "", source)
    stripped = "\n".join(re.sub(r"^\s*#\s?", "", line) for line in source.splitlines())
    if name.endswith(".md"):
        stripped = "\n".join(re.findall(r"^```bash\n(.*?)^```", stripped, flags=re.DOTALL | re.MULTILINE))
    joined = re.sub(r"\\\n\s*", "", stripped)
    for variable, value in re.findall(r'^(\w+)="([^"]*)"$', joined, re.MULTILINE):
        joined = joined.replace(f"${variable}", value)
    return joined.splitlines()


def our_commands(name: str) -> list[list[str]]:
    """Arguments of `htcl` for every `python …jobs/X.py …` and `htcl …` line, the job's file first."""
    found = []
    for line in lines(name):
        if match := re.search(r"\bpython (\S*jobs/\w+\.py)(.*)", line):
            found.append([match[1], *_words(match[2])])
        elif match := re.match(r"\s*(?:- )?htcl (.*)", line):
            found.append(["htcl", *_words(match[1])])
    return found


def ray_commands(name: str) -> list[list[str]]:
    """Arguments of every `ray …` command: those that stand at the start of a line, behind `- `, `VARIABLE=value` or
    `;`."""
    found = []
    for line in lines(name):
        command = re.sub(r"^\s*(?:- )?(?:export )?(?:\w+=\S+ )*(?:export .*? && )?", "", line)
        if command.startswith("ray ") and not command.startswith("ray ."):
            found.append(_words(command)[1:])
    return found


def _words(command: str) -> list[str]:
    return shlex.split(re.split(r"\s+#|`", command)[0], comments=False)


def pod_templates(node: Any) -> list[dict[str, Any]]:
    """Every pod's spec in a manifest."""
    if isinstance(node, list):
        return [spec for item in node for spec in pod_templates(item)]
    if not isinstance(node, dict):
        return []
    own = [node["template"]["spec"]] if "template" in node else []
    return own + [spec for value in node.values() for spec in pod_templates(value)]


def repository_file(name: str) -> Path:
    return REPOSITORY / name
