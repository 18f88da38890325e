"""The checks of the parity protocol: each takes a subject and yields measurements with limits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from converters import manifest
from converters.carry_out import invert
from converters.formats import TensorInfo, dtype_code
from converters.plan import make_plan
from zoo.checkpoints.file_names import ADAPTER, ADAPTER_WEIGHTS
from zoo.components.cache import Cache
from zoo.components.heads import LOGITS
from zoo.loading import load
from zoo.parity.reference import Outputs, Reference
from zoo.parity.result import Row
from zoo.parity.truth import Inputs, Truth
from zoo.saving.save import save

# Each limit is a multiple of what was measured over the variants and up to 20 seeds.
# fp64: two orders of the same sums differ by up to 3e-14 of the scale, and 5e-14 in gradients; the
# smallest planted bug shows at 1e-3. 1e-10 leaves room for models far deeper than a fixture.
FP64 = GRADIENTS = 1e-10
# A gradient that is zero by symmetry (a key bias without rotary embedding) is rounding noise, which
# has the whole model's scale, not its own.
SYMMETRIC = 1e-3
# With the same kernels on both sides the ratio of errors was 1.03 at most; with the reference's own
# other attention kernel 1.2 in either dtype, and 1.4 in bf16 where a head gives few numbers.
FP32, BF16 = 4.0, 1.5
# KL grows with the square of the error: 1.15 at most with the same kernels, 1.4 with the other one.
KL = 2.0

Load = Callable[[torch.dtype | None], Any]


@dataclass
class Subject:
    """A checkpoint, the reference's outputs for it, and how its native model is loaded."""

    name: str
    truth: Truth
    load: Load
    reading: Mapping[str, Any] = field(default_factory=dict)  # arguments of zoo.load
    _models: dict[torch.dtype | None, Any] = field(default_factory=dict)

    def model(self, dtype: torch.dtype | None) -> Any:
        """The native model in a dtype, loaded once."""
        if dtype not in self._models:
            self._models[dtype] = self.load(dtype)
        return self._models[dtype]

    def release(self) -> None:
        """Drop the loaded models."""
        self._models.clear()


def call(model: nn.Module, inputs: Inputs, **more: Any) -> list[Tensor]:
    """The native model's outputs, in order."""
    accepted = inspect.signature(model.forward).parameters
    extra = {name: value for name, value in inputs.extra.items() if name in accepted} | more
    if inputs.answer is not None:
        extra["decoder_input_ids"] = inputs.answer.ids
        if inputs.answer.mask is not None:
            extra["decoder_attention_mask"] = inputs.answer.mask
    out = model(inputs.ids, attention_mask=inputs.mask, **extra)
    return list(out) if isinstance(out, tuple) else [out]


def pair(native: list[Tensor], truth: Outputs) -> list[tuple[str, Tensor, Tensor]]:
    """(name, native, truth) of each output; numbers and shapes of outputs must agree."""
    mine, theirs = [tuple(x.shape) for x in native], [tuple(x.shape) for x in truth.values()]
    if mine != theirs:
        raise ShapesDiffer(f"outputs {mine} where the reference gives {theirs}")
    return [(name, x, y) for x, (name, y) in zip(native, truth.items(), strict=True)]


class ShapesDiffer(Exception):
    """The outputs have different shapes."""


def distance(native: Tensor, truth: Tensor, like: Tensor | None = None) -> float:
    """The largest difference, in units of the root mean square of `like`, or of the truth."""
    scale = rms(truth if like is None else like)
    return ((native.double() - truth).abs().max() / scale).item()


def rms(x: Tensor) -> Tensor:
    """The root mean square, in fp64."""
    return x.double().pow(2).mean().sqrt()


def divergence(native: Tensor, truth: Tensor) -> float:
    """Mean KL(truth || native) of the distributions over the last axis."""
    p, q = truth.double().log_softmax(-1), native.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


# --- checks --------------------------------------------------------------------------------------


@torch.no_grad()
def fp64(subject: Subject) -> Iterator[Row]:
    """Outputs in fp64, where rounding cannot hide a difference."""
    truth = subject.truth
    out = call(subject.model(torch.float64), truth.batch)
    pairs = pair(out, truth.outputs)
    error = max(distance(x, y) for _, x, y in pairs)
    yield Row(subject.name, "fp64", error, FP64, f"{error:.1e}")


