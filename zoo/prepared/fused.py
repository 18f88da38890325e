"""Fused modules: projections of the same input in one product, norms and rotary in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zoo.components import activations
from zoo.components.attention import Attention, attend
from zoo.components.masks import Mask
from zoo.components.mlp import MLP, GatedMLP
from zoo.components.moe import Experts
from zoo.components.norm import OffsetRMSNorm, RMSNorm
from zoo.components.rotary import Rotary
from zoo.prepared import kernels
from zoo.prepared.packed import Packer, few


class FusedAttention(Attention):
    """Self-attention with one product for queries, keys and values."""

    def __init__(self, plain: Attention, pack: Packer) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.dropout, self.scale = plain.head_dim, 0.0, plain.scale
        exactly = type(plain.rotary) is Rotary
        self.rotary = FusedRotary(plain.rotary) if exactly else plain.rotary  # type: ignore[arg-type]
        self.attend = attend_few if plain.attend is attend else plain.attend
        sizes = [part.out_features for part in (plain.q, plain.k, plain.v)]
        self.heads = [size // plain.head_dim for size in sizes]
        self.qkv = pack(plain.q, plain.k, plain.v)
        self.out = plain.out

    def project(self, x: Tensor) -> Iterator[Tensor]:
        """(b, h, s, e) queries, keys and values."""
        every = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return iter(every.split(self.heads, dim=1))


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
    """`attend`, with a kernel of our own for one query a row."""
    if q.shape[2] == 1 and kernels.usable(q):
        return kernels.attend_one(q, k, v, mask, scale)
    return attend(q, k, v, mask, scale, dropout)


class FusedRotary:
    """Rotary embedding, in one pass for one query a row."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        if q.shape[2] > 1 or not kernels.usable(q):
            return self.rotary(q, k, mask)
        tables = mask.keep(self.rotary, lambda: self.rotary.tables(mask.positions, q.dtype))
        cos, sin = (table.contiguous() for table in tables)
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)


class QuickNorm(nn.Module):
    """RMS norm, in one pass for a few rows."""

    few = 32

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = plain.weight, plain.eps
        self.plain, self.offset = type(plain).forward, OFFSETS[type(plain)]

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) from (…, d)."""
        if few(x, self.few) and kernels.usable(x) and not x.requires_grad:
            return kernels.norm(x, self.weight, self.eps, self.offset)
        return self.plain(self, x)  # type: ignore[arg-type]


class FusedGate(nn.Module):
    """A gated MLP with one product for gate and up."""

    def __init__(self, plain: GatedMLP, pack: Packer) -> None:
        super().__init__()
        self.act = plain.act
        self.both = pack(plain.gate, plain.up)
        self.down = plain.down

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) from (…, d)."""
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class PackedExperts(Experts):
    """A mixture of experts with packed weights, one product for gate and up of each."""

    def __init__(self, plain: Experts, pack: Packer) -> None:
        nn.Module.__init__(self)
        self.act, self.experts = plain.act, plain.experts
        self.experts_per_token = plain.experts_per_token
        self.router = plain.router
        first = (torch.cat(pair) for pair in zip(plain.gate, plain.up, strict=True))
        self.first = nn.ModuleList(pack.of(weight.detach(), None) for weight in first)
        self.last = nn.ModuleList(pack.of(weight.detach(), None) for weight in plain.down)

    def expert(self, x: Tensor, n: int) -> Tensor:
        """The output of expert `n`."""
        gate, up = self.first[n](x).chunk(2, dim=-1)
        y: Tensor = self.last[n](self.act(gate) * up)
        return y


OFFSETS: dict[type, float] = {RMSNorm: 0.0, OffsetRMSNorm: 1.0}


def _fused(name: str, module: nn.Module, pack: Packer) -> nn.Module:
    """The module with its projections fused and packed."""
    # self-attention has this name in every model; cross-attention has keys of another sequence
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


def fuse(module: nn.Module, pack: Packer, name: str = "") -> None:
    """Replace all parts of a module by fused and packed ones."""
    for child_name, child in list(module.named_children()):
        new = _fused(child_name, child, pack)
        if new is not child:
            setattr(module, child_name, new)
        del child  # free its weights before the next part's are packed
        fuse(new, pack, child_name)
