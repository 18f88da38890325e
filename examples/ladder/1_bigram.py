"""Rung 1, a bigram model: the next character depends on the last one alone.

python examples/ladder/1_bigram.py [TEXT FILE]
"""

from loop import Run, run
from torch import Tensor, nn


class Bigram(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        # row i: the logits of what comes after character i
        self.table = nn.Embedding(vocab, vocab)
        # almost zero, so that every character begins as likely as every other: the loss is ln v
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, s, v) of logits from (b, s) of ids."""
        return self.table(ids)


def main(arguments: list[str] | None = None) -> Run:
    """Train on a text and write."""
    # a row moves only when its character occurs, and by no more than the rate: large steps
    return run(Bigram, rate=3e-2, arguments=arguments)


if __name__ == "__main__":
    main()