@torch.no_grad()
def headless(subject: Subject) -> Iterator[Row]:
    """Hidden states, loaded without the head."""
    truth, model = subject.truth, subject.model(torch.float64)
    if model.config.head in model.headless:
        return
    bare = load(truth.directory, dtype=torch.float64, **{**subject.reading, "head": "none"})
    error = distance(call(bare, truth.batch)[0], truth.hidden)
    yield Row(subject.name, "headless", error, FP64, f"{error:.1e}")


@torch.no_grad()
def batch(subject: Subject) -> Iterator[Row]:
    """A row alone equals that row of the batch; a mask of ones equals no mask."""
    truth, model = subject.truth, subject.model(torch.float64)
    whole = call(model, truth.batch)
    ones = call(model, truth.batch.masked())
    errors = [distance(x, y) for x, y in zip(ones, whole, strict=True)]
    for i in range(4):
        alone = call(model, truth.batch.row(i))
        errors += [distance(x, y[i : i + 1]) for x, y in zip(alone, whole, strict=True)]
    yield Row(subject.name, "batch", max(errors), FP64, f"{max(errors):.1e}")


@torch.no_grad()
def padding(subject: Subject) -> Iterator[Row]:
    """Rows padded left, right and on both sides equal the reference's row alone."""
    truth, model = subject.truth, subject.model(torch.float64)
    errors = {}
    for side, inputs in truth.padded.items():
        out = call(model, inputs)
        distances = [
            # a single logit may be close to zero: the scale is the whole batch's
            distance(x, y, truth.outputs[name])
            for i, alone in enumerate(truth.alone)
            for name, x, y in pair([real(x, inputs, i) for x in out], alone)
        ]
        errors[side] = max(distances)
    if truth.unmasked is not None:
        out = call(model, truth.unmasked)
        errors["no mask"] = max(distance(x, y) for _, x, y in pair(out, truth.of_unmasked))
    worst = max(errors.values())
    detail = ", ".join(f"{side} {error:.1e}" for side, error in errors.items())
    yield Row(subject.name, "padding", worst, FP64, f"{worst:.1e}", detail)


