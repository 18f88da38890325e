"""What commands print: tables, sizes, JSON; and the texts that they read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import InputError
from zoo.terminal import passing


def indent(text: str, by: int = 2) -> str:
    """The text with spaces before each line."""
    return "\n".join(" " * by + line for line in text.splitlines())


def short_count(count: int) -> str:
    """1.2B or 124M."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def size(count: int) -> str:
    """137.97 GB; below a thousand, bytes."""
    for unit, each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= each:
            return f"{count / each:,.2f} {unit}"
    return f"{count} bytes"


def first_and_last(names: Sequence[str]) -> str:
    """All of a few names; of many the first and the last."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]}"


def visible(token: str) -> str:
    """A token as a table shows it."""
    return token if token.isprintable() else repr(token)


def to_json(data: Any, indent: int | None = 2) -> str:
    """JSON that standard output can write, and that no terminal obeys."""
    # what cannot be written would be so as Python does it, and be no JSON
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    if text.isprintable():
        return text
    # JSON allows more than a terminal should get
    escaped = (c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    return "".join(escaped)


def show_progress(done: int, count: int, name: str) -> None:
    """One line on standard error, gone when all is done."""
    passing(f"{done + 1}/{count} {name}" if done < count else "", sys.stderr)


def read_text(file: str) -> str:
    """The text in a file, or in standard input for "-".

    Raises:
        InputError: There is no such file, it is empty, or it is not UTF-8.
    """
    from zoo.checkpoints.path_reference import is_path, near_path

    if file == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    if not is_path(file):
        raise InputError(f"{file!r}: no file has such a name")
    if file != "-" and not Path(file).exists():
        near = near_path(file)
        raise InputError(f"{file}: no such file{near and '.' + near}")
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    where = "standard input" if file == "-" else file
    if not data:
        raise InputError(f"{where}: is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None


def lines_of(text: str) -> list[str]:
    """Lines as editors count them; a line separator of Unicode is part of a text."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
