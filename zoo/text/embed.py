"""A vector for each text: last hidden states pooled, or what a modules.json makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.checkpoints.finite import check_finite, watched
from zoo.checkpoints.sentences import WAYS, SentenceModel, manner
from zoo.checkpoints.sources import Ref
from zoo.components.model import Model
from zoo.errors import InputError, SequenceTooLong, UsageError, did_you_mean, listing
from zoo.text.inference import at_rest, device_of, headless, model_of
from zoo.tokenizers import Tokenizer

POOLINGS = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken", "max": "max_tokens"}


def embed(
    model: Model | Ref,
    texts: Sequence[str],
    *,
    pooling: Literal["mean", "first", "last", "max"] | None = None,
    normalize: bool = False,
    batch_size: int = 32,
    truncate: bool = False,
    **reading: Any,
) -> Tensor:
    """(texts, d), in their order; what is embedded together does not change it.

    The states of real tokens, special ones included, are pooled (`mean`), in fp32 at least. A
    checkpoint with a modules.json has steps of its own, which nothing is added to. A text of more
    tokens than the model takes is an error; `truncate` cuts it, and keeps its end token. `reading`
    is as `zoo.load` has it: head, config, ignore_config, revision …
    """
    model = model_of(model, **reading)
    _check(model, texts, pooling, normalize, batch_size)
    body, limit = model, model.config.limit
    if not isinstance(model, SentenceModel):
        body = headless(model)
    elif model.provenance is not None:
        longest, lower = manner(model.provenance.directory)
        limit = min((n for n in (limit, longest) if n is not None), default=None)
        texts = [text.lower() for text in texts] if lower else texts
    rows = _rows(model.tokenizer, limit, texts, truncate)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # alike in length: less padding
    found: list[Tensor] = []
    with at_rest(body):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            ids = [rows[n] for n in numbers]
            again = partial(_vectors, body, ids, pooling or "mean")
            with nullcontext() if found else watched(model):
                found.append(again())
                row = numbers.__getitem__
                check_finite(model, found[-1], "the embedding", row=row, again=again)
    vectors = torch.cat(found)
    vectors = vectors[torch.tensor(order, device=vectors.device).argsort()]
    return F.normalize(vectors, dim=-1) if normalize else vectors


def _check(
    model: Model, texts: Sequence[str], pooling: str | None, normalize: bool, batch_size: int
) -> None:
    if isinstance(model, SentenceModel) and (pooling is not None or normalize):
        asked = "normalize=True" if pooling is None else f"pooling={pooling!r}"
        raise UsageError(
            f"{asked}: this checkpoint's modules.json says how its states become a vector. "
            "zoo.load(…, modules=False) is the model without it"
        )
    if pooling is not None and pooling not in POOLINGS:
        near = did_you_mean(str(pooling), POOLINGS)
        raise UsageError(f"pooling={pooling!r}: one of {', '.join(POOLINGS)}.{near}")
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"batch_size={batch_size!r}: expected a positive number")
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise UsageError(f"expected one text or more in a list, found {type(texts).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"expected a text, found {type(text).__name__}")


def _rows(
    tokenizer: Tokenizer, limit: int | None, texts: Sequence[str], truncate: bool
) -> list[list[int]]:
    """Ids of each text, or which of them no model could embed."""
    rows = [tokenizer.encode(text) for text in texts]
    if empty := [str(n) for n, row in enumerate(rows) if not row]:
        raise InputError(f"texts of no tokens: {listing(empty)}, counted from 0")
    if limit is None:
        return rows
    long = [n for n, row in enumerate(rows) if len(row) > limit]
    if long and not truncate:
        counts = listing([f"text {n} has {len(rows[n])} tokens" for n in long], 5)
        raise SequenceTooLong(
            f"{counts}, counted from 0; the model takes {limit}. truncate=True cuts them"
        )
    for n in long:
        rows[n] = _cut(tokenizer, texts[n], rows[n], limit)
    return rows


def _cut(tokenizer: Tokenizer, text: str, row: list[int], limit: int) -> list[int]:
    """The first tokens and what stands behind every text."""
    begun = len(tokenizer.encode(text, eos=False))
    end = row[begun:]
    return row[: limit - len(end)] + end


def _vectors(model: Model, rows: list[list[int]], pooling: str) -> Tensor:
    device = device_of(model)
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    x: Tensor = model(ids, real)
    if isinstance(model, SentenceModel):
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return WAYS[POOLINGS[pooling]](x, real)
