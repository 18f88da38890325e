"""`embed`: one vector for each text, by pooling hidden states or by a checkpoint's modules.json."""

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
    **loading: Any,
) -> Tensor:
    """Embed texts: one vector for each, independent of the other texts of its batch.

    The last hidden states of all real tokens, special ones included, are pooled in fp32 at least.
    A checkpoint with a modules.json follows its own steps instead.

    Args:
        model: a model, or a reference that `zoo.load` loads.
        texts: a list of one text or more.
        pooling: "mean" (default), "first", "last" or "max" over a text's tokens.
        normalize: scale each vector to length 1.
        batch_size: texts computed at a time; texts of similar length go together.
        truncate: cut texts that have more tokens than the model takes, and keep their end token.
        **loading: options of `zoo.load`, for a reference: head, config, ignore_config, revision …

    Returns:
        (texts, d), in the order of the texts.

    Raises:
        UsageError: an option is out of range, or contradicts the checkpoint's modules.json.
        InputError: a text is no string, or has no tokens.
        SequenceTooLong: a text has more tokens than the model takes, without `truncate`.

    Example:
        >>> model = zoo.load("tiny-bert")
        >>> zoo.embed(model, ["the fox", "a dog"], normalize=True).shape
        torch.Size([2, 44])
    """
    model = model_of(model, **loading)
    _check(model, texts, pooling, normalize, batch_size)
    body, limit = model, model.config.limit
    if not isinstance(model, SentenceModel):
        body = headless(model)
    elif model.provenance is not None:
        longest, lower = manner(model.provenance.directory)
        limit = min((n for n in (limit, longest) if n is not None), default=None)
        texts = [text.lower() for text in texts] if lower else texts
    rows = _rows(model.tokenizer, limit, texts, truncate)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # similar length: less padding
    vectors: list[Tensor] = []
    with at_rest(body):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            ids = [rows[n] for n in numbers]
            again = partial(_vectors, body, ids, pooling or "mean")
            with nullcontext() if vectors else watched(model):
                vectors.append(again())
                row = numbers.__getitem__
                check_finite(model, vectors[-1], "the embedding", row=row, again=again)
    out = torch.cat(vectors)
    out = out[torch.tensor(order, device=out.device).argsort()]
    return F.normalize(out, dim=-1) if normalize else out


def _check(
    model: Model, texts: Sequence[str], pooling: str | None, normalize: bool, batch_size: int
) -> None:
    if isinstance(model, SentenceModel) and (pooling is not None or normalize):
        argument = "normalize=True" if pooling is None else f"pooling={pooling!r}"
        raise UsageError(
            f"{argument}: this checkpoint's modules.json says how its states become a vector. "
            "zoo.load(…, modules=False) loads the model without it"
        )
    if pooling is not None and pooling not in POOLINGS:
        near = did_you_mean(str(pooling), POOLINGS)
        raise UsageError(f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}.{near}")
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
    """The ids of each text; refuse texts of no tokens or too many."""
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
        rows[n] = _truncated(tokenizer, texts[n], rows[n], limit)
    return rows


def _truncated(tokenizer: Tokenizer, text: str, row: list[int], limit: int) -> list[int]:
    """The first tokens, and the end tokens that follow every text."""
    length = len(tokenizer.encode(text, eos=False))
    end = row[length:]
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
