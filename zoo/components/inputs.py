"""Checks of what `forward` is called with: in eager code, and of values on CPUs only."""

import torch
from torch import Tensor

from zoo.components.cache import Cache
from zoo.components.config import Config
from zoo.errors import InputError, MaskError, SequenceTooLong, TokenIdError


def check_ids(ids: Tensor, size: int, what: str = "token", like: Tensor | None = None) -> None:
    """Check that (b, s) of ids are rows of a table of this size, and shaped like `like`."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(ids, Tensor):
        text = isinstance(ids, str) or (
            isinstance(ids, list) and any(isinstance(x, str) for x in ids)
        )
        hint = ". Of texts, m.tokenizer.batch([…]) makes ids and a mask" if text else ""
        raise InputError(f"{what} ids: expected a tensor, found {type(ids).__name__}{hint}")
    if ids.is_meta:
        return
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{what} ids: expected int64 or int32 (batch, sequence), found {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if like is not None and ids.shape != like.shape:
        raise InputError(f"{what} ids: {list(ids.shape)} for input_ids {list(like.shape)}")
    if ids.numel() == 0:
        raise InputError(f"{what} ids: an empty sequence, {list(ids.shape)}")
    if ids.device.type == "cpu":
        low, high = ids.aminmax()
        if low < 0 or high >= size:
            row, at = ((ids < 0) | (ids >= size)).nonzero()[0].tolist()
            raise TokenIdError(
                f"row {row}, position {at}: {what} id {ids[row, at].item()} "
                f"is outside 0..{size - 1}"
            )


def token_types(types: Tensor | None, count: int, ids: Tensor) -> Tensor:
    """(b, s) of checked token types, zeros where none are given."""
    types = torch.zeros_like(ids) if types is None else types
    check_ids(types, count, "token type", ids)
    return types


def check_mask(mask: Tensor | None, ids: Tensor, chunk: bool = False) -> Tensor | None:
    """(b, s) of booleans, or None where every token is real.

    In a `chunk` of a longer sequence a row may be all padding; a whole row may not.
    """
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        return mask.bool()
    if not isinstance(mask, Tensor):
        raise MaskError(f"attention_mask: expected a tensor, found {type(mask).__name__}")
    if ids.is_meta:
        return mask.bool()
    if mask.shape != ids.shape:
        raise MaskError(f"attention_mask: {list(mask.shape)} for input_ids {list(ids.shape)}")
    if mask.device.type != "cpu":
        return mask.bool()
    others = mask[(mask != 0) & (mask != 1)]
    if len(others):
        raise MaskError(f"attention_mask: holds {others[0].item()}; only 0 and 1 mean anything")
    mask = mask.bool()
    if not chunk and not (alive := mask.any(dim=-1)).all():
        row = int((~alive).nonzero()[0])
        raise MaskError(f"attention_mask: row {row} is all zeros, so there is nothing to attend to")
    return None if mask.all() else mask


def check(ids: Tensor, config: Config, cache: Cache | None = None) -> None:
    """Check that (b, s) of ids are in the vocabulary, and that there are positions for all."""
    check_ids(ids, config.vocab)  # type: ignore[attr-defined]
    if torch.compiler.is_compiling():
        return
    if not isinstance(cache, Cache | None):
        raise InputError(f"cache: expected a zoo.Cache, found {type(cache).__name__}")
    length, limit = ids.shape[1] + (cache.length if cache else 0), config.limit
    if cache and config.limit_cached is not None and length > config.limit_cached and not limit:
        why = "beyond them every new token changes the positions of all keys: do without a cache"
        raise SequenceTooLong(f"{length} tokens, and {config.limit_cached} positions; {why}")
    if limit is not None and length > limit:
        more = " config={'extrapolate': True} allows" if hasattr(config, "extrapolate") else ""
        raise SequenceTooLong(f"{length} tokens, and the model has {limit} positions.{more}")
