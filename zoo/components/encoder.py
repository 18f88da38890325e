"""Encoders: the heads of the BERT family, which read their last hidden states."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from zoo.components import config
from zoo.components.activations import ACTIVATIONS
from zoo.components.heads import Classifier, MaskedLMHead, Pooler
from zoo.components.model import Embedding, Linear, Model

POOLED = ("pooler", "pretraining", "sequence_classification")
LABELLED = ("sequence_classification", "token_classification")
HEADS = (
    "masked_lm",
    "none",
    "pooler",
    "pretraining",
    "sequence_classification",
    "token_classification",
    "question_answering",
)


class Pooled(NamedTuple):
    """(b, s, d) of hidden states, (b, d) of pooled ones."""

    hidden: Tensor
    pooled: Tensor


class Pretraining(NamedTuple):
    """(b, s, v) of logits for masked words, (b, 2) for whether the next sentence follows."""

    mlm: Tensor
    nsp: Tensor


class Span(NamedTuple):
    """(b, s) of logits for the first token of an answer, (b, s) for its last one."""

    start: Tensor
    end: Tensor


Output = Tensor | Pooled | Pretraining | Span


class EncoderConfig(config.Config):
    """What a config says of the blocks' branches and of heads."""

    dim: config.Size = 768
    heads: config.Size = 12
    hidden: config.Size = 3072
    act: config.ActivationName = "gelu"
    eps: config.Positive = 1e-12
    dropout: config.Fraction = 0.1
    attn_dropout: config.Fraction = 0.1
    head_dropout: config.Fraction | None = None  # dropout
    head_act: config.ActivationName = config.DERIVED  # act
    summary_act: config.ActivationName | None = None  # None: the classifier reads the pooler
    summary_dropout: config.Fraction | None = 0.0  # before that layer; None: head_dropout
    lone_bias: bool = True  # the masked LM's bias has a second name
    tied: bool = True
    pad: config.TokenId | None = 0

    def derived(self) -> Mapping[str, Any]:
        return {"head_act": self.act}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from config.divides("heads", self.heads, "dim", self.dim)
        if self.head == "question_answering" and len(self.labels) != 2:
            yield f"labels: {len(self.labels)}, and a span has 2, its start and its end"


class Encoder(Model):
    """Expects `embed` and a config such as the above, with vocab."""

    heads: ClassVar[tuple[str, ...]] = HEADS
    embed: Embedding

    def add_head(self) -> None:
        """Add the head that the config names, and initialize: the constructor's last line."""
        c = self.config
        dropout = c.dropout if c.head_dropout is None else c.head_dropout
        head = "summary" if c.head == "sequence_classification" and c.summary_act else c.head
        if head in POOLED:
            self.pooler = Pooler(c.dim)
        if head == "summary":
            act, before = ACTIVATIONS[c.summary_act], c.summary_dropout
            before = dropout if before is None else before
            self.summary = Classifier(c.dim, len(c.labels), act, before, dropout)
        if c.head in ("masked_lm", "pretraining"):
            embed = self.embed if c.tied else None
            act = ACTIVATIONS[c.head_act]
            self.head = MaskedLMHead(c.dim, c.vocab, act, c.eps, embed, lone_bias=c.lone_bias)
        if c.head == "pretraining":
            self.nsp = Linear(c.dim, 2)
        if head in LABELLED:
            self.classifier = Linear(c.dim, len(c.labels))
            self.head_dropout = nn.Dropout(dropout)
        if c.head == "question_answering":
            self.span = Linear(c.dim, 2)
        self.finish()

    def read_out(self, x: Tensor, attention_mask: Tensor | None) -> Output:
        """Apply the head to (b, s, d) of hidden states."""
        match self.config.head:
            case "pooler":
                return Pooled(x, self.pooler(x, attention_mask))
            case "masked_lm":
                return self.head(x)
            case "pretraining":
                return Pretraining(self.head(x), self.nsp(self.pooler(x, attention_mask)))
            case "sequence_classification":
                if self.config.summary_act:
                    return self.summary(x, attention_mask)
                return self.classifier(self.head_dropout(self.pooler(x, attention_mask)))
            case "token_classification":
                return self.classifier(self.head_dropout(x))
            case "question_answering":
                start, end = self.span(x).unbind(dim=-1)
                return Span(start, end)
        return x
