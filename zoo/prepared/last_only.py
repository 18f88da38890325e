"""Logits of the last position only: all that generation needs of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.heads import LOGITS
from zoo.components.model import Model
from zoo.errors import UsageError


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


class LastPosition:
    """Cuts a head's input (b, s, d) to each row's last real token, (b, 1, d)."""

    def __init__(self, model: Model) -> None:
        if model.config.head not in LOGITS:
            raise UsageError(
                f"last_only: a model with the head {model.config.head!r} has no logits"
            )
        names = list(signature(type(model).forward).parameters)[1:]
        self.name = names[-2]  # of the mask, which is before the cache
        self.position = names.index(self.name)
        self.masks: dict[int, Tensor | None] = {}  # by thread

    def note_mask(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before the model: remember the mask of this call."""
        mask = args[self.position] if len(args) > self.position else named.get(self.name)
        self.masks[_thread()] = mask

    def cut(self, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """A hook before the head: cut its input."""
        (x,) = args
        mask = self.masks.pop(_thread(), None)
        if mask is None:
            return (x[:, -1:],)
        real = mask[:, -x.shape[1] :].bool()  # it may include the tokens in the cache
        positions = torch.arange(x.shape[1], device=x.device)
        last = torch.where(real, positions, 0).amax(dim=-1)
        return (x[torch.arange(len(x), device=x.device), last][:, None],)


@contextmanager
def last_only(model: Model) -> Iterator[None]:
    """Compute only the logits of each row's last real token, (b, 1, v), while the context is open.

    For any model, prepared or not; prepare a compiled one with `last_only=True` instead.
    """
    preparation = model.prepared
    if preparation is not None and preparation.last_only:
        yield
        return
    if preparation is not None and preparation.compiled:
        raise UsageError("a compiled model cannot be changed: prepare it with last_only=True")
    hooks = keep_last(model)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def keep_last(model: Model) -> list[Any]:
    """Cut the head's input to the last position for good; return the hooks."""
    last = LastPosition(model)
    head: Any = model.head
    return [
        model.register_forward_pre_hook(last.note_mask, with_kwargs=True),
        head.register_forward_pre_hook(last.cut),
    ]
