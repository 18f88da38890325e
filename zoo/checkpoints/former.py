"""Native configs written by earlier versions, whose fields had other names."""

from collections.abc import Collection, Mapping
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
# fields that only one family member has now, and the value with which every member wrote them
UNUSED = {"dual_chunk": None, "repeat": False}


def current_fields(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Rename fields to those of a config that has `names`; drop unused ones that it lacks.

    A field that is neither renamed nor unused stays, so that the config refuses it by name.
    """
    current = {
        RENAMED[name] if name not in names and name in RENAMED else name: value
        for name, value in fields.items()
    }
    return {
        name: value
        for name, value in current.items()
        if name in names or name not in UNUSED or value != UNUSED[name]
    }
