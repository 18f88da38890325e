"""One finding of a diagnosis: what is wrong, where, the evidence, and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zoo.diagnosis.checkup.opened import group
from zoo.diagnosis.checkup.statistics import Numbers
from zoo.errors import listing

_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """`where` holds names in the file. `likely` is between 0 and 1 and orders findings."""

    what: str
    where: tuple[str, ...]
    seen: str
    likely: float
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "where": list(self.where)}


def about(what: str, arrays: Sequence[Numbers], seen: str, likely: float, fix: str = "") -> Finding:
    """Return a finding about arrays; `{}` in `what` stands for their names."""
    return Finding(what.format(called(arrays)), files_of(arrays), seen, likely, fix)


def files_of(numbers: Iterable[Numbers]) -> tuple[str, ...]:
    """Return the names of several arrays in the files, each once."""
    return tuple(dict.fromkeys(name for n in numbers for name in n.array.files))


def counted(names: Sequence[str]) -> str:
    """Return how many tensors there are, as text."""
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def called(numbers: Iterable[Numbers]) -> str:
    """`blocks.*.attn.q.weight of layers 1, 3`: families, and which of their layers."""
    names = []
    for family, each in group(numbers, lambda n: n.array.family).items():
        layers = listing([str(n.array.layer) for n in each], 6)
        names.append(each[0].name if len(each) == 1 else f"{family} of layers {layers}")
    return listing(names, _SHOWN)


def families_of(numbers: Iterable[Numbers]) -> dict[str, list[Numbers]]:
    """Group the arrays of layers: those that differ by the layer's number alone."""
    return group((n for n in numbers if n.array.layer is not None), lambda n: n.array.family)
