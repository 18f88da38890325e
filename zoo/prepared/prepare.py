"""`prepare`: make a model fast for inference, with weights fused and packed for this machine.

The model is changed in place, one matrix at a time, so that its weights are never there twice.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from zoo.checkpoints.provenance import check_sources
from zoo.components.heads import LOGITS
from zoo.components.model import Model
from zoo.errors import InputError, MissingDependency, UsageError
from zoo.lora.layers import Lora
from zoo.prepared import kernels
from zoo.prepared.fused import fuse
from zoo.prepared.last_only import LastPosition, keep_last
from zoo.prepared.packed import Packer

M = TypeVar("M", bound=Model)


class Loss(NamedTuple):
    """The error of int8 on a sample of tokens, in units of the outputs' root mean square."""

    worst: float
    mean: float
    kl: float | None  # nats a token, from the distributions before; None without logits
    tokens: int


@dataclass(frozen=True)
class Preparation:
    """How a model was prepared: `model.prepared`."""

    dtype: torch.dtype
    int8: bool
    compiled: bool
    last_only: bool
    packed: int  # matrices packed for this machine's kernels
    kernels: bool  # whether products of a few rows use zoo/prepared/kernels.c
    seconds: float
    loss: Loss | None  # of int8; everything else is lossless


class Prepared(Model):
    """A mixin over a model's class that refuses what a prepared model cannot do."""

    prepared: Preparation

    @property
    def is_prepared(self) -> bool:
        """True, also while a model is being prepared or if that failed halfway."""
        return True

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"a prepared model {what}: its weights are packed for this machine's kernels. "
            "Use the model as zoo.load returns it"
        )

    def save_pretrained(self, dst: Any, **options: Any) -> NoReturn:
        """Refused."""
        self._refuse("cannot be saved")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse("has no state_dict")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse("takes no other weights")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self._refuse("cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("cannot be pickled")

    def train(self, mode: bool = True) -> Prepared:
        """Refused, except `train(False)`."""
        if mode:
            self._refuse("cannot be trained")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Prepared:
        """Refused, except `requires_grad_(False)`."""
        if requires_grad:
            self._refuse("has no gradients")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        probe = next(self.parameters())
        moved = fn(probe[:0])
        if moved.dtype != probe.dtype or moved.device != probe.device:
            self._refuse(f"stays {probe.dtype} on {probe.device}")
        return self


@cache
def _laid_over(cls: Any) -> Any:
    return type(cls.__name__, (Prepared, cls), {"__module__": cls.__module__})


def prepare(
    model: M,
    *,
    int8: bool = False,
    compile: bool | None = False,
    last_only: bool = False,
    sample: Tensor | None = None,
) -> M:
    """Make a model fast for inference, in place; it can no longer be trained, saved or copied.

    Projections of the same input are fused, and weights are packed for this machine's kernels.
    Without `int8` the outputs stay within the noise of the dtype.

    Args:
        model: a model, as zoo.load returns it.
        int8: quantize weights to int8, which changes the outputs: `model.prepared.loss` says by
            how much.
        compile: True uses torch.compile; None only where it pays, on GPUs.
        last_only: compute the logits of each row's last token only, all that generation needs.
        sample: token ids on which the loss of int8 is measured (default: random ones).

    Returns:
        The same model, with `model.prepared` set to a `Preparation`.

    Raises:
        UsageError: the model is prepared already, has an adapter, or is on the meta device.
        InputError: `sample` is no tensor of token ids.
        MissingDependency: `compile=True` on a CPU without a C++ compiler.

    Example:
        >>> model = zoo.prepare(zoo.load("tiny-llama"), int8=True)
        >>> model.prepared.int8, model.prepared.loss.kl < 0.1
        (True, True)
    """
    _check(model, sample)
    ((dtype, device),) = {(p.dtype, p.device) for p in model.parameters()}
    if compile is None:
        compile = device.type == "cuda"
    if compile:
        check_compiler(device)
    model.eval()
    started = time.perf_counter()
    before = None
    if int8:
        sample = _tokens(model) if sample is None else sample
        before = _outputs(model, sample)
    if last_only:
        LastPosition(model)  # refused before anything is changed
    parts = [part for part in model.modules() if isinstance(part, Model)]
    for part in parts:  # a sentence model has one inside; from here on, nothing else can use them
        kind: Any = type(part)
        part.__class__ = _laid_over(kind)
    pack = Packer(dtype, device, int8)
    fuse(model, pack)
    model.eval()  # the new parts too
    with torch.no_grad():
        for owner in model.modules():
            for name, p in owner.named_parameters(recurse=False):
                # a copy, so that nothing refers to the mapped file any more
                setattr(owner, name, nn.Parameter(p.detach().clone(), requires_grad=False))
    _give_back()
    loss = None
    if before is not None and sample is not None:
        loss = _loss(model, before, _outputs(model, sample), sample.numel())
    if last_only:
        keep_last(model)
    seconds = time.perf_counter() - started
    own = device.type == "cpu" and kernels.library() is not None
    preparation = Preparation(dtype, int8, bool(compile), last_only, pack.count, own, seconds, loss)
    for part in parts:
        part.prepared = preparation
    if compile:
        model.compile(fullgraph=True)
    return model


def _check(model: Any, sample: Any) -> None:
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if model.is_prepared:
        raise UsageError("a prepared model cannot be prepared again. Load it again")
    if any(isinstance(part, Lora) for part in model.modules()):
        raise UsageError("the model has an adapter beside its weights: merge_adapter() first")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError("a model on the meta device has no weights to prepare")
    if len({(p.dtype, p.device) for p in model.parameters()}) != 1:
        raise UsageError("a model in several dtypes or on several devices cannot be prepared")
    if sample is not None and not isinstance(sample, Tensor):
        raise InputError(f"sample: expected token ids, found {type(sample).__name__}")
    check_sources(model)


def check_compiler(device: torch.device) -> None:
    """Refuse early if torch.compile has no C++ compiler, which it needs on CPUs."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise MissingDependency(
            "compile=True needs a C++ compiler, and none was found. Install g++ or clang, or "
            "leave compile out"
        ) from None


def _give_back() -> None:
    """Return freed memory from the C library to the system: a fifth of GPT-2's size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _tokens(model: Model) -> Tensor:
    """(2, 64) random ids, or as many as the model has positions."""
    length = min(64, model.config.limit or 64)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab, (2, length), generator=random)
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def _outputs(model: Model, ids: Tensor) -> list[Tensor]:
    more = {}
    if "decoder_input_ids" in signature(type(model).forward).parameters:
        more["decoder_input_ids"] = ids
    out = model(ids, **more)
    return [x.double() for x in (out if isinstance(out, tuple) else [out])]


def _loss(model: Model, before: list[Tensor], after: list[Tensor], tokens: int) -> Loss:
    apart = [(y - x).abs() / x.square().mean().sqrt() for x, y in zip(before, after, strict=True)]
    kl = None
    if model.config.head in LOGITS:
        p, q = before[0].log_softmax(-1), after[0].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
    worst = max(x.max().item() for x in apart)
    return Loss(worst, max(x.mean().item() for x in apart), kl, tokens)
