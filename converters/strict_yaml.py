"""Read YAML as plain data; a duplicate key is an error."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from zoo.errors import ZooError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Strict(_Loader):
    """The safe loader, which refuses duplicate keys instead of keeping the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector while many objects are made that stay.

    Beside torch's objects each of its passes takes longer than what it is called from.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def parse_yaml(text: str, where: str, error: type[ZooError]) -> Any:
    """Parse YAML into plain data; `error` is raised with the line of what is wrong."""
    try:
        with collector_paused():
            return _Strict(text).get_single_data()
    except yaml.MarkedYAMLError as fault:
        line = fault.problem_mark.line + 1 if fault.problem_mark else "?"
        raise error(f"{where}: line {line}: {fault.problem}") from None
    except yaml.YAMLError as fault:
        raise error(f"{where}: {' '.join(str(fault).split())}") from None


def read_yaml(path: Path, error: type[ZooError]) -> Any:
    """Parse a YAML file into plain data; `error` names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{path.parent.name}/{path.name}: {fault}") from None
    return parse_yaml(text, f"{path.parent.name}/{path.name}", error)
