"""Trainable low-rank factors beside a layer's weight, attached and detached by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LINEAR = "lora"  # the name of the factors' module in a layer


class Lora(nn.Module):
    """Low-rank factors: scale * b @ a, (out, in), is added to a weight."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = a, b, scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, out): what to add to a linear layer's output, from its input (…, in)."""
        return F.linear(F.linear(self.dropout(x.to(self.a.dtype)), self.a), self.b) * self.scale

    def look_up(self, ids: Tensor) -> Tensor:
        """(…, out): what to add to an embedding's output, from token ids."""
        return F.linear(F.embedding(ids, self.a.mT), self.b) * self.scale

    def delta(self) -> Tensor:
        """(out, in): what to add to the weight."""
        return self.b @ self.a * self.scale

    def extra_repr(self) -> str:
        """Sizes and scale, for print(model)."""
        return f"{self.a.shape[1]} -> {self.a.shape[0]} -> {self.b.shape[0]}, scale={self.scale:g}"


def _beside(layer: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    low: Any = layer.lora
    more = low.look_up(inputs[0]) if isinstance(layer, nn.Embedding) else low(inputs[0])
    return (out + more).to(out.dtype)


def _with_stacks(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    for name, updates in _stacks(layer):
        weight = layer.get_parameter(name)
        total = list(weight)
        for n, low in updates.items():
            assert isinstance(low, Lora)
            total[int(n)] = (weight[int(n)] + low.delta()).to(weight.dtype)
        vars(layer)[name] = torch.stack(total)  # hides the parameter, during this call only


def _without_stacks(layer: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
    for name, _ in _stacks(layer):
        vars(layer).pop(name, None)


def _stacks(layer: nn.Module) -> Iterator[tuple[str, nn.ModuleDict]]:
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleDict) and name.startswith(f"{LINEAR}_"):
            yield name.removeprefix(f"{LINEAR}_"), child


def attach_factors(layer: nn.Module, leaf: str, at: int | None, low: Lora) -> list[Any]:
    """Put factors beside `layer.leaf`, or beside one matrix of a stack; return hooks to remove."""
    if at is None:
        layer.add_module(LINEAR, low)
        return [layer.register_forward_hook(_beside)]
    name, hooks = f"{LINEAR}_{leaf}", list[Any]()
    if not any(True for _ in _stacks(layer)):
        hooks.append(layer.register_forward_pre_hook(_with_stacks))
        hooks.append(layer.register_forward_hook(_without_stacks, always_call=True))
    stack = layer._modules.setdefault(name, nn.ModuleDict())
    assert isinstance(stack, nn.ModuleDict)
    stack[str(at)] = low
    return hooks


def detach_factors(layer: nn.Module, leaf: str) -> None:
    """Remove the factors beside `layer.leaf`; the hooks are the caller's to remove."""
    for name in (LINEAR, f"{LINEAR}_{leaf}"):
        layer._modules.pop(name, None)
