"""Color and progress on a terminal; plain lines in a file or a pipe."""

import os
import re
from typing import Any, TextIO

from zoo.errors import printable

GREEN, RED, DIM, BOLD = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[1m"
_OFF, _WIPE = "\x1b[0m", "\r\x1b[K"
_STYLE = re.compile(f"({'|'.join(map(re.escape, (GREEN, RED, DIM, BOLD, _OFF)))})")


class Escaped:
    """A stream for reports. Names come from files: their control characters are shown escaped."""

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        """Write the text with control characters escaped; our own colors pass on a terminal."""
        if text.isprintable() or text == "\n":
            return self.unescaped.write(text)
        # nothing but our own colors passes, and only where they are shown
        parts = _STYLE.split(text) if has_color(self.unescaped) else [text]
        escaped = (part if n % 2 else printable(part) for n, part in enumerate(parts))
        self.unescaped.write("".join(escaped))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: Any) -> Any:
    """The stream below `Escaped`, for what moves the cursor and escapes names itself."""
    return stream.unescaped if isinstance(stream, Escaped) else stream


def has_color(stream: TextIO) -> bool:
    """Whether colors may be written: on a terminal that has them, unless NO_COLOR is set."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, color: bool = True) -> str:
    """The text in a style, where `color` is true."""
    return f"{style}{text}{_OFF}" if color and style else text


def passing(text: str, stream: TextIO) -> None:
    """Print a line that the next one replaces; nothing where the stream is no terminal."""
    if stream.isatty():
        print(f"{_WIPE}{printable(text)}", end="", file=unescaped(stream), flush=True)
