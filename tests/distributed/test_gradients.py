"""Loss and gradients of 1, 2 and 3 real processes against one process that states the losses entry by entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.models import HTCL
from htcl_ray.models.vocabulary import train_wordpiece
from htcl_ray.objectives.gather import rank, sum_over_workers, world_size
from htcl_ray.objectives.stages import finetune_terms, pretrain_terms
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.order import worker_rows
from htcl_ray.training.step import compute_gradients
from htcl_ray.training.tasks import Task
from tests.distributed.conftest import run_workers
from tests.synthetic_features import tiny_config

pytestmark = pytest.mark.distributed

ROWS = 12
SONGS = 20
TEXTS = [f"calm piano {number % 7} at night {number}" for number in range(SONGS)]
WEIGHTS = {1: {"text": 1.0}, 2: {"text": 1.0, "preference": 0.7, "fusion": 1.3}}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
KNOWN = [(0, 1), (2, 9), (3, 4), (5, 11), (6, 7)]
"""Known pairs besides those of the batch."""


def song_rows(stage: int) -> np.ndarray:
    """Song numbers [ROWS, songs per row]: a song twice, a trigger that is recalled elsewhere, repeated triggers."""
    triggers = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 10, 1])
    recalled = np.array([12, 0, 13, 14, 15, 16, 17, 18, 19, 2, 11, 9])
    return triggers[:, None] if stage == 1 else np.stack([triggers, recalled], axis=1)


def song_ids() -> Tensor:
    """[SONGS, 3]: song, duplicate group (8 is a copy of 5), text (10 reads like 6)."""
    song = torch.arange(SONGS)
    group, text = song.clone(), song.clone()
    group[8], text[10] = 5, 6
    return torch.stack([song, group, text], dim=1)


def build(stage: int, dtype: torch.dtype) -> HTCL:
    """The same model in every process; dropout 0, temperatures apart from each other."""
    config = tiny_config("unused").with_overrides({"model.dropout": 0.0, "text.dropout": 0.0, "model.layers": 2})
    model = HTCL.untrained(config, train_wordpiece(TEXTS, 60))
    if stage == 2:
        model = model.to_stage_2(0.1, seed=1)
        model.logit_scale["fusion"].data.fill_(1.5)
    return model.to(dtype).train()


def load(model: HTCL, rows: np.ndarray) -> Batch:
    """Songs of different contents and lengths."""
    random = np.random.default_rng(0)
    frames = model.recipe.max_frames
    mel = torch.from_numpy(random.normal(-40, 12, (SONGS, frames, model.recipe.n_mels)))
    valid = torch.from_numpy(random.integers(3, frames + 1, SONGS))
    songs = rows.T.reshape(-1)
    tokens = model.text_encoder.tokenize([TEXTS[song] for song in songs])
    return Batch(mel[songs], valid[songs], tokens, song_ids()[songs])


def known_codes() -> Tensor:
    pairs = KNOWN + [tuple(pair) for pair in song_rows(2).tolist()]
    return torch.tensor(sorted({(min(pair) << 32) | max(pair) for pair in pairs}))


def task(stage: int) -> Task:
    if stage == 1:
        return Task("pretrain", ROWS, 1, lambda epoch: song_rows(1), pretrain_terms, WEIGHTS[1])
    known = known_codes()
    terms = lambda model, audio, text, ids: finetune_terms(model, audio, text, ids, known)  # noqa: E731
    return Task("finetune", ROWS, 2, lambda epoch: song_rows(2), terms, WEIGHTS[2])


def compute(model: HTCL, stage: int, micro_batch_size: int | None = None) -> dict[str, Tensor]:
    """What one worker of the group computes on its part: terms of the whole batch, and every gradient."""
    own = worker_rows(song_rows(stage), 0, ROWS, rank(), world_size())
    terms = compute_gradients(model, load(model, own), task(stage), micro_batch_size)
    found = {f"loss {name}": sum_over_workers(term) for name, term in terms.items()}
    return found | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def excluded(a: int, b: int, stage: int) -> bool:
    """Whether songs a and b must not be pushed apart."""
    known = {frozenset(pair) for pair in KNOWN + [tuple(pair) for pair in song_rows(2).tolist()]}
    alike = bool((song_ids()[a] == song_ids()[b]).any())
    return alike or (stage == 2 and frozenset((a, b)) in known)


def info_nce_by_entry(first: Tensor, second: Tensor, first_songs: list[int], second_songs: list[int], scale: Tensor, stage: int) -> Tensor:
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T * scale.exp()
    count = len(first)
    keep = torch.tensor([[i == j or not excluded(first_songs[i], second_songs[j], stage) for j in range(count)] for i in range(count)])
    logits = torch.where(keep, logits, -torch.inf)
    there = -torch.log_softmax(logits, dim=1).diagonal().mean()
    back = -torch.log_softmax(logits, dim=0).diagonal().mean()
    return (there + back) / 2


def reference(model: HTCL, stage: int) -> dict[str, Tensor]:
    """One process, the whole batch, full matrices, masks from Python loops."""
    rows = song_rows(stage)
    audio, text = encode(model, load(model, rows))
    songs = rows.T.reshape(-1).tolist()
    terms = {"text": info_nce_by_entry(audio, text, songs, songs, model.logit_scale["text"], stage)}
    if stage == 2:
        trigger, recalled = songs[:ROWS], songs[ROWS:]
        fused = model.fuse(audio, text)
        terms["preference"] = info_nce_by_entry(audio[:ROWS], audio[ROWS:], trigger, recalled, model.logit_scale["preference"], stage)
        there = info_nce_by_entry(audio[:ROWS], fused[ROWS:], trigger, recalled, model.logit_scale["fusion"], stage)
        back = info_nce_by_entry(audio[ROWS:], fused[:ROWS], recalled, trigger, model.logit_scale["fusion"], stage)
        terms["fusion"] = (there + back) / 2
    sum(WEIGHTS[stage][name] * term for name, term in terms.items()).backward()
    found = {f"loss {name}": term.detach() for name, term in terms.items()}
    return found | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert set(found) == set(expected)
    largest = max(tensor.abs().max().item() for name, tensor in expected.items() if not name.startswith("loss"))
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max().item()
        assert difference <= TOLERANCE[dtype] * largest, f"{name} differs by {difference:.2e}; the largest gradient entry is {largest:.2e}"


CASES = [(stage, dtype, micro) for stage in (1, 2) for dtype in TOLERANCE for micro in (None, 2)]


def work(folder: str) -> None:
    """Every case in one group of processes; starting one takes seconds."""
    for stage, dtype, micro in CASES:
        found = compute(build(stage, dtype), stage, micro)
        torch.save(found, Path(folder) / f"{stage}-{dtype}-{micro}-{world_size()}-{rank()}.pt")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_gradients_equal_one_process(workers: int, tmp_path: Path):
    run_workers(workers, tmp_path, work, str(tmp_path))
    for stage, dtype, micro in CASES:
        expected = reference(build(stage, dtype), stage)
        temperatures = {"logit_scale.text"} if stage == 1 else {"logit_scale.text", "logit_scale.preference", "logit_scale.fusion"}
        assert temperatures <= set(expected)
        for worker in range(workers):
            found = torch.load(tmp_path / f"{stage}-{dtype}-{micro}-{workers}-{worker}.pt", weights_only=True)
            assert_equal(found, expected, dtype)


def test_without_a_process_group():
    for stage in (1, 2):
        assert_equal(compute(build(stage, torch.float64), stage), reference(build(stage, torch.float64), stage), torch.float64)


def talk(folder: str) -> None:
    """Every collective once."""
    from htcl_ray.objectives import gather

    own = torch.full((2, 3), float(rank()), dtype=torch.float64, requires_grad=True)
    everyone = gather.gather_rows(own)
    ((rank() + 1) * everyone).sum().backward()
    module = torch.nn.Linear(2, 2)
    gather.copy_from_first(module)
    big = torch.nn.Parameter(torch.zeros(3, 5))
    odd = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    unused = torch.nn.Parameter(torch.zeros(2))
    big.grad, odd.grad = torch.full((3, 5), float(rank() + 1)), torch.arange(4, dtype=torch.float64) * (rank() + 1)
    gather.BUCKET_BYTES = 16  # every gradient in a bucket of its own
    gather.sum_gradients([big, odd, unused])
    gather.wait_for_all()
    numbers = gather.gather_rows(torch.tensor([[rank()]]))
    cpu = torch.device("cpu")
    counted = torch.tensor([gather.least_over_workers(7 - 3 * rank(), cpu), gather.workers_on_this_machine(cpu)])
    state = {"gathered": everyone.detach(), "gradient": own.grad, "weight": module.weight.detach(), "numbers": numbers, "counted": counted}
    torch.save(state | {"big": big.grad, "odd": odd.grad, "none": torch.tensor(unused.grad is None)}, Path(folder) / f"{rank()}.pt")


def test_collectives(tmp_path: Path):
    run_workers(2, tmp_path, talk, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{worker}.pt", weights_only=True) for worker in range(2))
    for found in (first, second):
        assert found["gathered"][:, 0].tolist() == [0, 0, 1, 1]
        assert (found["gradient"] == 3).all()  # 1 from the first worker's loss, 2 from the second's
        assert found["numbers"].flatten().tolist() == [0, 1]
        assert (found["big"] == 3).all()
        assert found["odd"].tolist() == [0, 3, 6, 9]
        assert found["none"]
        assert found["counted"].tolist() == [4, 2]
    assert torch.equal(first["weight"], second["weight"])
