"""Native configs written by earlier versions, whose fields had other names."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "chosen": "experts_per_token",
    "distance": "max_distance",
    "looks": "position_terms",
    "offset": "positions_after_pad",
    "placed": "absolute_positions",
    "reach": "max_distance",
    "shared": "shared_projections",
    "twice": "repeat",
}
# fields that one family member has, and the default with which earlier versions wrote them for all
DEFAULTS = {"dual_chunk": None, "repeat": False}


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give fields of a zoo.json their present names; leave out those at their default that moved.

    A field that no config has any more stays, so that the config refuses it by name.
    """
    current = {RENAMED.get(name, name): value for name, value in fields.items()}
    return {n: value for n, value in current.items() if n not in DEFAULTS or value != DEFAULTS[n]}
