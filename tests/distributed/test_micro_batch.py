"""The probed micro-batch with several workers: the least memory counts, and no worker waits for one that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from htcl_ray.errors import StepError
from htcl_ray.losses.collectives import rank
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training import micro_batch
from htcl_ray.training.batches import Batch
from tests.distributed.conftest import run_workers
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.distributed


def probe(folder: str) -> None:
    cpu = torch.device("cpu")
    model = HTCL.untrained(tiny_config("unused"), train_wordpiece(["calm piano"], 60))
    tokens = model.text_encoder.tokenize(["calm piano"])
    song = Batch(torch.zeros(1, 32, 16), torch.tensor([32]), tokens, torch.zeros(1, 3, dtype=torch.int64))
    five_rows = (
        micro_batch.constant_bytes(model, song, 16)
        + micro_batch.kept_bytes(model.train(), micro_batch.repeat_song(song, 5))
        + 1
    )
    sizes = []
    for memory in ((1e9, 1e9), (1e9, 2 * five_rows), (1e9, 1e3)):
        micro_batch.available_bytes = lambda device, memory=memory: memory[rank()]  # type: ignore[assignment]
        try:
            sizes.append(micro_batch.probe_micro_batch_size(model, song, 1, 16, cpu))
        except StepError:
            sizes.append(-1)
    torch.save(torch.tensor(sizes), Path(folder) / f"{rank()}.pt")


def test_workers_agree(tmp_path: Path):
    run_workers(2, tmp_path, probe, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{worker}.pt", weights_only=True).tolist() for worker in range(2))
    assert first == second == [16, 4, -1]
