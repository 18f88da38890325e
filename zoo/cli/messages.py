"""Messages of the package, with the options that they name as the shell spells them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.errors import in_shell, option

_CALL = re.compile(r"(zoo\.\w+\([^)]*\))")  # an example in Python stays one
_VALUE = r"'[^']*'|\"[^\"]*\"|\{[^{}]*\}|\([^()]*\)|True|False|-?[\d.]+(?:e-?\d+)?"
_KEYWORD = re.compile(rf"(?<![\w.'\"-])(\w+)=({_VALUE})(?!\w)")
_ALSO = {"max_shard_size": "--shard"}  # keywords whose option has another name


def spellings(params: Iterable[Any]) -> dict[str, str]:
    """Keyword -> option of a command: {"top_p": "--top-p"}."""
    options = {p.name: p.opts[0] for p in params if p.param_type_name == "option"}
    return options | {
        name: spelled for name, spelled in _ALSO.items() if spelled in options.values()
    }


def in_shell_syntax(message: str, options: Mapping[str, str]) -> str:
    """`revision='x'` as `--revision x`, wherever a message names an option of the command.

    Example:
        >>> in_shell_syntax("head='lm': gpt2 has none", {"head": "--head"})
        '--head lm: gpt2 has none'
    """
    first, colon, rest = message.partition(":")
    if colon and first in options:
        message = f"{options[first]}:{rest}"
    parts = _CALL.split(message)
    return "".join(
        part if n % 2 else _KEYWORD.sub(lambda match: _spelled(match, options), part)
        for n, part in enumerate(parts)
    )


def _spelled(match: re.Match[str], options: Mapping[str, str]) -> str:
    name, text = match.groups()
    if name not in options:
        return match[0]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return match[0]
    token = in_shell.set(True)
    try:
        shown = option(name, value)
    finally:
        in_shell.reset(token)
    return shown.replace(f"--{name.replace('_', '-')}", options[name], 1)
