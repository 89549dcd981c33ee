"""One part of the run as a list of measurements (units): each is recorded when it begins and when it ends, so that
nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from htcl_ray.training import batches

Precision = Literal["fp32", "tf32", "bf16"]
Unit = Callable[[], dict[str, Any]]
"""Returns its values: `line` is what is printed, `passed` the verdict of a check."""


@dataclass(frozen=True)
class Part:
    """What the process of one part is given."""

    name: str
    kind: str
    """cuda or cpu."""
    until: float
    """When it is ended, in seconds since the epoch."""
    records: Path
    """JSON Lines: {"unit": name} when a measurement begins, {"unit": name, "values": {…}} when it has ended."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.kind)

    @property
    def on_gpu(self) -> bool:
        """Whether that is a GPU: paper size; else toy size."""
        return self.kind == "cuda"

    def seconds_left(self) -> float:
        """Until the part is ended."""
        return self.until - time.time()

    def run(self, units: Mapping[str, Unit]) -> None:
        """Take the measurements that no earlier process of this part has begun, one after the other."""
        if not self.on_gpu:
            torch.set_num_threads(
                1
            )  # toy sizes gain nothing from more, and lose much where other processes use the cores
        begun = read_records(self.records, "").keys()
        for name, unit in units.items():
            if name in begun:
                continue
            self._record({"unit": name})
            started = time.perf_counter()
            try:
                values = unit()
            except torch.cuda.OutOfMemoryError:
                values = {"error": "out of memory"}
            except Exception as error:  # a measurement that fails must not take the others with it  # noqa: BLE001
                traceback.print_exc()
                values = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
            if self.on_gpu:
                torch.cuda.empty_cache()
            values["unit_seconds"] = round(time.perf_counter() - started, 2)
            line = values.pop("line", None) or values.get("error") or values.get("skipped") or ""
            verdict = (
                {True: "ok  ", False: "FAIL"}[values["passed"]]
                if "passed" in values
                else "FAIL"
                if "error" in values
                else "    "
            )
            print(f"{verdict} {self.name}  {name}: {line}  ({values['unit_seconds']:.1f} s)", flush=True)
            self._record({"unit": name, "values": values})

    def _record(self, record: dict[str, Any]) -> None:
        with open(self.records, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def precisions_of(part: Part) -> tuple[Precision, ...]:
    """What is compared on the part's device; CPUs have no TF32."""
    return ("fp32", "tf32", "bf16") if part.on_gpu else ("fp32", "bf16")


def read_records(path: Path, ended: str) -> dict[str, dict[str, Any]]:
    """Measurement → its values; one that began and did not end has an error that says how its process `ended`."""
    records: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            records[record["unit"]] = record.get("values", {"error": f"its process did not finish it ({ended})"})
    return records


@contextlib.contextmanager
def matrix_precision(precision: Precision) -> Iterator[None]:
    """TF32 for matrix products and convolutions of fp32 tensors, or full fp32. Changes nothing on a CPU."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@contextlib.contextmanager
def training_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Towers in training: bf16 under autocast, which is what a GPU uses by default, or fp32 or TF32 throughout. Losses
    stay fp32.
    """
    before = dict(batches.AUTOCAST)
    batches.AUTOCAST.pop(device.type, None)
    if precision == "bf16":
        batches.AUTOCAST[device.type] = torch.bfloat16
    try:
        with matrix_precision(precision):
            yield
    finally:
        batches.AUTOCAST.clear()
        batches.AUTOCAST.update(before)


@contextlib.contextmanager
def embedding_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Towers in embedding, which is fp32 unless something around it says otherwise."""
    with matrix_precision(precision), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield
