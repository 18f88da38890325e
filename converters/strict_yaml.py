"""YAML as plain data; a key that occurs twice is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zoo.errors import ZooError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Strict(_Loader):
    """The safe loader, which by itself would let the last of two equal keys win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str, error: type[ZooError]) -> Any:
    """Return the data in `text`; raise `error` with the line of any fault."""
    try:
        return _Strict(text).get_single_data()
    except yaml.MarkedYAMLError as fault:
        line = fault.problem_mark.line + 1 if fault.problem_mark else "?"
        raise error(f"{where}: line {line}: {fault.problem}") from None
    except yaml.YAMLError as fault:
        raise error(f"{where}: {' '.join(str(fault).split())}") from None


def read_yaml(path: Path, error: type[ZooError]) -> Any:
    """Return the data in a YAML file; raise `error` with the line of any fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{path.name}: {fault}") from None
    return parse_yaml(text, path.name, error)
