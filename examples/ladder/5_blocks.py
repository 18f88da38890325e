"""Rung 5, blocks: attention and MLP, four times over, each behind a norm.

python examples/ladder/5_blocks.py [TEXT FILE]
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from loop import Run, run
from text import CONTEXT
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        q, k, v = (
            rearrange(project(x), "b s (h e) -> b h s e", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        # scores, mask, softmax and sum of rung 4 in one call: the (s, t) pattern is never stored
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h s e -> b s (h e)"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        # the stream x grows with every sum; a norm gives each branch inputs of one size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        # x + …: a gradient passes the sums unchanged, so that the first block learns like the last
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, vocab: int, dim: int = 64, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(CONTEXT, dim)
        # a second layer attends to what the first one collected: words, not letters
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s, v) of logits from (b, s) of ids."""
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))  # (b, s, d)
        return self.head(self.blocks(x))


def main(arguments: list[str] | None = None) -> Run:
    """Train on a text and write."""
    return run(Model, rate=3e-3, arguments=arguments)


if __name__ == "__main__":
    main()
