"""Local tasks of mteb on ESC-10 clips. Importing mteb takes seconds, so a test imports this module when it runs."""

from __future__ import annotations

from typing import Any

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskZeroShotClassification
from mteb.abstasks.task_metadata import TaskMetadata

from htcl_ray.integrations.mteb import MtebModel, mteb_model

__all__ = [
    "Dataset",
    "DatasetDict",
    "LocalClassification",
    "LocalRetrieval",
    "LocalZeroShot",
    "MtebModel",
    "Recorder",
    "mteb_model",
    "run",
]

ABOUT: dict[str, Any] = {
    "description": "Clips of ESC-10 next to this checkout",
    "reference": None,
    "dataset": {"path": "local", "revision": "1"},
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "date": ("2015-01-01", "2015-12-31"),
    "dialect": [],
    "domains": [],
    "task_subtypes": [],
    "license": "cc-by-4.0",
    "annotations_creators": "derived",
    "sample_creation": "found",
    "bibtex_citation": "",
}


def about(name: str, kind: str, modalities: list[str], category: str) -> TaskMetadata:
    score = "ndcg_at_10" if kind == "Any2AnyRetrieval" else "accuracy"
    return TaskMetadata(**ABOUT, name=name, type=kind, main_score=score, modalities=modalities, category=category)


class LocalClassification(AbsTaskClassification):
    metadata = about("LocalESC10", "AudioClassification", ["audio"], "a2t")
    input_column_name = "audio"
    n_experiments = 2

    def load_data(self, **kwargs: Any) -> None:
        pass


class LocalZeroShot(AbsTaskZeroShotClassification):
    metadata = about("LocalESC10ZeroShot", "AudioZeroshotClassification", ["audio", "text"], "a2t")
    input_column_name = "audio"

    labels: tuple[str, ...] = ()

    def get_candidate_labels(self) -> list[str]:
        return list(self.labels)

    def load_data(self, **kwargs: Any) -> None:
        pass


class LocalRetrieval(AbsTaskRetrieval):
    metadata = about("LocalESC10Retrieval", "Any2AnyRetrieval", ["audio", "text"], "t2a")

    def load_data(self, **kwargs: Any) -> None:
        pass


class Recorder(MtebModel):
    """Keeps what mteb was given."""

    def encode(self, inputs: Any, **task: Any) -> np.ndarray:
        vectors = super().encode(inputs, **task)
        self.given = [*getattr(self, "given", []), vectors]
        return vectors


def run(task: Any, encoder: MtebModel) -> dict[str, Any]:
    task.data_loaded = True
    result = mteb.evaluate(
        encoder, task, cache=None, show_progress_bar=False, co2_tracker=False, encode_kwargs={"batch_size": 8}
    )
    return result.task_results[0].scores["test"][0]
