"""Warm start: which weights are taken, what is refused, and that training continues exactly from them."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, InputError, MismatchError, WorkspaceError
from htcl_ray.models import HTCL
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.train import finetune
from htcl_ray.training.loop import train
from htcl_ray.training.order import pair_order
from htcl_ray.training.song_numbers import read_pairs, with_replayed
from htcl_ray.training.stage_run import StageRun, check_data
from htcl_ray.training.warm_start import (
    check_source,
    earlier_pairs,
    find_source,
    preference_start,
    semantic_start,
    source_identity,
    training_pairs,
)
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.manifest import build_manifest
from tests.unit.training.test_training import CPU, World
from tests.worlds.official_model import small_wrapper
from tests.worlds.synthetic_features import write_pairs

pytestmark = pytest.mark.unit

PARTS = ["audio tower", "text tower", "audio head", "text head", "temperature"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """With a model of each stage in its workspace, `s1` and `p1`, whose weights are those of no fresh model."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        made = World(folder)
    for stage, (space, version, parents) in enumerate(
        [("semantic", "s1", {}), ("preference", "p1", {"pairs": "pairs", "model": "s1"})], start=1
    ):
        model = made.model(stage)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(stage)))
        path = f"models/{space}/{version}"
        model.save_pretrained(made.workspace.full(path))
        made.workspace.finish(path, build_manifest(space, config={}, inputs={"features": "synthetic", **parents}))
    return made


def folder(world: World, version: str) -> Path:
    return find_source(world.workspace, version).folder


def configured(world: World, **overrides: Any) -> Config:
    return world.config.with_overrides({name.replace("__", "."): value for name, value in overrides.items()})


def equal(a: HTCL, b: HTCL, prefix: str = "") -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first if name.startswith(prefix))


class TestSemanticStart:
    def test_an_equal_configuration_takes_every_weight(self, world: World):
        model, taken, left = semantic_start(world.config, folder(world, "s1"), None)
        source = HTCL.from_pretrained(folder(world, "s1"))
        assert (sorted(taken), left) == (sorted(PARTS), [])
        assert model.state_dict().keys() == source.state_dict().keys()
        assert equal(model, source)
        assert not equal(model, world.model(1))
        assert model.text_encoder.tokenizer.get_vocab() == source.text_encoder.tokenizer.get_vocab()

    @pytest.mark.parametrize(
        ("overrides", "left"),
        [
            ({"model__dim": 12}, ["audio head", "text head", "temperature"]),
            ({"model__width": 48}, ["audio tower", "audio head", "temperature"]),
            ({"text__layers": 2}, ["text tower", "text head", "temperature"]),
            ({"text__pooling": "mean"}, ["text tower", "text head", "temperature"]),
            ({"pretrain__loss": "sigmoid"}, ["temperature"]),
            ({"model__dropout": 0.3, "pretrain__epochs": 9, "pretrain__seed": 7}, []),
        ],
    )
    def test_parts_that_do_not_fit_are_new_and_the_others_taken(
        self, world: World, overrides: dict[str, Any], left: list[str]
    ):
        config = configured(world, **overrides)
        model, taken, actual_left = semantic_start(config, folder(world, "s1"), world.vocabulary)
        assert actual_left == left
        assert sorted([*taken, *actual_left]) == sorted(PARTS)
        fresh, source = HTCL.untrained(config, world.vocabulary), HTCL.from_pretrained(folder(world, "s1"))
        prefixes = {"audio tower": "audio_encoder.", "text tower": "text_encoder."}
        prefixes |= {"audio head": "audio_head.", "text head": "text_head."}
        for part, prefix in prefixes.items():
            if part in taken:
                assert equal(model, source, prefix), part
            else:
                assert {name: value.shape for name, value in model.state_dict().items() if name.startswith(prefix)} == {
                    name: value.shape for name, value in fresh.state_dict().items() if name.startswith(prefix)
                }

    def test_nothing_to_take_is_refused(self, world: World):
        with pytest.raises(MismatchError, match="neither the audio tower nor the text tower"):
            semantic_start(configured(world, model__width=48, text__layers=2), folder(world, "s1"), world.vocabulary)

    def test_imported_weights_keep_their_way_of_padding(self, world: World, tmp_path: Path):
        """The authors' recipe is part of what their weights were trained on."""
        torch.save(small_wrapper(1).state_dict(), tmp_path / "model-20.pth")
        official = HTCL.from_official(tmp_path / "model-20.pth", 1)
        official.save_pretrained(tmp_path / "official")
        record = official.record
        config = world.config.with_overrides(
            {"audio": record.audio.model_dump(), "model": record.model.model_dump(), "pretrain.batch_size": 16}
        )
        model, taken, left = semantic_start(config, tmp_path / "official", world.vocabulary)
        assert set(taken) == {"audio tower", "audio head"}
        assert set(left) == {"text tower", "text head", "temperature"}
        assert model.record.input == record.input
        mel = torch.randn(2, 40, record.audio.n_mels) * 10 - 40
        torch.testing.assert_close(model.eval().embed_mel(mel), official.embed_mel(mel), rtol=0, atol=0)


