"""Convolution over the tokens of a row."""

from torch import nn


class Conv1d(nn.Conv1d):
    """(b, d, s), a kernel's width of tokens at a time; it takes part in `Model.initialize`."""

    def draw(self, std: float) -> None:
        """Initialize the weight with this standard deviation, the bias with zeros."""
        nn.init.normal_(self.weight, 0, std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
