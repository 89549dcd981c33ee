"""The commands that the README and the pages show, given to a shell exactly as they are shown, in the order of a
reader.

A line of `htcl` that ends by itself is parsed by the shell, and its command runs in a process that is shared by all of
them (tests/worlds/command_process.py); servers and requests are processes as for a reader. The reader's folder holds a small world with what the pages speak of: `songs.parquet`, `log.parquet`, `song.mp3`,
`gate.yaml`, songs that are called `SONG_ID`, `a` or `b`. Nothing of a line is changed or left out; the preset `demo` that
lines name is one with short trainings (`SHORT`), in a copy of the package. The shipped one: tests/golden/demo.yaml,
tests/end_to_end/test_demo.py. `NOT_HERE` lists what needs a cloud, Docker, Kubernetes, a cluster or another installation, each with the test that checks its files or
runs the same under other names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml

from htcl_ray.cli import build_parser
from htcl_ray.demo_world import write_sample
from tests.conftest import REPOSITORY
from tests.worlds.command_process import CommandProcess, command_process
from tests.worlds.documented_commands import PAGES, blocks, variables
from tests.worlds.official_model import small_wrapper
from tests.worlds.ray_head import environment

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(3600)]

NOT_HERE = {
    r"pip install |source ": "installs or enters an environment: Makefile, tests/architecture/test_distribution.py",
    r"make (demo|test)": "`make test` runs this file; `make demo` is `htcl demo`: tests/end_to_end/test_demo.py",
    r"make pretrained-audio|htcl [\s\S]*audio\.extractor=pretrained": "downloads the weights of an encoder: "
    "tests/unit/extractors/test_musicnn.py, and benchmarks/own_music.py gives these commands",
    r"htcl import yambda ": "a data set that is published elsewhere: tests/unit/catalog/test_public_datasets.py writes a few rows of it",
    r"export |cat > ": "sets variables for, or writes a file of, the cluster commands after it: tests/architecture/test_deploy.py",
    r"(export .* && )?ray get-auth-token |ray start --head": "a head node on the default ports: tests/worlds/ray_head.py uses free ones",
    r"ray job (submit|logs|status|stop) |DATA=.*s3://": "a cluster with its storage: tests/end_to_end/test_jobs.py runs every job, "
    "tests/architecture/test_docs.py reads every flag",
    r"python -c .*write_sample|ray status": "the rehearsal on an autoscaling cluster: tests/ray/test_tune_autoscaling.py",
    r"ray (up|dashboard|down) ": "a cloud, or machines with SSH: tests/architecture/test_deploy.py",
    r"docker build |kubectl ": "Docker, Kubernetes: tests/architecture/test_deploy.py",
    r"python -m benchmarks\.gpu|PYTHONPATH=site |pip download ": "minutes of a GPU: tests/end_to_end/test_gpu_benchmark.py rehearses it",
    r"htcl evaluate .*--ablate": "trains nine variants of both stages for minutes: tests/ray/test_ablate.py trains three",
    r"htcl serve .*serve\.host=0\.0\.0\.0": "opens a port to other machines: tests/serve/test_network.py, in a network of its own",
    r"htcl serve .*serve\.ingress_replicas=2": "tests/serve/test_platform.py has two replicas of each",
    r"serve deploy ": "a cluster that runs already: tests/serve/test_commands.py runs the same file",
}
SERVERS = r"htcl serve|serve run "
"""Exit code of `--gate default` for a model that saw some hundred songs."""
PORT = 8000
"""The port of every request that is shown."""
NAMED = ("a", "b", "c", "SONG_ID", "OTHER_SONG_ID")


SHORT = {
    "audio": {"clip_seconds": 4.0, "tower": "transformer"},  # a third of the time of a step
    "pretrain": {"epochs": 2, "num_workers": 1},
    "finetune": {"epochs": 1, "num_workers": 1, "pairs_per_epoch": 128},
    "tune": {"space": {"pretrain.learning_rate": [1e-3, 2e-3]}},
}
"""Changed keys of the preset `demo`: what is run here has to work, not to learn. A space of two points has two trials."""
GATE = "bounds:\n  - {figure: text_to_audio.semantic.median_rank, at_most: 180}\n"
"""A gate that every model of the 180 songs passes, so that later lines use it; the reader's own, and in place of the shipped one."""


class Line(NamedTuple):
    """A command as it is shown, and the page's `DATA`."""

    page: str
    text: str
    data: str


