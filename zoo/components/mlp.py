"""The position-wise MLP, plain and gated."""

from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear


class MLP(nn.Module):
    """(b, s, d): down(act(up(x)))."""

    def __init__(
        self, dim: int, hidden: int, act: Activation, *, bias: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.act, self.dropout = act, nn.Dropout(dropout)
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        return self.down(self.dropout(self.act(self.up(x))))


class GatedMLP(nn.Module):
    """(b, s, d): down(act(gate(x)) * up(x))."""

    def __init__(
        self, dim: int, hidden: int, act: Activation, *, bias: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.act, self.dropout = act, nn.Dropout(dropout)
        self.gate = Linear(dim, hidden, bias=bias)
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))
