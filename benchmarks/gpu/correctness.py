"""Is what a GPU computes right: against the CPU, between precisions, in micro-batches, compiled, resumed, and by the
release gate's bounds.

Relative differences are ‖a − b‖ / ‖b‖ over all numbers of a group, computed in float64. Models have random weights,
dropout is off unless a check is about it. On the CPU the same checks compare bf16 with fp32, and what only a GPU has
says so.
"""

from __future__ import annotations

import copy
import importlib.resources
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import synthetic_songs
from benchmarks.gpu.units import Part, Precision, embedding_precision, precisions_of, training_precision
from benchmarks.steps import Step
from benchmarks.synthetic_songs import World
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.vector_checks import vector_check_tasks
from htcl_ray.losses import collectives
from htcl_ray.losses.false_negatives import false_negatives, pair_codes
from htcl_ray.models import HTCL
from htcl_ray.models.towers.transformer import TransformerLayer
from htcl_ray.schemas import METADATA
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.training.batches import Batch, BatchLoader, encode
from htcl_ray.training.checkpoint import gather_state, load_state, save_checkpoint
from htcl_ray.training.micro_batch import compute_gradients, probe_micro_batch_size
from htcl_ray.training.optimization import build_optimizer, compile_towers
from htcl_ray.training.randomness import get_rng_state, set_rng_state
from htcl_ray.training.stage_tasks import Task

ROWS = {1: 8, 2: 4}
"""Stage → rows of the batch that precisions are compared on: 8 songs, or 4 pairs."""
MICRO_BATCHES = (1, 3, 4)
GATE_CLIPS = 16
SHALLOW = 2
"""Layers of both towers where depth adds only time."""
BOUNDS: dict[Precision, dict[str, float]] = {
    "fp32": {"embeddings": 1e-4, "losses": 1e-4, "gradients": 2e-3},
    "tf32": {"embeddings": 1e-2, "losses": 1e-2, "gradients": 1e-1},
    "bf16": {"embeddings": 5e-2, "losses": 5e-2, "gradients": 5e-1},
}
"""Largest accepted relative difference from fp32 on the CPU. Gradients of a random model's contrastive loss are small
differences of large numbers, so they lose more than the unit roundoff (2⁻²⁴, 2⁻¹¹, 2⁻⁸)."""
COMPILED_BOUND = 1.5
"""Embeddings and gradients of a compiled step may differ from fp32 by this many times what those of the eager one
do."""


def run(part: Part) -> None:
    """Every check, the ones that everything else rests on first."""
    size = "paper" if part.on_gpu else "demo"
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", size, 64, "mixed")
        part.run(
            {
                "precisions, stage 1": lambda: precisions(part, world, 1),
                "precisions, stage 2": lambda: precisions(part, world, 2),
                "false-negative mask": lambda: mask(part),
                "gradient caching": lambda: gradient_caching(part, world),
                "attention kernels": lambda: attention(part, world),
                "collectives of one rank": lambda: communication(part),
                "release gate": lambda: release_gate(part, world),
                "automatic micro-batch": lambda: automatic_micro_batch(part, world),
                "resume": lambda: resume(part, world, Path(scratch)),
                "compiled": lambda: compiled(part, world),
            }
        )


def precisions(part: Part, world: World, stage: int) -> dict[str, Any]:
    """One step in every precision of the device against fp32 on the CPU: embeddings, losses, gradients by layer
    group.
    """
    cpu = torch.device("cpu")
    model = synthetic_songs.make_model(world, stage, cpu).eval()
    batch = synthetic_songs.first_batch(world, model, stage, ROWS[stage], cpu)
    with training_precision("fp32", cpu):
        expected = _step_numbers(model, batch, synthetic_songs.make_task(world, stage, cpu))
    model, batch, task = (
        model.to(part.device),
        batch.to(part.device),
        synthetic_songs.make_task(world, stage, part.device),
    )
    values: dict[str, Any] = {"rows": ROWS[stage], "frames": batch.valid_frames.tolist(), "passed": True}
    lines = []
    for precision in precisions_of(part):
        with training_precision(precision, part.device):
            differences = _differences(_step_numbers(model, batch, task), expected)
        worst = {kind: max(entry["relative"] for entry in groups.values()) for kind, groups in differences.items()}
        passed = all(worst[kind] <= bound for kind, bound in BOUNDS[precision].items())
        values[precision] = {**differences, "worst": worst, "bounds": BOUNDS[precision], "passed": passed}
        values["passed"] &= passed
        worst_group = max(differences["gradients"], key=lambda group: differences["gradients"][group]["relative"])
        shown = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())
        lines.append(f"{precision} {shown} ({worst_group})")
    return {**values, "line": "; ".join(lines)}


