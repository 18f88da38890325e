"""What a decoder has seen: keys and values layer by layer, so that no token is computed twice."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from zoo.errors import InputError, SequenceTooLong


class Rows(Protocol):
    """What a model keeps beside keys and values, a row for each row of the cache."""

    def take(self, rows: Tensor) -> Self:
        """Select rows by number."""
        ...


class Cache:
    """Room for `size` tokens in each row; a model that is handed it again goes on where it was.

    All room is taken at the first call, and no shape changes after it. Under torch.compile the
    whole of it is looked at, behind a mask; else what is filled.
    """

    def __init__(self, size: int) -> None:
        if type(size) is not int or size < 1:
            raise InputError(f"a cache for {size!r} tokens: expected a positive number")
        self.size = size
        self.slots: list[tuple[Tensor, Tensor]] = []  # (b, g, size, e) twice, as layers run
        self.filled: Tensor | None = None  # (), how many places hold a token
        self.real: Tensor | None = None  # (b, size), once there is padding in any row
        self.memory: Rows | None = None  # an encoder's output, where the model has an encoder

    @property
    def length(self) -> int:
        return 0 if self.filled is None else int(self.filled)

    def step(self, ids: Tensor, real: Tensor | None) -> Step:
        """Places for (b, s) tokens more, of which those of `real` count."""
        new = ids.shape[1]
        if self.filled is None:
            self.filled = torch.zeros((), dtype=torch.int64, device=ids.device)
        compiling = torch.compiler.is_compiling()
        start, end = (0, self.size) if compiling else (self.length, self.length + new)
        if not compiling:
            self._check(ids, end)
        places = self.filled + torch.arange(new, device=ids.device)
        if self.real is None and real is not None:
            self.real = torch.zeros(len(ids), self.size, dtype=torch.bool, device=ids.device)
            self.real |= torch.arange(self.size, device=ids.device) < self.filled
        if self.real is not None:
            given = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            self.real.index_copy_(1, places, given)
        return Step(self, start, end, places, not compiling, self.filled + new)

    def _check(self, ids: Tensor, end: int) -> None:
        if end > self.size:
            raise SequenceTooLong(f"{end} tokens, and the cache has room for {self.size}")
        if self.slots and len(ids) != len(self.slots[0][0]):
            raise InputError(f"{len(ids)} rows, and the cache holds {len(self.slots[0][0])}")

    def check_layer(self, n: int, k: Tensor, start: int) -> None:
        """The layer that is n-th to run goes on with keys like those that it has here."""
        if n == len(self.slots) and start:
            raise InputError(f"the cache is another model's: it has {n} layers, and this one more")
        if n < len(self.slots) and _kind(held := self.slots[n][0]) != _kind(k):
            has, here = (", ".join(map(str, _kind(x))) for x in (held, k))
            raise InputError(f"the cache is another model's: its keys are {has}, and here {here}")

    def slot(self, n: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The room of the layer that is n-th to run. It starts as zeros: masked, NaN would stay."""
        if n == len(self.slots):
            shapes = ((*x.shape[:2], self.size, x.shape[3]) for x in (k, v))
            keys, values = (k.new_zeros(shape) for shape in shapes)
            self.slots.append((keys, values))
        return self.slots[n]

    def cut(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if type(length) is not int or not 0 <= length <= self.length:
            raise InputError(f"cannot cut {self.length} tokens to {length!r}")
        if self.filled is not None:
            self.filled = torch.full_like(self.filled, length)
        if self.real is not None:
            self.real[:, length:] = False
        if not length:
            self.memory = None

    def take(self, rows: Tensor) -> None:
        """The rows of these numbers in the place of those that were there."""
        self.slots = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.slots]
        if self.real is not None:
            self.real = self.real.index_select(0, rows)
        if self.memory is not None:
            self.memory = self.memory.take(rows)


def _kind(x: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    """Heads, their width, and of what and where they are."""
    return x.shape[1], x.shape[3], x.dtype, x.device


class Step(NamedTuple):
    """Where the tokens of one call go."""

    cache: Cache
    start: int
    end: int  # of what is looked at
    places: Tensor  # (s,)
    eager: bool
    filled: Tensor  # (), once the tokens of this call are there

    def remember(self, n: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(b, g, t, e) of all tokens up to now, from (b, g, s, e) of these."""
        if k.requires_grad:
            raise InputError("a cache keeps no gradients; call the model under torch.no_grad()")
        if self.eager:
            self.cache.check_layer(n, k, self.start)
        if n == 0:  # and no sooner: a call that is refused leaves the cache as it was
            self.cache.filled = self.filled
        keys, values = self.cache.slot(n, k, v)
        if not self.eager:
            keys.index_copy_(2, self.places, k)
            values.index_copy_(2, self.places, v)
            return keys, values
        keys[:, :, self.start : self.end] = k
        values[:, :, self.start : self.end] = v
        return keys[:, :, : self.end], values[:, :, : self.end]

    def seen(self) -> Tensor | None:
        """(b, t), True at real tokens; None where all are."""
        real = self.cache.real
        return None if real is None else real[:, : self.end]
