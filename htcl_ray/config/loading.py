"""The configuration of a run, from a preset, an optional YAML file and `--set` assignments; later ones win.

It is recorded in the manifest of every artifact. Trials of a search change it by `with_overrides`. The sections and
their keys are in config/sections/.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator

from htcl_ray.config.sections import (
    AudioSettings,
    CatalogSettings,
    DataSettings,
    Dimension,
    EmbedSettings,
    EvaluateSettings,
    FinetuneSettings,
    GateSettings,
    IndexSettings,
    ModelSettings,
    PairSettings,
    PretrainSettings,
    RaySettings,
    ServeSettings,
    Settings,
    TextSettings,
    TrackingSettings,
    TuneSettings,
    nearest,
)
from htcl_ray.errors import ConfigError, HtclError, first_fault
from htcl_ray.workspace.credentials import lacks_credentials
from htcl_ray.workspace.paths import absolute, absolute_sqlite, folder_or_name

PRESETS = ("demo", "small", "paper")


class Config(Settings):
    """Configuration of a complete run."""

    preset: str = "paper"
    """Name of the preset whose values are the defaults of this run: `demo`, `small` or `paper`."""
    workspace: str = "./workspace"
    """Folder of all data and artifacts: a local path, s3:// or gs://. A relative path, in this and any other key and in
    a configuration file, is relative to the working directory of the command."""
    license: str = Field("unknown", pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$")
    """License of the trained models, for their model cards: an identifier of the Hugging Face Hub such as `apache-2.0`
    or `cc-by-nc-4.0`; `unknown` until it is decided, `other` for terms of your own."""
    data: DataSettings = DataSettings()
    catalog: CatalogSettings = CatalogSettings()
    audio: AudioSettings = AudioSettings()
    pairs: PairSettings = PairSettings()
    text: TextSettings = TextSettings()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    embed: EmbedSettings = EmbedSettings()
    index: IndexSettings = IndexSettings()
    tune: TuneSettings = TuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gate: GateSettings = GateSettings()
    serve: ServeSettings = ServeSettings()
    tracking: TrackingSettings = TrackingSettings()
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        window, clip = self.model.window_seconds, self.audio.clip_seconds
        if window is not None and window > clip:
            raise ValueError(
                f"model.window_seconds is {window:g}; expected at most audio.clip_seconds ({clip:g}), "
                "or null for whole clips"
            )
        if window is not None and self.audio.extractor != "log_mel":
            raise ValueError(
                f"model.window_seconds is {window:g}, but only log-mel frames are cut into windows and "
                f"audio.extractor is {self.audio.extractor}; set it to null"
            )
        self.catalog.check_extractor(self.audio.extractor)
        layers = self.model.layers_of(tower := self.audio.tower_name)
        for name, stage in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            if stage.freeze_audio_layers > layers:
                raise ValueError(
                    f"{name}.freeze_audio_layers is {stage.freeze_audio_layers}; "
                    f"expected at most {layers}, the number of layers of the {tower} tower"
                )
            if self.audio.extractor == "log_mel" and stage.mel_masks * stage.mel_mask_bands >= self.audio.n_mels:
                raise ValueError(
                    f"{name}.mel_masks × {name}.mel_mask_bands is {stage.mel_masks * stage.mel_mask_bands}; "
                    f"expected less than audio.n_mels ({self.audio.n_mels}), so that some bands remain"
                )
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """Return a configuration with dotted keys replaced, as in `{"pretrain.batch_size": 64}`, and check it."""
        tree = self.model_dump()
        with _one_batch_size(tree), _tower_of_extractor(tree):
            for key, value in overrides.items():
                _set(tree, key, value)
        return _validate(tree)

    def with_absolute_paths(self) -> Config:
        """Return the configuration with all relative paths made absolute from this process's working directory.

        Every command calls this once at its start, since workers and trials have other working directories.
        `text.name_or_path` is a path when a folder of that name exists. Raises ConfigError for a URI whose credentials
        were removed when the configuration was written.
        """
        for key, value in _texts(self.model_dump()):
            if lacks_credentials(value):
                raise ConfigError(
                    f"{key} is '{value}', whose credentials were left out when it was written; "
                    f"give it whole with --set {key}=URI, or without credentials and have them in the environment"
                )
        changes: dict[str, Any] = {"workspace": absolute(self.workspace)}
        for key in ("catalog", "interactions", "vectors"):
            changes[f"data.{key}"] = [absolute(path) for path in getattr(self.data, key)]
        models = {f"{step}.warm_start": getattr(self, step).warm_start for step in ("pretrain", "finetune")}
        models |= {f"{tower}.name_or_path": getattr(self, tower).name_or_path for tower in ("text", "audio")}
        changes |= {key: folder_or_name(name) for key, name in models.items() if name is not None}
        if self.evaluate.oracle_vectors is not None:
            changes["evaluate.oracle_vectors"] = absolute(self.evaluate.oracle_vectors)
        if self.serve.api_keys_file is not None:
            changes["serve.api_keys_file"] = absolute(self.serve.api_keys_file)
        if self.tracking.mlflow_uri is not None:
            changes["tracking.mlflow_uri"] = absolute_sqlite(self.tracking.mlflow_uri)
        searched = (self.tune.space or {}).get("text.name_or_path")
        if searched is not None and searched.values is not None:
            names = [folder_or_name(value) if isinstance(value, str) else value for value in searched.values]
            changes["tune.space.text.name_or_path"] = {"values": names}
        return self.with_overrides(changes)

    def as_yaml(self) -> str:
        """The configuration as YAML that `--config` accepts, without the credentials of its URIs."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve(preset: str | None = None, file: str | Path | None = None, assignments: Iterable[str] = ()) -> Config:
    """Build a configuration from a preset, a file and `key=value` assignments; later ones win.

    The preset is `preset`, else the one that the file names, else `paper`. Values are strings that are converted to the
    type of their key: `yes` is true for a boolean key and the name of a column in data.columns. Lists and sections are
    YAML: `a.b=[1, 2]`, `a={b: 1}`. Raises ConfigError.
    """
    from_file = _read_yaml(str(file)) if file is not None else {}
    name = preset or from_file.get("preset") or "paper"
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; {nearest(str(name), PRESETS)}")
    tree = _validate({"preset": name, **_preset(name)}).model_dump(mode="json")
    with _one_batch_size(tree), _tower_of_extractor(tree):
        _merge(tree, {**from_file, "preset": name}, prefix="")
    with _one_batch_size(tree), _tower_of_extractor(tree):
        _assign(tree, assignments)
    return _validate(tree)


