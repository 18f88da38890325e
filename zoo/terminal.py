"""Colour and progress where a person looks on; plain lines where a file or a program does."""

import os
from typing import TextIO

GREEN, RED, DIM, BOLD = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[1m"
_OFF, _WIPE = "\x1b[0m", "\r\x1b[K"


def has_colour(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, colour: bool = True) -> str:
    return f"{style}{text}{_OFF}" if colour and style else text


def passing(text: str, stream: TextIO) -> None:
    """A line that the next one replaces; nothing where nobody watches."""
    if stream.isatty():
        print(f"{_WIPE}{text}", end="", file=stream, flush=True)
