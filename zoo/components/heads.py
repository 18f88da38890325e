"""What reads the residual stream out: shared parts of task heads."""

import torch
from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear

LOGITS = ("lm", "shared_lm")  # heads that give a distribution over tokens at each place


def first_place(attention_mask: Tensor) -> Tensor:
    """(b, 1), where each row's first real token stands."""
    return attention_mask.bool().int().argmax(dim=-1, keepdim=True)


def last_token(x: Tensor, ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """(b, d): each row at its last token that is real by the mask and not the padding id."""
    if attention_mask is None and pad is None:
        return x[:, -1]
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    real = mask.bool() if pad is None else mask.bool() & (ids != pad)
    places = torch.arange(ids.shape[1], device=ids.device)
    # a row that holds nothing but padding ids is read where it begins
    last = torch.where(real, places, first_place(mask)).amax(dim=-1)
    return x[torch.arange(x.shape[0], device=x.device), last]


class Pooler(nn.Module):
    """(b, d): the first real token's state, through a layer of its own."""

    def __init__(self, dim: int, act: Activation = torch.tanh, dropout: float = 0.0) -> None:
        super().__init__()
        self.act, self.dropout = act, nn.Dropout(dropout)
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        first = x[:, 0]
        if attention_mask is not None:
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            first = x[rows, first_place(attention_mask)].squeeze(1)
        return self.act(self.dense(self.dropout(first)))


class Classifier(Pooler):
    """(b, labels): logits after a layer of the classifier's own."""

    def __init__(self, dim: int, labels: int, act: Activation, before: float, after: float) -> None:
        super().__init__(dim, act, before)
        self.after = nn.Dropout(after)
        self.out = Linear(dim, labels)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.out(self.after(super().forward(x, attention_mask)))


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary, after one more layer; tied, the decoder's weight is `embed`'s."""

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
            # a second name of the decoder's; untied files hold it too, and nothing reads it there
            self.bias = nn.Parameter(torch.zeros(vocab))
        if lone_bias and embed is not None:
            self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.dense(x))))
