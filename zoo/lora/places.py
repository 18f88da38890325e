"""Where a tensor of the reference's stands in a model: by its spec's rules, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converters.carry_out import backward
from converters.formats import TensorInfo
from converters.plan import Native, Plan, PlanStep, make_plan, target_names
from converters.spec import Dialect
from zoo.checkpoints.foreign import spec_of
from zoo.errors import PlanError, SpecError, did_you_mean, option


class Place(NamedTuple):
    """A native matrix, or one of several stacked in an array, that is part of one on disk.

    Its rows are those of the matrix on disk along one axis, its columns along the other.
    """

    native: str
    at: int | None  # which of the stacked ones
    rows: tuple[int, Tensor]  # (axis on disk, numbers along it)
    columns: tuple[int, Tensor]


class Places:
    """Names as files have them, with and without the prefix; as memory has them, where told."""

    def __init__(self, model: Any, native: Native) -> None:
        self.spec = spec_of(model)
        self.dialect: Dialect = self.spec.dialect("hf")
        self.fields, self.head, self.native = model.config.to_dict(), model.config.head, native
        self._at: dict[str, tuple[Plan, PlanStep, int]] = {}
        self._maps: dict[tuple[int, int], list[Place]] = {}
        # one array under two names is adapted under each of them apart
        every = {**native.shapes, **{n: native.shapes[of] for n, of in native.ties.items()}}
        try:
            self._learn(Native(every, {}))
        except SpecError:  # some of the names no file has
            self._learn(native)

    def _learn(self, native: Native) -> None:
        for alternatives in (False, True)[: 1 + bool(self.dialect.alternatives)]:
            header = target_names(
                self.spec, "hf", self.fields, native, bare=True, alternatives=alternatives
            )
            plan = make_plan(self.spec, "hf", self.fields, native, header, "adapter")
            for step in plan.steps:
                for n, name in enumerate(step.sources):
                    self._at.setdefault(name, (plan, step, n))

    def find(self, name: str) -> tuple[TensorInfo, PlanStep, int]:
        """(what it is on disk, the step that reads it, which of its tensors it is)."""
        prefix = self.dialect.prefix
        bare = name.removeprefix(prefix) if prefix else name
        forms = [name, bare]
        for legacy, modern in (*self.dialect.aliases, *self.dialect.tied):
            forms += [modern.format(b) for f in (name, bare) if (b := legacy.match(f)) is not None]
        found = next((self._at[form] for form in forms if form in self._at), None)
        if found is None:
            near = did_you_mean(bare, self._at)
            if any(rule.source.name.match(bare) is not None for rule in self.dialect.heads):
                near = f" It is of another head than {self.head}: pass {option('head', ...)}"
            raise PlanError(f"{name}: the model has nothing of that name.{near}")
        plan, step, n = found
        return plan.header[step.sources[n]], step, n

    def main(self, name: str) -> str | None:
        """Of a further name that files have for an array: its own."""
        for other, main in self.dialect.tied:
            for form in (name, name.removeprefix(self.dialect.prefix)):
                if (binding := other.match(form)) is not None:
                    return main.format(binding)
        return None

    def is_shared(self, name: str) -> bool:
        """Whether it is one of several modules of the reference's that are one here."""
        mains = (main for _, main in self.dialect.tied)
        return self.main(name) is not None or any(main.match(name) is not None for main in mains)

    def header(self) -> dict[str, TensorInfo]:
        """What files of this model hold."""
        bare = self.head in ("none", "pooler")
        return target_names(self.spec, "hf", self.fields, self.native, bare=bare)

    def first(self, name: str) -> Place:
        info, step, n = self.find(name)
        return self.places(step, n, info.shape)[0]

    def places(self, step: PlanStep, n: int, shape: tuple[int, ...]) -> list[Place]:
        """The native matrices that hold a matrix on disk."""
        if step.transform is None:
            first, second = (torch.arange(length) for length in shape)
            return [Place(step.targets[n], None, (0, first), (1, second))]
        key = id(step.transform), n
        if key not in self._maps:
            self._maps[key] = list(_carried(step, n))
        return [e._replace(native=step.targets[int(e.native)]) for e in self._maps[key]]


def _carried(step: PlanStep, n: int) -> Iterator[Place]:
    """By numbers that are carried through the step: which tensor, and the coordinates in it.

    Targets are named by their number: all uses of one rule have the same places.
    """
    assert step.transform is not None

    def matrices(arrays: list[Tensor]) -> list[Tensor]:
        return [x.reshape(-1, *x.shape[-2:]) for x in arrays]

    along = [matrices(step.transform.coordinates(axis)) for axis in (0, 1)]
    for target, which in enumerate(matrices(step.transform.owners())):
        stacked = step.transform.target_shape(_ref(step, target))
        for at, here in enumerate(which):
            if not bool((here == n).any()):
                continue
            found = [_axis(axis, x[target][at]) for axis, x in enumerate(along)]
            rows = next((f[1] for f in found if f is not None and f[0] == 0), None)
            columns = next((f[1] for f in found if f is not None and f[0] == 1), None)
            if rows is None or columns is None or not bool((here == n).all()) or len(stacked) > 3:
                raise PlanError(
                    f"{step.rule}: a row of {step.targets[target]} is no row or column of "
                    f"{step.sources[n]}, so factors of the one are none of the other"
                )
            yield Place(str(target), at if len(stacked) == 3 else None, rows, columns)


def _ref(step: PlanStep, target: int) -> Any:
    """The side of the rule that a target is of."""
    assert step.transform is not None
    refs = [r for r in step.rule.targets for _ in step.transform.grid(step.rule.spread(r))]
    return refs[target]


def _axis(axis: int, numbers: Tensor) -> tuple[int, tuple[int, Tensor]] | None:
    """(which of two axes such coordinates run along, (the axis on disk, the coordinates))."""
    if bool((numbers == numbers[:, :1]).all()):
        return 0, (axis, numbers[:, 0].long())
    if bool((numbers == numbers[:1]).all()):
        return 1, (axis, numbers[0].long())
    return None


def on_disk(step: PlanStep, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(step.sources, backward(step, native), strict=True))