@functools.cache
def lines() -> list[Line]:
    """Every command of the shell blocks, those of the README and of the page about one's own data first; continued
    lines are one."""
    shown: list[Line] = []
    for page in sorted(PAGES, key=lambda page: page.name not in ("README.md", "own-data.md")):
        data = (variables(PAGES[0]) | variables(page))["DATA"]
        for block in blocks(page, "bash"):
            block = re.sub(r"<<'(\w+)'.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE)
            begun = ""
            for line in block.splitlines():
                begun += f"\n{line}" if begun else line
                if (
                    not line.endswith("\\")
                    and subprocess.run(["bash", "-n", "-c", begun], capture_output=True).returncode == 0
                ):
                    shown.append(Line(page.name, begun.strip(), data))
                    begun = ""
            assert not begun, f"{page.name}: {begun}"
    return [line for line in shown if line.text]


def without_comment(line: Line) -> str:
    """The text of a line up to its comment."""
    return re.sub(r"\s+#.*", "", line.text)


def here(pattern: str) -> list[Line]:
    """The lines that begin with one of these, each once whatever its comment says."""
    chosen = [
        line
        for line in lines()
        if not any(re.match(other, line.text) for other in NOT_HERE) and re.match(pattern, line.text)
    ]
    return list({(without_comment(line), line.data): line for line in chosen}.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder."""
    folder = tmp_path_factory.mktemp("reader")
    tables = write_sample(folder / "sample", songs=180, artists=90, users=40, seed=3, seconds=4.0)
    catalog, log = pa.csv.read_csv(tables.catalog), pa.csv.read_csv(tables.interactions)
    readable = [
        (folder / "sample" / path).exists() and (folder / "sample" / path).stat().st_size > 10_000
        for path in catalog["audio_path"].to_pylist()
    ]
    catalog = catalog.filter(pa.array(readable))
    names = dict(zip(catalog["song_id"].to_pylist(), NAMED, strict=False))
    for table, file in ((catalog, "songs.parquet"), (log, "log.parquet")):
        for column in ("song_id", "trigger_song_id"):
            if column in table.column_names:
                renamed = pa.array([names.get(song, song) for song in table[column].to_pylist()], pa.string())
                table = table.set_column(table.column_names.index(column), column, renamed)
        if file == "songs.parquet":
            paths = pa.array([str(folder / "sample" / path) for path in table["audio_path"].to_pylist()])
            table = table.set_column(table.column_names.index("audio_path"), "audio_path", paths)
            renamed = {"song_id": "track_uri", "audio_path": "file"}
            pq.write_table(
                table.rename_columns([renamed.get(name, name) for name in table.column_names]),
                folder / "tracks.parquet",
            )
            waveform, rate = soundfile.read(paths[0].as_py())
            soundfile.write(folder / "song.mp3", waveform, rate)
        pq.write_table(table, folder / file)
    torch.save(small_wrapper(1).state_dict(), folder / "model-20.pth")
    (folder / "gate.yaml").write_text(GATE)
    (folder / "music").symlink_to(folder / "sample/audio")
    (folder / ".curlrc").write_text("fail-with-body\n")
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, in which the preset `demo` has the settings of `SHORT`, and the gate is `GATE`."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(REPOSITORY / "htcl_ray", folder / "htcl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    preset = folder / "htcl_ray/config/presets/demo.yaml"
    settings = yaml.safe_load(preset.read_text(encoding="utf-8"))
    for section, keys in SHORT.items():
        settings.setdefault(section, {}).update(keys)
    preset.write_text(yaml.safe_dump(settings), encoding="utf-8")
    (folder / "htcl_ray/evaluation/gate.yaml").write_text(GATE)
    return folder


def reader(world: Path, package: Path) -> dict[str, str]:
    """Environment variables of a reader's shell."""
    path = os.pathsep.join([str(package), str(REPOSITORY)])
    return {**environment(), "CURL_HOME": str(world), "PYTHONPATH": path}


def shell(line: Line, world: Path, package: Path) -> dict[str, object]:
    """Arguments of subprocess for a line: bash in the reader's folder, with the page's `DATA`."""
    variables = {**reader(world, package), "DATA": line.data}
    return {"args": ["bash", "-euo", "pipefail", "-c", line.text], "cwd": world, "env": variables}


def arguments_of(line: Line, folder: Path) -> list[str]:
    """Arguments that bash gives to `htcl` in a line, which is this command and nothing else."""
    listed = 'htcl() { printf "%s\\0" "$@"; }\n'
    variables = {**environment(), "DATA": line.data}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", listed + line.text],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.split("\0")[:-1]


def run(line: Line, world: Path, package: Path) -> subprocess.CompletedProcess[str]:
    """Run a line to its end in a shell."""
    return subprocess.run(**shell(line, world, package), capture_output=True, text=True, timeout=3000, check=False)


def run_step(line: Line, world: Path, process: CommandProcess) -> subprocess.CompletedProcess[str]:
    """Run the command of a line, and print how long it took: the durations of pytest show the sum only."""
    started = time.monotonic()
    done = process.run(arguments_of(line, world))
    print(f"{time.monotonic() - started:6.1f} s  {line.page}: {line.text}", flush=True)
    return done


@contextmanager
def named(folder: Path, *names: str) -> Iterator[None]:
    """For as long as it lasts, the oldest artifact of a folder has the first name too, the newest the last."""
    made = sorted(
        (path for path in folder.glob("*/") if (path / "manifest.json").exists()), key=lambda path: path.stat().st_mtime
    )
    for name, target in zip(names, (made[0], made[-1]), strict=False):
        (folder / name).symlink_to(target)
    try:
        yield
    finally:
        for name in names:
            (folder / name).unlink()


def test_every_line_is_run_here_or_named():
    ran = {without_comment(line) for pattern in (r"htcl ", "curl ", 'DATA="', SERVERS) for line in here(pattern)}
    unknown = [
        line
        for line in lines()
        if without_comment(line) not in ran and not any(re.match(pattern, line.text) for pattern in NOT_HERE)
    ]
    assert not unknown
    assert not any(re.match(pattern, "htcl ") for pattern in NOT_HERE), (
        "every command of the package is run as it is written"
    )
    for pattern, why in NOT_HERE.items():
        assert any(re.match(pattern, line.text) for line in lines()), f"{pattern} fits nothing"
        for file in re.findall(r"tests/[\w/]+\.py", why):
            assert (REPOSITORY / file).exists(), file
        assert "tests/" in why


@pytest.fixture(scope="module")
def steps(world: Path, package: Path) -> dict[Line, subprocess.CompletedProcess[str]]:
    """Every line of `htcl` but servers, run in order: from tables to reports, comparison, ablation, search and tuning."""
    done = {}
    with command_process(world, reader(world, package)) as process:
        for line in here("htcl "):
            if "RUN_A" in line.text:
                with named(world / "workspace/reports", "RUN_A", "RUN_B"):
                    done[line] = run_step(line, world, process)
            elif not re.match(SERVERS, line.text):
                done[line] = run_step(line, world, process)
    return done


def test_steps(steps: dict[Line, subprocess.CompletedProcess[str]], world: Path):
    assert len(steps) >= 14
    for line, done in steps.items():
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr, line
    assert {path.name for path in world.iterdir() if path.is_dir()} == {"sample", "music", "workspace", "WORKSPACE"}, (
        "nothing was written elsewhere"
    )
    (trials,) = (world / "workspace/runs/tune").glob("*/trials.jsonl")
    states = [json.loads(text)["state"] for text in trials.read_text().splitlines()]
    assert "finished" in states
    assert "failed" not in states


@contextmanager
def server(line: Line, world: Path, package: Path) -> Iterator[None]:
    """A server that is shown, from its start until it has stopped after Ctrl-C."""
    deadline = time.monotonic() + 600
    while _taken(PORT):
        assert time.monotonic() < deadline, f"port {PORT} is taken, and every command that is shown uses it"
        time.sleep(1)
    log = (world / "server.log").open("w")
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and would be by the server that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(**shell(line, world, package), stdout=log, stderr=log, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    try:
        while not _ready():
            assert process.poll() is None, (world / "server.log").read_text()
            assert time.monotonic() < deadline, (world / "server.log").read_text()
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which is asserted on next
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) in (0, 130, -signal.SIGINT, 1), (world / "server.log").read_text()


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _ready() -> bool:
    try:
        return httpx.get(f"http://localhost:{PORT}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def different_servers() -> list[Line]:
    """The lines that start a server, each server once: `htcl serve` reads nothing of `data` but which index is meant,
    and the lines of `htcl search` have the same flags."""
    chosen = {}
    for line in here(SERVERS):
        same: object = line.text
        if line.text.startswith("htcl "):
            options = build_parser().parse_args(arguments_of(line, REPOSITORY))
            kept = [assignment for assignment in options.assignments if not assignment.startswith("data.")]
            same = (options.preset, options.config, options.workspace, options.index, *kept)
        chosen[same] = line
    return list(chosen.values())


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("line", different_servers(), ids=lambda line: f"{line.page}: {line.text[:30]}")
def test_servers_respond_to_every_documented_request(world: Path, package: Path, line: Line):
    requests = here("curl ")
    assert len(requests) >= 10
    with server(line, world, package):
        for request in requests:
            done = run(request, world, package)
            assert done.returncode == 0, f"{request}\n{done.stdout}{done.stderr}"
            assert not re.search(r'"error"|status="failed"|"status": ?"failed"', done.stdout), (
                f"{request}\n{done.stdout}"
            )


@pytest.mark.usefixtures("steps")
def test_python_of_the_readme_and_of_own_data(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The documented files are those that the steps wrote."""
    monkeypatch.chdir(world)
    waveform, rate = soundfile.read("song.mp3", dtype="float32")
    names = {"waveform": waveform, "sample_rate": rate}
    with named(world / "workspace/models/semantic", "VERSION"):
        for page in PAGES:
            for block in blocks(page, "python") if page.name in ("README.md", "own-data.md") else ():
                exec(compile(block, page.name, "exec"), names)
    assert names["vector"].shape == names["words"][0].shape
    assert names["words"].shape[0] == 2
    assert "unknown_song" in capsys.readouterr().out, "the reasons of the quarantine"
