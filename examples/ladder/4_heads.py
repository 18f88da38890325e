"""Rung 4, several heads of attention: one position reads several others at once.

python examples/ladder/4_heads.py [TEXT FILE]
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from loop import Run, run
from text import CONTEXT
from torch import Tensor, nn


class Attention(nn.Module):
    """`heads` heads of width dim / heads: together they cost what rung 3's one head costs."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)  # the queries of all heads, one after the other
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)  # mixes what the heads bring

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        q, k, v = (
            rearrange(project(x), "b s (h e) -> b h s e", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        # rung 3 with an h in front: each head has its own pattern, and its own softmax
        scores = einsum(q, k, "b h s e, b h t e -> b h s t") * q.shape[-1] ** -0.5
        length = x.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()  # (s, t), where t <= s
        pattern = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)  # (b, h, s, t)
        y = einsum(pattern, v, "b h s t, b h t e -> b h s e")
        return self.out(rearrange(y, "b h s e -> b s (h e)"))


class Model(nn.Module):
    def __init__(self, vocab: int, dim: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(CONTEXT, dim)
        self.attn = Attention(dim, heads)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s, v) of logits from (b, s) of ids."""
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))  # (b, s, d)
        x = x + self.attn(x)
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x)


def main(arguments: list[str] | None = None) -> Run:
    """Train on a text and write."""
    return run(Model, rate=3e-3, arguments=arguments)


if __name__ == "__main__":
    main()
