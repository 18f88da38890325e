"""Rung 2, an MLP: the last two characters, each a vector, go through a hidden layer together.

python examples/ladder/2_mlp.py [TEXT FILE]
"""

import torch.nn.functional as F
from einops import rearrange
from loop import Run, run
from torch import Tensor, nn

WINDOW = 2  # characters that the model sees


class MLP(nn.Module):
    def __init__(self, vocab: int, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        # a table needs a row for each window, v ** w of them, and most are never seen; vectors
        # share what they learn: characters that act alike get similar ones
        self.up = nn.Linear(WINDOW * dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)  # logits near zero: the first loss is ln v

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s, v) of logits from (b, s) of ids."""
        # before the text stand characters of id 0, so that the first windows are full too
        padded = F.pad(ids, (WINDOW - 1, 0))  # (b, w - 1 + s)
        windows = padded.unfold(1, WINDOW, 1)  # (b, s, w)
        x = rearrange(self.embed(windows), "b s w d -> b s (w d)")
        return self.head(self.down(F.relu(self.up(x))))


def main(arguments: list[str] | None = None) -> Run:
    """Train on a text and write."""
    return run(MLP, rate=3e-3, arguments=arguments)


if __name__ == "__main__":
    main()
