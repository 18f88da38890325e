"""The position-wise branch, plain and gated."""

from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, act: Activation, *, bias: bool) -> None:
        super().__init__()
        self.act = act
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class GatedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int, act: Activation, *, bias: bool) -> None:
        super().__init__()
        self.act = act
        self.gate = Linear(dim, hidden, bias=bias)
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))
