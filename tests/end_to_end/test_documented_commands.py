"""The commands that the README and the pages show, given to a shell as they are shown, in the order of a reader, over a small world.

Filled in is only what a reader fills in: places, names of runs and songs, the port. Sizes are made small: a configuration file stands for
the preset, and sizes of batches and numbers of workers are lowered (`SMALLER`). What is shown but not run here is in `ELSEWHERE`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import soundfile

from htcl_ray.config import resolve
from htcl_ray.sample import write_sample
from tests.documented_commands import PAGES, blocks, variables
from tests.end_to_end.whole_path import SMALL
from tests.ray_head import environment, free_ports

pytestmark = pytest.mark.end_to_end

TINY = {
    "text.width": 16,
    "text.layers": 1,
    "model.conv_channels": 16,
    "model.width": 16,
    "model.layers": 1,
    "model.feed_forward": 32,
    "model.head_hidden": [16],
    "model.dim": 12,
    "pretrain.epochs": 1,
    "pretrain.batch_size": 16,
    "finetune.epochs": 1,
    "finetune.batch_size": 16,
    "finetune.pairs_per_epoch": 64,
    "evaluate.resamples": 100,
}
SMALLER = {
    "pretrain.batch_size=4096": "pretrain.batch_size=32",
    "pretrain.num_workers=4": "pretrain.num_workers=2",
}
ELSEWHERE = {
    r"pip install|make (demo|test)|source ": "how continuous integration installs, and what it calls",
    r"export |cat > ": "settings of the lines after it",
    r"(.* && )?ray (get-auth-token|start --head)": "tests/ray_head.py, tests/ray/cluster_of_nodes.py",
    r"ray job |python -c|ray status": "tests/end_to_end/test_jobs.py, tests/ray/test_tune_autoscaling.py",
    r"serve (run|deploy) ": "tests/serve/test_commands.py",
    r"ray (up|dashboard|down) |docker build|kubectl ": "needs a cloud, Docker or Kubernetes; test_deploy.py reads their files",
    r"htcl import-official ": "tests/unit/test_official.py",
    r"htcl evaluate .*--ablate": "tests/ray/test_ablate.py",
    r"python -m benchmarks\.gpu|PYTHONPATH=site |pip download ": "tests/end_to_end/test_gpu_benchmark.py",
    r"htcl tune ": "tests/ray/test_tune.py; tests/end_to_end/test_jobs.py",
}
GATE_FAILED = 1
"""What `--gate default` says of a model that saw forty songs once."""


def lines() -> list[str]:
    """Every command of the shell blocks, those of the README and of the page about one's own data first; continued lines are one."""
    found: list[str] = []
    for page in sorted(PAGES, key=lambda page: page.name not in ("README.md", "own-data.md")):
        for block in blocks(page, "bash"):
            block = re.sub(r"<<'(\w+)'.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE)
            begun = ""
            for line in block.replace("\\\n", " ").splitlines():
                begun += f"\n{line}" if begun else line.strip()
                if subprocess.run(["bash", "-n", "-c", begun], capture_output=True).returncode == 0:
                    found.append(begun)
                    begun = ""
            assert not begun, f"{page.name}: {begun}"
    return [line for line in found if line]


def elsewhere(line: str) -> bool:
    return any(re.match(pattern, line) for pattern in ELSEWHERE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: tables, one more catalogue with other names of columns, a recording, a gate, a small configuration."""
    folder = tmp_path_factory.mktemp("reader")
    tables = write_sample(folder / "sample", songs=60, artists=12, users=40, seed=3, seconds=4.0)
    catalog = pa.csv.read_csv(tables.catalog)
    paths = [str(tables.catalog.parent / path) for path in catalog["audio_path"].to_pylist()]
    catalog = catalog.set_column(catalog.column_names.index("audio_path"), "audio_path", pa.array(paths))
    pq.write_table(catalog, folder / "songs.parquet")
    pq.write_table(pa.csv.read_csv(tables.interactions), folder / "log.parquet")
    named = {"song_id": "track_uri", "audio_path": "file"}
    pq.write_table(catalog.rename_columns([named.get(name, name) for name in catalog.column_names]), folder / "named.parquet")
    waveform, rate = soundfile.read(paths[0])
    soundfile.write(folder / "song.mp3", waveform, rate)
    (folder / "gate.yaml").write_text("bounds:\n  - {figure: text_to_audio.semantic.median_rank, at_most: 60}\n")
    (folder / "small.yaml").write_text(resolve("demo").with_overrides({**SMALL, **TINY}).as_yaml())
    return folder


def filled_in(line: str, world: Path, port: int = 0) -> str:
    """The line for the world's folder."""
    if "track_uri" in line:
        line = line.replace("/data/htcl", str(world / "named")).replace("songs.parquet", "named.parquet")
    line = re.sub(r"/data/htcl|\./workspace|WORKSPACE", str(world / "workspace"), line)
    if "htcl config" not in line:
        line = re.sub(r"htcl (\w+)", r"htcl \1 --config small.yaml", re.sub(r"--preset \w+ ?", "", line))
    for shown, small in SMALLER.items():
        line = line.replace(shown, small)
    reports = sorted(path.name for path in (world / "workspace/reports").glob("*/")) or [""]
    line = line.replace("RUN_A", reports[0]).replace("RUN_B", reports[-1])
    songs = pq.read_table(world / "songs.parquet", columns=["song_id"])["song_id"].to_pylist()
    for letter, song in zip("abc", songs, strict=False):
        line = line.replace(f'"{letter}"', f'"{song}"')
    line = line.replace("endSongId=SONG_ID", f"endSongId={songs[7]}").replace("SONG_ID", songs[0])
    return line.replace("localhost:8000", f"localhost:{port}").replace("curl -s", "curl -s --fail-with-body")


def run(line: str, world: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=world, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def test_every_line_is_run_here_or_elsewhere():
    unknown = [line for line in lines() if not elsewhere(line) and not re.match(r'htcl |curl |DATA="', line)]
    assert not unknown
    assert all(any(re.match(pattern, line) for line in lines()) for pattern in ELSEWHERE), "a pattern that fits nothing"


def shown_lines(command: str) -> list[str]:
    """Lines of one command without their remarks, each once however its tables are called."""
    data = variables(PAGES[0])["DATA"]
    parts = [part.split("  #")[0].strip().replace("$DATA", data) for line in lines() if not elsewhere(line) for part in line.split(" && ")]
    return list(dict.fromkeys(re.sub(r"/data/(?=songs|log)", "", part) for part in parts if part.startswith(command)))


@pytest.fixture(scope="module")
def steps(world: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every line of `htcl` but `serve`, run in order: from tables to reports, comparison and search."""
    return {line: run(filled_in(line, world), world) for line in shown_lines("htcl ") if not line.startswith("htcl serve")}


def test_steps(steps: dict[str, subprocess.CompletedProcess[str]]):
    assert len(steps) >= 14
    for line, done in steps.items():
        failed_gate = "--gate default" in line and done.returncode == GATE_FAILED and "the gate failed" in done.stderr
        assert done.returncode == 0 or failed_gate, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr, line


@pytest.mark.usefixtures("steps")
def test_requests_to_the_server(world: Path):
    """Every curl that is shown, to the `htcl serve` that is shown."""
    port = free_ports(1)[0]
    line = f"exec {filled_in(shown_lines('htcl serve')[0], world)} --set serve.port={port}"
    with (world / "serve.log").open("w") as log:
        server = subprocess.Popen(["bash", "-c", line], cwd=world, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "try:" not in (world / "serve.log").read_text():
            assert server.poll() is None, (world / "serve.log").read_text()
            assert time.monotonic() < deadline, (world / "serve.log").read_text()
            time.sleep(0.5)
        asked = [filled_in(line, world, port) for line in lines() if line.startswith("curl ")]
        assert len(asked) >= 10
        for line in asked:
            done = run(line, world)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            assert not re.search(r'"error"|status="failed"|"status": ?"failed"', done.stdout), f"{line}\n{done.stdout}"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)


@pytest.mark.usefixtures("steps")
def test_python_of_the_readme_and_of_own_data(world: Path, capsys: pytest.CaptureFixture[str]):
    """What is read there is what the steps wrote."""
    model = next((world / "workspace/models/semantic").glob("*/")).name
    waveform, rate = soundfile.read(world / "song.mp3", dtype="float32")
    names = {"waveform": waveform, "sample_rate": rate}
    for page in PAGES:
        for block in blocks(page, "python") if page.name in ("README.md", "own-data.md") else ():
            code = block.replace("/data/htcl", str(world / "workspace")).replace("VERSION", model)
            exec(compile(code, page.name, "exec"), names)
    assert names["vector"].shape == (12,)
    assert names["words"].shape == (2, 12)
    assert "unknown_song" in capsys.readouterr().out, "the reasons of the quarantine"