@torch.no_grad()
def cached(subject: Subject) -> Iterator[Row]:
    """Outputs with a KV cache equal those without: split, token by token, and padded."""
    model = subject.model(torch.float64)
    if "cache" not in inspect.signature(model.forward).parameters:
        return
    if model.config.head not in (*LOGITS, "none"):
        return
    truth, limit = subject.truth, model.config.limit_cached
    errors = {}
    for side, inputs in {"unpadded": truth.batch, **truth.padded}.items():
        inputs = part(inputs, 0, limit)
        mask = inputs.positions.mask
        first = None if mask is None else mask.argmax(dim=-1)
        tokens, least = inputs.positions.ids.shape[1], 1
        if mask is None or first is None:
            inputs, cuts = _rows(inputs, torch.arange(4)), [[n] for n in range(1, tokens)]
        else:  # every row must begin in the first part
            early = ((first < tokens // 2) & mask.any(dim=-1)).nonzero().flatten()
            inputs, least = _rows(inputs, early), int(first[early].max()) + 1
            mask, cuts = inputs.positions.mask, [[least]]
        whole, distances = call(model, inputs)[0], [0.0]
        real = torch.ones_like(whole[..., 0]).bool() if mask is None else mask.bool()
        for cut in [*cuts, list(range(least, tokens))]:
            cache, ends = Cache(tokens), zip([0, *cut], [*cut, tokens], strict=True)
            parts = [call(model, part(inputs, *end), cache=cache)[0] for end in ends]
            distances.append(distance(torch.cat(parts, dim=1)[real], whole[real], whole))
        errors[side] = max(distances)
    worst = max(errors.values())
    detail = ", ".join(f"{side} {error:.1e}" for side, error in errors.items())
    yield Row(subject.name, "cache", worst, FP64, f"{worst:.1e}", detail)


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    return Inputs(
        inputs.ids[rows],
        {name: x[rows] for name, x in inputs.extra.items()},
        None if inputs.mask is None else inputs.mask[rows],
        None if inputs.answer is None else _rows(inputs.answer, rows),
    )


def part(inputs: Inputs, start: int, end: int | None) -> Inputs:
    """A slice of the tokens that have outputs; an encoder's input stays whole."""
    if inputs.answer is not None:
        return replace(inputs, answer=part(inputs.answer, start, end))
    mask = None if inputs.mask is None else inputs.mask[:, start:end]
    return replace(inputs, ids=inputs.ids[:, start:end], mask=mask)


def real(x: Tensor, inputs: Inputs, row: int) -> Tensor:
    """(1, …), a row of an output, without padded positions if it has positions."""
    mask = inputs.positions.mask
    assert mask is not None
    if x.dim() > 1 and x.shape[1] == mask.shape[1]:
        return x[row : row + 1, mask[row].bool()]
    return x[row : row + 1]


def gradients(subject: Subject) -> Iterator[Row]:
    """Gradients of every parameter under the names on disk, with masked and unmasked padding."""
    truth, model = subject.truth, subject.model(torch.float64)
    inputs = truth.padded["mixed"]
    out = call(model, inputs)
    total = torch.zeros((), dtype=torch.float64)
    for i, weights in enumerate(truth.cotangents):
        for _, x, weight in pair([real(x, inputs, i) for x in out], weights):
            total = total + (x * weight).sum()
    if truth.unmasked is not None:
        out = call(model, truth.unmasked)
        for _, x, weight in pair(out, truth.unmasked_cotangents):
            total = total + (x * weight).sum()
    model.zero_grad(set_to_none=True)
    total.backward()
    native = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    errors = gradient_errors(_on_disk(model, native, truth.gradients), truth.gradients)
    name, worst = max(errors.items(), key=lambda item: item[1])
    detail = f"{name}: {worst:.1e} of its scale"
    yield Row(subject.name, "gradients", worst, GRADIENTS, f"{worst:.1e}", detail)


def _on_disk(
    model: Any, native: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Native tensors through the inverse of the rules, named and laid out as in `like`."""
    header = {n: TensorInfo(n, tuple(x.shape), dtype_code(x.dtype)) for n, x in like.items()}
    plan, fields = model.provenance.plan, model.config.to_dict()
    return invert(make_plan(plan.spec, "hf", fields, plan.native, header), native)


def gradient_errors(native: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> largest difference, relative to the gradient's own scale."""
    if unmatched := native.keys() ^ truth.keys():
        return {name: float("inf") for name in sorted(unmatched)}
    least = SYMMETRIC * max(x.abs().max().item() for x in truth.values())
    return {
        name: ((native[name] - x).abs().max() / max(x.abs().max().item(), least)).item()
        for name, x in truth.items()
    }


@torch.no_grad()
def fp32(subject: Subject) -> Iterator[Row]:
    """fp32: no further from the truth than the reference itself, up to the order of sums."""
    yield _against_floor(subject, torch.float32, "fp32", FP32)
    floor = subject.truth.floors[torch.float32]
    out = call(subject.model(torch.float32), subject.truth.batch)
    wrong, total = 0.0, 0
    for name, x, y in pair(out, floor.truth):
        if not _is_logits(name):
            continue
        best = y.topk(min(2, y.shape[-1]), dim=-1)
        # a tie within the noise does not count
        noise = 8 * (floor.outputs[name].double() - y).abs().max()
        clear = best.values[..., 0] - best.values[..., -1] > noise
        wrong += ((x.argmax(-1) != best.indices[..., 0]) & clear).sum().item()
        total += clear.numel()
    if total:
        yield Row(subject.name, "top-1", wrong, 0, f"{100 * (1 - wrong / total):.4g}%")


@torch.no_grad()
def bf16(subject: Subject) -> Iterator[Row]:
    """bf16: likewise for weights rounded to bf16, and the KL divergence of the distributions."""
    yield _against_floor(subject, torch.bfloat16, "bf16", BF16)
    floor = subject.truth.floors[torch.bfloat16]
    out = call(subject.model(torch.bfloat16), subject.truth.batch)
    ratios = {}
    for name, x, y in pair(out, floor.truth):
        if _is_logits(name):
            mine, theirs = divergence(x, y), divergence(floor.outputs[name], y)
            ratios[mine / theirs] = f"{name}: {mine:.1e} where the reference has {theirs:.1e}"
    if ratios:
        worst = max(ratios)
        yield Row(subject.name, "KL", worst, KL, f"{worst:.2f}x", ratios[worst])


def _is_logits(name: str) -> bool:
    return "logits" in name


def _against_floor(subject: Subject, dtype: torch.dtype, check: str, limit: float) -> Row:
    floor = subject.truth.floors[dtype]
    out = call(subject.model(dtype), subject.truth.batch)
    ratios = []
    for name, x, y in pair(out, floor.truth):
        scale = rms(y)
        mine = (rms(x.double() - y) / scale).item()
        theirs = (rms(floor.outputs[name].double() - y) / scale).item()
        detail = f"{name}: {mine:.1e} where the reference has {theirs:.1e}"
        ratios.append((mine / theirs, f"{mine:.1e} {mine / theirs:.2f}x", detail))
    worst, shown, detail = max(ratios)
    return Row(subject.name, check, worst, limit, shown, detail)


def export(subject: Subject) -> Iterator[Row]:
    """A saved copy equals the source, directly and through a native directory."""
    from zoo.saving.save import save

    truth, model = subject.truth, subject.model(None)
    with TemporaryDirectory() as scratch:
        back, native, again, fresh = (
            Path(scratch, n) for n in ("back", "native", "again", "fresh")
        )
        save(model, back)
        dropped = model.provenance.dropped
        problems = differences(truth.directory, back, dropped)
        problems += Reference(back, truth.reference_class, torch.float32).problems
        save(model, native, to="native")
        save(load(native, modules=False), again)
        lines = differences(truth.directory, again, dropped)
        problems += [f"through native: {line}" for line in lines]
        shown = "equal" if not problems else f"{len(problems)} differ"
        yield Row(subject.name, "export", len(problems), 0, shown, "; ".join(problems[:8]))
        yield _fresh(subject, fresh)


@torch.no_grad()
def _fresh(subject: Subject, directory: Path) -> Row:
    """A model without a checkpoint is saved so that the reference computes the same function."""
    truth, model = subject.truth, subject.model(None)
    kept, model.provenance = model.provenance, None
    try:
        save(model, directory)
    finally:
        model.provenance = kept
    named = Reference(directory, truth.reference_class, torch.float64, lifted=True)
    pairs = pair(list(named.by_rows(truth.batch.named).values()), truth.outputs)
    error = max(distance(x, y) for _, x, y in pairs)
    value = float("inf") if named.problems else error
    detail = "; ".join(named.problems)
    return Row(subject.name, "from scratch", value, FP64, f"{error:.1e}", detail)


def differences(source: Path, copy: Path, dropped: Collection[str] = ()) -> list[str]:
    """Return the files and tensors that differ or that only one of two directories has."""
    mine, theirs = _tensors(copy), _tensors(source)
    theirs = {name: what for name, what in theirs.items() if name not in dropped}
    out = [f"{n}: only in the {'copy' if n in mine else 'source'}" for n in mine.keys() ^ theirs]
    out += [f"{n}: differs" for n in mine.keys() & theirs.keys() if mine[n] != theirs[n]]
    for path in sorted(source.glob("*.json")):
        other = copy / path.name
        # index and manifest follow from the files; an adapter beside the weights is not saved
        if path.name.endswith(".index.json") or path.name in (manifest.NAME, ADAPTER):
            continue
        if not other.is_file():
            out.append(f"{path.name}: missing")
        elif other.read_bytes() != path.read_bytes():
            out.append(f"{path.name}: differs")
    return sorted(out)


def _tensors(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Name -> dtype, shape, bytes."""
    out = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name in ADAPTER_WEIGHTS:
            continue
        with safe_open(path, "pt") as file:
            out.update({name: _content(file.get_tensor(name)) for name in file.keys()})  # noqa: SIM118
    if not out:
        for path in sorted(directory.glob("pytorch_model*.bin")):
            state = torch.load(path, map_location="cpu", weights_only=True)
            out.update({name: _content(tensor) for name, tensor in state.items()})
    return out


def _content(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


# the cheapest first, since most bugs fail it
NUMERIC = (fp64, padding, batch, headless, gradients, fp32, bf16)
CHECKS = (*NUMERIC, cached, export)
