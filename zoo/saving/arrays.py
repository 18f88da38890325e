"""A model's arrays during a conversion, made lazily from what is on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from converters.carry_out import agreed
from converters.checkpoint import Checkpoint
from converters.formats import TensorInfo, torch_dtype
from converters.language import Rule
from converters.lazy import Lazy
from converters.output import ZEROS, FileSpan, Item
from converters.plan import Native, Plan, PlanStep
from zoo.errors import listing
from zoo.lora.merging import Changes

ADAPTED = " + the adapter"  # appended to the rule of an array that it changes


@dataclass
class Arrays:
    """A model's arrays, made from what is on disk when they are used."""

    checkpoint: Checkpoint
    plan: Plan
    trust: Collection[str]
    quantized: Collection[str]  # names of dequantized arrays
    changes: Changes | None = None  # by an adapter
    adapter: str = ""  # the file that it is in
    zeros: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # name -> shape of arrays of zeros that no file holds

    @cached_property
    def ways(self) -> dict[str, tuple[PlanStep, int]]:
        """Native name -> (the step that makes it, its number in the step)."""
        return {name: (step, n) for step in self.plan.steps for n, name in enumerate(step.targets)}

    def way(self, name: str) -> tuple[PlanStep, int]:
        """Return the step that makes an array, by any of its names, and its number in the step."""
        return self.ways[self.plan.native.ties.get(name, name)]

    def own(self, name: str) -> Lazy:
        """Return the array that the checkpoint has."""
        step, n = self.way(name)
        names = agreed(step, self.checkpoint.lazy, self.trust)
        if step.transform is None:
            return self.checkpoint.lazy(names[n])
        return step.transform.targets_of([self.checkpoint.lazy(name) for name in names])[n]

    def made(self, name: str) -> Lazy:
        """Return the array to write."""
        if name in self.zeros:
            return Lazy.of(torch.zeros(self.zeros[name], dtype=torch_dtype(self.any_dtype)))
        array = self.own(name)
        return array if self.changes is None else self.changes.made(name, array)

    def changed(self, names: Iterable[str]) -> bool:
        """Return whether an adapter changes any of these."""
        return self.changes is not None and any(self.changes.changed(name) for name in names)

    def coarse(self, names: Iterable[str]) -> bool:
        """Return whether any of these was dequantized."""
        ties = self.plan.native.ties
        return any(ties.get(name, name) in self.quantized for name in names)

    def rule(self, rule: Rule, names: Sequence[str]) -> str:
        """Return the text of a rule for the manifest."""
        return f"{rule}{ADAPTED}" if self.changed(names) else str(rule)

    def origin(self, names: Iterable[str]) -> str:
        """Return the files and tensors that native arrays are made from."""
        sources = dict.fromkeys(name for each in names for name in self.way(each)[0].sources)
        files = dict.fromkeys(self.checkpoint.where[name] for name in sources)
        more = f" and {self.adapter}" if self.changed(names) else ""
        return f"{listing(files)}: {listing(sources)}{more}"

    @property
    def any_dtype(self) -> str:
        """The dtype of some array."""
        return self.checkpoint.tensors[self.plan.steps[0].sources[0]].dtype

    def dtype(self, name: str) -> str:
        """Return the dtype of an array on disk."""
        return self.checkpoint.tensors[self.way(name)[0].sources[0]].dtype

    def span(self, name: str) -> FileSpan | None:
        """Return where the bytes of an array are in a file, if they can be copied."""
        step, n = self.way(name)
        if step.transform is not None or step.also or self.changed([name]):
            return None
        return span_of(self.checkpoint, step.sources[n])

    def state(self, native: Native, kind: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters with the dtypes of the files, on meta."""
        for name in self.names(native):
            dtype = kind or torch_dtype(self.dtype(name))
            yield name, torch.empty(native.shapes[name], dtype=dtype, device="meta")

    def names(self, native: Native) -> list[str]:
        """Return names in the order of the files; last those that are no longer tied."""
        names = [name for step in self.plan.steps for name in step.targets]
        return [*names, *(name for name in native.shapes if name not in self.ways)]

    def forward(self, native: Native) -> Iterator[Item]:
        """Yield the native tensors."""
        for name in self.names(native):
            step, _ = self.way(name)
            info = TensorInfo(name, native.shapes[name], self.dtype(name))
            rule, made = self.rule(step.rule, [name]), partial(self.made, name)
            decoded, source = self.coarse([name]), self.origin([name])
            yield Item(info, rule, made, self.span(name), decoded=decoded, source=source)

    def backward(self, inverse: Plan) -> Iterator[Item]:
        """Yield the tensors of a dialect."""

        def made(step: PlanStep, n: int) -> Lazy:
            if step.transform is None:
                return self.made(step.targets[n])
            return step.transform.sources_of([self.made(name) for name in step.targets])[n]

        for step in inverse.steps:
            for names in (step.sources, *step.also):
                for n, name in enumerate(names):
                    shape, make = inverse.header[name].shape, partial(made, step, n)
                    if step.targets[0] in self.zeros:
                        item = Item(TensorInfo(name, shape, self.any_dtype), ZEROS, make)
                    else:
                        info = TensorInfo(name, shape, self.dtype(step.targets[0]))
                        span = self.span(step.targets[n]) if step.transform is None else None
                        rule = self.rule(step.rule, step.targets)
                        decoded = self.coarse(step.targets)
                        source = self.origin(step.targets)
                        item = Item(info, rule, make, span, decoded=decoded, source=source)
                    yield item.cast(inverse.header[name].dtype)


def span_of(checkpoint: Checkpoint, name: str) -> FileSpan | None:
    """Return where a tensor's bytes are in a file, if they can be copied unread."""
    reader: Any = checkpoint.readers[checkpoint.where[name]]
    span = reader.span(name) if hasattr(reader, "span") else None
    return None if span is None else FileSpan(reader.path, span[0])
