"""Perplexity: how well a decoder foresees a text, each token from as much as a window shows."""

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
from zoo.text.inference import at_rest, called, device_of, every_place, headless, model_of

UNLIMITED = 2048  # the window where a model has no end of positions
LOGITS = 1 << 24  # how many are held at a time: 64 MB of fp32


@dataclass(frozen=True)
class Score:
    """`nll` in nats a token; `bytes` of the scored text as UTF-8, None where only ids are known."""

    tokens: int
    nll: float
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.tokens * self.nll / math.log(2) / self.bytes if self.bytes else None

    def to_json(self) -> dict[str, Any]:
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
    **reading: Any,
) -> Score:
    """Of a text, or of ids as they are, of any length; each token is scored once.

    A `window` of tokens (all positions of the model) moves on by `stride` (half of it), and what
    is new in it is scored: after at least `window - stride` tokens. The first token of all has
    nothing before it and is not scored, unless the tokenizer puts one there, or `bos=True` does.
    `reading` is as `zoo.load` has it: head, config, ignore_config, revision …
    """
    model = model_of(model, **reading)
    if not isinstance(model, Decoder) or model.config.head != "lm":
        raise UsageError(
            f"{called(model)}: only a decoder with head 'lm' gives each token a probability "
            "from those before it; a masked LM fills gaps (zoo.fill)"
        )
    every_place(model)
    window, stride = _sizes(model, window, stride)
    ids, size = _read(model, text, bos)
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
            "more, its first one would have nothing before it"
        )
    return window, stride


def _read(
    model: Model, text: str | Sequence[int] | Tensor, bos: bool | None
) -> tuple[Tensor, int | None]:
    """(s,) of ids, and the bytes of those that are scored."""
    if not isinstance(text, str):
        if bos is not None:
            raise UsageError(f"bos={bos}: of ids, the first one is what it is")
        return _ids(text, model), None
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, bos=bos, eos=False)
    size = len(text.encode())
    if not tokenizer.encode("", bos=bos, eos=False):
        first = tokenizer.decode(ids[:1])
        size -= len(first.encode()) if text.startswith(first) else 0
    return _ids(ids, model), size


def _ids(given: Sequence[int] | Tensor, model: Model) -> Tensor:
    """(s,), each of them known: the last one is never shown to the model, which checks the rest."""
    try:
        ids = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"expected a text or its ids: {error}") from None
    if ids.ndim != 1:
        raise InputError(f"ids: expected one row of them, found {list(ids.shape)}")
    if len(ids) < 2:
        raise InputError("nothing to score: no token has another before it")
    check_ids(ids[None], model.config.vocab)
    return ids.to(device_of(model), torch.int64)


def _windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, the first token that is scored, end), the last one as wide as the others."""
    new, end = 1, min(window, length)
    while new < length:
        yield max(0, end - window), new, end
        new, end = end, min(end + stride, length)


def _nll(model: Model, ids: Tensor, count: int) -> float:
    """Of the last `count` of these ids together, in nats."""
    total, at = 0.0, len(ids) - count
    for logits in _logits(model, ids[:-1], at - 1):
        check_finite(model, logits, row=lambda n: None, again=lambda: model(ids[None, :-1]))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = ids[at : at + len(wide)]
        total += F.cross_entropy(wide, wanted, reduction="none").double().sum().item()
        at += len(wide)
    return total


def _logits(model: Model, context: Tensor, first: int) -> Iterator[Tensor]:
    """(n, v), a part at a time; of the tokens before `first` none, they are only looked at."""
    most = model.config.limit_cached
    if most is not None and len(context) > most:
        yield model(context[None])[0, first:]  # no cache goes so far
        return
    size = max(1, LOGITS // model.config.vocab)
    cache, body = Cache(len(context)), headless(model)
    for start in range(0, first, size):
        body(context[None, start : min(start + size, first)], cache=cache)
    for start in range(first, len(context), size):
        yield model(context[None, start : start + size], cache=cache)[0]
