"""Health of a run: detection of collapse and plateaus on a fixed probe batch, with dropout off.

The probe is of training rows: on unseen songs, the loss of an overfitted model may exceed that of an untrained one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from htcl_ray.config.sections import StageSettings
from htcl_ray.errors import MismatchError, StepError
from htcl_ray.evaluation.stats.collapse import effective_rank, mean_cosine
from htcl_ray.losses.collectives import gather_rows, rank, sum_over_workers, world_size
from htcl_ray.losses.registry import loss_class
from htcl_ray.models.htcl import HTCL
from htcl_ray.models.towers.text import check_song_texts
from htcl_ray.training.batches import BatchLoader, encode
from htcl_ray.training.order import worker_rows
from htcl_ray.training.song_numbers import Rows, Songs
from htcl_ray.training.stage_tasks import Task

PROBE_ROWS = 128
"""Rows of the probe: enough for a rank of tens, few next to an epoch."""
ENCODED_AT_ONCE = 16
COMPARED_TEXTS = 64
EQUAL = 1e-5
"""Largest difference of unit-norm vectors that are equal up to rounding; an untrained, narrow tower differs by 1e-3."""

REMEDIES = {
    "plateau": "raise {stage}.learning_rate or {stage}.warmup_share, lower {stage}.temperature, "
    "or check that song texts differ",
    "collapse": "lower {stage}.learning_rate, raise the batch size, or check that audio and texts differ between songs",
}


def distinct_texts(songs: Songs) -> list[str]:
    """Up to 64 different texts of training songs."""
    _, first = np.unique(songs.ids[songs.train, 2], return_index=True)
    chosen: Rows = songs.train[np.sort(first)[:: max(1, len(first) // COMPARED_TEXTS)][:COMPARED_TEXTS]]
    return [songs.texts[song] for song in chosen.tolist()]


def refuse_equal_texts(model: HTCL, songs: Songs) -> None:
    """Raise InputError when the model embeds different song texts alike, or not at all.

    For the start of a run; `HealthWatch` detects a tower that collapses later.
    """
    texts = distinct_texts(songs)
    if len(texts) < 2:
        return
    check_song_texts(model.text_encoder.tokenizer, texts, model.text_encoder.settings)
    vectors = model.embed_text(texts)
    if (vectors - vectors[0]).abs().max() <= EQUAL:
        name = model.text_encoder.settings.name_or_path
        raise MismatchError(
            f"the text tower{f' (text.name_or_path {name})' if name else ''} embeds {len(texts)} different song texts "
            f"alike, for instance '{texts[0][:80]}' and '{texts[1][:80]}'; expected different vectors: its weights are "
            "damaged or collapsed, so train or choose another one"
        )


def probe_rows(rows: int, workers: int) -> Rows:
    """Rows of an epoch that make up the probe, equally many per worker; `rows` is at least `workers`."""
    wanted = min(max(PROBE_ROWS, workers), rows)
    return np.sort(np.random.default_rng(0).choice(rows, wanted // workers * workers, replace=False))


class HealthWatch:
    """The probe of one run, its metrics after each epoch, and the duration of each fault.

    Every worker must call the same methods.
    """

    def __init__(
        self,
        task: Task,
        loader: BatchLoader,
        settings: StageSettings,
        device: torch.device,
        *,
        step: int,
        say: Callable[[str], None],
    ) -> None:
        self.task, self.settings, self.say = task, settings.health, say
        has_plateau = loss_class(settings.loss).chance_level(PROBE_ROWS) is not None
        self.watched = [name for name, weight in task.weights.items() if weight] if has_plateau else []
        self.since: dict[str, int] = {}
        """Fault → the last step without it."""
        self.healthy_at = step
        order = task.order(0)
        chosen = probe_rows(len(order), world_size())
        own = worker_rows(order[chosen], 0, len(chosen), rank(), world_size())
        self.batch = loader.load_first_windows(own.T.reshape(-1)).to(device)

    def measure(self, model: HTCL) -> dict[str, float]:
        """Measure the probe: mean cosine and effective rank of audio and text, loss and plateau of each term.

        The plateau of a term is its loss for equal vectors.
        """
        was_training = model.training
        model.eval()
        with torch.no_grad():
            parts = [
                self.batch.part(start, start + ENCODED_AT_ONCE) for start in range(0, len(self.batch), ENCODED_AT_ONCE)
            ]
            audio, text = (torch.cat(vectors) for vectors in zip(*(encode(model, part) for part in parts), strict=True))
            metrics = self._losses("probe_loss", model, audio, text)
            metrics |= self._losses("plateau_loss", model, torch.ones_like(audio), torch.ones_like(text))
        model.train(was_training)
        ids = gather_rows(self.batch.ids)
        # Duplicate recordings and equal texts have equal vectors, so one of each is compared.
        for name, vectors, kind in (("audio", audio, 1), ("text", text, 2)):
            distinct = gather_rows(vectors)[_first_of_each(ids[:, kind])].double().cpu().numpy()
            if len(distinct) >= 2:
                metrics[f"mean_cosine_{name}"] = mean_cosine(distinct)
            if len(distinct) > 2 * self.settings.min_effective_rank:
                metrics[f"effective_rank_{name}"] = effective_rank(distinct)
        return metrics

    def _losses(self, prefix: str, model: HTCL, audio: Tensor, text: Tensor) -> dict[str, float]:
        terms = self.task.terms(model, audio, text, self.batch.ids)
        return {f"{prefix}_{name}": sum_over_workers(value).item() for name, value in terms.items()}

    def check(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Report the faults that have lasted for `patience_steps`, as sentences.

        They are printed and returned, or raised as StepError if the action is `stop`.
        """
        now = self._faults(metrics)
        self.since = {fault: self.since.get(fault, self.healthy_at) for fault in now}
        self.healthy_at = step
        lasting = [text for fault, text in now.items() if step - self.since[fault] >= self.settings.patience_steps]
        if lasting and self.settings.action == "stop":
            raise StepError(f"{self.task.name} stopped at step {step}: {'; '.join(lasting)}")
        for text in lasting:
            self.say(f"{self.task.name}  WARNING at step {step}: {text}")
        return lasting

    def _faults(self, metrics: Mapping[str, float]) -> dict[str, str]:
        settings = self.settings
        faults: dict[str, str] = {}
        for name in ("audio", "text"):
            cosine, rank_now = metrics.get(f"mean_cosine_{name}"), metrics.get(f"effective_rank_{name}")
            if cosine is not None and cosine > settings.max_mean_cosine:
                faults[f"cosine {name}"] = self._advice(
                    "collapse", f"the mean cosine of {name} vectors is {cosine:.3f}"
                )
            elif rank_now is not None and rank_now < settings.min_effective_rank:
                faults[f"rank {name}"] = self._advice(
                    "collapse", f"the effective rank of {name} vectors is {rank_now:.1f}"
                )
        for term in self.watched:
            loss, plateau = metrics[f"probe_loss_{term}"], metrics[f"plateau_loss_{term}"]
            if plateau > 0 and abs(loss - plateau) <= settings.plateau_margin * plateau:
                what = f"the {term} loss of the probe is {loss:.3f}, what equal vectors for all songs would have"
                faults[f"plateau {term}"] = self._advice("plateau", what)
        return faults

    def _advice(self, fault: str, what: str) -> str:
        return f"{what} ({fault}); {REMEDIES[fault].format(stage=self.task.name)}"


def _first_of_each(values: Tensor) -> Tensor:
    """Position of the first of each distinct value."""
    _, first = np.unique(values.cpu().numpy(), return_index=True)
    return torch.from_numpy(first).to(values.device)
