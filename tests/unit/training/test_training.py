"""Optimizer, gradients in micro-batches, validation, and the loop with its checkpoints."""

from __future__ import annotations

import itertools
import math
import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from htcl_ray.config import Config
from htcl_ray.errors import StepError, WorkspaceError
from htcl_ray.losses.stages import total_loss
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.pipelines.inputs import determining_settings
from htcl_ray.pipelines.train_worker import TrainJob, train_worker
from htcl_ray.training.batches import BatchLoader, encode
from htcl_ray.training.checkpoint import TrainingState, load_state
from htcl_ray.training.features import open_frames
from htcl_ray.training.loop import train
from htcl_ray.training.metrics_log import MetricsLog
from htcl_ray.training.micro_batch import compute_gradients
from htcl_ray.training.optimization import build_optimizer, learning_rate_factor
from htcl_ray.training.randomness import get_rng_state, seed_worker, set_rng_state
from htcl_ray.training.song_numbers import Pairs, Songs, read_pairs, read_songs
from htcl_ray.training.stage_run import StageRun, check_data
from htcl_ray.training.stage_tasks import Task, finetune_task, pretrain_task
from htcl_ray.training.validation import Gallery, pair_ranks, pairs_inside, validate, validation_gallery
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features, write_pairs

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


class World:
    """Synthetic songs and pairs, read as training reads them; written first, unless another process has done so."""

    def __init__(self, folder: Path, *, write: bool = True) -> None:
        self.config = tiny_config(folder / "workspace")
        self.workspace = Workspace(self.config.workspace)
        path = write_features(self.config) if write else "features/synthetic"
        self.songs: Songs = read_songs(self.workspace, path)
        manifest = self.workspace.manifest(path)
        assert manifest is not None
        self.frames = open_frames(self.workspace, path, manifest, self.songs)
        self.pairs: Pairs = read_pairs(self.workspace, write_pairs(self.config) if write else "pairs/pairs", self.songs)
        self.vocabulary = train_wordpiece([self.songs.texts[row] for row in self.songs.train], 100)

    def model(self, stage: int, config: Config | None = None) -> HTCL:
        config = config or self.config
        model = HTCL.untrained(config, self.vocabulary)
        return (
            model
            if stage == 1
            else model.to_stage_2(0.074, 0, loss=config.finetune.loss, batch_size=config.finetune.global_batch_size)
        )

    def task(self, stage: int, config: Config | None = None) -> Task:
        config = config or self.config
        return (
            pretrain_task(self.songs, config.pretrain)
            if stage == 1
            else finetune_task(self.pairs, self.songs.train, config.finetune, CPU)
        )

    def loader(self, model: HTCL) -> BatchLoader:
        return BatchLoader(self.songs, self.frames, model.text_encoder, None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        return World(folder)


def gradients(model: HTCL) -> dict[str, torch.Tensor]:
    actual = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return actual


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 7])
def test_two_passes_with_dropout_equal_one_retained_graph(world: World, stage: int, micro_batch_size: int):
    """Same micro-batches, same random numbers; the graph of all of them kept at once."""
    model, task = world.model(stage).double().train(), world.task(stage)
    batch = world.loader(model).load(task.order(0)[:8].T.reshape(-1))
    start = get_rng_state(CPU)
    terms = compute_gradients(model, batch, task, micro_batch_size)
    actual, after = gradients(model), get_rng_state(CPU)
    set_rng_state(start, CPU)
    songs = micro_batch_size * task.songs_per_row
    encoded = [encode(model, batch.part(a, a + songs)) for a in range(0, len(batch), songs)]
    audio, text = (torch.cat(vectors) for vectors in zip(*encoded, strict=True))
    expected_terms = task.terms(model, audio, text, batch.ids)
    total_loss(expected_terms, task.weights).backward()
    expected = gradients(model)
    assert torch.equal(after["cpu"], get_rng_state(CPU)["cpu"])
    assert set(actual) == set(expected)
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max().item() <= 1e-12 * largest, name
    for name, term in expected_terms.items():
        torch.testing.assert_close(terms[name], term.detach(), rtol=1e-12, atol=0)


