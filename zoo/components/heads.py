"""Task heads: pooling, classification, masked words."""

import torch
from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear

LOGITS = ("lm", "shared_lm")  # heads that give a distribution over tokens at each position


def first_real(attention_mask: Tensor) -> Tensor:
    """(b, 1), the index of each row's first real token."""
    return attention_mask.bool().int().argmax(dim=-1, keepdim=True)


def last_token(x: Tensor, ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """(b, d): the state of each row's last token that is real by the mask and not `pad`."""
    if attention_mask is None and pad is None:
        return x[:, -1]
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    real = mask.bool() if pad is None else mask.bool() & (ids != pad)
    index = torch.arange(ids.shape[1], device=ids.device)
    # a row of nothing but padding ids is read at its first real token
    last = torch.where(real, index, first_real(mask)).amax(dim=-1)
    return x[torch.arange(x.shape[0], device=x.device), last]


class Pooler(nn.Module):
    """(b, d): the state of each row's first real token, after a linear layer."""

    def __init__(self, dim: int, act: Activation = torch.tanh, dropout: float = 0.0) -> None:
        super().__init__()
        self.act, self.dropout = act, nn.Dropout(dropout)
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(b, d) from (b, s, d)."""
        first = x[:, 0]
        if attention_mask is not None:
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            first = x[rows, first_real(attention_mask)].squeeze(1)
        return self.act(self.dense(self.dropout(first)))


class Classifier(Pooler):
    """(b, labels): logits after a pooling layer of the classifier's own."""

    def __init__(self, dim: int, labels: int, act: Activation, before: float, after: float) -> None:
        super().__init__(dim, act, before)
        self.after = nn.Dropout(after)
        self.out = Linear(dim, labels)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(b, labels) from (b, s, d)."""
        return self.out(self.after(super().forward(x, attention_mask)))


class MaskedLMHead(nn.Module):
    """(b, s, v): logits after one more layer. With `embed` the decoder's weight is tied to it."""

    def __init__(
        self,
        dim: int,
        vocab: int,
        act: Activation,
        eps: float,
        embed: nn.Embedding | None,
        *,
        lone_bias: bool = True,
    ) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.act = act
        self.norm = nn.LayerNorm(dim, eps)
        self.decoder = Linear(dim, vocab)
        if embed is not None:
            self.decoder.weight = embed.weight
        if lone_bias:
            # a second name of the decoder's bias; untied files hold it too, and nothing reads it
            self.bias = nn.Parameter(torch.zeros(vocab))
        if lone_bias and embed is not None:
            self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, v) from (b, s, d)."""
        return self.decoder(self.norm(self.act(self.dense(x))))
