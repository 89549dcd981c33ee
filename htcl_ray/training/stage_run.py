"""One stage to run, and the checks of its inputs that come before training. Needs neither Ray nor, to import, torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from htcl_ray.config import Config
from htcl_ray.config.sections import FinetuneSettings, StageSettings
from htcl_ray.errors import ConfigError, MismatchError, WorkspaceError
from htcl_ray.models.towers.registry import TOWERS
from htcl_ray.training.warm_start import (
    check_source,
    find_source,
    semantic_start,
    source_identity,
    takes_text_tower,
    training_pairs,
)
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.paths import canonical
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.training.song_numbers import Pairs, Songs

PAPER_ROWS_PER_WORKER = 32
"""Rows that each GPU of the paper contributes to a batch."""


@dataclass(frozen=True)
class StageRun:
    """One stage to run: its inputs, and where its model and its run go."""

    step: str
    space: str
    """`semantic` or `preference`: the folder below models/."""
    settings: StageSettings
    features: Artifact
    pairs: Artifact | None
    parent: Artifact | None
    version: str
    folder: str = ""
    """Prefix of the two paths below: empty, or the folder of a search's trial, with a slash at its end."""

    @property
    def model_path(self) -> str:
        """Folder of the model, below the workspace's root."""
        return f"{self.folder}models/{self.space}/{self.version}"

    @property
    def runs_path(self) -> str:
        """Folder that holds the stage's runs."""
        return f"{self.folder}runs/{self.step}"

    @property
    def inputs(self) -> dict[str, str]:
        """Versions for the manifest."""
        named = {"features": self.features, "pairs": self.pairs, "model": self.parent}
        versions = {name: artifact.version for name, artifact in named.items() if artifact is not None}
        if self.settings.warm_start is not None:
            versions["warm_start"] = source_identity(self.settings.warm_start)
        return versions


def check_parent(workspace: Workspace, parent: Artifact, config: Config) -> None:
    """Raise MismatchError when a stage-1 model has another recipe, size or text tower than the configuration."""
    from htcl_ray.models.record import parse_record

    file = f"{parent.path}/config.json"
    record = parse_record(workspace.read_json(file), workspace.uri_of(file))
    if record.text is None:
        raise MismatchError(
            f"the semantic model {parent.version} is an audio encoder alone, without heads or a text tower; "
            "stage 2 needs a model that 'htcl pretrain' made or that was imported from a whole stage-1 file"
        )
    if workspace.is_local:  # of a remote one, a worker checks it before it trains
        from htcl_ray.models.folder import read_tokenizer
        from htcl_ray.models.towers.text import tokenizer_from_name

        if read_tokenizer(workspace.local_copy(parent.path), record.text) is None:
            tokenizer_from_name(record.text.settings.name_or_path, record.text.transformer)
    own = TOWERS[record.audio.tower_name].settings
    others = {entry.settings for entry in TOWERS.values() if entry.settings not in (None, own)}  # sizes of other towers
    recorded = {"audio": record.audio.resolved(), "model": record.model, "text": record.text.settings}
    configuration = {"audio": config.audio.resolved(), "model": config.model, "text": config.text}
    for section, settings in recorded.items():
        configured = configuration[section].model_dump(mode="json")
        for key, value in settings.model_dump(mode="json", exclude=set(filter(None, others))).items():
            wanted = configured[key]
            same_model = key == "name_or_path" and value and wanted and canonical(value) == canonical(wanted)
            if value != wanted and not same_model:
                raise MismatchError(
                    f"the semantic model {parent.version} was made with {section}.{key}={value}, but the configuration "
                    f"says {wanted}; run 'htcl pretrain' with this configuration or give the one that it was made with"
                )


