"""Linear layers whose weights are packed for the CPU's kernels: oneDNN blocks, or int8."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.components import activations
from zoo.components.activations import Activation
from zoo.errors import UsageError
from zoo.prepared import kernels


class Fixed(nn.Module):
    """A linear layer for inference only; here the weight is stored as `F.linear` takes it."""

    packed = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.contiguous(), bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) from (…, in), without gradients."""
        return self.product(without_gradient(x))

    def product(self, x: Tensor) -> Tensor:
        """(…, out) from (…, in)."""
        return F.linear(x, self.weight, self.bias)


def without_gradient(x: Tensor) -> Tensor:
    """Refuse an input that requires gradients."""
    if x.requires_grad:
        raise UsageError("a prepared model has no gradients. Use the model as zoo.load returns it")
    return x


# activations that oneDNN fuses into a product, before rounding: its name and algorithm
FUSED: dict[Activation, tuple[str, str]] = {
    F.gelu: ("gelu", "none"),
    activations.gelu_tanh: ("gelu", "tanh"),
    F.relu: ("relu", ""),
    F.silu: ("swish", ""),
}


class Packed(Fixed):
    """A layer with a weight in a kernel's own layout, which torch.compile cannot trace."""

    packed = True

    def __init__(self, features: int) -> None:
        nn.Module.__init__(self)
        self.features, self.key = features, id(self)
        _LAYERS[self.key] = self

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) from (…, in), without gradients."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        y: Tensor = torch.ops.zoo.product(without_gradient(x), self.key, self.features)
        return y


# For torch.compile the product is a custom operator that gets its layer's key.
_LAYERS: WeakValueDictionary[int, Packed] = WeakValueDictionary()
_OPERATORS = torch.library.Library("zoo", "DEF")
_OPERATORS.define("product(Tensor x, int layer, int features) -> Tensor")
for _where in ("CPU", "CUDA"):
    _OPERATORS.impl("product", lambda x, layer, features: _LAYERS[layer].product(x), _where)
_OPERATORS.impl("product", lambda x, layer, features: x.new_empty(*x.shape[:-1], features), "Meta")


def few(x: Tensor, rows: int) -> bool:
    """Whether (…, in) has at most so many rows."""
    return x.numel() <= rows * x.shape[-1]


MANY = 1024  # rows that oneDNN packs for: a layout for one row is slower for all other counts


class OneDNN(Packed):
    """A weight in oneDNN's blocked layout, with an activation fused into the product."""

    few = 8  # rows; up to so many our own kernels are faster

    def __init__(self, weight: Tensor, bias: Tensor | None, act: Activation | None = None) -> None:
        super().__init__(len(weight))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MANY)
        self.bias, self.act = bias, act
        self.fused = FUSED[act] if act else ("none", "")
        self.blocks = kernels.WeightBlocks.of(self.weight, weight, bias)

    def product(self, x: Tensor) -> Tensor:
        """(…, out) from (…, in), by the best kernel for so many rows."""
        if self.blocks is not None and few(x, self.few) and kernels.usable(x):
            if self.act is None:
                return self.blocks.product(x, x.dtype)
            return self.act(self.blocks.product(x, torch.float32)).to(x.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.fused[0], [], self.fused[1]
        )
        return y


class Int8(Packed):
    """Int8 weights with a scale for each row; without our own kernels, computed in bf16."""

    few = 16  # rows; for more, the weight is dequantized to bf16 and multiplied as a matrix

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(len(weight))
        # 4096 rows at a time: fp32 copies of all would need more memory than the result
        parts = [_bytes(rows.float()) for rows in weight.split(4096)]
        self.weight, self.scale = (
            torch.cat(part).contiguous() for part in zip(*parts, strict=True)
        )
        self.bias = bias
        self.wide = self.scale.float(), None if bias is None else bias.float()

    def product(self, x: Tensor) -> Tensor:
        """(…, out) from (…, in), by the best kernel for so many rows."""
        if few(x, self.few) and kernels.usable(x):
            y = kernels.bytes_product(x, self.weight, *self.wide)
            if y is not None:
                return y
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        # torch's kernel reads past the end of rows whose size is no multiple of 16, and may crash
        fits = rows.device.type == "cpu" and rows.shape[1] % 16 == 0
        if fits and len(rows) <= self.few:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.bfloat16()) * self.scale
        y = y.to(x.dtype).view(*x.shape[:-1], len(self.scale))
        return y if self.bias is None else y + self.bias


def _bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    # round the scale to bf16 first, so that weights are quantized with the scale that is used
    scale = (rows.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Packer:
    """Makes layers in the best layout for a dtype and device, and counts the packed ones."""

    def __init__(self, dtype: torch.dtype, device: torch.device, int8: bool) -> None:
        self.int8, self.count = int8, 0
        self.onednn = not int8 and device.type == "cpu" and has_onednn(dtype)

    def __call__(self, *parts: nn.Module, act: Activation | None = None) -> Fixed:
        """Fuse layers of the same input into one; `act` is an activation for oneDNN to fuse."""
        with torch.no_grad():
            weight = _joined([part.weight for part in parts])
            bias = None if parts[0].bias is None else _joined([part.bias for part in parts]).clone()
            return self.of(weight.detach(), None if bias is None else bias.detach(), act)

    def of(self, weight: Tensor, bias: Tensor | None, act: Activation | None = None) -> Fixed:
        """Make a layer of a weight (out, in)."""
        if self.int8:
            layer: Fixed = Int8(weight, bias)
        elif self.onednn:
            layer = OneDNN(weight, bias, act)
        else:
            layer = Fixed(weight.clone(), bias)
        self.count += layer.packed
        return layer

    def applies(self, act: Activation) -> bool:
        """Whether oneDNN can fuse this activation."""
        return self.onednn and act in FUSED


def _joined(parts: list[Any]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of a dtype for oneDNN on this machine."""
    try:
        weight = torch.ones(2, 2, dtype=dtype)
        return bool(dtype != torch.float64 and OneDNN(weight, None).product(weight).sum() == 8)
    except (AttributeError, RuntimeError):
        return False
