"""Mixture of experts: a router sends each token through a few of many MLPs."""

import torch
from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear


class Experts(nn.Module):
    """Gated MLPs stacked along axis x, whose outputs are weighted by the router."""

    def __init__(
        self, dim: int, hidden: int, act: Activation, *, experts: int, experts_per_token: int
    ) -> None:
        super().__init__()
        self.act, self.experts, self.experts_per_token = act, experts, experts_per_token
        self.router = Linear(dim, experts, bias=False)
        self.gate = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))

    def draw(self, std: float) -> None:
        """Initialize all experts with this standard deviation."""
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, 0, std)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        tokens = x.flatten(0, 1)
        scores = self.router(tokens)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, index = scores.softmax(dim=-1, dtype=wide).topk(self.experts_per_token, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        run = self.run_dense if torch.compiler.is_compiling() else self.run_sparse
        return run(tokens, weights, index).view_as(x)

    def run_sparse(self, tokens: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """(b · s, d); `weights` and `index` are (b · s, experts_per_token)."""
        out = torch.zeros_like(tokens)
        for expert in index.unique().tolist():
            row, rank = (index == expert).nonzero(as_tuple=True)
            y = self.expert(tokens[row], expert) * weights[row, rank, None]
            out = out.index_add(0, row, y.to(out.dtype))
        return out

    def run_dense(self, tokens: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """(b · s, d), the same sum over all experts: no shape depends on a value."""
        weights = weights.new_zeros(tokens.shape[0], self.experts).scatter(1, index, weights)
        out = torch.zeros_like(tokens)
        for expert in range(self.experts):
            out = out + (self.expert(tokens, expert) * weights[:, expert, None]).to(out.dtype)
        return out

    def expert(self, x: Tensor, n: int) -> Tensor:
        """(…, d) of expert n from (…, d)."""
        y = self.act(x @ self.gate[n].mT) * (x @ self.up[n].mT)
        return y @ self.down[n].mT