class TestExactness:
    def trained(self, world: World, model: HTCL, stage: int, config: Config) -> HTCL:
        settings = config.pretrain if stage == 1 else config.finetune
        train(
            model,
            world.task(stage, config),
            world.loader(model),
            settings,
            CPU,
            on_checkpoint=lambda metrics, step, save: None,
            say=lambda line: None,
        )
        return model

    @pytest.mark.parametrize("stage", [1, 2])
    def test_without_a_learning_rate_the_weights_stay_those_of_the_source(self, world: World, stage: int):
        rates = ("learning_rate", "text_learning_rate", *(["audio_learning_rate"] if stage == 2 else []))
        step = "pretrain" if stage == 1 else "finetune"
        config = configured(world, **{f"{step}__{rate}": 1e-30 for rate in rates}, **{f"{step}__epochs": 1})
        source = folder(world, "s1" if stage == 1 else "p1")
        model = semantic_start(config, source, None)[0] if stage == 1 else preference_start(config, source)
        assert equal(self.trained(world, model, stage, config), HTCL.from_pretrained(source))

    @pytest.mark.parametrize("stage", [1, 2])
    def test_training_continues_as_after_loading_the_weights_by_hand(self, world: World, stage: int):
        step = "pretrain" if stage == 1 else "finetune"
        config = configured(world, **{f"{step}__epochs": 1})
        source = folder(world, "s1" if stage == 1 else "p1")
        started = semantic_start(config, source, None)[0] if stage == 1 else preference_start(config, source)
        by_hand = world.model(stage)
        by_hand.load_state_dict(HTCL.from_pretrained(source).state_dict())
        first, second = (self.trained(world, model, stage, config) for model in (started, by_hand))
        assert equal(first, second)
        assert not equal(first, HTCL.from_pretrained(source))


class TestRefusals:
    @pytest.mark.parametrize(
        ("step", "source", "overrides", "message"),
        [
            ("pretrain", "p1", {}, "p1 is a preference model of stage 2, but pretrain continues one of stage 1"),
            ("pretrain", "s1", {"audio__hop_length": 512}, "features with audio.hop_length=1536"),
            ("pretrain", "absent", {}, "'absent' is neither a model folder nor a model of the workspace"),
            ("finetune", "s1", {}, "s1 is no whole preference model of stage 2"),
            ("finetune", "p1", {"audio__n_mels": 8}, "features with audio.n_mels=16, but the configuration says 8"),
            ("finetune", "p1", {"model__dim": 8}, "was made with model.dim=16, but the configuration says 8"),
            ("finetune", "p1", {"text__layers": 3}, "was made with text.layers=1, but the configuration says 3"),
            ("finetune", "p1", {"finetune__loss": "sigmoid"}, "the loss softmax, but finetune.loss is sigmoid"),
        ],
    )
    def test_one_sentence_before_anything_starts(
        self, world: World, step: str, source: str, overrides: dict[str, Any], message: str
    ):
        config = configured(world, **overrides, **{f"{step}__warm_start": source})
        with pytest.raises(InputError, match=message) as raised:
            check_source(world.workspace, config, step)
        assert "\n" not in str(raised.value)

    def test_what_fits_is_not_refused(self, world: World):
        for step, source in (("pretrain", "s1"), ("finetune", "p1")):
            check_source(world.workspace, configured(world, **{f"{step}__warm_start": source}), step)
            check_source(world.workspace, world.config, step)

    def test_pairs_that_cannot_be_replayed(self, world: World, tmp_path: Path):
        shutil.copytree(folder(world, "p1"), tmp_path / "copy")
        (tmp_path / "copy/manifest.json").unlink()
        config = configured(world, finetune__warm_start=str(tmp_path / "copy"))
        with pytest.raises(WorkspaceError, match=r"no pairs.*finetune\.replay_share=0"):
            check_source(world.workspace, config, "finetune")
        check_source(world.workspace, config.with_overrides({"finetune.replay_share": 0}), "finetune")
        with pytest.raises(ConfigError, match="replay_share"):
            config.with_overrides({"finetune.replay_share": 1})

    def test_a_preference_model_of_another_semantic_model(self, world: World):
        shutil.copytree(folder(world, "p1"), world.workspace.full("models/preference/p2"))
        made_from = {"features": "synthetic", "pairs": "pairs", "model": "s0"}
        world.workspace.finish("models/preference/p2", build_manifest("preference", config={}, inputs=made_from))
        with pytest.raises(
            MismatchError, match="p2 was fine-tuned from the semantic model s0, but this run belongs to s1"
        ):
            finetune(configured(world, finetune__warm_start="p2"), "s1")
        world.workspace.remove("models/preference/p2")

    def test_the_checks_before_training_say_what_is_taken(self, world: World, capsys: pytest.CaptureFixture[str]):
        manifest = world.workspace.manifest("features/synthetic")
        assert manifest is not None
        features = Artifact("features/synthetic", "synthetic", manifest)

        def checked(**overrides: Any) -> str | None:
            config = configured(world, pretrain__warm_start="s1", **overrides)
            stage = StageRun("pretrain", "semantic", config.pretrain, features, None, None, "v")
            assert stage.inputs == {"features": "synthetic", "warm_start": "s1"}
            return check_data(world.workspace, config, stage)

        assert checked() is None, "the tokenizer comes with the text tower"
        assert (
            "starts from s1: audio tower, text tower, audio head, text head, temperature\n" in capsys.readouterr().out
        )
        assert checked(text__layers=2) is not None
        shown = capsys.readouterr().out
        assert "starts from s1: audio tower, audio head; not taken, since they do not fit" in shown


