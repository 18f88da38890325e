"""Perplexity: how well a decoder predicts a text, each token from those before it in a window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.checkpoints.finite import check_finite, watched
from zoo.checkpoints.sources import Ref
from zoo.components.cache import Cache
from zoo.components.decoder import Decoder
from zoo.components.inputs import check_ids
from zoo.components.model import Model
from zoo.errors import InputError, SequenceTooLong, UsageError
from zoo.text.inference import (
    at_rest,
    check_all_logits,
    device_of,
    headless,
    model_of,
    name_of,
)

UNLIMITED = 2048  # the window where a model has no end of positions
LOGITS = 1 << 24  # in memory at a time: 64 MB of fp32


@dataclass(frozen=True)
class Score:
    """`nll` in nats a token; `bytes` of the scored text as UTF-8, None for ids without a text."""

    tokens: int
    nll: float
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll), or inf where that overflows."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-likelihood in bits for each byte of the text."""
        return self.tokens * self.nll / math.log(2) / self.bytes if self.bytes else None

    def to_json(self) -> dict[str, Any]:
        """All figures as plain numbers."""
        return {
            "tokens": self.tokens,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def perplexity(
    model: Model | Ref,
    text: str | Sequence[int] | Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    **loading: Any,
) -> Score:
    """Score a text of any length under a decoder; each token is scored once.

    A window of tokens moves over the text by `stride`, and the tokens that are new in it are
    scored, after at least `window - stride` others. The first token has none before it and is not
    scored, unless the tokenizer, or `bos=True`, puts a token there.

    Args:
        model: a decoder with head "lm", or a reference that `zoo.load` loads.
        text: a text, or its token ids.
        window: tokens that the model reads at a time (default: all its positions).
        stride: tokens by which the window moves (default: half of it).
        bos: True puts the bos token before a text, False none (default: as the tokenizer does).
        progress: called with (tokens scored, tokens in all) after each window.
        **loading: options of `zoo.load`, for a reference: head, config, ignore_config, revision …

    Returns:
        A `Score`: the number of tokens, their mean negative log-likelihood, perplexity and bits
        per byte.

    Raises:
        UsageError: the model is no decoder with head "lm", or `window` or `stride` do not fit it.
        SequenceTooLong: `window` exceeds the model's positions.
        InputError: fewer than two tokens, or no text and no ids.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> score = zoo.perplexity(model, "abcabcabc")
        >>> score.tokens
        8
        >>> score.perplexity > 1
        True
    """
    model = model_of(model, **loading)
    if not isinstance(model, Decoder) or model.config.head != "lm":
        raise UsageError(
            f"{name_of(model)}: only a decoder with head 'lm' gives each token a probability "
            "from those before it; a masked LM predicts masked tokens (zoo.fill)"
        )
    check_all_logits(model)
    window, stride = _sizes(model, window, stride)
    ids, size = _encode(model, text, bos)
    total = 0.0
    with at_rest(model):
        for start, new, end in _windows(len(ids), window, stride):
            with nullcontext() if start else watched(model):
                total += _nll(model, ids[start:end], end - new)
            if progress:
                progress(end, len(ids))
    return Score(len(ids) - 1, total / (len(ids) - 1), size)


def _sizes(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    c = model.config
    if window is None:
        window = c.limit or c.limit_cached or UNLIMITED
    if type(window) is not int or window < 2:
        raise UsageError(f"window={window!r}: expected a number of tokens, 2 or more")
    if c.limit is not None and window > c.limit:
        raise SequenceTooLong(f"window={window}: the model has {c.limit} positions")
    if stride is None:
        stride = window // 2
    if type(stride) is not int or not 1 <= stride < window:
        raise UsageError(
            f"stride={stride!r}: expected 1 to {window - 1}; at the window's {window} tokens or "
            "more, its first token would have none before it"
        )
    return window, stride


def _encode(
    model: Model, text: str | Sequence[int] | Tensor, bos: bool | None
) -> tuple[Tensor, int | None]:
    """(s,) ids, and the bytes of those that are scored."""
    if not isinstance(text, str):
        if bos is not None:
            raise UsageError(f"bos={bos}: only for a text; put a bos id before the ids yourself")
        return _ids(text, model), None
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, bos=bos, eos=False)
    size = len(text.encode())
    if not tokenizer.encode("", bos=bos, eos=False):
        first = tokenizer.decode(ids[:1])
        size -= len(first.encode()) if text.startswith(first) else 0
    return _ids(ids, model), size


def _ids(values: Sequence[int] | Tensor, model: Model) -> Tensor:
    """(s,) ids, all of the vocabulary: the model checks all but the last, which it never reads."""
    try:
        ids = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"expected a text or its ids: {error}") from None
    if ids.ndim != 1:
        raise InputError(f"ids: expected one row of ids, found shape {list(ids.shape)}")
    if len(ids) < 2:
        raise InputError("nothing to score: no token has another before it")
    check_ids(ids[None], model.config.vocab)
    return ids.to(device_of(model), torch.int64)


def _windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored token, end) of each window; the last is as wide as the others."""
    new, end = 1, min(window, length)
    while new < length:
        yield max(0, end - window), new, end
        new, end = end, min(end + stride, length)


def _nll(model: Model, ids: Tensor, count: int) -> float:
    """The sum over the last `count` of these ids, in nats."""
    total, at = 0.0, len(ids) - count
    for logits in _logits(model, ids[:-1], at - 1):
        check_finite(model, logits, row=lambda n: None, again=lambda: model(ids[None, :-1]))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = ids[at : at + len(wide)]
        total += F.cross_entropy(wide, targets, reduction="none").double().sum().item()
        at += len(wide)
    return total


def _logits(model: Model, context: Tensor, first: int) -> Iterator[Tensor]:
    """(n, v) logits from token `first` on, a chunk at a time; those before are context only."""
    limit = model.config.limit_cached
    if limit is not None and len(context) > limit:
        yield model(context[None])[0, first:]  # no cache is that long
        return
    size = max(1, LOGITS // model.config.vocab)
    cache, body = Cache(len(context)), headless(model)
    for start in range(0, first, size):
        body(context[None, start : min(start + size, first)], cache=cache)
    for start in range(first, len(context), size):
        yield model(context[None, start : start + size], cache=cache)[0]
