"""Limits on a tokenizer.json: how much its steps may lengthen a text, and which patterns they try.

Normalizer, pre-tokenizer and decoder are chains of steps, and each may make a text longer: thirty
that double it turn one character into a billion. So the worst growth of each step is multiplied
before `tokenizers` reads the file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

from converters.strict_regex import why_slow

MOST_GROWTH = 256  # some published files have 8
MOST_STEPS = 64
MOST_TEMPLATE = 1024  # special tokens around a text
LONGEST_WORD = 1000  # characters; WordPiece tries all substrings of a word; usually 100
_CHAINS = ("normalizers", "pretokenizers", "decoders", "processors")
# steps that write a character as several: the first one grows as Unicode does, later ones may again
_FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Precompiled": 18, "Lowercase": 2}
_SPELLINGS = {"BertNormalizer": 3, "ByteLevel": 2, "Metaspace": 2}
_CERTAIN = re.compile(
    r"(?:\\[sSdDwW]|\\p\{\w+\}|\[\^?[^\]\[\\]+\]|[^\\.*+?{}()|\[\]^$])(?:\+|\{[1-9],?\d?\})?"
)


def check_steps(data: Mapping[str, Any]) -> None:
    """Raise ValueError if a text could grow beyond the limit, or a pattern take forever."""
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        growth, seen = 1.0, set[str]()
        for name in names:
            steps = list(_steps(data.get(name)))
            if len(steps) > MOST_STEPS:
                raise ValueError(f"{name}: expected at most {MOST_STEPS} steps, found {len(steps)}")
            for step in steps:
                growth *= _growth(step, name, seen)
                if growth > MOST_GROWTH:
                    raise ValueError(f"{name}: makes a text more than {MOST_GROWTH} times as long")
    for step in _steps(data.get("post_processor")):
        _check_template(step)
    model = data.get("model")
    word = model.get("max_input_chars_per_word") if isinstance(model, dict) else None
    if isinstance(word, int) and word > LONGEST_WORD:
        raise ValueError(
            f"model.max_input_chars_per_word: expected at most {LONGEST_WORD}, found {word}"
        )


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """Each step of a chain, in order."""
    if not isinstance(step, dict):
        return
    inner = [each for key in _CHAINS if isinstance(step.get(key), list) for each in step[key]]
    if not inner:
        yield step
    for each in inner:
        yield from _steps(each)


def _growth(step: Mapping[str, Any], name: str, seen: set[str]) -> float:
    """By which factor a step may lengthen a text; a slow pattern in it is refused."""
    kind, pattern = str(step.get("type")), step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str) and (why := why_slow(regex)):
        raise ValueError(f"{name}: the pattern {regex[:60]!r} {why}")
    content = step.get("content")
    if kind == "Replace" and isinstance(content, str):
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            return max(
                1.0,
                len(content.encode("utf-8", "replace")) / len(literal.encode("utf-8", "replace")),
            )
        return max(1, len(content)) if regex and _CERTAIN.fullmatch(regex) else 1 + len(content)
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    if kind not in _FORMS and kind not in _SPELLINGS:
        return 1
    first = "form" if kind in _FORMS else "spelling"
    growth: float = 1 if first not in seen else (_FORMS | _SPELLINGS)[kind]
    seen.add(first)
    if kind == "Precompiled":
        longest = _longest_text(step.get("precompiled_charsmap"))
        if longest > _FORMS[kind]:  # not one of Unicode's tables, whose first use is not counted
            growth = longest
    return growth


def _longest_text(table: Any) -> int:
    """The length of the longest text that a table writes for a character."""
    data = base64.b64decode(table) if isinstance(table, str) else b""
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0"))


def _check_template(step: Mapping[str, Any]) -> None:
    special = step.get("special_tokens")
    if not isinstance(special, dict):
        return
    sizes = {
        name: len(token["ids"])
        for name, token in special.items()
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    for key in ("single", "pair"):
        pieces = step.get(key)
        named = [p.get("SpecialToken") for p in pieces or () if isinstance(p, dict)]
        ids = sum(sizes.get(str(p.get("id")), 1) for p in named if isinstance(p, dict))
        if ids > MOST_TEMPLATE:
            raise ValueError(
                f"post_processor.{key}: expected at most {MOST_TEMPLATE} special tokens, "
                f"found {ids}"
            )