def gradient_caching(part: Part, world: World) -> dict[str, Any]:
    """Micro-batches of several sizes against one pass, and dropout that both encodings of a micro-batch share."""
    model = synthetic_songs.make_model(world, 1, part.device, SHALLOW)
    batch = synthetic_songs.first_batch(world, model, 1, 12, part.device)
    task = synthetic_songs.make_task(world, 1, part.device)
    values: dict[str, Any] = {"rows": len(batch), "passed": True}
    lines = []
    bounds: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.2}
    for precision, bound in bounds.items():
        with training_precision(precision, part.device):
            once = _step_numbers(model.eval(), batch, task)
            entries = {
                micro: max(
                    entry["relative"]
                    for entry in _differences(_step_numbers(model, batch, task, micro), once)["gradients"].values()
                )
                for micro in MICRO_BATCHES
            }
            model.train()
            state = get_rng_state(part.device)
            first = encode(model, batch.part(0, 4))
            set_rng_state(state, part.device)
            replayed = all(torch.equal(a, b) for a, b in zip(first, encode(model, batch.part(0, 4)), strict=True))
        passed = replayed and max(entries.values()) <= bound
        values[precision] = {
            "gradients_by_micro_batch": entries,
            "bound": bound,
            "dropout_replayed_bit_equal": replayed,
            "passed": passed,
        }
        values["passed"] &= passed
        lines.append(
            f"{precision} gradients {max(entries.values()):.1e}, dropout {'replayed' if replayed else 'NOT replayed'} bit for bit"
        )
    return {**values, "line": "; ".join(lines)}


def compiled(part: Part, world: World) -> dict[str, Any]:
    """A compiled bf16 step against the eager one; both are judged by their difference from fp32."""
    layers = SHALLOW if part.on_gpu else 1  # a CPU takes half a minute for each
    model = synthetic_songs.make_model(world, 1, part.device, layers).train()
    for module in model.modules():  # without dropout, the mode in which `compile_towers` compiles serves
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, TransformerLayer):
            module.dropout = 0.0
    batch = synthetic_songs.first_batch(world, model, 1, 8, part.device)
    task = synthetic_songs.make_task(world, 1, part.device)
    with training_precision("fp32", part.device):
        expected = _step_numbers(model, batch, task)
    with training_precision("bf16", part.device):
        eager = _step_numbers(model, batch, task)
        compile_towers(model, synthetic_songs.first_batch(world, model, 1, 4, torch.device("cpu")), part.device, print)
        actual = _step_numbers(model, batch, task)
    worst = {
        side: {
            kind: max(entry["relative"] for entry in groups.values())
            for kind, groups in _differences(numbers, expected).items()
        }
        for side, numbers in (("eager", eager), ("compiled", actual))
    }
    passed = all(
        worst["compiled"][kind] <= COMPILED_BOUND * worst["eager"][kind] for kind in ("embeddings", "gradients")
    )
    passed &= (
        worst["compiled"]["losses"] <= BOUNDS["bf16"]["losses"]
    )  # one number: the eager one's errors may happen to cancel
    shown = {side: ", ".join(f"{kind} {value:.1e}" for kind, value in kinds.items()) for side, kinds in worst.items()}
    return {**worst, "passed": passed, "line": f"from fp32: compiled {shown['compiled']}; eager {shown['eager']}"}


