"""Config fields that the reference declares or reads; any other field changes no result."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path

from converters.strict_yaml import read_yaml
from zoo.errors import SpecError, did_you_mean

PATH = Path(__file__).with_suffix(".yaml")
SHARED, ROPE = "every model", "rope"  # lists that belong to no single architecture
INNER = ("rope_parameters", "rope_scaling")  # objects whose keys the list `rope` holds
_ALIKE = 0.8  # share of equal letters: n_haed for n_head
# published names that resemble a field and are not misspelled
_NOISE = frozenset(
    {
        "sliding_window_size",  # gemma-2-9b has it beside sliding_window
        *("attention_probs_dropout_prob", "hidden_dropout_prob"),  # gpt-neox-20b, in BERT's words
    }
)


@cache
def reference_fields() -> dict[str, frozenset[str]]:
    """Return the names of config fields, by architecture and shared list."""
    return {name: frozenset(fields) for name, fields in read_yaml(PATH, SpecError).items()}


def cannot_matter(field: str, names: Collection[str]) -> bool:
    """Return whether a field is none of `names` and no misspelling of one."""
    return field not in names and (field in _NOISE or not did_you_mean(field, names, _ALIKE))
