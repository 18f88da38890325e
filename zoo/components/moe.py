"""A mixture of experts: each token goes through the few that its router chooses."""

import torch
from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear


class Experts(nn.Module):
    """Gated MLPs stacked along their first axis; only those that were chosen run."""

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
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, 0, std)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens)
        wide = torch.promote_types(x.dtype, torch.float32)
        share, index = scores.softmax(dim=-1, dtype=wide).topk(self.experts_per_token, dim=-1)
        share = share / share.sum(dim=-1, keepdim=True)
        run = self.run_all if torch.compiler.is_compiling() else self.run_chosen
        return run(tokens, share, index).view_as(x)

    def run_chosen(self, tokens: Tensor, share: Tensor, index: Tensor) -> Tensor:
        """(tokens, dim) from each token's (tokens, experts_per_token) shares and experts."""
        out = torch.zeros_like(tokens)
        for expert in index.unique().tolist():
            row, place = (index == expert).nonzero(as_tuple=True)
            y = self.expert(tokens[row], expert) * share[row, place, None]
            out = out.index_add(0, row, y.to(out.dtype))
        return out

    def run_all(self, tokens: Tensor, share: Tensor, index: Tensor) -> Tensor:
        """The same sum with shapes that no value decides, for compilers."""
        weights = share.new_zeros(tokens.shape[0], self.experts).scatter(1, index, share)
        out = torch.zeros_like(tokens)
        for expert in range(self.experts):
            out = out + (self.expert(tokens, expert) * weights[:, expert, None]).to(out.dtype)
        return out

    def expert(self, x: Tensor, n: int) -> Tensor:
        y = self.act(x @ self.gate[n].mT) * (x @ self.up[n].mT)
        return y @ self.down[n].mT
