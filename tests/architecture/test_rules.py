"""Rules of the layout that a reader relies on, checked on the source text and on fresh processes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

SOURCES = sorted((REPOSITORY / "htcl_ray").rglob("*.py"))
MAY_IMPORT = {
    "ray": ("htcl_ray/pipelines/", "htcl_ray/serving/", "htcl_ray/cluster/"),
    "faiss": ("htcl_ray/index/engines/",),
    "torch.distributed": ("htcl_ray/losses/collectives.py", "htcl_ray/pipelines/train.py"),
    "optuna": ("htcl_ray/pipelines/", "htcl_ray/tuning/"),
    "pickle": (),
}
PURE = (
    "htcl_ray/audio/",
    "htcl_ray/catalog/",
    "htcl_ray/interactions/",
    "htcl_ray/demo_world/",
    "htcl_ray/evaluation/metrics.py",
)
"""Plain functions on arrays and tables: no torch, so that the processes of Ray Data that run them stay small."""


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def named_modules(path: Path) -> set[str]:
    """Every string in a file that may be the name of a module, as `importlib.import_module` takes it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(f"{library}.") for name in imported_modules(path))


def test_there_are_sources_to_check():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_the_edges_import(library: str):
    offenders = [
        relative(path)
        for path in SOURCES
        if imports(path, library) and not relative(path).startswith(MAY_IMPORT[library] or ("-",))
    ]
    assert not offenders, (
        f"{library} may be imported in {MAY_IMPORT[library] or 'no file'}, but is imported in {offenders}"
    )


INTERNALS = {
    r"\b(ray|serve|tune|optuna)(\.\w+)*\.(_private|_internal|_common)\b": {"htcl_ray/cluster/ray_internals.py"},
    r"\._ot_\w+|PlainRayHandler": {"htcl_ray/cluster/ray_internals.py"},
    r"RAY_SERVE_\w+": {"htcl_ray/cluster/ray_internals.py", "htcl_ray/serving/haproxy.py"},
    r"/proc\b": {
        "htcl_ray/cluster/ray_internals.py",
        "htcl_ray/audio/sandbox_worker.py",
        "htcl_ray/training/micro_batch.py",
    },
}
"""Uses of interfaces that are private to Ray, Optuna and the kernel's processes, and the files that hold them.

`haproxy.py` is a program that Ray starts before the package can be imported. `sandbox_worker.py` is a confined process
that limits itself, and `micro_batch.py`, in a layer below Ray, reads the free memory of the machine: both use files of
`/proc` that Linux documents, and no process of Ray's.
"""


@pytest.mark.parametrize("pattern", INTERNALS)
def test_internals_are_used_in_one_file(pattern: str):
    uses = {
        relative(path): match[0] for path in SOURCES if (match := re.search(pattern, path.read_text(encoding="utf-8")))
    }
    elsewhere = {name: text for name, text in uses.items() if name not in INTERNALS[pattern]}
    assert not elsewhere, f"move these uses to htcl_ray/cluster/ray_internals.py: {elsewhere}"
    assert uses, f"{pattern} matches no file; remove it from the rule"


def test_pure_layers_import_no_torch():
    offenders = [relative(path) for path in SOURCES if relative(path).startswith(PURE) and imports(path, "torch")]
    assert not offenders


