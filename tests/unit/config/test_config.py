"""Configuration: precedence of presets, files and assignments, conversion of values, error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from htcl_ray.config import Config, json_schema, resolve
from htcl_ray.errors import ConfigError

pytestmark = pytest.mark.unit


def test_later_assignments_take_precedence(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("pretrain:\n  epochs: 7\n  batch_size: 16\n")
    config = resolve("demo", file, ["pretrain.batch_size=8", "pretrain.batch_size=4"])
    assert (config.pretrain.epochs, config.pretrain.batch_size) == (7, 4)
    assert config.model.width == resolve("demo").model.width


def test_printed_configuration_can_be_loaded(tmp_path: Path):
    config = resolve("demo", None, ["data.catalog=[a.csv, b.csv]", "data.columns.song_id=clip", "finetune.epochs=3"])
    file = tmp_path / "saved.yaml"
    file.write_text(config.as_yaml())
    assert resolve(None, file) == config


def test_overrides_equal_assignments():
    by_command = resolve("paper", None, ["pretrain.temperature=0.05", "index.kind=hnsw"])
    assert resolve("paper").with_overrides({"pretrain.temperature": 0.05, "index.kind": "hnsw"}) == by_command


def test_paths_accept_a_string_or_a_list():
    assert resolve("demo", None, ["data.catalog=a.csv"]).data.catalog == ("a.csv",)
    assert resolve("demo", None, ["data.interactions=[a.csv, b.csv]"]).data.interactions == ("a.csv", "b.csv")


def test_columns_accept_free_names():
    assert resolve("demo", None, ["data.columns.song_id=clip_id", "data.columns.title=Track Name"]).data.columns == {
        "song_id": "clip_id",
        "title": "Track Name",
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("pretrain.epoch=3", "did you mean 'pretrain.epochs'"),
        ("pretrian.epochs=3", "did you mean 'pretrain'"),
        ("data.columns.songid=x", "did you mean 'song_id'"),
        ("pretrain.epochs", "has no '='"),
        ("pretrain=3", "is a section"),
        ("workspace.x=1", "is a value, not a section"),
        ("pretrain.epochs=abc", "pretrain.epochs"),
        ("pretrain.epochs=0", "pretrain.epochs"),
        ("index.kind=faiss", "'auto', 'flat', 'hnsw', 'ivf' or 'ivf_pq'"),
        ("data.split_shares=[0.5, 0.1, 0.1]", "sum to 1"),
        ("audio.f_max=9000", "sample_rate / 2"),
        ("pairs.negative_feedback=[like]", "positive_feedback and in negative_feedback"),
        ("pairs.positive_feedback=[love]", "pairs.positive_feedback"),
        ("model.heads=5", "multiple of heads"),
        (
            "model.window_seconds=9",
            "model.window_seconds is 9; expected at most audio.clip_seconds (8), or null for whole clips",
        ),
        (
            "pretrain.freeze_audio_layers=6",
            "pretrain.freeze_audio_layers is 6; expected at most 5, the number of layers of the cnn tower",
        ),
        (
            "finetune.mel_masks=8",
            "finetune.mel_masks × finetune.mel_mask_bands is 128; expected less than audio.n_mels (64)",
        ),
        ("pretrain.micro_batch_size=0", "'pretrain.micro_batch_size': it is 0; expected a number from 1, auto or null"),
        ("pretrain.micro_batch_size=fits", "it is 'fits'; expected a number from 1, auto or null"),
        (
            "pretrain.micro_batch_size=33",
            "micro_batch_size is 33; expected at most batch_size / num_workers (32), or auto or null",
        ),
        ("finetune.num_workers=200", "expected a multiple of num_workers (200), for instance 200"),
        ("pretrain.seed=-1", "pretrain.seed"),
        ("data.catalog=[a", "not YAML"),
        ("pretrain.loss=hinge", "pretrain.loss"),
    ],
)
def test_invalid_values_raise_one_sentence(assignment: str, message: str):
    with pytest.raises(ConfigError) as caught:
        resolve("demo", None, [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_indivisible_batch_size_names_the_nearest_valid_ones():
    with pytest.raises(ConfigError, match="for instance 62 or 64"):
        resolve("demo", None, ["pretrain.batch_size=63", "pretrain.num_workers=2"])


def test_incompatible_loss_options_raise():
    with pytest.raises(ConfigError, match="corrects a softmax, and loss is sigmoid"):
        resolve("demo", None, ["finetune.loss=sigmoid", "finetune.popularity_correction=true"])
    with pytest.raises(ConfigError, match="explicit_negatives adds others; choose one"):
        resolve("demo", None, ["finetune.explicit_negatives=true", "finetune.popularity_correction=true"])


@pytest.mark.parametrize("value", ["auto", "null", "32"])
def test_micro_batch_sizes(value: str):
    config = resolve("demo", None, [f"pretrain.micro_batch_size={value}"])
    assert str(config.pretrain.micro_batch_size) == value.replace("null", "None")


@pytest.mark.parametrize("section", ["pretrain", "finetune", "tune", "evaluate"])
def test_seeds_are_limited_to_32_bits(section: str):
    assert getattr(resolve("demo", None, [f"{section}.seed={2**32 - 1}"]), section).seed == 2**32 - 1
    for seed in (-1, 2**32, 20_000_000_000_000):
        with pytest.raises(
            ConfigError, match=rf"^configuration key '{section}\.seed': Input should be .* \(it is '{seed}'\)$"
        ):
            resolve("demo", None, [f"{section}.seed={seed}"])


@pytest.mark.parametrize(
    "key", ["learning_rate", "text_learning_rate", "weight_decay", "max_gradient_norm", "cpus_per_worker"]
)
def test_infinite_numbers_raise(key: str):
    for value in (".inf", ".nan"):
        with pytest.raises(ConfigError, match=rf"configuration key 'pretrain\.{key}': Input should be"):
            resolve("demo", None, [f"pretrain.{key}={value}"])


LITERAL_TEXTS = [
    "yes",
    "no",
    "on",
    "null",
    "~",
    "1:30",
    "064",
    "2024",
    "2024-01-01",
    ".inf",
    "1e5",
    "0x1F",
    "a #4.csv",
    "[live",
    "{day}",
    ": :",
    "::",
    "*x",
    "true",
]


@pytest.mark.parametrize("text", LITERAL_TEXTS)
def test_strings_are_not_converted(text: str, tmp_path: Path):
    config = resolve("demo", None, [f"serve.host={text}", f"data.columns.song_id={text}", f"workspace={text}"])
    assert config.serve.host == config.data.columns["song_id"] == config.workspace == text
    file = tmp_path / "saved.yaml"
    file.write_text(config.as_yaml())
    assert resolve(None, file) == config
    if text not in ("null", "~", "[live"):
        assert resolve("demo", None, [f"data.catalog={text}"]).data.catalog == (text,)


def test_plain_scalars_of_a_file_are_strings(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  catalog: DJ/songs#4.csv\n  columns: {song_id: yes, year: 2024, title: 1:30, album: 064, genre: 2024-01-01, mood: on}\n"
        "  split_column: no\npretrain: &stage\n  batch_size: 064\n  learning_rate: 1e-4\n  compile: yes\n"
        "finetune:\n  <<: *stage\n  loss: softmax\n"
    )
    config = resolve("demo", file)
    assert config.data.columns == {
        "song_id": "yes",
        "year": "2024",
        "title": "1:30",
        "album": "064",
        "genre": "2024-01-01",
        "mood": "on",
    }
    assert config.data.split_column == "no"
    assert (config.pretrain.batch_size, config.pretrain.learning_rate, config.pretrain.compile) == (64, 1e-4, True)
    assert config.finetune.batch_size == 64


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "seed", "weight_decay", "compile"])
@pytest.mark.parametrize("text", ["1:30", ".inf", "-.inf", ".nan", "inf", "nan", "2024-01-01", "one", "[1]", ""])
def test_non_numbers_raise_in_files_and_assignments(key: str, text: str, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(f"pretrain:\n  {key}: {text}\n")
    for refused in ({"file": file}, {"assignments": [f"pretrain.{key}={text}"]}):
        with pytest.raises(ConfigError, match=f"pretrain.{key}"):
            resolve("demo", **refused)


def test_null_is_accepted_only_by_nullable_keys(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  split_column: ~\npairs:\n  half_life_days: null\n")
    for config in (resolve("demo", file), resolve("demo", None, ["data.split_column=null", "pairs.half_life_days="])):
        assert config.data.split_column is None
        assert config.pairs.half_life_days is None
    for key in ("data.catalog", "data.text_columns", "pretrain.epochs", "workspace", "data.columns.title"):
        with pytest.raises(ConfigError, match=key):
            resolve("demo", None, [f"{key}="])


def test_assignments_accept_lists_and_sections():
    config = resolve(
        "demo",
        None,
        ["data.catalog=[a b.csv, 'c, d.csv', yes]", "data.columns={song_id: no, year: 064}", "pretrain={epochs: 3}"],
    )
    assert config.data.catalog == ("a b.csv", "c, d.csv", "yes")
    assert config.data.columns == {"song_id": "no", "year": "064"}
    assert config.pretrain.epochs == 3


def test_search_space_values_keep_their_types(tmp_path: Path):
    file = tmp_path / "run.yaml"
    space = "{pretrain.batch_size: [064, 128], pretrain.learning_rate: [1e-4, 2.5E-3], pretrain.loss: [softmax, no], "
    space += "a: ['1', 1, true, null, 1:30]}"
    file.write_text(f"tune:\n  space: {space}\n  samples: 0100\n")
    for config in (
        resolve("demo", file),
        resolve("demo", None, [f"tune.space={space}"]),
        resolve("demo", None, [f"tune={{space: {space}}}"]),
    ):
        assert config.tune.space is not None
        values = {key: dimension.values for key, dimension in config.tune.space.items()}
        assert repr(values) == (
            "{'pretrain.batch_size': (64, 128), 'pretrain.learning_rate': (0.0001, 0.0025), 'pretrain.loss': ('softmax', 'no'), "
            "'a': ('1', 1, True, None, '1:30')}"
        )
    assert resolve("demo", file).tune.samples == 100
    one = resolve("demo", None, ["tune.space.pretrain.batch_size=[064, 128]"]).tune.space
    assert one is not None
    assert one["pretrain.batch_size"].values == (64, 128)


def test_unknown_preset_and_unreadable_file_raise(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        resolve("demmo")
    with pytest.raises(ConfigError, match="No such file"):
        resolve("demo", tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        resolve("demo", tmp_path / "list.yaml")
    (tmp_path / "unknown.yaml").write_text("pretrain:\n  epoch: 3\n")
    with pytest.raises(ConfigError, match=r"did you mean 'pretrain\.epochs'"):
        resolve("demo", tmp_path / "unknown.yaml")


def test_paper_preset_has_the_published_sizes():
    config = resolve("paper")
    assert (config.audio.sample_rate, config.audio.n_fft, config.audio.hop_length, config.audio.n_mels) == (
        16000,
        2048,
        1536,
        128,
    )
    assert config.audio.max_frames == 1251
    assert (
        config.model.width,
        config.model.layers,
        config.model.heads,
        config.model.feed_forward,
        config.model.dim,
    ) == (
        768,
        12,
        12,
        3072,
        100,
    )
    assert (config.pretrain.epochs, config.pretrain.temperature) == (20, 0.074)
    for stage in ("pretrain", "finetune"):
        assert getattr(config, stage).global_batch_size == 32
        assert getattr(config.with_overrides({f"{stage}.num_workers": 8}), stage).global_batch_size == 256, "32 per GPU"


@pytest.mark.parametrize(
    ("preset", "file", "assignments", "expected"),
    [
        ("paper", {}, [], (None, 32, 32)),
        ("paper", {}, ["num_workers=8"], (None, 32, 256)),
        ("paper", {}, ["batch_size=256", "num_workers=4"], (256, None, 256)),
        ("paper", {"batch_size": 64}, ["num_workers=2"], (64, None, 64)),
        ("paper", {"batch_size": 64}, ["num_workers=2", "batch_size_per_worker=5"], (None, 5, 10)),
        ("demo", {"batch_size_per_worker": 5}, [], (None, 5, 10)),
        ("demo", {"batch_size": None, "batch_size_per_worker": 5}, [], (None, 5, 10)),
        ("demo", {"batch_size_per_worker": 5}, ["batch_size=12"], (12, None, 12)),
    ],
)
def test_later_batch_size_replaces_the_other_key(
    preset: str,
    file: dict[str, int],
    assignments: list[str],
    expected: tuple[int | None, int | None, int],
    tmp_path: Path,
):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump({"finetune": file}))
    config = resolve(preset, tmp_path / "file.yaml", [f"finetune.{assignment}" for assignment in assignments])
    stage = config.finetune
    assert (stage.batch_size, stage.batch_size_per_worker, stage.global_batch_size) == expected
    assert stage.resolved().batch_size == expected[2]
    (tmp_path / "shown.yaml").write_text(config.as_yaml())
    assert resolve(None, tmp_path / "shown.yaml") == config == config.with_overrides({})
    more = config.with_overrides({"finetune.num_workers": 1}).finetune.global_batch_size
    assert more == (expected[0] or expected[1])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["batch_size=64", "batch_size_per_worker=32"],
            "is 64 and batch_size_per_worker is 32; expected a number for one of them",
        ),
        (["batch_size=null"], "is None and batch_size_per_worker is None; expected a number for one of them"),
        (["batch_size_per_worker=1", "num_workers=1"], "num_workers is 1; expected at least 2 rows"),
        (["batch_size_per_worker=0"], "greater than or equal to 1"),
        (
            ["batch_size_per_worker=8", "num_workers=2", "micro_batch_size=9"],
            r"expected at most batch_size / num_workers \(8\)",
        ),
    ],
)
def test_contradicting_batch_sizes_raise(assignments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        resolve("demo", None, [f"pretrain.{assignment}" for assignment in assignments])


def test_configuration_is_frozen_and_typed():
    config = Config()
    with pytest.raises(Exception, match="frozen"):
        config.workspace = "elsewhere"  # type: ignore[misc]
    assert yaml.safe_load(config.as_yaml())["pretrain"]["epochs"] == 20


def test_with_absolute_paths_resolves_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of every key that names a file or folder, and only of those; the second time, in another directory, nothing
    changes."""
    (tmp_path / "bert").mkdir()
    monkeypatch.chdir(tmp_path)
    given = [
        "data.catalog=[songs.csv, s3://bucket/songs.csv, 'file:///some%20where/c.csv']",
        "data.interactions=../log.csv",
        "text.name_or_path=bert",
        "serve.api_keys_file=~/keys.yaml",
        "tracking.mlflow_uri=sqlite:///runs.db",
        "tune.space={text.name_or_path: [./bert, org/bert, null], pretrain.loss: [softmax, sigmoid]}",
    ]
    config = resolve("demo", None, given).with_absolute_paths()
    assert config.workspace == f"{tmp_path}/workspace"
    assert config.data.catalog == (f"{tmp_path}/songs.csv", "s3://bucket/songs.csv", "/some where/c.csv")
    assert config.data.interactions == (f"{tmp_path.parent}/log.csv",)
    assert config.text.name_or_path == f"{tmp_path}/bert"
    assert config.serve.api_keys_file == str(Path.home() / "keys.yaml")
    assert config.tracking.mlflow_uri == f"sqlite:///{tmp_path}/runs.db"
    space = config.tune.space or {}
    assert space["text.name_or_path"].values == (f"{tmp_path}/bert", "org/bert", None)
    assert space["pretrain.loss"].values == ("softmax", "sigmoid")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.with_absolute_paths() == config
    assert resolve(None, None, ["text.name_or_path=org/bert"]).with_absolute_paths().text.name_or_path == "org/bert"


