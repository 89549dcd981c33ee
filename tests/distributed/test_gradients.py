"""Loss and gradients of 1, 2 and 3 processes against one process that computes the losses entry by entry."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses import collectives
from htcl_ray.losses.collectives import rank, sum_over_workers, world_size
from htcl_ray.losses.stages import finetune_terms, pretrain_terms
from htcl_ray.models import HTCL
from htcl_ray.models.towers.registry import TOWERS
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.micro_batch import compute_gradients
from htcl_ray.training.order import worker_rows
from htcl_ray.training.stage_tasks import Task
from tests.distributed.conftest import run_workers
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.distributed

ROWS = 12
SONGS = 20
TEXTS = [f"calm piano {number % 7} at night {number}" for number in range(SONGS)]
WEIGHTS = {1: {"text": 1.0}, 2: {"text": 1.0, "preference": 0.7, "fusion": 1.3}}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
KNOWN = [(0, 1), (2, 9), (3, 4), (5, 11), (6, 7)]
"""Known pairs besides those of the batch."""
LOG_Q = torch.from_numpy(np.log(np.random.default_rng(5).uniform(0.01, 0.3, (SONGS, 2))))


@dataclass(frozen=True)
class Variant:
    """A stage with its loss."""

    name: str
    stage: int
    loss: str = "softmax"
    masked: bool = True
    corrected: bool = False
    rejected: bool = False
    rehearsed: int = 0
    several: bool = False
    tower: str = "transformer"


STANDARD = [Variant("first", 1), Variant("second", 2)]
VARIANTS = [
    Variant("first-unmasked", 1, masked=False),
    Variant("second-unmasked", 2, masked=False),
    Variant("first-sigmoid", 1, loss="sigmoid"),
    Variant("second-sigmoid", 2, loss="sigmoid"),
    Variant("corrected", 2, corrected=True),
    Variant("rejected", 2, rejected=True),
    Variant("rejected-sigmoid-unmasked", 2, loss="sigmoid", rejected=True, masked=False),
    Variant("rehearsed-corrected", 2, rehearsed=1, corrected=True),
    Variant("rehearsed-rejected", 2, rehearsed=2, rejected=True),
    Variant("rehearsed-sigmoid", 2, loss="sigmoid", rehearsed=2),
    Variant("several", 2, several=True),
    Variant("several-rejected", 2, several=True, rejected=True),
    Variant("first-cnn", 1, tower="cnn"),
    Variant("second-mlp", 2, tower="mlp"),
    Variant("first-windows", 1, tower="window_transformer"),
]


def song_rows(variant: Variant) -> np.ndarray:
    """Song numbers [ROWS, songs per row]: a song twice, a trigger that is recalled elsewhere, repeated triggers, no
    rejected song."""
    triggers = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 10, 1])
    recalled = np.array([12, 0, 13, 14, 15, 16, 17, 18, 19, 2, 11, 9])
    rejected = np.array([9, 13, 13, 8, 5, 19, 2, 18, 4, 2, 17, 14])
    rehearsed = np.random.default_rng(3).permutation(2 * SONGS)[: 2 * ROWS].reshape(2, ROWS) % SONGS
    columns = (
        [triggers]
        if variant.stage == 1
        else [triggers, recalled, rejected]
        if variant.rejected
        else [triggers, recalled]
    )
    return np.stack([*columns, *rehearsed[: variant.rehearsed]], axis=1)


def song_ids() -> Tensor:
    """[SONGS, 3]: song, duplicate group (8 is a copy of 5), text (10 reads like 6)."""
    song = torch.arange(SONGS)
    group, text = song.clone(), song.clone()
    group[8], text[10] = 5, 6
    return torch.stack([song, group, text], dim=1)


def build(variant: Variant, dtype: torch.dtype) -> HTCL:
    """The same model in every process; dropout 0, temperatures and biases apart from each other."""
    fixed = {"model.dropout": 0.0, "text.dropout": 0.0, "model.layers": 2, "pretrain.loss": variant.loss}
    fixed |= {"audio.extractor": TOWERS[variant.tower].extractors[0], "audio.tower": variant.tower}
    for tower in ("cnn", "mlp", "window_transformer"):
        fixed |= {f"model.{tower}.width": 32} | ({} if tower == "cnn" else {f"model.{tower}.dropout": 0.0})
    model = HTCL.untrained(tiny_config("unused").with_overrides(fixed), train_wordpiece(TEXTS, 60), feature_width=16)
    if variant.stage == 2:
        model = model.to_stage_2(0.1, seed=1, loss=variant.loss)
        if variant.loss == "sigmoid":
            for name in ("preference", "fusion"):
                model.logit_bias[name].data.fill_(-1.5)
        model.logit_scale["fusion"].data.fill_(1.5)
    return model.to(dtype).train()


def load(model: HTCL, rows: np.ndarray) -> Batch:
    """Songs of different contents and lengths."""
    random = np.random.default_rng(0)
    frames = tiny_config("unused").audio.max_frames
    mel = torch.from_numpy(random.normal(-40, 12, (SONGS, frames, 16)))
    valid = torch.from_numpy(random.integers(3, frames + 1, SONGS))
    songs = rows.T.reshape(-1)
    tokens = model.text_encoder.tokenize([TEXTS[song] for song in songs])
    return Batch(mel[songs], valid[songs], tokens, song_ids()[songs])


def pairs_of_the_batch() -> list[tuple[int, int]]:
    return [(trigger, recalled) for trigger, recalled in song_rows(STANDARD[1]).tolist()]


def known_codes() -> Tensor:
    return torch.tensor(sorted({(min(pair) << 32) | max(pair) for pair in KNOWN + pairs_of_the_batch()}))


def directed_codes() -> Tensor:
    return torch.tensor(sorted({(trigger << 32) | recalled for trigger, recalled in KNOWN + pairs_of_the_batch()}))


def task(variant: Variant) -> Task:
    rows = song_rows(variant)
    if variant.stage == 1:
        terms = functools.partial(pretrain_terms, masked=variant.masked)
    else:
        log_q = LOG_Q if variant.corrected else None
        terms = functools.partial(
            finetune_terms,
            known_pairs=known_codes(),
            masked=variant.masked,
            log_q=log_q,
            positives=directed_codes() if variant.several else None,
            with_rejected=variant.rejected,
            rehearsed=variant.rehearsed,
        )
    return Task(variant.name, ROWS, rows.shape[1], lambda epoch: rows, terms, WEIGHTS[variant.stage])


def compute(model: HTCL, variant: Variant, micro_batch_size: int | None = None) -> dict[str, Tensor]:
    """Compute the terms of the whole batch and every gradient, as one worker of the group."""
    own = worker_rows(song_rows(variant), 0, ROWS, rank(), world_size())
    terms = compute_gradients(model, load(model, own), task(variant), micro_batch_size)
    actual = {f"loss {name}": sum_over_workers(term) for name, term in terms.items()}
    return actual | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def excluded(a: int, b: int, variant: Variant) -> bool:
    """Whether songs a and b must not be pushed apart."""
    known = {frozenset(pair) for pair in KNOWN + pairs_of_the_batch()}
    alike = bool((song_ids()[a] == song_ids()[b]).any())
    return variant.masked and (alike or (variant.stage == 2 and frozenset((a, b)) in known))


class Entries:
    """The terms, computed entry by entry on full matrices, with masks from Python loops."""

    def __init__(self, model: HTCL, variant: Variant) -> None:
        self.model, self.variant = model, variant

    def seen(self, rows: list[int], columns: list[int]) -> Tensor:
        return torch.tensor(
            [[i == j or not excluded(a, b, self.variant) for j, b in enumerate(columns)] for i, a in enumerate(rows)]
        )

    def term(
        self,
        name: str,
        first: Tensor,
        second: Tensor,
        first_songs: list[int],
        second_songs: list[int],
        *,
        used: list[bool] | None = None,
        drawn_as: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """`second` may have more rows than `first`: those match nothing, and only those that are `used` count.

        `drawn_as`: columns of LOG_Q that hold for the first and the second side.
        """
        rows = len(first)
        logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T * self.model.logit_scale[name].exp()
        keep = self.seen(first_songs, second_songs)
        if used is not None:
            keep &= torch.tensor([True] * rows + used)
        if self.variant.loss == "sigmoid":
            z = 2 * torch.eye(rows, len(second), dtype=logits.dtype) - 1
            entries = torch.log(1 + torch.exp(-z * (logits + self.model.logit_bias[name])))
            return torch.where(keep, entries, 0).sum() / rows
        if self.variant.several and name == "preference":
            return self.several(logits, keep, first_songs, second_songs) / (2 * rows)
        correct = torch.zeros(SONGS, 2) if not self.variant.corrected or name == "text" else LOG_Q
        forward = torch.where(keep, logits - correct[second_songs, drawn_as[1]], -torch.inf)
        backward = torch.where(keep, logits - correct[first_songs, drawn_as[0]][:, None], -torch.inf)[:, :rows]
        return (
            -(
                torch.log_softmax(forward, dim=1).diagonal().mean()
                + torch.log_softmax(backward, dim=0).diagonal().mean()
            )
            / 2
        )

    def several(self, logits: Tensor, keep: Tensor, triggers: list[int], recalled: list[int]) -> Tensor:
        """Both directions of the preference term with every pair of the batch as a positive, summed over queries."""
        pairs, rows, total = {*KNOWN, *pairs_of_the_batch()}, len(triggers), torch.zeros((), dtype=logits.dtype)
        columns = recalled[:rows]
        matches = [[i == j or (a, b) in pairs for j, b in enumerate(columns)] for i, a in enumerate(triggers)]
        for query in range(rows):
            for scores, kept, own in (
                (logits[query], keep[query], [key for key in range(rows) if matches[query][key]]),
                (logits[:, query], keep[:, query], [key for key in range(rows) if matches[key][query]]),
            ):
                negatives = [key for key in range(len(scores)) if kept[key] and key not in own]
                for positive in own:
                    total = total - torch.log_softmax(scores[[positive, *negatives]], dim=0)[0] / len(own)
        return total


def reference(model: HTCL, variant: Variant) -> dict[str, Tensor]:
    """One process, the whole batch."""
    rows = song_rows(variant)
    audio, text = encode(model, load(model, rows))
    songs = rows.T.reshape(-1).tolist()
    entries = Entries(model, variant)
    if variant.stage == 1:
        terms = {"text": entries.term("text", audio, text, songs, songs)}
    else:
        trigger, recalled, both = songs[:ROWS], songs[ROWS : 2 * ROWS], 2 * ROWS
        fused = model.fuse(audio, text)
        used = [songs[both + i] != recalled[i] for i in range(ROWS)] if variant.rejected else None
        trigger_to_fusion = entries.term("fusion", audio[:ROWS], fused[ROWS:both], trigger, recalled)
        recalled_to_fusion = entries.term("fusion", audio[ROWS:both], fused[:ROWS], recalled, trigger, drawn_as=(1, 0))
        end = (2 + variant.rejected) * ROWS  # behind it the rehearsed songs
        named, preferred = [*range(both), *range(end, len(songs))], slice(ROWS, end)
        named_songs = [songs[row] for row in named]
        terms = {
            "text": entries.term("text", audio[named], text[named], named_songs, named_songs),
            "preference": entries.term(
                "preference", audio[:ROWS], audio[preferred], trigger, songs[preferred], used=used
            ),
            "fusion": (trigger_to_fusion + recalled_to_fusion) / 2,
        }
    sum(WEIGHTS[variant.stage][name] * term for name, term in terms.items()).backward()
    actual = {f"loss {name}": term.detach() for name, term in terms.items()}
    return actual | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert set(actual) == set(expected)
    largest = max(tensor.abs().max().item() for name, tensor in expected.items() if not name.startswith("loss"))
    for name, tensor in expected.items():
        difference = (actual[name] - tensor).abs().max().item()
        assert difference <= TOLERANCE[dtype] * largest, (
            f"{name} differs by {difference:.2e}; the largest gradient entry is {largest:.2e}"
        )


CASES = [(variant, dtype, micro) for variant in STANDARD for dtype in TOLERANCE for micro in (None, 2)]
CASES += [(variant, torch.float64, micro) for variant in VARIANTS for micro in (None, 2)]


def work(folder: str) -> None:
    """Every case in one group of processes; starting one takes seconds."""
    for variant, dtype, micro in CASES:
        actual = compute(build(variant, dtype), variant, micro)
        torch.save(actual, Path(folder) / f"{variant.name}-{dtype}-{micro}-{world_size()}-{rank()}.pt")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_gradients_equal_one_process(workers: int, tmp_path: Path):
    run_workers(workers, tmp_path, work, str(tmp_path))
    for variant, dtype, micro in CASES:
        expected = expected_of(variant, dtype)
        learned = ("logit_scale", "logit_bias") if variant.loss == "sigmoid" else ("logit_scale",)
        assert {f"{kind}.{term}" for kind in learned for term in WEIGHTS[variant.stage]} <= set(expected)
        for worker in range(workers):
            actual = torch.load(tmp_path / f"{variant.name}-{dtype}-{micro}-{workers}-{worker}.pt", weights_only=True)
            assert_equal(actual, expected, dtype)


@functools.cache
def expected_of(variant: Variant, dtype: torch.dtype) -> dict[str, Tensor]:
    return reference(build(variant, dtype), variant)


def test_variants_differ():
    """Each variant has another gradient than its stage's standard, so none of them can be mistaken for it."""
    for variant in VARIANTS:
        plain = expected_of(STANDARD[variant.stage - 1], torch.float64)["audio_head.0.weight"]
        assert (
            expected_of(variant, torch.float64)["audio_head.0.weight"] - plain
        ).abs().max() > 1e-3 * plain.abs().max()