def test_learning_rate_warms_up_and_falls():
    settings = tiny_config("unused").pretrain.model_copy(update={"warmup_share": 0.1})
    factors = [learning_rate_factor(step, 100, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    constant = settings.model_copy(update={"schedule": "constant"})
    assert {learning_rate_factor(step, 100, constant) for step in range(10, 100)} == {1.0}


def test_every_parameter_is_in_one_group_at_its_rate(world: World):
    config = world.config.with_overrides(
        {"finetune.learning_rate": 1e-3, "finetune.audio_learning_rate": 1e-4, "finetune.text_learning_rate": 1e-5}
    )
    model = world.model(2)
    optimizer = build_optimizer(model, config.finetune)
    rates = {id(parameter): group["peak"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 1e-4 if name.startswith("audio_encoder") else 1e-5 if name.startswith("text_encoder") else 1e-3
        assert rates[id(parameter)] == expected, name
    first = build_optimizer(model, config.pretrain.model_copy(update={"text_learning_rate": 1e-6}))
    rates = {id(parameter): group["peak"] for group in first.param_groups for parameter in group["params"]}
    assert {rates[id(parameter)] for parameter in model.audio_encoder.parameters()} == {config.pretrain.learning_rate}
    assert {rates[id(parameter)] for parameter in model.text_encoder.parameters()} == {1e-6}


def test_weight_decay_is_for_matrices(world: World):
    model = world.model(1)
    optimizer = build_optimizer(model, world.config.pretrain.model_copy(update={"weight_decay": 0.1}))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.1}
    assert not isinstance(build_optimizer(model, world.config.pretrain), torch.optim.AdamW)


def test_pair_ranks_by_sorting():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(20, 6)).astype(np.float32)
    pairs = np.array([[a, b] for a in range(20) for b in range(20) if a != b])
    for (a, b), rank in zip(pairs, pair_ranks(vectors, pairs), strict=True):
        order = [int(song) for song in np.argsort(-(vectors @ vectors[a])) if song != a]
        assert rank == order.index(b) + 1
    assert pair_ranks(np.ones((5, 2), dtype=np.float32), np.array([[0, 1]])).tolist() == [2.5]


def test_pairs_inside_a_gallery():
    gallery, pairs = np.array([2, 5, 9]), np.array([[2, 9], [9, 5], [2, 3], [0, 5], [10, 2]])
    assert pairs_inside(gallery, pairs).tolist() == [[0, 2], [2, 1]]
    assert pairs_inside(gallery[:0], pairs).tolist() == pairs_inside(gallery, pairs[:0]).tolist() == []


@pytest.mark.parametrize("validation", [3_000, 100_000])
@pytest.mark.parametrize("pairs_per_song", [0.5, 10])
def test_pairs_do_not_vanish_from_the_gallery_of_a_large_catalogue(validation: int, pairs_per_song: float):
    """Songs drawn by themselves hold 42 of the 10 million pairs of a million songs; songs of pairs hold hundreds at
    least."""
    random = np.random.default_rng(1)
    songs = np.sort(random.choice(2 * validation, validation, replace=False))
    drawn = np.unique(random.integers(0, validation**2, round(pairs_per_song * validation)))
    pairs = songs[np.stack([drawn // validation, drawn % validation], axis=1)]
    gallery = validation_gallery(songs, pairs)
    assert len(gallery.songs) == len(np.unique(gallery.songs)) == 2048
    assert np.isin(gallery.songs, songs).all()
    assert (np.diff(gallery.songs) > 0).all()
    assert 800 <= len(gallery.pairs) <= 8 * 2048
    codes = pairs[:, 0] * 4 * validation + pairs[:, 1]
    actual = gallery.songs[gallery.pairs]
    assert np.isin(actual[:, 0] * 4 * validation + actual[:, 1], codes).all()
    assert np.mean(actual[:, 0]) == pytest.approx(validation, rel=0.1), (
        "triggers come from the whole catalogue, not from its beginning"
    )
    again = validation_gallery(songs, pairs)
    assert (again.songs == gallery.songs).all()
    assert (again.pairs == gallery.pairs).all()


def test_a_gallery_of_few_pairs_is_filled_with_other_songs():
    songs, pairs = np.arange(5_000), np.array([[0, 1], [1, 4_999], [7, 8]])
    gallery = validation_gallery(songs, pairs)
    assert len(gallery.songs) == 2048
    assert gallery.songs[gallery.pairs].tolist() == pairs.tolist()
    hub = np.stack([np.zeros(4_999, dtype=np.int64), songs[1:]], axis=1)
    assert len(validation_gallery(songs, hub).songs) == 2048
    assert len(validation_gallery(songs, hub).pairs) == 2047
    many = np.stack(np.meshgrid(songs[:400], songs[:400]), axis=-1).reshape(-1, 2)
    kept = validation_gallery(songs[:400], many[many[:, 0] != many[:, 1]])
    assert len(kept.pairs) == 8 * 2048
    assert len(np.unique(kept.pairs[:, 0])) == 400, "of too many pairs a sample, not those of the first songs"


def test_validation_is_repeatable_and_complete(world: World):
    model = world.model(2).train()
    gallery = validation_gallery(world.songs.validation, world.pairs.validation)
    assert gallery.songs.tolist() == world.songs.validation.tolist()
    first, second = (validate(model, world.loader(model), gallery) for _ in range(2))
    assert first == second
    assert set(first) == {
        "validation_recall@10",
        "validation_ndcg@10",
        "validation_median_rank",
        "validation_pair_recall@10",
        "validation_pair_ndcg@10",
        "validation_pair_median_rank",
    }
    assert model.training
    assert validate(model, world.loader(model), validation_gallery(world.songs.validation[:0])) == {}
    alone = validation_gallery(np.arange(5000))
    assert len(alone.songs) == len(np.unique(alone.songs)) == 2048
    assert len(alone.pairs) == 0
    assert not any(
        name.startswith("validation_pair")
        for name in validate(model, world.loader(model), Gallery(gallery.songs, alone.pairs))
    )


def test_ndcg_of_validation_is_scikit_learn_s(world: World):
    """12 songs, each with a text of its own, so that ranks 11 and 12 count nothing; the trigger of a pair is no
    candidate."""
    model = world.model(2).eval()
    loader, both = world.loader(model), validation_gallery(world.songs.validation, world.pairs.validation)
    actual = validate(model, loader, both)
    gallery, inside = both
    batch = loader.load(gallery)
    audio = model.embed_mel(batch.features, batch.valid_frames).numpy()
    text = model.embed_text([world.songs.texts[row] for row in gallery]).numpy()
    assert len(gallery) == 12
    assert actual["validation_ndcg@10"] == pytest.approx(ndcg_score(np.eye(12), text @ audio.T, k=10))
    scores = np.array([np.delete(audio[trigger] @ audio.T, trigger) for trigger, _ in inside])
    wanted = np.array([np.delete(np.arange(12) == recalled, trigger) for trigger, recalled in inside])
    assert actual["validation_pair_ndcg@10"] == pytest.approx(ndcg_score(wanted, scores, k=10))
    assert 0 < actual["validation_pair_ndcg@10"] < actual["validation_pair_recall@10"] < 1


def run(
    world: World, stage: int, config: Config, folder: Path | None = None, model: HTCL | None = None, **more: Any
) -> tuple[HTCL, list]:
    """Train, keeping every epoch's checkpoint in `folder`."""
    model = model or world.model(stage, config)
    epochs: list[dict[str, float]] = []

    def on_checkpoint(metrics: dict[str, float] | None, step: int, save: Any) -> None:
        if metrics is not None:
            epochs.append(metrics)
        if folder is not None:
            save(folder / f"step-{step}")

    settings = config.pretrain if stage == 1 else config.finetune
    task, say = world.task(stage, config), more.pop("say", print)
    train(model, task, world.loader(model), settings, CPU, on_checkpoint=on_checkpoint, say=say, **more)
    return model, epochs


def test_stage_1_learns_what_text_names(world: World):
    """Genres are audible and named; 12 songs of 6 genres lie in the gallery, so chance is a median rank of about 4."""
    config = world.config.with_overrides({"pretrain.epochs": 60, "pretrain.health.patience_steps": 60})
    lines: list[str] = []
    _, epochs = run(world, 1, config, say=lines.append)
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.5
    assert epochs[-1]["validation_median_rank"] <= 2.5
    assert epochs[-1]["probe_loss_text"] < 0.98 * epochs[-1]["plateau_loss_text"]
    assert not [line for line in lines if "WARNING" in line]
    assert lines[-1].startswith("pretrain  epoch 60/60  step 120/120  loss text ")
    assert {"temperature_text", "learning_rate", "songs_per_second", "gradient_norm", "peak_memory_gb"} <= set(
        epochs[-1]
    )
    assert 0 <= epochs[-1]["seconds_waiting_for_data"] < 60


def test_checkpoints_within_an_epoch(world: World, tmp_path: Path):
    """Two steps an epoch: every third step, and the end of each epoch."""
    run(world, 1, world.config.with_overrides({"pretrain.epochs": 4, "pretrain.checkpoint_every_steps": 3}), tmp_path)
    assert sorted(int(folder.name.removeprefix("step-")) for folder in tmp_path.iterdir()) == [2, 3, 4, 6, 8]


def test_what_another_run_cannot_repeat_is_said(world: World, tmp_path: Path):
    config = world.config.with_overrides({"pretrain.epochs": 2, "pretrain.micro_batch_size": 4})
    run(world, 1, config, tmp_path)
    lines: list[str] = []
    other = config.with_overrides({"pretrain.micro_batch_size": 2})
    run(
        world,
        1,
        other,
        model=HTCL.from_pretrained(tmp_path / "step-2"),
        resume=load_state(tmp_path / "step-2"),
        say=lines.append,
    )
    assert any("made with micro_batch_size 4, now it is 2; the run resumes" in line for line in lines)
    assert any(line.startswith("pretrain  continues after step 2/4 (epoch 2 of 2)") for line in lines)


def test_auto_probes_unless_the_checkpoint_was_probed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that did not fit is started again with `auto`: the size that it failed with is not taken over."""
    config = world.config.with_overrides({"pretrain.epochs": 3, "pretrain.health.action": "off"})
    probes: list[int] = []
    monkeypatch.setattr("htcl_ray.training.loop.probe_micro_batch_size", lambda *arguments: probes.append(4) or 4)

    def resume_run(settings: Any, start: str, into: str) -> TrainingState:
        again = config.with_overrides({"pretrain.micro_batch_size": settings})
        run(
            world,
            1,
            again,
            tmp_path / into,
            HTCL.from_pretrained(tmp_path / start),
            resume=load_state(tmp_path / start),
        )
        return load_state(tmp_path / into / "step-6")

    run(world, 1, config, tmp_path)
    actual = resume_run("auto", "step-2", "auto")
    assert (actual.micro_batch_size, actual.probed, len(probes)) == (4, True, 1)
    assert resume_run("auto", "auto/step-4", "again").micro_batch_size == 4
    assert len(probes) == 1, "a probed size is taken over, so that random numbers are drawn as before"


def test_each_worker_restores_its_own_random_numbers_and_sums():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    state = TrainingState(
        1, None, False, optimizer={}, rng={"cpu": torch.stack(states)}, sums={"text": torch.tensor([1.5, 2.0])}
    )
    for rank, seed in enumerate((1, 2)):
        own = state.rng_of(rank, workers=2)
        assert own is not None
        set_rng_state(own, CPU)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    assert state.rng_of(0, workers=3) is None
    assert [state.sums_of(rank, 2)["text"].item() for rank in range(2)] == [1.5, 2.0]
    assert [state.sums_of(rank, 3)["text"].item() for rank in range(3)] == [3.5, 0, 0]


def test_stage_2_moves_every_part(world: World):
    config = world.config.with_overrides({"finetune.epochs": 1, "finetune.pairs_per_epoch": 16})
    before = world.model(2).state_dict()
    after, epochs = run(world, 2, config)
    for part in ("audio_encoder", "text_encoder", "audio_head", "text_head", "fusion", "logit_scale"):
        assert any(
            not torch.equal(tensor, after.state_dict()[name])
            for name, tensor in before.items()
            if name.startswith(part)
        ), part
    assert {"loss_text", "loss_preference", "loss_fusion"} <= set(epochs[0])
    weights = world.task(2, config).weights
    assert epochs[0]["loss"] == pytest.approx(sum(weights[name] * epochs[0][f"loss_{name}"] for name in weights))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("learned", [False, True])
def test_a_temperature_that_is_not_learned_stays_exactly_where_it_starts(
    world: World, stage: int, loss: str, micro_batch_size: int | None, learned: bool
):
    name = "pretrain" if stage == 1 else "finetune"
    chosen = {
        "loss": loss,
        "micro_batch_size": micro_batch_size,
        "learn_temperature": learned,
        "epochs": 2,
        "health.action": "off",
    }
    config = world.config.with_overrides(
        {"finetune.pairs_per_epoch": 32, **{f"{name}.{key}": value for key, value in chosen.items()}}
    )
    before, temperatures = world.model(stage, config).state_dict(), world.model(stage, config).temperatures()
    model, epochs = run(world, stage, config)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == (key.startswith("logit_scale.") and not learned), key
    assert len(temperatures) == (1 if stage == 1 else 3)
    assert len([key for key in before if key.startswith("logit_bias.")]) == (
        len(temperatures) if loss == "sigmoid" else 0
    )
    for term, value in temperatures.items():
        assert (epochs[-1][f"temperature_{term}"] == value) == (not learned)


def test_the_lowest_temperature_stays_too(world: World):
    config = world.config.with_overrides(
        {"pretrain.temperature": 0.01, "pretrain.learn_temperature": False, "pretrain.epochs": 1}
    )
    model, _ = run(world, 1, config)
    assert torch.equal(model.logit_scale["text"], world.model(1, config).logit_scale["text"])


def test_rows_seen_count_full_batches_of_all_epochs(world: World, tmp_path: Path):
    """36 training songs are two batches of 16, and 48 are three; a resumed run continues the count."""
    config = world.config.with_overrides({"finetune.pairs_per_epoch": 40})
    assert [metrics["rows_seen"] for metrics in run(world, 1, config, tmp_path)[1]] == [32, 64, 96]
    _, rest = run(
        world, 1, config, model=HTCL.from_pretrained(tmp_path / "step-4"), resume=load_state(tmp_path / "step-4")
    )
    assert [metrics["rows_seen"] for metrics in rest] == [96]
    longer = config.with_overrides({"pretrain.songs_per_epoch": 48, "pretrain.epochs": 2})
    assert [(metrics["step"], metrics["rows_seen"]) for metrics in run(world, 1, longer)[1]] == [(3, 48), (6, 96)]
    assert [metrics["rows_seen"] for metrics in run(world, 2, config)[1]] == [32, 64]


def test_songs_of_an_epoch_go_on_where_the_one_before_ended(world: World):
    task = world.task(1, world.config.with_overrides({"pretrain.songs_per_epoch": 24, "pretrain.seed": 3}))
    assert task.rows == 24
    whole = world.task(1, world.config.with_overrides({"pretrain.seed": 3}))
    assert whole.rows == 36
    assert np.array_equal(
        np.concatenate([task.order(epoch) for epoch in range(3)]), np.concatenate([whole.order(0), whole.order(1)])
    )


def test_without_progress_only_what_a_person_must_know_is_said(world: World, tmp_path: Path):
    config = world.config.with_overrides({"pretrain.epochs": 2, "pretrain.micro_batch_size": 4})
    lines: list[str] = []
    run(world, 1, config, tmp_path, say=lines.append, show_progress=False)
    assert lines == []
    other = config.with_overrides({"pretrain.micro_batch_size": 2})
    resumed = HTCL.from_pretrained(tmp_path / "step-2")
    run(world, 1, other, model=resumed, resume=load_state(tmp_path / "step-2"), say=lines.append, show_progress=False)
    assert len(lines) == 1
    assert "made with micro_batch_size 4, now it is 2" in lines[0]


def test_a_damaged_training_state_is_one_sentence(world: World, tmp_path: Path):
    run(world, 1, world.config.with_overrides({"pretrain.epochs": 1}), tmp_path)
    (folder,) = tmp_path.glob("step-*")
    file = folder / "training_state.pt"
    for data in (file.read_bytes()[:-200], b"", b"no state"):
        file.write_bytes(data)
        with pytest.raises(WorkspaceError, match=r"training_state\.pt cannot be read .* remove the damaged checkpoint"):
            load_state(folder)


def test_a_loss_that_is_no_number_stops_the_run(world: World):
    model = world.model(1)
    with torch.no_grad():
        model.audio_head[0].weight.fill_(math.nan)
    with pytest.raises(StepError, match=r"the gradient of step 1 has norm nan.*lower pretrain\.learning_rate"):
        run(world, 1, world.config, model=model)


def test_metrics_log_continues_without_repeating(world: World, tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    log = MetricsLog(workspace, "runs/a", 0)
    for epoch in (1, 2, 3):
        log.write({"epoch": epoch, "step": 10 * epoch, "loss": 1 / epoch})
    log.close()
    again = MetricsLog(workspace, "runs/a", 20)  # the third epoch's checkpoint was never stored
    again.write({"epoch": 3, "step": 30, "loss": 0.5})
    again.close()
    lines = workspace.read_bytes("runs/a/metrics.jsonl").decode().splitlines()
    assert [line.split(",")[0] for line in lines] == ['{"epoch": 1', '{"epoch": 2', '{"epoch": 3']
    assert '"loss": 0.5' in lines[2]
    assert len(list((tmp_path / "runs/a/tensorboard").glob("events.*"))) >= 1


def test_every_seed_rank_and_step_has_dropout_of_its_own():
    """The largest seed of the settings, and resumed runs: a CPU's generator takes the lowest 32 bits of a seed
    alone."""
    drawn = {}
    for seed, worker, step in itertools.product((0, 1, 2**32 - 1), (0, 1, 999), (0, 1, 2**20)):
        seed_worker(seed, worker, step)
        drawn[seed, worker, step] = tuple(torch.rand(4).tolist())
    assert len(set(drawn.values())) == len(drawn)
    seed_worker(1, 999, 1)
    assert tuple(torch.rand(4).tolist()) == drawn[1, 999, 1]


def test_rows_per_worker_and_workers_make_the_batch(world: World, capsys: pytest.CaptureFixture[str]):
    """The same global batch is the same run, another number of workers another one; workers with few rows are warned
    about."""
    features = Artifact("features/synthetic", "synthetic", {})

    def checked(**sizes: int) -> tuple[StageRun, str]:
        config = world.config.with_overrides({f"pretrain.{name}": value for name, value in sizes.items()})
        stage = StageRun("pretrain", "semantic", config.pretrain, features, None, None, "v")
        check_data(world.workspace, config, stage)
        return stage, capsys.readouterr().out

    few, said = checked(batch_size_per_worker=8, num_workers=2)
    assert said == (
        "pretrain  WARNING: each of 2 worker(s) has 8 of the 16 rows of a batch; the paper has 32 per GPU, which "
        "pretrain.batch_size_per_worker=32 would give\n"
    )
    same, other = checked(batch_size=16, num_workers=2)[0], checked(batch_size_per_worker=8, num_workers=4)[0]
    assert (
        determining_settings(few.settings)
        == determining_settings(same.settings)
        != determining_settings(other.settings)
    )
    assert checked(batch_size_per_worker=32, num_workers=1)[1] == ""
    assert (
        checked(batch_size=64, num_workers=2)[1]
        == "pretrain  36 training rows are fewer than a batch of 64; batches have 36\n"
    )
    one = world.config.with_overrides(
        {"pretrain.batch_size_per_worker": 9, "pretrain.num_workers": 1, "pretrain.epochs": 1}
    )
    _, epochs = run(world, 1, one)
    assert (epochs[0]["candidates"], epochs[0]["step"]) == (9, 4)


@pytest.mark.parametrize(("learning_rate", "error"), [(1e-3, None), (1e30, "StepError")])
def test_a_run_leaves_no_frames(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning_rate: float, error: str | None
):
    """Neither one that ends well nor one that fails. The pipeline's worker runs in this process, in Ray Train's local
    mode."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    changes = {
        "pretrain.num_workers": 1,
        "pretrain.epochs": 1,
        "pretrain.warmup_share": 0.0,
        "pretrain.max_gradient_norm": None,
    }
    config = world.config.with_overrides({**changes, "pretrain.learning_rate": learning_rate})
    features = Artifact("features/synthetic", "synthetic", world.workspace.manifest("features/synthetic") or {})
    job = TrainJob(config, world.workspace, features, f"runs/pretrain/{error}", world.vocabulary, None, None)
    result = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "lines": queue.SimpleQueue()},
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(storage_path=str(tmp_path / "runs")),
    ).fit()
    assert (result.return_value or {}).get("error") == error
    assert list(tmp_path.glob("htcl-*/frames*")) == []