def _assign(tree: dict[str, Any], assignments: Iterable[str]) -> None:
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"'--set {assignment}' has no '='; expected key=value, for instance pretrain.epochs=5")
        _set(tree, key.strip(), _assigned_value(key.strip(), text.strip(), assignment))


def _loader(resolvers: Mapping[str, str]) -> type[yaml.SafeLoader]:
    """Return a YAML loader that reads plain scalars as strings unless they match the pattern of one of these tags."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {}
    for tag, pattern in resolvers.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None)
    return Loader


_TEXTS = {"null": "~|null|Null|NULL|", "merge": "<<"}
_TextLoader = _loader(_TEXTS)
"""Loader for values that are converted to the type of their key. YAML 1.1 would convert `yes`, `064` and `1:30`."""
_ScalarLoader = _loader(
    {
        **_TEXTS,
        "bool": "true|True|TRUE|false|False|FALSE",
        "int": "[-+]?[0-9]+",
        "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    }
)
"""Loader for `tune.space`, whose values have no declared type: the core schema of YAML 1.2."""
_ScalarLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def _parse(text: str, key: str = "") -> Any:
    """Parse the YAML value of a configuration key, or a whole configuration when `key` is empty."""
    if key == "tune.space" or key.startswith("tune.space."):
        return _ScalarLoader(text).get_single_data()
    tree = _TextLoader(text).get_single_data()
    section = tree if key == "tune" else tree.get("tune") if isinstance(tree, dict) and not key else None
    if isinstance(section, dict) and section.get("space") is not None:
        typed = _ScalarLoader(text).get_single_data()
        section["space"] = (typed if key == "tune" else typed["tune"])["space"]
    return tree


NULLS = ("~", "null", "Null", "NULL")


def _assigned_value(key: str, text: str, assignment: str) -> Any:
    """Convert the text of `--set key=text` to null, a list or a section where the type of the key allows it."""
    annotation = _type_of(key)
    if not text or (text in NULLS and not _allows(annotation, str, without=NoneType)):
        return None
    if (text.startswith("[") and _allows(annotation, tuple, Dimension)) or (
        text.startswith("{") and _allows(annotation, dict, Settings)
    ):
        try:
            return _parse(text, key)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '--set {assignment}' is not YAML: {str(error).splitlines()[0]}") from None
    return text


def _type_of(dotted: str) -> Any:
    """The annotation of a configuration key, or None when the key does not exist."""
    annotation: Any = Config
    for name in _parts(dotted):
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            field = annotation.model_fields.get(name)
            annotation = None if field is None else field.annotation
        else:
            values = (get_args(kind)[1] for kind in _alternatives(annotation) if get_origin(kind) is dict)
            annotation = next(values, None)
    return annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _alternatives(member))
    return (annotation,)


def _allows(annotation: Any, *kinds: type, without: type | None = None) -> bool:
    """Whether an alternative of an annotation is a subclass of one of these types, and none is `without`."""
    types = [get_origin(kind) or kind for kind in _alternatives(annotation)]
    return without not in types and any(isinstance(kind, type) and issubclass(kind, kinds) for kind in types)


BATCH_SIZES = ("batch_size", "batch_size_per_worker")


@contextmanager
def _one_batch_size(tree: dict[str, Any]) -> Iterator[None]:
    """Let a batch size that is set while this context is open replace the other batch size of an earlier layer."""
    stages = [tree[name] for name in ("pretrain", "finetune")]
    before = [{key: stage[key] for key in BATCH_SIZES} for stage in stages]
    for stage in stages:
        stage.update(dict.fromkeys(BATCH_SIZES, ...))
    yield
    for stage, sizes in zip(stages, before, strict=True):
        given = any(stage[key] not in (..., None) for key in BATCH_SIZES)
        stage.update({key: None if given else sizes[key] for key in BATCH_SIZES if stage[key] is ...})


@contextmanager
def _tower_of_extractor(tree: dict[str, Any]) -> Iterator[None]:
    """Let an extractor that is set while this context is open, without a tower, unset the tower of an earlier layer."""
    audio = tree["audio"]
    before = {key: audio[key] for key in ("extractor", "tower")}
    audio["tower"] = ...
    yield
    if audio["tower"] is ...:
        audio["tower"] = before["tower"] if audio["extractor"] == before["extractor"] else None


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Iterate over (dotted key, string) of all strings in a tree."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}" if key else name)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value, key)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    return Config.model_json_schema()


def _preset(name: str) -> dict[str, Any]:
    text = importlib.resources.files("htcl_ray.config").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return _parse(text) or {}


def _read_text(path: str) -> str:
    path = absolute(path)
    if "://" not in path:
        return Path(path).read_text(encoding="utf-8")
    from htcl_ray.workspace.filesystem import open_filesystem, storage_errors

    filesystem, name = open_filesystem(path)
    with storage_errors(path), filesystem.open_input_stream(name) as stream:
        return str(stream.read(), "utf-8")


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        tree = _parse(_read_text(path))
    except HtclError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} is not YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"the configuration file {path} holds a {type(tree).__name__}; expected keys such as 'pretrain:'"
        )
    return tree


FREE_FORM = ("data.columns", "tune.space")
"""Sections whose keys are chosen by the user and may contain dots; an assigned section replaces the earlier one."""


def _parts(dotted: str) -> list[str]:
    for section in FREE_FORM:
        if dotted.startswith(f"{section}."):
            return [*section.split("."), dotted.removeprefix(f"{section}.")]
    return dotted.split(".")


def _merge(tree: dict[str, Any], changes: Mapping[str, Any], prefix: str) -> None:
    for key, value in changes.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and not {dotted, prefix} & {*FREE_FORM} and isinstance(tree.get(key), dict):
            _merge(tree[key], value, dotted)
        else:
            _set_leaf(tree, str(key), value, dotted)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = _parts(dotted)
    section: Any = tree
    for depth, name in enumerate(parents):
        if not isinstance(section, dict) or name not in section:
            _refuse(dotted, section, ".".join(parents[:depth]), name)
        if section[name] is None and ".".join(parents[: depth + 1]) in FREE_FORM:
            section[name] = {}
        section = section[name]
    if not isinstance(section, dict):
        raise ConfigError(f"'{'.'.join(parents)}' is a value, not a section, so '{dotted}' does not exist")
    _merge(section, {leaf: value}, ".".join(parents))


def _set_leaf(section: dict[str, Any], leaf: str, value: Any, dotted: str) -> None:
    prefix = ".".join(_parts(dotted)[:-1])
    free = dotted in FREE_FORM or prefix in FREE_FORM
    if leaf not in section and not free:
        _refuse(dotted, section, prefix, leaf)
    if isinstance(section.get(leaf), dict) and not isinstance(value, Mapping) and not free:
        raise ConfigError(
            f"'{dotted}' is a section; expected one of its keys: {', '.join(section[leaf]) or 'key=value'}"
        )
    section[leaf] = value


def _refuse(dotted: str, section: Any, prefix: str, name: str) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"'{prefix}' is a value, not a section, so '{dotted}' does not exist")
    below = [f"{prefix}.{key}" if prefix else key for key in section]
    wrong = f"{prefix}.{name}" if prefix else name
    raise ConfigError(f"unknown configuration key '{dotted}'; {nearest(wrong, below)}")


def _validate(tree: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        fault = first_fault(error)
        where = f"configuration key '{fault.key}': " if fault.key else ""  # empty: keys of two sections contradict
        given = f"it is {fault.value!r}"
        stated = isinstance(fault.value, dict) or given in fault.message
        raise ConfigError(f"{where}{fault.message}{'' if stated else f' ({given})'}") from None