def test_without_a_process_group():
    for variant in STANDARD + VARIANTS:
        assert_equal(
            compute(build(variant, torch.float64), variant), expected_of(variant, torch.float64), torch.float64
        )


def call_every_collective(folder: str) -> None:
    """Call every collective once."""
    own = torch.full((2, 3), float(rank()), dtype=torch.float64, requires_grad=True)
    everyone = collectives.gather_rows(own)
    ((rank() + 1) * everyone).sum().backward()
    module = torch.nn.Linear(2, 2)
    collectives.copy_from_first(module)
    big = torch.nn.Parameter(torch.zeros(3, 5))
    odd = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    unused = torch.nn.Parameter(torch.zeros(2))
    big.grad, odd.grad = torch.full((3, 5), float(rank() + 1)), torch.arange(4, dtype=torch.float64) * (rank() + 1)
    collectives.BUCKET_BYTES = 16  # every gradient in a bucket of its own
    collectives.sum_gradients([big, odd, unused])
    collectives.wait_for_all()
    numbers = collectives.gather_rows(torch.tensor([[rank()]]))
    cpu = torch.device("cpu")
    counted = torch.tensor(
        [collectives.least_over_workers(7 - 3 * rank(), cpu), collectives.workers_on_this_machine(cpu)]
    )
    state = {
        "gathered": everyone.detach(),
        "gradient": own.grad,
        "weight": module.weight.detach(),
        "numbers": numbers,
        "counted": counted,
    }
    torch.save(
        state | {"big": big.grad, "odd": odd.grad, "none": torch.tensor(unused.grad is None)},
        Path(folder) / f"{rank()}.pt",
    )


def test_collectives(tmp_path: Path):
    run_workers(2, tmp_path, call_every_collective, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{worker}.pt", weights_only=True) for worker in range(2))
    for actual in (first, second):
        assert actual["gathered"][:, 0].tolist() == [0, 0, 1, 1]
        assert (actual["gradient"] == 3).all()  # 1 from the first worker's loss, 2 from the second's
        assert actual["numbers"].flatten().tolist() == [0, 1]
        assert (actual["big"] == 3).all()
        assert actual["odd"].tolist() == [0, 3, 6, 9]
        assert actual["none"]
        assert actual["counted"].tolist() == [4, 2]
    assert torch.equal(first["weight"], second["weight"])
