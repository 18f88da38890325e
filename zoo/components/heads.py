"""What reads the residual stream out: shared parts of task heads."""

import torch
from torch import Tensor, nn

from zoo.components.activations import Activation
from zoo.components.model import Linear


def last_token(x: Tensor, ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """(b, d): each row at its last real token.

    What is real is said by the mask; without one, by the padding id; without either every token is.
    """
    if attention_mask is not None:
        real = attention_mask.bool()
    elif pad is not None:
        real = ids != pad
    else:
        return x[:, -1]
    places = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(real, places, 0).amax(dim=-1)
    return x[torch.arange(len(x), device=x.device), last]


class Pooler(nn.Module):
    """(b, d): the first token's state, through a layer of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, 0]).tanh()


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary, after one more layer. `embed` gives the decoder its weight, if tied."""

    def __init__(
        self, dim: int, vocab: int, act: Activation, eps: float, embed: nn.Embedding | None
    ) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.act = act
        self.norm = nn.LayerNorm(dim, eps)
        self.decoder = Linear(dim, vocab)
        # a second name of the decoder's bias; untied files hold it too, and nothing reads it there
        self.bias = nn.Parameter(torch.zeros(vocab))
        if embed is not None:
            self.decoder.weight, self.decoder.bias = embed.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.dense(x))))