def attention(part: Part, world: World) -> dict[str, Any]:
    """Each kernel of scaled-dot-product attention in a whole layer against softmax(q·kᵀ)·v in float64: outputs and
    input gradients.
    """
    sizes = world.config.model
    torch.manual_seed(0)
    layer = TransformerLayer(sizes.width, sizes.heads, sizes.feed_forward, 0.0).to(part.device).eval()
    tokens = -(-world.config.audio.max_frames // 8) + 1
    x = torch.randn(4, tokens, sizes.width, device=part.device)
    valid = (torch.arange(tokens) < torch.tensor([tokens, tokens // 2, 3, tokens - 1])[:, None]).to(part.device)
    values: dict[str, Any] = {"passed": True}
    usable = []
    bounds: dict[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2}
    for masked in (False, True):
        attended = valid[:, None, None, :] if masked else None
        expected = _layer_numbers(_plain_layer(layer), x.double(), attended)
        for precision, bound in bounds.items():
            for backend in (
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.MATH,
            ):
                name = f"{backend.name.lower()}, {precision}, {'masked' if masked else 'no mask'}"
                try:
                    with (
                        warnings.catch_warnings(action="ignore"),
                        sdpa_kernel(backend),
                        embedding_precision(precision, part.device),
                    ):
                        actual = _layer_numbers(layer, x, attended)
                except RuntimeError as error:  # this kernel does not take masks, this precision or this device
                    values[name] = {"not_available": (str(error).strip().splitlines() or [""])[0][:120]}
                    continue
                relative = max(_relative(a, b) for a, b in zip(actual, expected, strict=True))
                values[name] = {"relative": relative, "bound": bound, "passed": relative <= bound}
                values["passed"] &= relative <= bound
                usable.append((relative, name))
    return {
        **values,
        "line": f"{len(usable)} of 16 combinations are available; the worst, {max(usable)[1]}: {max(usable)[0]:.1e}",
    }


def communication(part: Part) -> dict[str, Any]:
    """NCCL (on the CPU gloo) with one rank. The package skips communication for one worker, so its inner functions are
    called.
    """
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if part.on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            rows = torch.randn(5, 3, device=part.device, requires_grad=True)
            gathered = collectives.GatherRows.apply(rows)
            gathered.square().sum().backward()
            tensors = [torch.randn(7, device=part.device), torch.randn(2, 2, device=part.device)]
            before = [tensor.clone() for tensor in tensors]
            collectives.sum_in_place(tensors)
            least, first = torch.tensor(3, device=part.device), torch.randn(4, device=part.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            kept = first.clone()
            dist.broadcast(first, src=0)
            dist.barrier()
            checks = {
                "gather": torch.equal(gathered.detach(), rows.detach()),
                "gradient_of_gather": torch.equal(rows.grad, 2 * rows.detach()) if rows.grad is not None else False,
                "sum": all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)),
                "least": int(least) == 3,
                "broadcast": torch.equal(first, kept),
            }
        finally:
            dist.destroy_process_group()
    backend = "nccl" if part.on_gpu else "gloo"
    return {
        "backend": backend,
        **checks,
        "passed": all(checks.values()),
        "line": f"{backend}: {len(checks)} collectives with their gradient",
    }


def mask(part: Part) -> dict[str, Any]:
    """The false-negative mask on the device and on the CPU, with known pairs: equal in every entry."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.stack([rng.integers(0, high, 3000) for high in (2000, 500, 900)], axis=1))
    low, high = (torch.from_numpy(rng.integers(0, 2000, 5000)) for _ in range(2))
    known = torch.unique(pair_codes(torch.minimum(low, high), torch.maximum(low, high)))
    expected = false_negatives(ids[:1000], ids, known)
    actual = false_negatives(ids[:1000].to(part.device), ids.to(part.device), known.to(part.device)).cpu()
    differing = int((actual != expected).sum())
    return {
        "entries": expected.numel(),
        "masked": int(expected.sum()),
        "differing": differing,
        "passed": differing == 0 and bool(expected.any()),
        "line": f"{differing} of {expected.numel():,} entries differ ({int(expected.sum()):,} are masked)",
    }


def release_gate(part: Part, world: World) -> dict[str, Any]:
    """Determinism of embedding in each precision, by the bounds of the shipped release gate; stored vectors are fp32 of
    the CPU.
    """
    model = synthetic_songs.make_model(world, 1, torch.device("cpu")).eval()
    chosen = np.arange(GATE_CLIPS)
    mel, valid = world.frames.batch(chosen)
    mels = [clip[:count].astype(np.float32) for clip, count in zip(mel, valid.tolist(), strict=True)]
    stored = SongEncoder(model, None, {"semantic": None, "preference": None}).encode_songs(mels).semantic
    encoder = SongEncoder(model.to(part.device), None, {"semantic": None, "preference": None})
    songs = _evaluation_songs(stored)
    bounds = _gate_bounds()
    values: dict[str, Any] = {"clips": GATE_CLIPS, "bounds": bounds}
    lines = []
    for precision in precisions_of(part):
        with embedding_precision(precision, part.device):
            tasks = vector_check_tasks(encoder, songs, mels, chosen, [], [None] * GATE_CLIPS, seed=0)
        figures = next(task for task in tasks if task.name == "determinism").methods["semantic"]
        measured = {name: figures[name].value for name in bounds}
        accepted = all(measured[name] <= bound for name, bound in bounds.items())
        values[precision] = {**measured, "accepted": accepted}
        worst = max(bounds, key=lambda name: measured[name] / bounds[name])
        lines.append(
            f"{precision} {'accepted' if accepted else 'REFUSED'} ({worst} {measured[worst]:.1e}, bound {bounds[worst]:.0e})"
        )
    return {**values, "passed": values["fp32"]["accepted"], "line": "; ".join(lines)}


def automatic_micro_batch(part: Part, world: World) -> dict[str, Any]:
    """`micro_batch_size: auto` with little free memory, after an out-of-memory error: its size must be one that a step
    fits in.
    """
    model = synthetic_songs.make_model(world, 1, part.device)
    task = synthetic_songs.make_task(world, 1, part.device)
    loader = BatchLoader(world.songs, world.frames, model.text_encoder, None)
    ballast, provoked = None, None
    if part.on_gpu:
        free, keep = torch.cuda.mem_get_info()[0], 12 * 2**30
        ballast = torch.empty(max(0, free - keep), dtype=torch.uint8, device=part.device)
        provoked = _runs_out_of_memory(model, loader, part.device)
    local_rows = 1024
    fitting_rows = probe_micro_batch_size(model, loader.longest(), task.songs_per_row, local_rows, part.device)
    rows = min(2 * fitting_rows, local_rows) if part.on_gpu else 8  # on the CPU, the size is extrapolated and large
    batch = loader.load(np.arange(rows) % 64).to(part.device)
    optimizer = build_optimizer(model.train(), world.config.pretrain)
    compute_gradients(model, batch, task, min(fitting_rows, rows))
    optimizer.step()
    del ballast
    passed = fitting_rows >= 1 and provoked is not False and (fitting_rows < local_rows or not part.on_gpu)
    how = (
        "after an out-of-memory error"
        if provoked
        else "no out-of-memory error can be provoked on a CPU"
        if provoked is None
        else "no error came"
    )
    return {
        "rows": fitting_rows,
        "of_local_rows": local_rows,
        "provoked_out_of_memory": provoked,
        "step_rows": rows,
        "passed": passed,
        "line": f"{fitting_rows} of {local_rows} rows ({how}); a step of {rows} rows ran with it",
    }


def _runs_out_of_memory(model: HTCL, loader: BatchLoader, device: torch.device) -> bool:
    """Whether a batch of 2,048 full clips is too many for the memory that is left."""
    try:
        encode(model, loader.load(np.zeros(2048, np.int64)).to(device))
    except torch.cuda.OutOfMemoryError:
        return True
    return False


def resume(part: Part, world: World, scratch: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step; the same third step from the checkpoint: bit-equal weights, or which
    operations are not.
    """
    model = synthetic_songs.make_model(world, 1, part.device, SHALLOW)
    task = synthetic_songs.make_task(world, 1, part.device)
    batch = synthetic_songs.first_batch(world, model, 1, 16, part.device)
    torch.manual_seed(1)
    step, optimizer = _training_step(model, task, world, micro_batch_size=8)
    for _ in range(2):
        step(batch)
    folder = scratch / "checkpoint"
    save_checkpoint(folder, model, gather_state(2, 8, False, optimizer, {}, part.device))
    step(batch)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    differing = _resumed_difference(part, world, task, batch, folder, expected)
    values: dict[str, Any] = {"differing_tensors": differing, "bit_equal": not differing}
    if not differing:
        return {**values, "passed": True, "line": f"bit-equal in all {len(expected)} tensors"}
    again = _resumed_difference(part, world, task, batch, folder, expected)
    with warnings.catch_warnings(record=True) as caught, _deterministic():
        warnings.simplefilter("always")
        first = _resumed_state(part, world, task, batch, folder)
        deterministic = not _unequal(_resumed_state(part, world, task, batch, folder), first)
    operations = sorted(
        {str(entry.message).split(" does not have")[0] for entry in caught if "deterministic" in str(entry.message)}
    )
    values |= {"differs_between_two_resumes": again != differing, "bit_equal_with_deterministic_kernels": deterministic}
    values |= {"operations_without_deterministic_kernel": operations}
    reason = (
        "kernels that add in no fixed order"
        if deterministic
        else f"no deterministic kernel for {operations or 'an unnamed operation'}"
    )
    return {
        **values,
        "passed": deterministic,
        "line": f"{len(differing)} of {len(expected)} tensors differ by default: {reason}",
    }


# --- the numbers of one step, and their differences
# -------------------------------------------------------------------------------

Numbers = dict[str, dict[str, Tensor]]
"""embeddings, losses, gradients → group → its numbers, on the device that computed them."""


def _step_numbers(model: HTCL, batch: Batch, task: Task, micro_batch_size: int | None = None) -> Numbers:
    with torch.no_grad():
        audio, text = encode(model, batch)
    model.zero_grad()
    terms = compute_gradients(model, batch, task, micro_batch_size)
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(layer_group(name, model.record.model.layers), []).append(
                parameter.grad.detach().reshape(-1)
            )
    model.zero_grad()
    return {
        "embeddings": {name: F.normalize(vectors, dim=1) for name, vectors in (("audio", audio), ("text", text))},
        "losses": {name: term.detach() for name, term in terms.items()},
        "gradients": {name: torch.cat(parts) for name, parts in groups.items()},
    }


def layer_group(name: str, layers: int) -> str:
    """The group of layers that a parameter belongs to; Transformer layers of the audio tower are in thirds."""
    parts = name.split(".")
    if parts[0] == "audio_encoder":
        if parts[1] == "layers":
            third = 3 * int(parts[2]) // layers
            return f"audio layers, third {third + 1}"
        return "audio convolutions" if parts[1] == "convolutions" else "audio projection and position"
    if parts[0] == "text_encoder":
        return {"embeddings": "text embeddings", "pooler": "text pooler"}.get(parts[2], "text layers")
    return parts[0].replace("_", " ")


def _differences(actual: Numbers, expected: Numbers) -> dict[str, dict[str, dict[str, float]]]:
    return {
        kind: {
            group: {
                "largest": float((actual[kind][group] - numbers.to(actual[kind][group].device)).abs().max()),
                "relative": _relative(actual[kind][group], numbers),
            }
            for group, numbers in groups.items()
        }
        for kind, groups in expected.items()
    }


def _relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; inf where a number is not finite."""
    actual, expected = actual.detach().double(), expected.detach().to(actual.device).double()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


# --- attention
# ----------------------------------------------------------------------------------------------------------------------


def _layer_numbers(layer: Any, x: Tensor, attended: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input from fixed random weights of the output."""
    x = x.clone().requires_grad_()
    out = layer(x, attended)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    (out.double() * weights).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def _plain_layer(layer: TransformerLayer) -> Any:
    """The layer in float64 with attention written out."""
    exact = copy.deepcopy(layer).double()

    def forward(x: Tensor, attended: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = exact.attention_in(x).view(batch, tokens, 3, exact.heads, width // exact.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // exact.heads) ** 0.5
        if attended is not None:
            scores = scores.masked_fill(~attended, -torch.inf)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = exact.attention_norm(x + exact.attention_out(mixed))
        return exact.feed_norm(x + exact.feed_out(F.gelu(exact.feed_in(x))))

    return forward


# --- the release gate
# ---------------------------------------------------------------------------------------------------------------


def _gate_bounds() -> dict[str, float]:
    """Determinism bounds of the shipped gate for vectors of stored log-mels."""
    gate = yaml.safe_load(
        importlib.resources.files("htcl_ray").joinpath("evaluation", "gate.yaml").read_text(encoding="utf-8")
    )
    prefix = "determinism.semantic."
    bounds = {b["figure"].removeprefix(prefix): b["at_most"] for b in gate["bounds"] if b["figure"].startswith(prefix)}
    return {name: bound for name, bound in bounds.items() if name != "from_audio_difference"}


def _evaluation_songs(vectors: np.ndarray) -> EvaluatedSongs:
    ids = [f"{i:06d}" for i in range(len(vectors))]
    metadata = pa.table({field.name: pa.nulls(len(ids), field.type) for field in METADATA}, schema=METADATA)
    return EvaluatedSongs(
        ids,
        ids,
        np.array(["test"] * len(ids)),
        ids,
        metadata,
        {"semantic": vectors},
        np.zeros((len(ids), 2), np.float32),
    )


# --- resuming
# -----------------------------------------------------------------------------------------------------------------------


def _training_step(model: HTCL, task: Task, world: World, micro_batch_size: int) -> tuple[Step, torch.optim.Optimizer]:
    optimizer = build_optimizer(model.train(), world.config.pretrain)

    def step(batch: Batch) -> None:
        compute_gradients(model, batch, task, micro_batch_size)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def _resumed_state(part: Part, world: World, task: Task, batch: Batch, folder: Path) -> Mapping[str, Tensor]:
    model, state = HTCL.from_pretrained(folder).to(part.device), load_state(folder)
    step, optimizer = _training_step(model, task, world, micro_batch_size=8)
    optimizer.load_state_dict(state.optimizer)
    rng = state.rng_of(0, 1)
    assert rng is not None
    set_rng_state(rng, part.device)
    step(batch)
    return model.state_dict()


def _resumed_difference(
    part: Part, world: World, task: Task, batch: Batch, folder: Path, expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Tensor → largest difference, of those that are not bit-equal."""
    return _unequal(_resumed_state(part, world, task, batch, folder), expected)


def _unequal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float((actual[name] - tensor).abs().max())
        for name, tensor in expected.items()
        if not torch.equal(actual[name], tensor)
    }


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
