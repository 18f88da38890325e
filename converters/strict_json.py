"""JSON read strictly: no duplicate keys, no NaN, limited size and depth."""

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
# Bytes of memory that Python takes for what each byte may begin: a list with one element; a key
# with its pair during parsing and its entry; a slot in a list; half of a short text.
_COSTS = {b"[": 88, b"{": 88, b":": 136, b",": 40, b'"': 32}
_TWO_BYTES, _FOUR_BYTES = re.compile(rb"[\xc4-\xef]"), re.compile(rb"[\xf0-\xff]")


class DuplicateKeys(ValueError):
    """Keys that occur twice in one object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict, or raise DuplicateKeys: an `object_pairs_hook`."""
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    counts = Counter(name for name, _ in pairs)
    twice = sorted(name for name, count in counts.items() if count > 1)
    raise DuplicateKeys(listing(repr(name) for name in twice))


def memory_of(data: bytes) -> int:
    """Return an upper bound of the bytes that the parsed objects take, without parsing."""
    return sum(data.count(byte) * cost for byte, cost in _COSTS.items())


def _check_memory(data: bytes, where: str, most: int) -> None:
    """Raise ResourceLimit if text and parsed objects would take more than `most` bytes."""
    width = 4 if _FOUR_BYTES.search(data) else 2 if _TWO_BYTES.search(data) else 1
    escaped = 4 if b"\\u" in data else width
    # the file's own bytes are freed once it is decoded
    memory = (width + escaped - 1) * len(data) + memory_of(data)
    if memory > most:
        raise ResourceLimit(
            f"{where}: {len(data)} bytes of JSON that would take some {memory >> 20} MB of memory, "
            f"of at most {most >> 20} MB"
        )


class _NotANumber:
    """A placeholder for NaN or Infinity, so that the walk can name its field."""

    def __init__(self, text: str) -> None:
        self.text = text


def read_json(path: Path, error: type[ZooError] = ConfigError) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        error: Raised for everything that strict reading refuses, with the field's name.

    Raises:
        ResourceLimit: If the file or its objects would be too large.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "config.json")
        >>> _ = path.write_text('{"layers": 2}')
        >>> read_json(path)
        {'layers': 2}
    """
    return _as(dict, _parse(read_text(path, error), str(path), error), str(path), error)


def read_json_list(path: Path, error: type[ZooError] = ConfigError) -> list[Any]:
    """Like `read_json`, for a file that holds a list."""
    return _as(list, _parse(read_text(path, error), str(path), error), str(path), error)


def parse_json(
    data: bytes, where: str, error: type[ZooError] = ConfigError, most: int = MAX_MEMORY
) -> dict[str, Any]:
    """Return the object that `data` encodes; `where` names it in messages.

    Raises:
        ResourceLimit: If it would take more than `most` bytes of memory; nothing is parsed then.
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
        data = file.read(size + 1)
        if len(data) > size:  # it grows, or its file system does not know its size
            data += file.read(MAX_BYTES + 1 - len(data))
            if len(data) > MAX_BYTES:
                raise ResourceLimit(f"{path}: grew beyond {MAX_BYTES} bytes while it was read")
    _check_memory(data, str(path), MAX_MEMORY)
    return _decoded(data, str(path), error)


def _as(kind: type, value: Any, where: str, error: type[ZooError]) -> Any:
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise error(f"{where}: holds {type(value).__name__} where {wanted} is expected")
    return value


def _decoded(data: bytes, where: str, error: type[ZooError]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 at byte {problem.start}") from None


def _parse(text: str, where: str, error: type[ZooError]) -> Any:
    data: Any = None
    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=_NotANumber)
    except DuplicateKeys as problem:
        raise error(f"{where}: duplicate keys in one object: {problem}") from None
    except RecursionError:
        _too_deep(where, error)
    except ValueError as problem:  # not JSON, or an integer of thousands of digits
        raise error(f"{where}: not JSON: {problem}") from None
    if isinstance(data, dict | list) and (problems := _walk(data, where, error)):
        raise error(f"{where}: {listing(problems)}")
    return data


def _too_deep(where: str, error: type[ZooError]) -> NoReturn:
    raise error(f"{where}: nested deeper than {MAX_DEPTH} levels")


def _walk(data: dict[str, Any] | list[Any], where: str, error: type[ZooError]) -> list[str]:
    """List what Python's parser accepts and JSON does not, with the path of each field."""
    problems = []
    level: list[tuple[str, Any]] = [("", data)]
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
