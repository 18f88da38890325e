"""Characters as numbers, a split into two parts, and random batches: what every rung reads."""

import torch
from torch import Tensor

CONTEXT, ROWS = 64, 12  # how far back a model may look, and texts in a batch

Batch = tuple[Tensor, Tensor]  # ids (b, s), and the ids that follow each of them (b, s)


class Text:
    """A text as ids: the first 90% to learn from, the rest to test on.

    Models are tested on text that they were not trained on, because one that memorizes its training
    text has a low loss there and has learned nothing else.
    """

    def __init__(self, text: str) -> None:
        self.itos = sorted(set(text))  # sorted: the same text gives the same ids in every run
        self.stoi = {character: i for i, character in enumerate(self.itos)}
        ids = torch.tensor(self.encode(text))  # (n,)
        cut = int(0.9 * len(ids))
        self.training, self.validation = ids[:cut], ids[cut:]
        if len(self.validation) <= CONTEXT:
            raise ValueError(f"{len(text)} characters: expected more than {10 * CONTEXT + 10}")

    @property
    def vocab(self) -> int:
        """How many different characters there are."""
        return len(self.itos)

    def encode(self, text: str) -> list[int]:
        """Ids of characters."""
        if unknown := sorted(set(text) - set(self.itos)):
            raise ValueError(f"characters that the training text does not have: {unknown}")
        return [self.stoi[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """Characters of ids."""
        return "".join(self.itos[i] for i in ids)

    def batch(self, random: torch.Generator) -> Batch:
        """Windows of the training part that start anywhere.

        Each of the b · s positions is an example: its target is the character after it.
        """
        starts = torch.randint(len(self.training) - CONTEXT, (ROWS,), generator=random)
        return cut(self.training, starts)

    def test(self, rows: int = 256) -> Batch:
        """Windows of the validation part, evenly spaced and the same for every model."""
        last = len(self.validation) - CONTEXT - 1
        return cut(self.validation, torch.linspace(0, last, min(rows, last + 1)).long())


def cut(ids: Tensor, starts: Tensor) -> Batch:
    """(b, s) of ids from each start, and (b, s) of the same one character later."""
    at = starts[:, None] + torch.arange(CONTEXT)  # (b, s)
    return ids[at], ids[at + 1]