class TestVersions:
    def test_the_source_is_part_of_the_fingerprint(self, world: World, tmp_path: Path):
        def version(**overrides: Any) -> str:
            return inputs.semantic_version(configured(world, **overrides), "synthetic")

        shutil.copytree(folder(world, "s1"), tmp_path / "a")
        shutil.copytree(folder(world, "s1"), tmp_path / "b")
        a, b = (version(pretrain__warm_start=str(tmp_path / name)) for name in "ab")
        assert a == b, "the content of a folder counts, not its name"
        assert len({a, version(), version(pretrain__warm_start="s1"), version(pretrain__warm_start="s2")}) == 4
        world.model(1).save_pretrained(tmp_path / "b")
        assert version(pretrain__warm_start=str(tmp_path / "b")) != a
        assert source_identity("s1") == "s1"

    def test_the_share_of_replayed_pairs_counts_only_with_a_warm_start(self, world: World):
        def version(**overrides: Any) -> str:
            return inputs.preference_version(configured(world, **overrides), "synthetic", "pairs", "s1")

        assert version() == version(finetune__replay_share=0.1)
        started = {"finetune__warm_start": "p1"}
        assert version(**started) != version(**started, finetune__replay_share=0.1)


class TestReplay:
    def test_pairs_are_drawn_in_the_configured_share(self, world: World):
        earlier = replace(world.pairs, train=world.pairs.train[:30], weights=world.pairs.weights[:30] * 1e6)
        newer = replace(world.pairs, train=world.pairs.train[50:60], weights=np.arange(1, 11.0))
        mixed = with_replayed(newer, earlier, 0.3)
        assert mixed.weights[: len(newer.train)].sum() == pytest.approx(0.7)
        assert mixed.weights[: len(newer.train)] == pytest.approx(0.7 * newer.weights / newer.weights.sum())
        old = {tuple(pair) for pair in earlier.train.tolist()}
        drawn = Counter(
            tuple(pair) in old
            for epoch in range(20)
            for pair in pair_order(0, epoch, mixed.train, mixed.weights, 500).tolist()
        )
        assert drawn[True] / drawn.total() == pytest.approx(0.3, abs=0.02)
        assert mixed.validation is newer.validation

    def test_an_earlier_pair_is_no_explicit_negative(self, world: World):
        earlier = replace(world.pairs, train=world.pairs.train[:2], weights=np.ones(2))
        rejected = np.array([world.pairs.train[0], world.pairs.train[40]])
        newer = replace(
            world.pairs,
            train=world.pairs.train[50:60],
            weights=np.ones(10),
            rejected=rejected,
            rejected_weights=np.array([1.0, 2.0]),
        )
        mixed = with_replayed(newer, earlier, 0.5)
        assert mixed.rejected.tolist() == rejected[1:].tolist()
        assert mixed.rejected_weights.tolist() == [2.0]
        assert mixed.rejected_left_out == newer.rejected_left_out + 1

    def test_an_empty_table_leaves_the_other_as_it_is(self, world: World):
        empty = replace(world.pairs, train=world.pairs.train[:0], weights=world.pairs.weights[:0])
        for mixed in (with_replayed(world.pairs, empty, 0.5), with_replayed(empty, world.pairs, 0.5)):
            assert np.array_equal(mixed.train, world.pairs.train)
            assert np.array_equal(mixed.weights, world.pairs.weights)

    def test_the_earlier_pairs_are_those_that_the_manifest_names(self, world: World):
        settings = configured(world, finetune__warm_start="p1").finetune
        newer = write_pairs(world.config, songs=30, version="newer")
        earlier = earlier_pairs(world.workspace, settings)
        assert earlier is not None
        assert earlier.path == "pairs/pairs"
        mixed = training_pairs(world.workspace, settings, newer, world.songs)
        count = len(read_pairs(world.workspace, newer, world.songs).train)
        assert len(mixed.train) == count + len(world.pairs.train)
        for unmixed in (world.config.finetune, settings.model_copy(update={"replay_share": 0.0})):
            assert earlier_pairs(world.workspace, unmixed) is None
            assert len(training_pairs(world.workspace, unmixed, newer, world.songs).train) == count