def test_all_keys_with_paths_are_known():
    """A key with a name like one of a path belongs into `with_absolute_paths`, so this list is what it knows."""
    keys = {
        f"{section}.{key}"
        for section, values in Config().model_dump().items()
        if isinstance(values, dict)
        for key in values
        if any(
            part in ("path", "file", "folder", "dir", "uri", "catalog", "interactions", "vectors")
            for part in key.split("_")
        )
    }
    assert keys == {
        "data.catalog",
        "data.interactions",
        "data.vectors",
        "audio.name_or_path",
        "evaluate.oracle_vectors",
        "text.name_or_path",
        "serve.api_keys_file",
        "tracking.mlflow_uri",
    }


def test_a_configuration_file_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/run.yaml").write_text("workspace: ws\n")
    monkeypatch.chdir(tmp_path)
    assert resolve(None, "configs/run.yaml").with_absolute_paths().workspace == f"{tmp_path}/ws"


def test_every_key_and_section_has_a_description():
    """The description of a section is that of its definition. 20 characters exclude a mere repetition of the name."""
    schema = json_schema()
    definitions = {"Config": schema, **schema["$defs"]}
    sections = {name: part for name, part in definitions.items() if "properties" in part}
    descriptions = {name: part.get("description", "") for name, part in sections.items()}
    descriptions |= {
        f"{name}.{key}": value.get("description") or descriptions.get(value.get("$ref", "").rpartition("/")[2], "")
        for name, part in sections.items()
        for key, value in part["properties"].items()
    }
    assert len(descriptions) > 190
    assert not [name for name, description in descriptions.items() if len(description) < 20]
