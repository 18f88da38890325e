"""Which config fields the reference declares or reads; any other cannot change what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from converters.strict_yaml import read_yaml
from zoo.errors import SpecError, did_you_mean

PATH = Path(__file__).with_suffix(".yaml")
SHARED, ROPE = "every model", "rope"  # lists that belong to no single architecture
INNER = ("rope_parameters", "rope_scaling")  # objects whose keys the list `rope` holds
_ALIKE = 0.8  # of a name's letters: n_haed for n_head


@cache
def reference_fields() -> dict[str, frozenset[str]]:
    return {name: frozenset(fields) for name, fields in read_yaml(PATH, SpecError).items()}


def cannot_matter(field: str, known: Iterable[str], beside: Mapping[str, Any]) -> bool:
    """Whether a field is neither one of the `known` nor one of them misspelt.

    A name that is close to a known field which stands `beside` it is no misspelling of that.
    """
    known = set(known)
    return field not in known and not did_you_mean(field, known - beside.keys(), _ALIKE)
