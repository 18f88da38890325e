"""Prepared for inference: the same function from weights fused and packed for this machine.

What was loaded is changed in place, one matrix at a time, so that no two copies of it stay.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from threading import get_ident
from typing import Any, NamedTuple, NoReturn, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.components import activations
from zoo.components.activations import Activation
from zoo.components.attention import Attention, attend
from zoo.components.heads import LOGITS
from zoo.components.masks import Mask
from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Model
from zoo.components.moe import Experts
from zoo.components.norm import OffsetRMSNorm, RMSNorm
from zoo.components.rotary import Rotary
from zoo.errors import InputError, MissingDependency, UsageError
from zoo.lora.layers import Lora
from zoo.prepared import kernels
from zoo.text.inference import check_sources

M = TypeVar("M", bound=Model)


class Loss(NamedTuple):
    """What int8 did to the outputs for some tokens, in units of their root mean square."""

    worst: float
    mean: float
    kl: float | None  # nats a token, from the distributions before; None where there are none
    tokens: int


@dataclass(frozen=True)
class Preparation:
    """What was done to a model."""

    dtype: torch.dtype
    int8: bool
    compiled: bool
    last_only: bool
    packed: int  # matrices that lie as this machine's kernels want them
    kernels: bool  # whether few rows go through zoo/prepared/kernels.c
    seconds: float
    loss: Loss | None  # of int8; the rest loses nothing


class Prepared(Model):
    """Laid over a model's class: what a prepared model still can do, and what it refuses."""

    prepared: Preparation

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"a prepared model {what}: its weights lie as this machine's kernels want them. "
            "Use the model as zoo.load gives it"
        )

    def save_pretrained(self, directory: Any, **options: Any) -> NoReturn:
        self._refuse("cannot be saved")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("has no state_dict")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("takes no other weights")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self._refuse("cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("cannot be pickled")

    def train(self, mode: bool = True) -> Prepared:
        if mode:
            self._refuse("cannot be trained")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Prepared:
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


# --- products with weights that no longer are parameters -----------------------------------------


class Fixed(nn.Module):
    """A linear layer whose weight lies as `F.linear` takes it."""

    packed = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.contiguous(), bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(without_gradient(x))

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def without_gradient(x: Tensor) -> Tensor:
    if x.requires_grad:
        raise UsageError("a prepared model has no gradients. Use the model as zoo.load gives it")
    return x


# what oneDNN applies to sums before it rounds them: name, and which form of it
FUSED: dict[Activation, tuple[str, str]] = {
    F.gelu: ("gelu", "none"),
    activations.gelu_tanh: ("gelu", "tanh"),
    F.relu: ("relu", ""),
    F.silu: ("swish", ""),
}


class Packed(Fixed):
    """A weight that lies as a kernel wants it, and that no compiler can look at."""

    packed = True

    def __init__(self, features: int) -> None:
        nn.Module.__init__(self)
        self.features, self.key = features, id(self)
        _KNOWN[self.key] = self

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        y: Tensor = torch.ops.zoo.product(without_gradient(x), self.key, self.features)
        return y


# To a compiler its product is an operator that knows its layer.
_KNOWN: WeakValueDictionary[int, Packed] = WeakValueDictionary()
_OPERATORS = torch.library.Library("zoo", "DEF")
_OPERATORS.define("product(Tensor x, int layer, int features) -> Tensor")
for _where in ("CPU", "CUDA"):
    _OPERATORS.impl("product", lambda x, layer, features: _KNOWN[layer].product(x), _where)
_OPERATORS.impl("product", lambda x, layer, features: x.new_empty(*x.shape[:-1], features), "Meta")


def few(x: Tensor, rows: int) -> bool:
    return x.numel() <= rows * x.shape[-1]


MANY = 1024  # rows that oneDNN's blocks are made for: those for one are slower for all others


class OneDNN(Packed):
    """Blocks in the order in which oneDNN reads them; an activation may follow at once."""

    few = 8  # rows; so many are read faster by kernels of our own

    def __init__(self, weight: Tensor, bias: Tensor | None, act: Activation | None = None) -> None:
        super().__init__(len(weight))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MANY)
        self.bias, self.act = bias, act
        self.said = FUSED[act] if act else ("none", "")
        self.blocks = kernels.Blocks.of(self.weight, weight, bias)

    def product(self, x: Tensor) -> Tensor:
        if self.blocks is not None and few(x, self.few) and kernels.usable(x):
            if self.act is None:
                return self.blocks.product(x, x.dtype)
            return self.act(self.blocks.product(x, torch.float32)).to(x.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.said[0], [], self.said[1]
        )
        return y


