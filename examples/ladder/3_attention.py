"""Rung 3, one head of attention by hand: a position chooses which earlier ones to read.

python examples/ladder/3_attention.py [TEXT FILE]
"""

import torch
import torch.nn.functional as F
from einops import einsum
from loop import Run, run
from text import CONTEXT
from torch import Tensor, nn


class Attention(nn.Module):
    """One head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)  # query: what a position looks for
        self.k = nn.Linear(dim, dim)  # key: what a position offers to be found by
        self.v = nn.Linear(dim, dim)  # value: what it passes on to those who attend to it
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        q, k, v = self.q(x), self.k(x), self.v(x)  # (b, s, d) each
        # a sum of d products has a spread of sqrt(d): divided, the softmax starts soft and learns
        scores = einsum(q, k, "b s d, b t d -> b s t") * q.shape[-1] ** -0.5
        # position s predicts character s + 1: reading it from position s + 1 would be cheating
        length = x.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()  # (s, t), where t <= s
        scores = scores.masked_fill(~allowed, -torch.inf)
        pattern = scores.softmax(dim=-1)  # (b, s, t), each row sums to one
        return self.out(einsum(pattern, v, "b s t, b t d -> b s d"))


class Model(nn.Module):
    def __init__(self, vocab: int, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        # attention is a sum over a set: without these it could not tell the order of characters
        self.positions = nn.Embedding(CONTEXT, dim)
        self.attn = Attention(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s, v) of logits from (b, s) of ids."""
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))  # (b, s, d)
        x = x + self.attn(x)  # collect: from all of the context, where rung 2 had a window of two
        x = x + self.down(F.relu(self.up(x)))  # and compute with it: rung 2's MLP
        return self.head(x)


def main(arguments: list[str] | None = None) -> Run:
    """Train on a text and write."""
    return run(Model, rate=3e-3, arguments=arguments)


if __name__ == "__main__":
    main()
