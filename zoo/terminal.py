"""Color and progress on a terminal; plain lines in a file or a pipe."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

GREEN, RED, DIM, BOLD = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[1m"
_OFF, _WIPE = "\x1b[0m", "\r\x1b[K"
_STYLE = re.compile(f"({'|'.join(map(re.escape, (GREEN, RED, DIM, BOLD, _OFF)))})")


class Escaped:
    """A stream for reports. Names come from files: `escape` makes their control characters visible.

    Colors of `paint` pass, where the stream below shows them.
    """

    def __init__(self, stream: TextIO, escape: Callable[[str], str]) -> None:
        self.unescaped, self._escape = stream, escape

    def write(self, text: str) -> int:
        """Write the text with control characters escaped; our own colors pass on a terminal."""
        if text.isprintable() or text == "\n":
            return self.unescaped.write(text)
        # nothing but our own colors passes, and only where they are shown
        parts = _STYLE.split(text) if has_color(self.unescaped) else [text]
        escaped = (part if n % 2 else self._escape(part) for n, part in enumerate(parts))
        self.unescaped.write("".join(escaped))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: Any) -> Any:
    """Return the stream below `Escaped`, to move the cursor on it."""
    return stream.unescaped if isinstance(stream, Escaped) else stream


def has_color(stream: TextIO) -> bool:
    """Whether colors may be written: on a terminal that has them, unless NO_COLOR is set."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, color: bool = True) -> str:
    """Put the text into a style such as `GREEN`, unless `color` is False."""
    return f"{style}{text}{_OFF}" if color and style else text


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Rows as aligned columns; those numbered in `right` are aligned on their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def passing(text: str, stream: TextIO) -> None:
    """Show a line that the next one replaces; nothing if the stream is no terminal."""
    if stream.isatty():
        unescaped(stream).write(_WIPE)
        print(text, end="", file=stream, flush=True)
