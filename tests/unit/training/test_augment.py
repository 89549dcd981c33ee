"""Crops and masks of training clips: where they may fall, and that nothing but a clip's place in training decides
them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from htcl_ray.config.sections import PretrainSettings
from htcl_ray.models import HTCL
from htcl_ray.models.towers.transformer import masked_input
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.batches import BatchLoader, BatchRows
from htcl_ray.training.features import open_frames
from htcl_ray.training.song_numbers import read_songs
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features

pytestmark = pytest.mark.unit

WINDOW = 13
MASKS = PretrainSettings(time_masks=2, time_mask_frames=5, mel_masks=1, mel_mask_bands=6, seed=7)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> BatchLoader:
    """Songs of 9 to 32 frames, as they are."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        config = tiny_config(folder / "workspace")
        workspace = Workspace(config.workspace)
        path = write_features(config)
        songs = read_songs(workspace, path)
        manifest = workspace.manifest(path)
        assert manifest is not None
        model = HTCL.untrained(config, train_wordpiece(songs.texts, 100))
        return BatchLoader(songs, open_frames(workspace, path, manifest, songs), model.text_encoder, None)


def augmented(plain: BatchLoader, settings: PretrainSettings = MASKS, window: int | None = WINDOW) -> BatchLoader:
    return BatchLoader(plain.songs, plain.frames, plain.text_encoder, Augmentation(settings, window))


def all_songs(plain: BatchLoader) -> BatchRows:
    return BatchRows(step=0, first=0, rows=np.arange(len(plain.songs.song_ids))[:, None])


def test_a_crop_is_a_slice_of_the_clip(plain: BatchLoader):
    part = all_songs(plain)
    whole, cropped = plain.load(part.songs), augmented(plain, PretrainSettings()).load_for_training(part, epoch=0)
    assert cropped.valid_frames.tolist() == [min(frames, WINDOW) for frames in whole.valid_frames.tolist()]
    assert cropped.features.shape[1] == WINDOW
    offsets = []
    for clip, frames, crop, count in zip(
        whole.features, whole.valid_frames.tolist(), cropped.features, cropped.valid_frames.tolist(), strict=True
    ):
        matches = [
            start for start in range(frames - count + 1) if torch.equal(clip[start : start + count], crop[:count])
        ]
        assert len(matches) == 1, "the crop is no slice of the clip"
        assert not crop[count:].any()
        offsets += matches
    assert len(set(offsets)) > 5
    assert torch.equal(whole.ids, cropped.ids)
    assert all(torch.equal(whole.tokens[name], tensor) for name, tensor in cropped.tokens.items())


def test_every_offset_is_equally_likely():
    """Over the very generators that training takes: 20 offsets, 3,000 clips of 15 steps."""
    augmentation = Augmentation(PretrainSettings(seed=3), window=31)
    counts = np.zeros(20)
    for step in range(15):
        for random in augmentation.generators(epoch=1, step=step, first=0, rows=100, songs_per_row=2):
            start, stop = augmentation.crop(random, 50)
            assert stop - start == 31
            counts[start] += 1
    assert chisquare(counts).pvalue > 0.001
    assert augmentation.crop(np.random.default_rng(0), 31) == augmentation.crop(np.random.default_rng(1), 31) == (0, 31)
    assert Augmentation(PretrainSettings(), None).crop(np.random.default_rng(0), 1251) == (0, 1251)


