"""The model card: description, usage and measured metrics of a model, also in the Hugging Face model-index format."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from htcl_ray.config.sections import Settings
from htcl_ray.errors import MismatchError
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.registry import TOWERS
from htcl_ray.workspace.credentials import without_credentials

HEADLINES = {
    ("text_to_audio", "recall@10"): "text-to-audio-retrieval",
    ("text_to_audio", "median_rank"): "text-to-audio-retrieval",
    ("probe_*", "accuracy"): "audio-classification",
    ("cold", "ndcg@10"): "recommendation",
    ("cold", "item_auc"): "recommendation",
}
"""Task and metric that a card shows of the model's own space → task type of the model-index."""
SPACES = {1: "semantic", 2: "preference"}


class Measured(Settings):
    """One metric of an evaluation."""

    task: str
    title: str
    """Title of the task."""
    method: str
    figure: str
    value: float
    low: float | None
    """Lower bound of the 95 % confidence interval, or null."""
    high: float | None
    n: int


class Evaluation(Settings):
    """Content of `evaluation.json`."""

    report: str
    """Version of the report that holds everything."""
    data: dict[str, Any]
    """The data of the evaluation, such as `split` and `songs`."""
    weights: str
    """SHA-256 of the `model.safetensors` that was evaluated: metrics of other weights are not written again."""
    figures: tuple[Measured, ...]


def evaluation_of(tasks: Iterable[TaskResult], report: str, data: Mapping[str, Any], weights: str) -> Evaluation:
    """Collect every metric of the tasks that has a value; the other arguments are fields of `Evaluation`."""
    measured = [
        Measured(
            task=task.name,
            title=task.title,
            method=method,
            figure=metric,
            value=result.value,
            low=low,
            high=high,
            n=result.n,
        )
        for task in tasks
        for method, of_method in task.methods.items()
        for metric, result in of_method.items()
        if not math.isnan(result.value)
        for low, high in [result.interval or (None, None)]
    ]
    return Evaluation(report=report, data=dict(data), weights=weights, figures=tuple(measured))


def read_evaluation(file: Path) -> Evaluation | None:
    """Read the `evaluation.json` of a model folder, None without one. Raises MismatchError for another file."""
    try:
        return Evaluation.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MismatchError(
            f"{file} is not an evaluation of an HTCL model ({reason}); remove it or evaluate again"
        ) from None


def headlines(record: ModelRecord, evaluation: Evaluation) -> list[tuple[str, Measured]]:
    """The metrics of the model's own space that a card shows, each with its task type."""
    return [
        (kind, item)
        for (task, metric), kind in HEADLINES.items()
        for item in evaluation.figures
        if item.method == SPACES[record.stage] and item.figure == metric and fnmatch.fnmatchcase(item.task, task)
    ]


def model_card(record: ModelRecord, parameters: int, evaluation: Evaluation | None = None) -> str:
    """Write the README.md of a model folder."""
    stage = {
        1: "stage 1: audio and text in one semantic space, learned from songs and their descriptions",
        2: "stage 2: a preference space, fine-tuned from a stage-1 model on songs that listeners like together",
    }[record.stage]
    audio = record.audio
    seconds = record.model.window_seconds
    windows = "" if seconds is None else f"; longer clips in windows of {seconds:g} s, averaged"
    text = "none: the model embeds audio only"
    if record.text is not None:
        text = (
            without_credentials(record.text.settings.name_or_path or "")
            or "a BERT trained from scratch on the catalogue's texts"
        )
    encode = "audio(waveform, sample_rate)" if audio.extractor == "log_mel" else "features(features)"
    words = (
        "" if record.text is None else '\ntexts = model.embed_text(["calm piano", "fast techno"])\nprint(texts @ song)'
    )
    return f"""---
{_front_matter(record, evaluation)}
---

# HTCL music model, {SPACES[record.stage]} space

Hierarchical two-stage contrastive learning of music representations (arXiv 2505.23298), {stage}.

| | |
|---|---|
| Embedding | {record.model.dim} numbers, unit norm; compare by inner product |
{_features_row(record)}
| Input | {record.input}{windows} |
| Audio encoder | {_tower(record)} |
| Text encoder | {text} |
| Parameters | {parameters:,} |

```python
from htcl_ray.models import HTCL

model = HTCL.from_pretrained("path/to/this/folder")
song = model.embed_{encode}{words}
```
{_metrics_table(record, evaluation)}
The model was trained on one catalogue only; if it was made by `htcl pretrain` or `htcl finetune`, the metrics of its
training are in `manifest.json` next to this file. Similarities reflect the descriptions and listeners of that
catalogue, with their gaps.
"""


def _features_row(record: ModelRecord) -> str:
    audio = record.audio
    if audio.extractor == "log_mel":
        mel = f"{audio.n_mels} mel bands every {audio.hop_length} samples"
        return f"| Audio | first {audio.clip_seconds:g} s, mono, {audio.sample_rate} Hz; {mel} |"
    licence = record.feature_licence or "unknown"
    return (
        f"| Features | `{audio.extractor}`, {record.input_width} numbers a frame; licence of their encoder: {licence} |"
    )


def _tower(record: ModelRecord) -> str:
    """The sizes of the audio tower in words."""
    name = record.audio.tower_name
    section = TOWERS[name].settings
    if section is None:
        return f"{record.model.layers} layers, width {record.model.width}"
    sizes = ", ".join(f"{key} {value}" for key, value in getattr(record.model, section).model_dump(mode="json").items())
    return f"{name}: {sizes}"


def _front_matter(record: ModelRecord, evaluation: Evaluation | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if evaluation is not None:
        results = [
            EvalResult(
                task_type=kind,
                task_name=item.title,
                dataset_type="held-out-catalogue",
                dataset_name=_data_name(evaluation),
                dataset_config=item.task,  # results of one type, such as two probes, are told apart by it
                dataset_split=evaluation.data.get("split"),
                dataset_revision=evaluation.report,
                metric_type=item.figure,
                metric_name=item.figure,
                metric_value=item.value,
                metric_args={"n": item.n} | ({} if item.low is None else {"interval_95": [item.low, item.high]}),
            )
            for kind, item in headlines(record, evaluation)
        ]
    tags = ["music", "audio", "contrastive-learning"]
    name = f"HTCL, {SPACES[record.stage]} space" if results else None
    return ModelCardData(
        license=record.license,
        pipeline_tag="feature-extraction",
        library_name="htcl-ray",
        tags=tags,
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def _metrics_table(record: ModelRecord, evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    lines = [
        f"| {item.title} | {item.figure} | {item.value:.4g} | {_interval(item)} | {item.n} |"
        for _, item in headlines(record, evaluation)
    ]
    if not lines:
        return ""
    head = "| Task | Metric | Value | 95 % interval | n |\n|---|---|---|---|---|"
    return f"\nMeasured on {_data_name(evaluation)} (report {evaluation.report}):\n\n{head}\n" + "\n".join(lines) + "\n"


def _interval(item: Measured) -> str:
    return "–" if item.low is None else f"{item.low:.4g} to {item.high:.4g}"


def _data_name(evaluation: Evaluation) -> str:
    songs = f"{evaluation.data['songs']} " if "songs" in evaluation.data else ""
    return f"{songs}held-out songs of its catalogue"
