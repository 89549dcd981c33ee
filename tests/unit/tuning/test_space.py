"""The search space: refused spaces, types of values, and points as configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pytest
import yaml

from htcl_ray.config import Config, json_schema, resolve
from htcl_ray.config.sections import Dimension
from htcl_ray.errors import ConfigError
from htcl_ray.tuning.budget import batch_sizes
from htcl_ray.tuning.optuna_study import optuna_study
from htcl_ray.tuning.space import configured_point, default_space, distributions, search_space, with_parameters

pytestmark = pytest.mark.unit
ROWS = {"pretrain": 10_000, "finetune": 10_000}


def configured(space: str | None = None, *assignments: str) -> Config:
    return resolve("demo", None, [*assignments, *([] if space is None else [f"tune.space={space}"])])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{}", "space is empty; expected at least one configuration key, or null for the default space"),
        (
            "{pretrain.temprature: [0.1, 0.2]}",
            "pretrain.temprature, but no configuration key has this name; did you mean 'pretrain.temperature'",
        ),
        (
            "{pretrian.temperature: [0.1, 0.2]}",
            "pretrian.temperature, but no configuration key has this name; did you mean 'pretrain'",
        ),
        (
            "{pretrain.temperature.x: [0.1, 0.2]}",
            "no configuration key has this name; pretrain.temperature is a value, not a section",
        ),
        ("{data.columns.song_id: [a, b]}", "tune.space names data.columns.song_id"),
        (
            "{pretrain: [1, 2]}",
            "tune.space names pretrain, which is a section; expected its keys, such as pretrain.batch_size",
        ),
        (
            "{pretrain.temperature: []}",
            "'tune.space.pretrain.temperature': values is []; expected at least two, all different",
        ),
        (
            "{pretrain.temperature: [0.1]}",
            "'tune.space.pretrain.temperature': values is [0.1]; expected at least two, all different",
        ),
        ("{pretrain.temperature: [0.1, 0.1]}", "expected at least two, all different"),
        (
            "{pretrain.temperature: [0.1, [0.2]]}",
            "[0.2] is among its values; expected finite numbers, strings, true, false or null",
        ),
        ("{pretrain.temperature: [0.1, .nan]}", "nan is among its values"),
        (
            "{pretrain.temperature: {low: 0.5, high: 0.02}}",
            "its range is 0.5 to 0.02; expected finite numbers, low less than high",
        ),
        (
            "{pretrain.temperature: {low: 0.5, high: 0.5}}",
            "its range is 0.5 to 0.5; expected finite numbers, low less than high",
        ),
        (
            "{pretrain.learning_rate: {low: 0.5, high: .inf}}",
            "tune.space.pretrain.learning_rate.high': Input should be a finite number",
        ),
        (
            "{pretrain.learning_rate: {low: 0, high: 1, log: true}}",
            "low is 0; expected more than 0 in a range with log",
        ),
        ("{pretrain.temperature: {low: 0.1}}", "it is neither a list nor a range"),
        (
            "{pretrain.temperature: {lo: 0.1, high: 0.2}}",
            "'tune.space.pretrain.temperature': a range has no 'lo'; did you mean 'low'?",
        ),
        ("{pretrain.temperature: {values: [0.1, 0.2], high: 0.2}}", "it has values and a range; expected either"),
        (
            "{pretrain.temperature: 0.5}",
            "'tune.space.pretrain.temperature': it is 0.5; expected a list of values, or a range with low and high",
        ),
        ("{pretrain: {temperature: [0.1, 0.2]}}", "'tune.space.pretrain': a range has no 'temperature'"),
        (
            "{pretrain.temperature: {low: 0.001, high: 0.2}}",
            "tune.space cannot give pretrain.temperature the value 0.001",
        ),
        ("{pretrain.warmup_share: {low: 0, high: 1}}", "tune.space cannot give pretrain.warmup_share the value 1.0"),
        ("{pretrain.mel_masks: {low: 0, high: 2.5}}", "tune.space cannot give pretrain.mel_masks the value 2.5"),
        ("{pretrain.loss: [softmax, hinge]}", "tune.space cannot give pretrain.loss the value hinge"),
        (
            "{pretrain.compile: {low: 0, high: 1}}",
            "tune.space.pretrain.compile is a range, but pretrain.compile is true or false",
        ),
        (
            "{pretrain.learn_temperature: [1, true]}",
            "tune.space.pretrain.learn_temperature is [1, True], of which two are the same value",
        ),
        (
            "{pretrain.batch_size: {low: 8, high: 32}}",
            "tune.space.pretrain.batch_size is a range; expected a list of values",
        ),
        (
            "{pretrain.batch_size: [8, 9]}",
            "tune.space.pretrain.batch_size has 9, which pretrain.num_workers (2) does not divide; "
            "expected multiples of 2",
        ),
        ("{pretrain.batch_size: [8, 16.0]}", "tune.space.pretrain.batch_size has 16.0; expected whole numbers"),
        ("{pretrain.batch_size: [8, true]}", "tune.space.pretrain.batch_size has True; expected whole numbers"),
        ("{pretrain.batch_size: [8, '16']}", "tune.space.pretrain.batch_size has '16'; expected whole numbers"),
        (
            "{pretrain.batch_size_per_worker: [8, 16]}",
            "but batches are searched by their global size, batch_size; take it out",
        ),
        ("{pretrain.batch_size: [8, 0]}", "tune.space cannot give pretrain.batch_size the value 0"),
        (
            "{data.catalog: [a, b]}",
            "tune.space names data.catalog, which trials of tune.stage=pretrain cannot change; "
            "expected keys of pretrain, model",
        ),
        ("{audio.n_mels: [64, 128]}", "tune.space names audio.n_mels, which trials"),
        ("{evaluate.seed: [1, 2]}", "tune.space names evaluate.seed, which trials"),
        ("{tune.samples: [100, 200]}", "tune.space names tune.samples, which trials"),
        ("{tune.space.x: [1, 2]}", "tune.space names tune.space.x"),
        ("{workspace: [a, b]}", "tune.space names workspace, which trials"),
        (
            "{finetune.temperature: [0.1, 0.2]}",
            "tune.space names finetune.temperature, which trials of tune.stage=pretrain cannot change",
        ),
        (
            "{pretrain.num_workers: [1, 2]}",
            "pretrain.num_workers, but it changes where and how a stage runs, not what it learns; take it out",
        ),
        ("{pretrain.micro_batch_size: [1, 2]}", "pretrain.micro_batch_size, but it changes where and how"),
        ("{pretrain.health.action: [warn, stop]}", "pretrain.health.action, but it changes where and how"),
        (
            "{pretrain.seed: [1, 2]}",
            "tune.space names pretrain.seed, but trials are compared with the same seed; take it out of the space",
        ),
        (
            "{pretrain.epochs: [1, 2]}",
            "tune.space names pretrain.epochs, but every trial sees tune.samples rows; take it out of the space",
        ),
        (
            "{pretrain.songs_per_epoch: [64, 128]}",
            "tune.space names pretrain.songs_per_epoch, but every trial sees tune.samples rows",
        ),
        (
            "{pretrain.best_metric: [loss, null]}",
            "tune.space names pretrain.best_metric, but trials are compared by tune.objectives",
        ),
        (
            "{pretrain.freeze_audio_layers: [0, 2], model.layers: [1, 2]}",
            "pretrain.freeze_audio_layers the value 2 and model.layers the value 1, which",
        ),
        (
            "{pretrain.mel_masks: {low: 0, high: 4}, pretrain.mel_mask_bands: [8, 40]}",
            "pretrain.mel_masks the value 4 and pretrain.mel_mask_bands",
        ),
    ],
)
def test_an_invalid_space_is_refused_in_one_sentence(space: str, message: str):
    with pytest.raises(ConfigError) as caught:
        search_space(configured(space, "audio.tower=transformer", "audio.n_mels=128"), ROWS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "tune" in str(caught.value)


def test_stage_2_cannot_search_keys_of_its_parent_model():
    with pytest.raises(
        ConfigError,
        match=r"model\.layers, which trials of tune\.stage=finetune cannot change; expected keys of finetune",
    ):
        search_space(configured("{model.layers: [1, 2]}", "tune.stage=finetune"), ROWS)
    with pytest.raises(ConfigError, match=r"finetune\.pairs_per_epoch, but every trial sees tune\.samples rows"):
        search_space(configured("{finetune.pairs_per_epoch: [64, 128]}", "tune.stage=finetune"), ROWS)


def test_the_audio_tower_and_its_sizes_are_searched():
    """The only key of `audio`: features do not depend on it."""
    space = search_space(configured("{audio.tower: [transformer, cnn], model.cnn.width: [64, 128]}"), ROWS)
    assert {name: dimension.values for name, dimension in space.items()} == {
        "audio.tower": ("transformer", "cnn"),
        "model.cnn.width": (64, 128),
    }
    with pytest.raises(ConfigError, match=r"tune\.space cannot give audio\.tower the value mlp: .*extractor log_mel"):
        search_space(configured("{audio.tower: [cnn, mlp]}"), ROWS)
    with pytest.raises(ConfigError, match=r"audio\.tower, which trials of tune\.stage=finetune cannot change"):
        search_space(configured("{audio.tower: [transformer, cnn]}", "tune.stage=finetune"), ROWS)


def test_values_have_the_type_of_their_key():
    space = search_space(
        configured(
            "{pretrain.learning_rate: ['1e-4', 1], pretrain.learn_temperature: [1, 0], "
            "pretrain.max_gradient_norm: [null, 2]}"
        ),
        ROWS,
    )
    values = [
        repr(space[f"pretrain.{name}"].values) for name in ("learning_rate", "learn_temperature", "max_gradient_norm")
    ]
    assert values == ["(0.0001, 1.0)", "(True, False)", "(None, 2.0)"]


def test_ranges_of_whole_numbers_give_whole_numbers():
    config = configured(
        "{pretrain.mel_masks: {low: 0, high: 3}, pretrain.learning_rate: {low: 1.0e-4, high: 1, log: true}, "
        "model.dim: [8, 16]}"
    )
    assert distributions(config, search_space(config, ROWS)) == {
        "pretrain.mel_masks": optuna.distributions.IntDistribution(0, 3),
        "pretrain.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
        "model.dim": optuna.distributions.CategoricalDistribution((8, 16)),
    }


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "both"])
@pytest.mark.parametrize(
    "assignments", [[], ["num_workers=3", "batch_size=9"], ["micro_batch_size=8"], ["micro_batch_size=auto"]]
)
def test_every_point_is_a_configuration_that_needs_no_more_memory(stage: str, assignments: list[str]):
    config = configured(
        None, f"tune.stage={stage}", *[f"{name}.{item}" for name in ("pretrain", "finetune") for item in assignments]
    )
    space = distributions(config, search_space(config, ROWS))
    study = optuna_study([], space, ["semantic"])
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    seen = set()
    for _ in range(60):
        parameters = study.ask(space).params
        point = with_parameters(config, parameters)
        for name in config.tune.stages:
            before, after = getattr(config, name), getattr(point, name)
            assert {key: getattr(after, key.partition(".")[2]) for key in parameters if key.startswith(name)} == {
                key: value for key, value in parameters.items() if key.startswith(name)
            }
            assert rows_at_a_time(after) <= rows_at_a_time(before)
            seen.add((name, after.batch_size, after.micro_batch_size))
            unchanged = {"temperature", "learn_temperature", "learning_rate", "batch_size", "micro_batch_size"}
            assert after.model_dump(exclude=unchanged) == before.model_dump(exclude=unchanged)
    assert len({size for _, size, _ in seen}) == 4


def rows_at_a_time(stage: Any) -> float:
    """Rows that a worker encodes at a time; 0 for `auto`, which always fits its memory."""
    if stage.micro_batch_size == "auto":
        return 0
    return stage.micro_batch_size or stage.batch_size / stage.num_workers


def test_a_larger_batch_is_encoded_in_micro_batches():
    config = configured(None)  # 64 rows, 2 workers
    parts = {
        size: with_parameters(config, {"pretrain.batch_size": size}).pretrain.micro_batch_size
        for size in (2, 32, 64, 66, 256)
    }
    assert parts == {2: None, 32: None, 64: None, 66: 32, 256: 32}
    split = config.with_overrides({"pretrain.micro_batch_size": 8})
    parts = {
        size: with_parameters(split, {"pretrain.batch_size": size}).pretrain.micro_batch_size
        for size in (2, 16, 64, 256)
    }
    assert parts == {2: 1, 16: 8, 64: 8, 256: 8}
    assert with_parameters(config, {"pretrain.temperature": 0.1}).pretrain.micro_batch_size is None


def test_the_default_space_lies_around_the_configuration():
    config = configured(None, "tune.stage=both")
    space = default_space(config, ROWS)
    assert set(space) == {
        f"{stage}.{key}"
        for stage in ("pretrain", "finetune")
        for key in ("temperature", "learn_temperature", "batch_size", "learning_rate")
    }
    assert space["pretrain.batch_size"].values == (32, 64, 128, 256)
    point = configured_point(config, space)
    assert point is not None
    assert with_parameters(config, point) == config
    small = default_space(config, {"pretrain": 130, "finetune": 63})
    assert small["pretrain.batch_size"].values == (32, 64, 128)
    assert "finetune.batch_size" not in small


def test_a_configuration_outside_the_space_is_not_a_point_of_it():
    for space in (
        "{pretrain.temperature: {low: 0.2, high: 0.3}}",
        "{pretrain.batch_size: [32, 128]}",
        "{pretrain.max_gradient_norm: [null, 2]}",
    ):
        config = configured(space)
        assert configured_point(config, search_space(config, ROWS)) is None
    config = configured("{pretrain.temperature: {low: 0.074, high: 0.3}, pretrain.batch_size: [64, 128]}")
    assert configured_point(config, search_space(config, ROWS)) == {
        "pretrain.temperature": 0.074,
        "pretrain.batch_size": 64,
    }


MIXED = (
    "{a: [1, true, 1.0, '1', null], b: {low: 1, high: 2}, c: [true, yes, 'null', null, 1.0e-05], "
    "d: {low: 0.5, high: 1, log: true}}"
)


def test_a_printed_space_is_read_back_with_the_types_of_its_values(tmp_path: Path):
    config = configured(MIXED, "tune.objectives=semantic")
    (tmp_path / "saved.yaml").write_text(config.as_yaml())
    again = resolve(None, tmp_path / "saved.yaml")
    assert config.tune.space is not None
    assert again.tune.space is not None
    assert repr(again.tune) == repr(config.tune)
    assert repr(again.tune.space["a"].values) == "(1, True, 1.0, '1', None)"
    assert repr(again.tune.space["c"].values) == "(True, 'yes', 'null', None, 1e-05)"
    assert config.tune.objectives == ("semantic",)


def test_the_schema_of_a_file_takes_lists_and_ranges():
    space: dict[str, Any] = {
        "pretrain.temperature": {"low": 0.02, "high": 0.5, "log": True},
        "pretrain.loss": ["softmax", "sigmoid"],
    }
    jsonschema.validate({"tune": {"space": space}}, json_schema())
    jsonschema.validate(yaml.safe_load(configured(MIXED).as_yaml()), json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"tune": {"space": {"pretrain.temperature": 0.5}}}, json_schema())


def test_a_space_is_set_whole_or_by_key(tmp_path: Path):
    """In a file, by --set and by overrides; a space that is given whole replaces the one before."""
    listed, ranged = Dimension(values=(0.1, 0.2)), Dimension(low=0.02, high=0.5, log=True)
    (tmp_path / "run.yaml").write_text("tune:\n  space:\n    pretrain.temperature: [0.1, 0.2]\n")
    config = resolve("demo", tmp_path / "run.yaml")
    assert config.tune.space == {"pretrain.temperature": listed}
    by_set = resolve(
        "demo", tmp_path / "run.yaml", ["tune.space={pretrain.temperature: {low: 0.02, high: 0.5, log: true}}"]
    )
    assert by_set.tune.space == {"pretrain.temperature": ranged}
    assert resolve("demo", tmp_path / "run.yaml", ["tune.space={model.dim: [8, 16]}"]).tune.space == {
        "model.dim": Dimension(values=(8, 16))
    }
    assert resolve("demo", None, ["tune.space.pretrain.temperature=[0.1, 0.2]"]) == configured(
        "{pretrain.temperature: [0.1, 0.2]}"
    )
    more = config.with_overrides({"tune.space.model.dim": [8, 16]})
    assert more.tune.space == {"pretrain.temperature": listed, "model.dim": Dimension(values=(8, 16))}
    again = more.with_overrides(
        {"tune.space.pretrain.temperature": {"low": 0.02, "high": 0.5, "log": True}, "pretrain.epochs": 3}
    )
    assert again.tune.space == {"pretrain.temperature": ranged, "model.dim": Dimension(values=(8, 16))}
    assert more.with_overrides({"tune.space": None}).tune.space is None
    assert more.with_overrides({"tune.space": {"model.dim": [4, 8]}}).tune.space == {
        "model.dim": Dimension(values=(4, 8))
    }


def test_objectives_are_those_that_the_stages_learn():
    assert resolve("demo", None, ["tune.objectives=semantic"]).tune.judged_by == ("semantic",)
    assert [
        resolve("demo", None, [f"tune.stage={stage}"]).tune.judged_by for stage in ("pretrain", "finetune", "both")
    ] == [
        ("semantic",),
        ("preference",),
        ("preference",),
    ]
    for bad, message in (
        ("preference", "which stage 1 does not learn"),
        ("[semantic, semantic]", "expected each once"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve("demo", None, [f"tune.objectives={bad}"])


def test_batches_per_worker_are_searched_as_global_ones():
    """The paper preset on 4 workers: batches of 128, of which trials have more or fewer."""
    config = resolve("paper", None, ["pretrain.num_workers=4", "tune.space={pretrain.batch_size: [64, 128, 256]}"])
    space = search_space(config, {"pretrain": 1000})
    assert configured_point(config, space) == {"pretrain.batch_size": 128}
    for size, micro in ((64, None), (128, None), (256, 32)):
        trial = with_parameters(config, {"pretrain.batch_size": size}).pretrain
        assert (trial.global_batch_size, trial.batch_size_per_worker, trial.micro_batch_size) == (size, None, micro)
    default = search_space(resolve("paper", None, ["pretrain.num_workers=4"]), {"pretrain": 1000})
    assert default["pretrain.batch_size"].values == (64, 128, 256, 512)
    assert batch_sizes(config, {}, "pretrain") == (128,)
