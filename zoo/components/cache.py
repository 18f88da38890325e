"""The KV cache: keys and values of each layer, so that no token is computed twice."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from zoo.errors import InputError, SequenceTooLong


class Rows(Protocol):
    """What a model keeps beside keys and values, with a row for each row of the cache."""

    def take(self, rows: Tensor) -> Self:
        """Select rows by number."""
        ...


class Cache:
    """A KV cache with room for `size` tokens in each row.

    Pass the same cache to a model's next call, with the next tokens only. Memory is allocated at
    the first call, and no shape changes after it: under torch.compile attention reads the whole
    cache behind a mask, else the filled part.

    Example:
        >>> import torch, zoo
        >>> config = zoo.models.llama.Config(vocab=50, dim=16, layers=1, heads=2, hidden=32)
        >>> model, cache = zoo.models.llama.Model(config), zoo.Cache(8)
        >>> with torch.no_grad():
        ...     logits = model(torch.tensor([[5, 9, 40]]), cache=cache)
        >>> cache.length
        3
    """

    def __init__(self, size: int) -> None:
        if type(size) is not int or size < 1:
            raise InputError(f"a cache for {size!r} tokens: expected a positive number")
        self.size = size
        self.slots: list[tuple[Tensor, Tensor]] = []  # (b, g, size, e) of keys, values; by layer
        self.filled: Tensor | None = None  # (), how many positions hold a token
        self.real: Tensor | None = None  # (b, size), once any row has padding
        self.memory: Rows | None = None  # an encoder's output, where the model has an encoder

    @property
    def length(self) -> int:
        """How many tokens each row holds."""
        return 0 if self.filled is None else int(self.filled)

    def step(self, ids: Tensor, real: Tensor | None) -> Step:
        """Reserve slots for (b, s) more tokens, of which those where `real` is True count."""
        new = ids.shape[1]
        if self.filled is None:
            self.filled = torch.zeros((), dtype=torch.int64, device=ids.device)
        compiling = torch.compiler.is_compiling()
        start, end = (0, self.size) if compiling else (self.length, self.length + new)
        if not compiling:
            self._check(ids, end)
        slots = self.filled + torch.arange(new, device=ids.device)
        if self.real is None and real is not None:
            self.real = torch.zeros(len(ids), self.size, dtype=torch.bool, device=ids.device)
            self.real |= torch.arange(self.size, device=ids.device) < self.filled
        if self.real is not None:
            now = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            self.real.index_copy_(1, slots, now)
        return Step(self, start, end, slots, not compiling, self.filled + new)

    def _check(self, ids: Tensor, end: int) -> None:
        if end > self.size:
            raise SequenceTooLong(f"{end} tokens, and the cache has room for {self.size}")
        if self.slots and len(ids) != len(self.slots[0][0]):
            raise InputError(f"{len(ids)} rows, and the cache holds {len(self.slots[0][0])}")

    def check_layer(self, layer: int, k: Tensor, start: int) -> None:
        """Refuse keys that do not continue those of this layer, counted as layers run."""
        if layer == len(self.slots) and start:
            raise InputError(
                f"the cache is another model's: it has {layer} layers, and this one more"
            )
        if layer < len(self.slots) and _kind(old := self.slots[layer][0]) != _kind(k):
            has, here = (", ".join(map(str, _kind(x))) for x in (old, k))
            raise InputError(f"the cache is another model's: its keys are {has}, and here {here}")

    def slot(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(b, g, size, e) of a layer's keys and of its values.

        Memory starts as zeros: a NaN would spread even where it is masked.
        """
        if layer == len(self.slots):
            shapes = ((*x.shape[:2], self.size, x.shape[3]) for x in (k, v))
            keys, values = (k.new_zeros(shape) for shape in shapes)
            self.slots.append((keys, values))
        return self.slots[layer]

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
        """Replace all rows by those of these numbers, as a beam search does."""
        self.slots = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.slots]
        if self.real is not None:
            self.real = self.real.index_select(0, rows)
        if self.memory is not None:
            self.memory = self.memory.take(rows)


def _kind(x: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    """Heads, head width, dtype and device."""
    return x.shape[1], x.shape[3], x.dtype, x.device


class Step(NamedTuple):
    """Where the tokens of one call are stored."""

    cache: Cache
    start: int
    end: int  # of what attention reads
    slots: Tensor  # (s,)
    eager: bool
    filled: Tensor  # (), with the tokens of this call

    def remember(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(b, g, t, e) of keys and values of all tokens so far, from (b, g, s, e) of new ones."""
        if k.requires_grad:
            raise InputError("a cache keeps no gradients; call the model under torch.no_grad()")
        if self.eager:
            self.cache.check_layer(layer, k, self.start)
        if layer == 0:  # and no sooner: a call that is refused leaves the cache as it was
            self.cache.filled = self.filled
        keys, values = self.cache.slot(layer, k, v)
        if not self.eager:
            keys.index_copy_(2, self.slots, k)
            values.index_copy_(2, self.slots, v)
            return keys, values
        keys[:, :, self.start : self.end] = k
        values[:, :, self.start : self.end] = v
        return keys[:, :, : self.end], values[:, :, : self.end]

    def real(self) -> Tensor | None:
        """(b, t), True at real tokens; None where all are."""
        real = self.cache.real
        return None if real is None else real[:, : self.end]
