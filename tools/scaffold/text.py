"""YAML as text: values on one line, and new entries in registry.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "unguessed:"  # marks what a person has to complete


def flow(value: Any) -> str:
    """Return YAML on one line; floats have a point, and strings are quoted if necessary."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float):
        digits = repr(value)
        return digits if "." in digits or "e" not in digits else digits.replace("e", ".0e", 1)
    if isinstance(value, str):
        reserved = value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
        if re.fullmatch(r"[A-Za-z_][\w ./+-]*", value) and not reserved and value == value.strip():
            return value
    return json.dumps(value, ensure_ascii=False)


def quoted(text: str) -> str:
    """Return a key or value, quoted unless YAML reads it as the same string."""
    plain = text[0] not in "{}[]\"'&*!|>%@`,#?-" and ": " not in text and " #" not in text
    return text if plain else json.dumps(text, ensure_ascii=False)


def shortened(value: Any, most: int = 40) -> str:
    text = flow(value)
    return text if len(text) <= most else f"{text[:most]}…"


def inserted(text: str, section: str, name: str, block: Sequence[str]) -> str:
    """Insert `block` after the last entry of a section; it replaces an entry of that name."""
    lines = text.splitlines()
    at = next(k for k, line in enumerate(lines) if re.match(rf"{section}\s*:", line))
    tops = [k for k in range(at + 1, len(lines)) if re.match(r"[^\s#]", lines[k])]
    end = tops[0] if tops else len(lines)
    body: list[str] = []
    inside = False
    for line in lines[at + 1 : end]:
        if re.match(r"  \S", line) or re.match(r"\S", line):
            inside = section != "checkpoints" and line.startswith(f"  {name}:")
        if not (inside and line.strip()) and not (MARK in line and line in block):
            body.append(line)
    last = max((k for k, line in enumerate(body) if re.match(r"\s+\S", line)), default=-1)
    body[last + 1 : last + 1] = block
    opening = re.sub(r":\s*\{\s*\}", ":", lines[at])
    return "\n".join([*lines[:at], opening, *body, *lines[end:]]) + "\n"
