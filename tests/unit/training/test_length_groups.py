"""Groups of rows of similar length: the cheapest ones, and encoding that they do not change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training import length_groups as groups_module
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.length_groups import ACCEPTED_PADDING, GROUP_COST, LEVELS, length_groups, padded_share
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit


def cost(lengths: Tensor, groups: list[Tensor], group_cost: float) -> float:
    return sum(len(group) * int(lengths[group].max()) + group_cost * int(lengths.max()) for group in groups)


def all_groupings(lengths: Tensor) -> list[list[Tensor]]:
    """Every split of the rows, in order of their level, between two levels."""
    level = -(-lengths * LEVELS // int(lengths.max()))
    levels = sorted(set(level.tolist()))
    groupings = []
    for cuts in itertools.product([False, True], repeat=len(levels) - 1):
        ends = [end for end, is_end in zip(levels, [*cuts, True], strict=True) if is_end]
        starts = [0, *ends[:-1]]
        groupings.append(
            [((level > start) & (level <= end)).nonzero()[:, 0] for start, end in zip(starts, ends, strict=True)]
        )
    return groupings


@pytest.mark.parametrize("group_cost", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_of_all_groupings(seed: int, group_cost: float):
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(1, 600, 9))
    groups = length_groups(lengths, group_cost)
    assert sorted(torch.cat(groups).tolist()) == list(range(9))
    longest = [int(lengths[group].max()) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert cost(lengths, groups, group_cost) == min(cost(lengths, each, group_cost) for each in all_groupings(lengths))


def test_little_padding_is_not_worth_a_second_group():
    lengths = torch.tensor([100, 99, 97, 91, 95, 100])
    assert padded_share(lengths, [torch.arange(6)]) <= ACCEPTED_PADDING
    [group] = length_groups(lengths, 0.0)
    assert group.tolist() == list(range(6)), "rows stay in their order, and so do sums over them"


def test_short_rows_stay_in_one_group():
    [group] = length_groups(torch.tensor([64] * 40 + [8] * 40), 0.0)
    assert group.tolist() == list(range(80))


def test_previews_among_whole_songs():
    lengths = torch.tensor([1251] * 160 + [313] * 80 + [800, 900, 1000, 1100])
    groups = length_groups(lengths, GROUP_COST["cuda"])
    assert padded_share(lengths, [torch.arange(len(lengths))]) > 0.2
    assert padded_share(lengths, groups) < 0.05
    assert len(groups) == 2


def test_encoding_in_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """Against one song at a time, in float64."""
    texts = ["calm", "calm piano at night with a slow choir", "techno", "fast techno for the night", "calm", "piano"]
    model = HTCL.untrained(tiny_config("unused"), train_wordpiece(texts, 60)).double().eval()
    valid = torch.tensor([32, 5, 31, 6, 4, 30])
    mel = torch.from_numpy(np.random.default_rng(0).normal(-40, 12, (6, 32, 16)))
    batch = Batch(mel, valid, model.text_encoder.tokenize(texts), torch.zeros(6, 3, dtype=torch.int64))
    monkeypatch.setitem(GROUP_COST, "cpu", 0.3)
    monkeypatch.setattr(groups_module, "SHORT", 0)
    assert [len(group) for group in length_groups(valid, 0.3)] == [3, 3]
    assert len(length_groups(batch.lengths_of_texts(), 0.3)) > 1
    audio, text = encode(model, batch)
    for row in range(6):
        alone = encode(model, batch.part(row, row + 1))
        torch.testing.assert_close(torch.stack([audio[row], text[row]]), torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_padded_share_of_micro_batches():
    """Two songs of a micro-batch are too few for a second group, eight are not."""
    valid = torch.tensor([400, 100, 100, 400, 400, 100, 100, 100])
    batch = Batch(torch.zeros(8, 400, 1), valid, {"attention_mask": torch.ones(8, 3)}, torch.zeros(8, 3))
    assert batch.padded_share() == 0
    assert batch.padded_share(2) == pytest.approx(1 - 1700 / (4 * 800 - 2 * 300))


def test_texts_padded_on_the_left_stay_whole():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    batch = Batch(torch.zeros(2, 4, 8), torch.tensor([4, 4]), {"attention_mask": mask}, torch.zeros(2, 3))
    assert batch.lengths_of_texts().tolist() == [3, 3]
