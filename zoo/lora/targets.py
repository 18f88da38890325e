"""Target modules: which native matrices hold the weight of one of the reference's modules.

The answer follows from the rules of the architecture's spec.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from converters.carry_out import backward
from converters.formats import TensorInfo
from converters.plan import Native, Plan, PlanStep, make_plan, target_names
from converters.spec import Dialect
from zoo.checkpoints.plan_by_names import spec_of
from zoo.errors import PlanError, SpecError, did_you_mean, option


class TargetMatrix(NamedTuple):
    """A native matrix, or one of a stack, that is part of a matrix on disk.

    `rows` and `columns` say which indices of the matrix on disk they are, and along which axis.
    """

    native: str
    at: int | None  # the index in a stack
    rows: tuple[int, Tensor]  # (axis on disk, indices along it)
    columns: tuple[int, Tensor]


class TargetIndex:
    """The reference's names, with and without the prefix, and the native matrices behind them."""

    def __init__(self, model: Any, native: Native) -> None:
        self.spec = spec_of(model)
        self.dialect: Dialect = self.spec.dialect("hf")
        self.fields, self.head, self.native = model.config.to_dict(), model.config.head, native
        self._at: dict[str, tuple[Plan, PlanStep, int]] = {}
        self._maps: dict[tuple[int, int], list[TargetMatrix]] = {}
        # of two tied names each is adapted separately
        every = {**native.shapes, **{n: native.shapes[of] for n, of in native.ties.items()}}
        try:
            self._learn(Native(every, {}))
        except SpecError:  # no file has some of these names
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
        """(tensor on disk, the step that reads it, its number among the step's tensors)."""
        prefix = self.dialect.prefix
        bare = name.removeprefix(prefix) if prefix else name
        forms = [name, bare]
        for legacy, modern in (*self.dialect.aliases, *self.dialect.tied):
            forms += [modern.format(b) for f in (name, bare) if (b := legacy.match(f)) is not None]
        entry = next((self._at[form] for form in forms if form in self._at), None)
        if entry is None:
            near = did_you_mean(bare, self._at)
            if any(rule.source.name.match(bare) is not None for rule in self.dialect.heads):
                near = f" It belongs to another head than {self.head}: pass {option('head', ...)}"
            raise PlanError(f"{name}: the model has no tensor of that name.{near}")
        plan, step, n = entry
        return plan.header[step.sources[n]], step, n

    def main(self, name: str) -> str | None:
        """The main name of a tied array, for one of its other names."""
        for other, main in self.dialect.tied:
            for form in (name, name.removeprefix(self.dialect.prefix)):
                if (binding := other.match(form)) is not None:
                    return main.format(binding)
        return None

    def is_shared(self, name: str) -> bool:
        """Whether several modules of the reference share this array."""
        mains = (main for _, main in self.dialect.tied)
        return self.main(name) is not None or any(main.match(name) is not None for main in mains)

    def header(self) -> dict[str, TensorInfo]:
        """The tensors that files of this model contain."""
        bare = self.head in ("none", "pooler")
        return target_names(self.spec, "hf", self.fields, self.native, bare=bare)

    def first(self, name: str) -> TargetMatrix:
        """The first native matrix behind a name."""
        info, step, n = self.find(name)
        return self.matrices(step, n, info.shape)[0]

    def matrices(self, step: PlanStep, n: int, shape: tuple[int, ...]) -> list[TargetMatrix]:
        """The native matrices that a matrix on disk becomes."""
        if step.transform is None:
            first, second = (torch.arange(length) for length in shape)
            return [TargetMatrix(step.targets[n], None, (0, first), (1, second))]
        key = id(step.transform), n
        if key not in self._maps:
            self._maps[key] = list(_carried(step, n))
        return [e._replace(native=step.targets[int(e.native)]) for e in self._maps[key]]


def _carried(step: PlanStep, n: int) -> Iterator[TargetMatrix]:
    """Carry coordinates through a step to see which native rows and columns they become.

    Matrices are named by their numbers, so that the result holds for all uses of one rule.
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
            axes = [_axis(axis, x[target][at]) for axis, x in enumerate(along)]
            rows = next((f[1] for f in axes if f is not None and f[0] == 0), None)
            columns = next((f[1] for f in axes if f is not None and f[0] == 1), None)
            if rows is None or columns is None or not bool((here == n).all()) or len(stacked) > 3:
                raise PlanError(
                    f"{step.rule}: a row of {step.targets[target]} is no row or column of "
                    f"{step.sources[n]}, so low-rank factors cannot be mapped"
                )
            yield TargetMatrix(str(target), at if len(stacked) == 3 else None, rows, columns)


def _ref(step: PlanStep, target: int) -> Any:
    """The reference in the rule that a target comes from."""
    assert step.transform is not None
    refs = [r for r in step.rule.targets for _ in step.transform.grid(step.rule.spread(r))]
    return refs[target]


def _axis(axis: int, numbers: Tensor) -> tuple[int, tuple[int, Tensor]] | None:
    """(native axis along which coordinates vary, (axis on disk, coordinates)), or None."""
    if bool((numbers == numbers[:, :1]).all()):
        return 0, (axis, numbers[:, 0].long())
    if bool((numbers == numbers[:1]).all()):
        return 1, (axis, numbers[0].long())
    return None


def on_disk(step: PlanStep, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on disk of a step, from native arrays."""
    return dict(zip(step.sources, backward(step, native), strict=True))