def check_data(workspace: Workspace, config: Config, stage: StageRun) -> str | None:
    """Read the inputs of training and check them; return the vocabulary of a text tower that starts from scratch.

    The vocabulary is None for stage 2 and for a pretrained text tower. Prints batches that are smaller than configured
    or than the paper's, and left-out pairs. Raises ConfigError, MismatchError or WorkspaceError.
    """
    from htcl_ray.training.order import global_batch
    from htcl_ray.training.song_numbers import read_songs

    check_source(workspace, config, stage.step)
    songs = read_songs(workspace, stage.features.path)
    pairs = None if stage.pairs is None else _usable_pairs(workspace, config.finetune, stage.pairs, songs)
    rows = len(songs.train) if pairs is None else config.finetune.pairs_per_epoch or len(pairs.train)
    wanted, workers = stage.settings.global_batch_size, stage.settings.num_workers
    batch = global_batch(rows, wanted, workers)
    _check_best_metric(stage, songs, pairs)
    if batch < wanted:
        print(
            f"{stage.step}  {rows} training rows are fewer than a batch of {wanted}; batches have {batch}", flush=True
        )
    elif wanted // workers < PAPER_ROWS_PER_WORKER:
        print(
            f"{stage.step}  WARNING: each of {workers} worker(s) has {wanted // workers} of the {wanted} rows "
            f"of a batch; the paper has {PAPER_ROWS_PER_WORKER} per GPU, "
            f"which {stage.step}.batch_size_per_worker={PAPER_ROWS_PER_WORKER} would give",
            flush=True,
        )
    if stage.parent is not None:
        return None
    from htcl_ray.models.towers.text import check_song_texts, check_text_settings, fast_tokenizer
    from htcl_ray.models.towers.vocabulary import train_wordpiece
    from htcl_ray.training.health import distinct_texts
    from htcl_ray.training.song_text import vocabulary_texts

    if takes_text_tower(workspace, config):
        _check_warm_start(workspace, config, stage, None, distinct_texts(songs))
        return None
    tower = check_text_settings(config.text)
    if tower is not None:
        check_song_texts(tower.tokenizer, distinct_texts(songs), config.text)
    if config.text.name_or_path is not None:
        _check_warm_start(workspace, config, stage, None, [])
        return None
    texts = vocabulary_texts([songs.texts[row] for row in songs.train.tolist()], config.pretrain)
    vocabulary = train_wordpiece(texts, config.text.vocab_size)
    check_song_texts(fast_tokenizer(vocabulary), distinct_texts(songs), config.text)
    _check_warm_start(workspace, config, stage, vocabulary, [])
    return vocabulary


def _check_warm_start(
    workspace: Workspace, config: Config, stage: StageRun, vocabulary: str | None, texts: list[str]
) -> None:
    """Print which parts of the earlier model stage 1 takes. Raises MismatchError when it takes none.

    `texts`: song texts that the tokenizer of a text tower that is taken has to tell apart.
    """
    from htcl_ray.models.towers.text import check_song_texts

    name = config.pretrain.warm_start
    if name is None:
        return
    model, taken, left = semantic_start(config, find_source(workspace, name).folder, vocabulary)
    if texts:
        check_song_texts(model.text_encoder.tokenizer, texts, config.text)
    not_taken = f"; not taken, since they do not fit the configuration: {', '.join(left)}" if left else ""
    print(f"{stage.step}  starts from {name}: {', '.join(taken)}{not_taken}", flush=True)


def _check_best_metric(stage: StageRun, songs: Songs, pairs: Pairs | None) -> None:
    """Raise ConfigError when no epoch can have the metric that chooses the best one."""
    metric = stage.settings.best_metric or ""
    if metric.startswith("validation") and not len(songs.validation):
        raise ConfigError(
            f"{stage.step}.best_metric is {metric}, but no song is in the validation split; "
            "give data.split_shares a validation share and run 'htcl preprocess', or choose loss"
        )
    if not metric.startswith("validation_pair"):
        return
    if pairs is None:
        raise ConfigError(
            f"{stage.step}.best_metric is {metric}, but stage 1 has no pairs; expected loss or validation_recall@10"
        )
    from htcl_ray.training.validation import validation_gallery

    if not len(validation_gallery(songs.validation, pairs.validation).pairs):
        raise ConfigError(
            f"{stage.step}.best_metric is {metric}, but no pair has both songs in the validation gallery; "
            "expected loss or validation_recall@10, or more interactions between validation songs"
        )


def _usable_pairs(workspace: Workspace, settings: FinetuneSettings, artifact: Artifact, songs: Songs) -> Pairs:
    """Read the pairs and print how many are left out. Raises WorkspaceError when fewer than two are usable."""
    pairs = training_pairs(workspace, settings, artifact.path, songs)
    if pairs.missing:
        print(f"finetune  {pairs.missing} pairs are left out: a song has no features in the pair's split", flush=True)
    if pairs.rejected_left_out:
        print(
            f"finetune  {pairs.rejected_left_out} negatives are left out: a song has no training features, "
            "or the two are a pair",
            flush=True,
        )
    if len(pairs.train) < 2:
        raise WorkspaceError(
            f"{workspace.uri_of(artifact.path)} has {len(pairs.train)} usable training pair(s); expected at least 2: "
            "give more interactions, or lower pairs.min_support, and run 'htcl preprocess' again"
        )
    return pairs
