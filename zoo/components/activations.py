"""Activations by the names that configs use."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import did_you_mean

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU approximated by tanh."""
    return F.gelu(x, approximate="tanh")


def gelu_fast(x: Tensor) -> Tensor:
    """GELU, its constant sqrt(2 / pi) cut off where the original cut it off."""
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def gelu_10(x: Tensor) -> Tensor:
    """GELU clipped to [-10, 10]."""
    return F.gelu(x).clip(-10, 10)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU approximated by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU."""
    return F.relu(x).square()


def laplace(x: Tensor) -> Tensor:
    """Laplace activation of Mega: an error function that approximates squared ReLU."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def sqrt_softplus(x: Tensor) -> Tensor:
    """Square root of softplus."""
    return F.softplus(x).sqrt()


def linear(x: Tensor) -> Tensor:
    """The identity."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": gelu_10,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_fast,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def unknown(field: str, name: str) -> Iterator[str]:
    """The problem with an activation that is not implemented."""
    if name not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        yield f"{field}: {name!r} is not one of {names}.{did_you_mean(name, ACTIVATIONS)}"