def test_files_hold_one_concern():
    long = {
        relative(path): lines for path in SOURCES if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, f"longer than 400 lines: {long}"


LAYERS = (
    {"workspace", "config", "api", "schemas", "errors", "progress"},
    {"models", "losses", "interactions", "catalog", "audio", "extractors", "demo_world", "client"},
    {"training", "evaluation", "tuning", "search", "index"},
    {"pipelines", "serving", "cluster", "commands", "integrations"},
    {"cli", "__init__"},
)
"""Parts of the package, the lowest layer first. A part imports only from its own layer and from those below."""
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
UPWARD_IMPORTS = {
    "htcl_ray/config/sections/training.py imports losses": "the keys of the registry are the values of `loss`",
    "htcl_ray/config/sections/model.py imports models": "the keys of the registry are the values of `audio.tower`",
    "htcl_ray/models/card.py imports evaluation": "a model card shows the metrics of each task",
    "htcl_ray/models/folder.py imports evaluation": "the front matter of a model card names the task of each metric",
}
"""Imports from a higher layer that remain, each with its reason."""
SHARED_MODULE_NAMES = {
    "base": "base classes, named for their folder: configuration sections, losses, towers, engines",
    "folder": "the files of a model folder and the files of an index folder",
    "registry": "registries of losses and of audio towers",
    "labels": "labels of songs in a catalogue column, and labels of trials in tables",
    "tune": "a configuration section and the step of the same name",
}
"""Module names that occur more than once, each with the reason."""
SHARED_CLASS_NAMES: dict[str, str] = {}
"""Class names that are defined more than once, each with the reason."""
SMALL_LINES = 80
MAX_SMALL_MODULES = 15
"""Number of modules of fewer than SMALL_LINES lines that at most one other module imports, by statement or by name."""


def part_of(module: str) -> str:
    """The part of the package that a module belongs to, `__init__` for the package itself."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    return relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def test_every_part_of_the_package_has_a_layer():
    parts = {part_of(module_of(path)) for path in SOURCES}
    assert parts == set(LAYER)


def test_layers_import_only_downwards():
    upward = {
        f"{relative(path)} imports {part_of(module)}"
        for path in SOURCES
        for module in imported_modules(path)
        if module.startswith("htcl_ray.") and LAYER.get(part_of(module), 0) > LAYER[part_of(module_of(path))]
    }
    assert not upward - set(UPWARD_IMPORTS), "move the definition to a lower layer"
    assert not set(UPWARD_IMPORTS) - upward, "remove these exceptions, which are no longer needed"


def test_names_of_modules_are_unique():
    names = Counter(path.stem for path in SOURCES if path.stem != "__init__")
    shared = {name for name, number in names.items() if number > 1}
    assert shared == set(SHARED_MODULE_NAMES), "rename a module, or update SHARED_MODULE_NAMES"


def test_names_of_classes_are_unique():
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    shared = {name for name, number in names.items() if number > 1}
    assert shared == set(SHARED_CLASS_NAMES), "rename a class, or update SHARED_CLASS_NAMES"


def test_few_small_modules_have_one_importer():
    modules = {module_of(path): path for path in SOURCES}
    importers = Counter(
        module
        for path in SOURCES
        for module in ((imported_modules(path) | named_modules(path)) - {module_of(path)}) & set(modules)
    )
    small = [
        name
        for name, path in modules.items()
        if path.stem != "__init__"
        and importers[name] <= 1
        and len(path.read_text(encoding="utf-8").splitlines()) < SMALL_LINES
    ]
    assert len(small) <= MAX_SMALL_MODULES, f"merge modules that exist only for one other module: {small}"


def test_no_vague_names():
    vague = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    assert not [relative(path) for path in SOURCES if path.stem in vague or path.parent.name in vague]


def test_no_unsafe_loading():
    """Nothing that comes from outside is unpickled."""
    offenders = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            name = ast.unparse(node.func)
            if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
                offenders.append(f"{relative(path)}:{node.lineno} torch.load without weights_only=True")
            if name in {"np.load", "numpy.load"} and "allow_pickle" in keywords:
                offenders.append(f"{relative(path)}:{node.lineno} numpy.load with allow_pickle")
            if "trust_remote_code" in keywords and ast.unparse(keywords["trust_remote_code"]) != "False":
                offenders.append(f"{relative(path)}:{node.lineno} remote code")
            if name.startswith("yaml.") and name.endswith("load") and name != "yaml.safe_load":
                offenders.append(f"{relative(path)}:{node.lineno} {name}")
    assert not offenders


@pytest.mark.parametrize(
    "module",
    ["htcl_ray", "htcl_ray.config", "htcl_ray.cli", "htcl_ray.client", "htcl_ray.audio", "htcl_ray.evaluation.metrics"],
)
def test_light_imports(module: str):
    """`import htcl_ray`, and what every command imports first, loads neither ray nor torch."""
    code = f"import {module}, sys; print([name for name in ('ray', 'torch', 'faiss', 'transformers') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert loaded.stdout.strip() == "[]"


def test_importing_the_serve_application_starts_nothing():
    code = "import serve.app, sys; import ray; print(ray.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False"


def test_files_with_names_that_can_be_guessed_lie_in_the_private_folder():
    """In the directory for temporary files another user can make them first; `private_folder` is below it."""
    only_named_or_random = {
        "htcl_ray/workspace/local_copies.py",
        "htcl_ray/workspace/storage.py",
        "htcl_ray/pipelines/train_worker.py",
        "htcl_ray/serving/front.py",
    }
    users = {relative(path) for path in SOURCES if "gettempdir" in path.read_text(encoding="utf-8")}
    assert users <= only_named_or_random, "use private_folder of htcl_ray/workspace/local_copies.py"


def test_jobs_hold_only_main():
    """Functions defined in `__main__` are pickled by value, so a job defines nothing but `main`."""
    jobs = sorted((REPOSITORY / "jobs").glob("*.py"))
    names = {path.stem for path in jobs} - {"__init__"}
    assert names >= {"run", "preprocess", "pretrain", "finetune", "tune", "embed", "build_index", "evaluate"}
    for path in jobs:
        if path.stem == "__init__":
            continue
        defined = [
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        assert defined == ["main"], f"{path.name} defines {defined}"


def test_jobs_are_not_called_like_a_library():
    names = {path.stem for path in (REPOSITORY / "jobs").glob("*.py")} - {"__init__"}
    assert not names & (
        set(sys.stdlib_module_names) | {"ray", "torch", "transformers", "librosa", "optuna", "faiss", "numpy"}
    )


def test_the_public_names_are_there_and_are_imported_only_when_they_are_used():
    """What DESIGN and the README promise: `from htcl_ray import HTCL, SongIndex, Client, AsyncClient, log_mel,
    info_nce, metrics`."""
    import htcl_ray
    from htcl_ray.audio import log_mel
    from htcl_ray.client import AsyncClient, Client
    from htcl_ray.evaluation import metrics
    from htcl_ray.index.song_index import SongIndex
    from htcl_ray.losses import info_nce
    from htcl_ray.models import HTCL

    expected = {"HTCL": HTCL, "SongIndex": SongIndex, "Client": Client, "AsyncClient": AsyncClient}
    expected |= {"log_mel": log_mel, "info_nce": info_nce, "metrics": metrics}
    assert set(htcl_ray.__all__) == set(expected)
    assert {name: getattr(htcl_ray, name) for name in htcl_ray.__all__} == expected
    assert set(htcl_ray.__all__) <= set(dir(htcl_ray))
    with pytest.raises(AttributeError, match="'htcl_ray' has no attribute 'nothing'"):
        htcl_ray.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "light"),
    [
        ("Client", "torch faiss ray"),
        ("log_mel", "torch faiss ray"),
        ("metrics", "torch faiss ray"),
        ("HTCL", "faiss ray"),
    ],
)
def test_a_public_name_loads_what_it_needs_and_no_more(name: str, light: str):
    code = (
        f"from htcl_ray import {name}; import sys; print([name for name in {light.split()!r} if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert loaded.stdout.strip() == "[]"