def test_masks_hide_whole_rows_and_columns_within_bounds():
    """Masked cells are determined by comparison; they must be rows and columns, few enough, and hold the mean of what is
    left."""
    augmentation = Augmentation(MASKS, None)
    bands_hidden, frames_hidden = [], []
    for seed, frames in [(seed, frames) for seed in range(150) for frames in (1, 3, 9, 40)]:
        checkered = np.indices((frames, 16)).sum(axis=0) % 2  # no cell is near the mean of the others
        clip = (-80 + 60 * checkered + np.random.default_rng(seed).normal(0, 3, (frames, 16))).astype(np.float16)
        masked = clip.copy()
        augmentation.mask(np.random.default_rng([seed, frames]), masked)
        hidden = masked != clip
        columns, rows = hidden.all(axis=0), hidden.all(axis=1)
        assert np.array_equal(hidden, rows[:, None] | columns[None, :])
        assert columns.sum() <= 6
        assert rows.sum() <= min(2 * 5, frames // 2)
        if hidden.any():
            np.testing.assert_allclose(
                masked[hidden].astype(float), clip[~hidden].astype(float).mean(), atol=0.04
            )  # fp16 at −50
        if frames == 40:
            frames_hidden.append(rows.sum())
            bands_hidden.append(columns.sum())
    assert set(bands_hidden) == set(range(7))
    assert chisquare(np.bincount(bands_hidden)).pvalue > 0.001
    assert max(frames_hidden) == 10, "two stretches of five, apart"


@pytest.mark.parametrize("bands", [1, 2, 16])
@pytest.mark.parametrize("masks", [1, 2, 7, 50])
@pytest.mark.parametrize("width", [1, 8, 16, 200])
def test_some_cells_are_left_whatever_the_settings_and_the_clip(masks: int, width: int, bands: int):
    """Masks wider than the bands or longer than the clip, together more than all of it, and clips whose cells are
    equal."""
    settings = PretrainSettings(time_masks=masks, time_mask_frames=width, mel_masks=masks, mel_mask_bands=width)
    for seed, frames in [(seed, frames) for seed in range(20) for frames in (1, 2, 3, 40)]:
        noise = np.random.default_rng(seed).normal(-60, 9, (frames, bands))
        for clip in (noise.astype(np.float16), np.full((frames, bands), -80, dtype=np.float16)):
            masked = clip.copy()
            Augmentation(settings, None).mask(np.random.default_rng([seed, frames]), masked)
            assert (masked == clip).any()
            prepared, _ = masked_input(torch.from_numpy(masked)[None].float(), torch.tensor([frames]))
            assert prepared.isfinite().all()


def test_hidden_cells_are_zeros_to_the_audio_encoder():
    clip = np.random.default_rng(0).normal(-40, 12, (30, 16)).astype(np.float16)
    masked = clip.copy()
    Augmentation(MASKS, None).mask(np.random.default_rng(2), masked)
    hidden = torch.from_numpy(masked != clip)
    assert 30 < hidden.sum() < 300
    prepared, _ = masked_input(torch.from_numpy(masked)[None].float(), torch.tensor([30]))
    assert prepared[0, :30][hidden].abs().max() < 2e-3, "more than rounding to fp16"


def test_only_valid_frames_are_masked(plain: BatchLoader):
    """In a padded batch: zeros stay behind every clip, and the masks of a clip do not depend on its padding."""
    part = all_songs(plain)
    batch = augmented(plain, window=None).load_for_training(part, epoch=2)
    whole = plain.load(part.songs)
    assert torch.equal(batch.valid_frames, whole.valid_frames)
    assert not torch.equal(batch.features, whole.features)
    for row, (clip, count) in enumerate(zip(batch.features, batch.valid_frames.tolist(), strict=True)):
        assert not clip[count:].any()
        alone = augmented(plain, window=None).load_for_training(BatchRows(0, row, part.rows[row : row + 1]), epoch=2)
        assert torch.equal(alone.features[0], clip[:count])


def test_shifts_rotate_the_valid_frames(plain: BatchLoader):
    """Every rotation of a clip occurs, its padding stays zero, and the order of its frames is kept."""
    part, shifted = all_songs(plain), augmented(plain, PretrainSettings(time_shift=True), window=None)
    whole = plain.load(part.songs)
    shifts = set()
    for epoch in range(3):
        batch = shifted.load_for_training(part, epoch)
        for clip, original, count in zip(batch.features, whole.features, whole.valid_frames.tolist(), strict=True):
            turns = [turn for turn in range(count) if torch.equal(clip[:count], original[:count].roll(turn, 0))]
            assert len(turns) == 1
            assert not clip[count:].any()
            shifts |= {(turns[0], count)}
    assert len(shifts) > 60
    assert {turn == 0 for turn, _ in shifts} == {True, False}


def test_features_of_other_extractors_are_cropped_only(plain: BatchLoader):
    """A number of a vector is no mel band, and the order of windows is left alone."""
    part, settings = all_songs(plain), MASKS.model_copy(update={"time_shift": True})
    for window in (None, WINDOW):
        loaders = [
            BatchLoader(plain.songs, plain.frames, plain.text_encoder, Augmentation(chosen, window, "vectors"))
            for chosen in (settings, PretrainSettings(seed=settings.seed))
        ]
        altered, cropped = (loader.load_for_training(part, epoch=1).features for loader in loaders)
        assert torch.equal(altered, cropped)


@pytest.mark.parametrize("songs_per_row", [1, 2])
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_alter_clips_like_one_worker(plain: BatchLoader, songs_per_row: int, workers: int):
    loader = augmented(plain)
    rows = np.random.default_rng(0).permutation(48)[: 12 * songs_per_row].reshape(12, songs_per_row)
    one = loader.load_for_training(BatchRows(5, 0, rows), epoch=3)
    own = 12 // workers
    parts = [
        loader.load_for_training(BatchRows(5, rank * own, rows[rank * own : (rank + 1) * own]), epoch=3)
        for rank in range(workers)
    ]
    expected = {
        int(song): clip[:count] for song, clip, count in zip(one.ids[:, 0], one.features, one.valid_frames, strict=True)
    }
    assert len(expected) == rows.size
    for part in parts:
        for song, clip, count in zip(part.ids[:, 0], part.features, part.valid_frames, strict=True):
            assert torch.equal(clip[:count], expected[int(song)])


def test_place_in_training_is_all_that_counts(plain: BatchLoader):
    loader, rows = augmented(plain), np.arange(20).reshape(10, 2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = loader.load_for_training(BatchRows(4, 0, rows), epoch=1).features
    assert torch.equal(torch.get_rng_state(), state)
    np.random.seed(5)  # noqa: NPY002 (the global generator must not matter either)
    assert torch.equal(loader.load_for_training(BatchRows(4, 0, rows), epoch=1).features, first)
    other_seed = augmented(plain, MASKS.model_copy(update={"seed": 8}))
    for other in (
        loader.load_for_training(BatchRows(4, 0, rows), epoch=2),
        loader.load_for_training(BatchRows(5, 0, rows), epoch=1),
        loader.load_for_training(BatchRows(4, 1, rows), epoch=1),
        other_seed.load_for_training(BatchRows(4, 0, rows), epoch=1),
    ):
        assert not torch.equal(other.features, first)
    twice = loader.load_for_training(BatchRows(4, 0, np.array([[30, 30]] * 6)), epoch=1)
    assert len({clip.numpy().tobytes() for clip in twice.features}) == 12, (
        "copies of a song in one batch are altered alike"
    )


def test_stream_gives_the_parts_in_order(plain: BatchLoader):
    loader = augmented(plain)
    parts = [BatchRows(step, 4, np.arange(step, step + 6).reshape(3, 2)) for step in (3, 4, 5)]
    for part, batch in zip(parts, loader.stream(parts, epoch=6), strict=True):
        assert batch.ids[:, 0].tolist() == part.rows[:, 0].tolist() + part.rows[:, 1].tolist()
        assert torch.equal(batch.features, loader.load_for_training(part, epoch=6).features)
    assert list(loader.stream([], epoch=0)) == []


def test_without_augmentation_clips_are_whole(plain: BatchLoader):
    part = all_songs(plain)
    for loader in (
        plain,
        augmented(plain, PretrainSettings(), window=None),
        augmented(plain, PretrainSettings(), window=32),
    ):
        assert torch.equal(loader.load_for_training(part, epoch=9).features, plain.load(part.songs).features)
