"""JSON read to the letter: no duplicate keys, no NaN, bounded in size and depth."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from converters.formats import open_regular
from zoo.errors import ConfigError, ResourceLimit, ZooError, listing

MAX_BYTES = 64 << 20  # the index of a trillion-parameter model has 10 MB, Gemma 3's tokenizer 33
MAX_MEMORY = 64 << 20  # beyond the file itself, for its text and all objects made of it
MAX_DEPTH = 64
# What Python takes for what a byte may begin: a list that holds one thing; a key, its pair while
# the object is read, and its entry; a slot in a list; half of a short text.
_COSTS = {b"[": 88, b"{": 88, b":": 136, b",": 40, b'"': 32}
_TWO_BYTES, _FOUR_BYTES = re.compile(rb"[\xc4-\xef]"), re.compile(rb"[\xf0-\xff]")


class DuplicateKeys(ValueError):
    """Keys that stand twice in one object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: a dict, or DuplicateKeys."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(name for name, _ in pairs)
    twice = sorted(name for name, count in counts.items() if count > 1)
    raise DuplicateKeys(listing(repr(name) for name in twice))


def memory_of(data: bytes) -> int:
    """An upper bound, without building any of them, of the bytes that JSON's objects take."""
    return sum(data.count(byte) * cost for byte, cost in _COSTS.items())


def _check_memory(data: bytes, where: str, most: int) -> None:
    """ResourceLimit where the text and what is parsed of it would take more than `most` bytes."""
    width = 4 if _FOUR_BYTES.search(data) else 2 if _TWO_BYTES.search(data) else 1
    escaped = 4 if b"\\u" in data else width
    # the file's own bytes are gone once the text is there
    memory = (width + escaped - 1) * len(data) + memory_of(data)
    if memory > most:
        raise ResourceLimit(
            f"{where}: {len(data)} bytes of JSON that would take some {memory >> 20} MB of memory, "
            f"of at most {most >> 20} MB"
        )


class _NotANumber:
    """Marks the place of a NaN or Infinity, so that the walk can name its field."""

    def __init__(self, text: str) -> None:
        self.text = text


def read_json(path: Path, error: type[ZooError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file; whatever a strict reading refuses is `error`, naming the field."""
    return _as(dict, _parse(read_text(path, error), str(path), error), str(path), error)


def read_json_list(path: Path, error: type[ZooError] = ConfigError) -> list[Any]:
    """Likewise, of a file that holds a list."""
    return _as(list, _parse(read_text(path, error), str(path), error), str(path), error)


def parse_json(
    data: bytes, where: str, error: type[ZooError] = ConfigError, most: int = MAX_MEMORY
) -> dict[str, Any]:
    """The object that `data` spells, `where` being its name in messages.

    Raises:
        ResourceLimit: it would take more than `most` bytes of memory; nothing is built then.
    """
    _check_memory(data, where, most)
    return _as(dict, _parse(_decoded(data, where, error), where, error), where, error)


def read_text(path: Path, error: type[ZooError] = ConfigError) -> str:
    """Return the text of a JSON file within the bounds of size and memory, for `parse_json`."""
    fd = open_regular(path)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > MAX_BYTES:
            raise ResourceLimit(f"{path}: {size} bytes, of at most {MAX_BYTES} in such a file")
        data = file.read(MAX_BYTES + 1)
    _check_memory(data, str(path), MAX_MEMORY)
    return _decoded(data, str(path), error)


def _as(kind: type, found: Any, where: str, error: type[ZooError]) -> Any:
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise error(f"{where}: holds {type(found).__name__} where {wanted} is expected")
    return found


def _decoded(data: bytes, where: str, error: type[ZooError]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 at byte {problem.start}") from None


def _parse(text: str, where: str, error: type[ZooError]) -> Any:
    found: Any = None
    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=_NotANumber)
    except DuplicateKeys as problem:
        raise error(f"{where}: keys that stand twice in one object: {problem}") from None
    except RecursionError:
        _too_deep(where, error)
    except ValueError as problem:  # not JSON, or an integer of thousands of digits
        raise error(f"{where}: not JSON: {problem}") from None
    if isinstance(found, dict | list) and (problems := _walk(found, where, error)):
        raise error(f"{where}: {listing(problems)}")
    return found


def _too_deep(where: str, error: type[ZooError]) -> NoReturn:
    raise error(f"{where}: nested deeper than {MAX_DEPTH} levels")


def _walk(found: dict[str, Any] | list[Any], where: str, error: type[ZooError]) -> list[str]:
    """What Python's parser takes and JSON does not have, with the path of its field."""
    problems = []
    level: list[tuple[str, Any]] = [("", found)]
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                kind = type(item)
                if kind is dict or kind is list:
                    below.append((f"{path}{key}.", item))
                elif kind is _NotANumber:
                    problems.append(f"field {path}{key} is {item.text}")
                elif kind is float and not math.isfinite(item):
                    problems.append(f"field {path}{key} is too large for a float")
                elif kind is str and not _encodable(item):
                    problems.append(f"field {path}{key} holds half a surrogate pair")
                if type(key) is str and not _encodable(key):
                    problems.append(f"field {path}{key!r} has half a surrogate pair in its name")
        if not below:
            return problems
        level = below
    _too_deep(where, error)


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
