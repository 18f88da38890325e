"""Rung 6, GPT-2: zoo/models/gpt2.py without its options. Its parameters have the same names.

python examples/ladder/6_gpt.py [TEXT FILE]
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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h s e -> b s (h e)"))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # as ReLU, without the kink


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, d) from (b, s, d)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocab: int, dim: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight  # tied: a character is read and written as one vector
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # matrices; biases are zero, and norms do nothing yet
                # two branches a layer add up to the stream: it must not grow with depth
                ends = name.endswith(("attn.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 * ((2 * layers) ** -0.5 if ends else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s, v) of logits from (b, s) of ids."""
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))  # (b, s, d)
        return self.head(self.norm(self.blocks(x)))


def main(arguments: list[str] | None = None) -> Run:
    """Train on a text and write."""
    return run(GPT, rate=1e-3, arguments=arguments)


if __name__ == "__main__":
    main()