class Int8(Packed):
    """A byte a weight and a scale a row; where there are no kernels of ours, multiplied in bf16."""

    few = 16  # rows; for more, bytes are made bf16 once and multiplied as a matrix

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(len(weight))
        # some rows at a time, lest their fp32 be larger than all that is kept
        parts = [_bytes(rows.float()) for rows in weight.split(4096)]
        self.weight, self.scale = (
            torch.cat(part).contiguous() for part in zip(*parts, strict=True)
        )
        self.bias = bias
        self.wide = self.scale.float(), None if bias is None else bias.float()

    def product(self, x: Tensor) -> Tensor:
        if few(x, self.few) and kernels.usable(x):
            done = kernels.bytes_product(x, self.weight, *self.wide)
            if done is not None:
                return done
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        # torch's kernel reads past the end of rows that are no multiple of 16, and may crash there
        fits = rows.device.type == "cpu" and rows.shape[1] % 16 == 0
        if fits and len(rows) <= self.few:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.bfloat16()) * self.scale
        y = y.to(x.dtype).view(*x.shape[:-1], len(self.scale))
        return y if self.bias is None else y + self.bias


def _bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    # rounded to bf16 first, so that bytes are those of the scale that is used
    scale = (rows.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Packer:
    """Makes the layers; counts those that were packed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, int8: bool) -> None:
        self.int8, self.count = int8, 0
        self.onednn = not int8 and device.type == "cpu" and has_onednn(dtype)

    def __call__(self, *parts: nn.Module, act: Activation | None = None) -> Fixed:
        """One layer of several that read the same; `act` is one of `FUSED` that oneDNN applies."""
        with torch.no_grad():
            weight = _joined([part.weight for part in parts])
            bias = None if parts[0].bias is None else _joined([part.bias for part in parts]).clone()
            return self.of(weight.detach(), None if bias is None else bias.detach(), act)

    def of(self, weight: Tensor, bias: Tensor | None, act: Activation | None = None) -> Fixed:
        if self.int8:
            layer: Fixed = Int8(weight, bias)
        elif self.onednn:
            layer = OneDNN(weight, bias, act)
        else:
            layer = Fixed(weight.clone(), bias)
        self.count += layer.packed
        return layer

    def applies(self, act: Activation) -> bool:
        return self.onednn and act in FUSED


def _joined(parts: list[Any]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs such weights on this machine."""
    try:
        weight = torch.ones(2, 2, dtype=dtype)
        return bool(dtype != torch.float64 and OneDNN(weight, None).product(weight).sum() == 8)
    except (AttributeError, RuntimeError):
        return False


# --- parts that read one stream with one product -------------------------------------------------


class FusedAttention(Attention):
    def __init__(self, plain: Attention, pack: Packer) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.dropout, self.scale = plain.head_dim, 0.0, plain.scale
        exactly = type(plain.rotary) is Rotary
        self.rotary = Turning(plain.rotary) if exactly else plain.rotary  # type: ignore[arg-type]
        self.attend = attend_few if plain.attend is attend else plain.attend
        sizes = [part.out_features for part in (plain.q, plain.k, plain.v)]
        self.heads = [size // plain.head_dim for size in sizes]
        self.qkv = pack(plain.q, plain.k, plain.v)
        self.out = plain.out

    def project(self, x: Tensor) -> Iterator[Tensor]:
        every = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return iter(every.split(self.heads, dim=1))


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """`attend`, where one query a row is no matrix."""
    if q.shape[2] == 1 and kernels.usable(q):
        return kernels.attend_one(q, k, v, mask, scale)
    return attend(q, k, v, mask, scale, dropout)


class Turning:
    """`Rotary`, in one pass where there is one query a row."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        if q.shape[2] > 1 or not kernels.usable(q):
            return self.rotary(q, k, mask)
        tables = mask.keep(self.rotary, lambda: self.rotary.tables(mask.positions, q.dtype))
        cos, sin = (table.contiguous() for table in tables)
        return kernels.turn(q, cos, sin), kernels.turn(k, cos, sin)


class QuickNorm(nn.Module):
    """An RMS norm, in one pass for few rows."""

    few = 32

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = plain.weight, plain.eps
        self.plain, self.offset = type(plain).forward, OFFSETS[type(plain)]

    def forward(self, x: Tensor) -> Tensor:
        if few(x, self.few) and kernels.usable(x) and not x.requires_grad:
            return kernels.norm(x, self.weight, self.eps, self.offset)
        return self.plain(self, x)  # type: ignore[arg-type]


class FusedGate(nn.Module):
    def __init__(self, plain: GatedMLP, pack: Packer) -> None:
        super().__init__()
        self.act = plain.act
        self.both = pack(plain.gate, plain.up)
        self.down = plain.down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class PackedExperts(Experts):
    def __init__(self, plain: Experts, pack: Packer) -> None:
        nn.Module.__init__(self)
        self.act, self.experts = plain.act, plain.experts
        self.experts_per_token = plain.experts_per_token
        self.router = plain.router
        first = (torch.cat(pair) for pair in zip(plain.gate, plain.up, strict=True))
        self.first = nn.ModuleList(pack.of(weight.detach(), None) for weight in first)
        self.last = nn.ModuleList(pack.of(weight.detach(), None) for weight in plain.down)

    def expert(self, x: Tensor, n: int) -> Tensor:
        gate, up = self.first[n](x).chunk(2, dim=-1)
        y: Tensor = self.last[n](self.act(gate) * up)
        return y


OFFSETS: dict[type, float] = {RMSNorm: 0.0, OffsetRMSNorm: 1.0}


def _fused(name: str, module: nn.Module, pack: Packer) -> nn.Module:
    """The same part, with the products that read one stream made one."""
    # self-attention has this name in every model; another sequence's keys come apart
    if type(module) is Attention and name.rpartition(".")[2] == "attn":
        return FusedAttention(module, pack)
    if type(module) is GatedMLP:
        return FusedGate(module, pack)
    if type(module) is Experts:
        return PackedExperts(module, pack)
    if isinstance(module, RMSNorm) and type(module) in OFFSETS:
        return QuickNorm(module)
    if type(module) is MLP and pack.applies(module.act):
        module.up = pack(module.up, act=module.act)  # type: ignore[assignment]
        module.act = activations.linear
    if isinstance(module, nn.Linear):
        return pack(module)
    return nn.Identity() if isinstance(module, nn.Dropout) else module


def _rebuild(module: nn.Module, pack: Packer, name: str = "") -> None:
    for child_name, child in list(module.named_children()):
        new = _fused(child_name, child, pack)
        if new is not child:
            setattr(module, child_name, new)
        del child  # its weights go before the next part's are packed
        _rebuild(new, pack, child_name)


# --- the last place alone ------------------------------------------------------------------------


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


class LastPlace:
    """Cuts what a head reads, (b, s, d), to each row's last real token, (b, 1, d)."""

    def __init__(self, model: Model) -> None:
        if model.config.head not in LOGITS:
            raise UsageError(
                f"last_only: a model with the head {model.config.head!r} has no logits"
            )
        names = list(signature(type(model).forward).parameters)[1:]
        self.name = names[-2]  # of the mask; behind it stands the cache
        self.place = names.index(self.name)
        self.masks: dict[int, Tensor | None] = {}  # of what each thread is reading

    def note(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = args[self.place] if len(args) > self.place else named.get(self.name)
        self.masks[_thread()] = mask

    def cut(self, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        mask = self.masks.pop(_thread(), None)
        if mask is None:
            return (x[:, -1:],)
        real = mask[:, -x.shape[1] :].bool()  # it may name the tokens in the cache too
        places = torch.arange(x.shape[1], device=x.device)
        last = torch.where(real, places, 0).amax(dim=-1)
        return (x[torch.arange(len(x), device=x.device), last][:, None],)


@contextmanager
def last_only(model: Model) -> Iterator[None]:
    """Within it a decoder gives (b, 1, v), the logits of each row's last real token.

    For any model, prepared or not; a compiled one is prepared with `last_only=True` instead.
    """
    done = getattr(model, "prepared", None)
    if done is not None and done.last_only:
        yield
        return
    if done is not None and done.compiled:
        raise UsageError("a compiled model is as it was: prepare it with last_only=True")
    hooks = _keep_last(model)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep_last(model: Model) -> list[Any]:
    last = LastPlace(model)
    head: Any = model.head
    return [
        model.register_forward_pre_hook(last.note, with_kwargs=True),
        head.register_forward_pre_hook(last.cut),
    ]


# --- the pass itself -----------------------------------------------------------------------------


def prepare(
    model: M,
    *,
    int8: bool = False,
    compile: bool | None = False,
    last_only: bool = False,
    sample: Tensor | None = None,
) -> M:
    """The same model, made fast for inference and for nothing else: it is changed in place.

    `int8` keeps a byte a weight, which changes logits: `model.prepared.loss` says how much, for the
    token ids of `sample` or for random ones. `compile=None` compiles where that pays, on GPUs.
    `last_only` leaves the logits of each row's last token, all that generation needs.
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
    hooked = LastPlace(model) if last_only else None  # refused before anything is changed
    pack = Packer(dtype, device, int8)
    _rebuild(model, pack)
    model.eval()  # the new parts too
    with torch.no_grad():
        for owner in model.modules():
            for name, p in owner.named_parameters(recurse=False):
                # out of the mapped file, which nothing holds then
                setattr(owner, name, nn.Parameter(p.detach().clone(), requires_grad=False))
    _give_back()
    loss = None
    if before is not None and sample is not None:
        loss = _loss(model, before, _outputs(model, sample), sample.numel())
    if hooked is not None:
        _keep_last(model)
    seconds = time.perf_counter() - started
    own = device.type == "cpu" and kernels.library() is not None
    done = Preparation(dtype, int8, bool(compile), last_only, pack.count, own, seconds, loss)
    inner = [part for part in model.modules() if isinstance(part, Model)]
    for part in inner:  # a sentence model's own, too
        kind: Any = type(part)
        part.__class__ = _laid_over(kind)
        part.prepared = done  # type: ignore[assignment]
    if compile:
        model.compile(fullgraph=True)
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether anything in it was prepared: what a sentence model wraps is, too."""
    return any(isinstance(part, Fixed) for part in model.modules())


def _check(model: Any, sample: Any) -> None:
    if isinstance(model, nn.Module) and is_prepared(model):
        raise UsageError("a prepared model cannot be prepared again. Load it anew")
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if any(isinstance(part, Lora) for part in model.modules()):
        raise UsageError("an adapter stands beside the weights: merge_adapter() first")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError("a model on the meta device has no weights to prepare")
    if len({(p.dtype, p.device) for p in model.parameters()}) != 1:
        raise UsageError("a model in several dtypes or on several devices cannot be prepared")
    if sample is not None and not isinstance(sample, Tensor):
        raise InputError(f"sample: expected token ids, found {type(sample).__name__}")
    check_sources(model)


def check_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for CPUs, and finds out late that nothing can translate it."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise MissingDependency(
            "compile=True needs a C++ compiler, and none is here. Install g++ or clang, or leave "
            "compile away"
        ) from None


def _give_back() -> None:
    """To the system, what the C library keeps of freed matrices: a fifth of GPT-2's size."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _tokens(model: Model) -> Tensor:
    """(2, 64) or as many as there are positions."""
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
