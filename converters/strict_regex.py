"""Regular expressions from files: only those that a backtracking matcher is quick with are used.

Where a sequence fails, such a matcher tries every length of every unbounded repetition before the
place where it failed. So of two unbounded repetitions in a sequence, nothing that may fail follows
the second; a group that is repeated has one length; and all other choices of a sequence together
are few. Trying a pattern at one character then takes time in proportion to the text. The published
pre-tokenizers that are known to us are so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LONGEST = 1 << 13  # characters of a pattern
DEEPEST = 20  # groups in groups
_FEW = 16  # a repetition of so many at most is no unbounded one
_CHOICES = 1 << 12  # ways in which one sequence may choose, its unbounded repetitions aside
_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}")
_OPENINGS = re.compile(r"\?(?:[ims-]*:|P?<[A-Za-z_]\w*>|(?P<looks><?[=!]))")
_FLAGS = re.compile(r"\(\?[ims-]+\)")
# no others, such as \\c, which takes the character behind it along in one engine and not in another
_ESCAPES = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}"
    r"|[sSdDwWbBAZzGnrtfvhH]|[^A-Za-z0-9])"
)
_ASSERTED = {"\\b", "\\B", "\\A", "\\Z", "\\z", "\\G"}  # match no character, and may fail


class _Slow(Exception):
    """A pattern that is not used; holds why."""


@dataclass
class _Part:
    """What is repeated: a character where it has no alternatives."""

    alternatives: list[list[_Part]] | None = None
    asserts: bool = False
    least: int = 1
    most: int = 1
    many: bool = field(init=False, default=False)
    any: bool = False  # character of a line
    takes_line: bool = field(init=False, default=False)  # all that is left of it

    def may_be_empty(self) -> bool:
        if self.asserts:
            return False  # it may fail, which is what counts
        inside = self.alternatives is not None and any(map(_may_be_empty, self.alternatives))
        return self.least == 0 or inside


def _may_be_empty(sequence: list[_Part]) -> bool:
    return all(part.may_be_empty() for part in sequence)


def why_slow(
    pattern: str, unbounded: int = 2, *, nested: bool = True, to_the_end: bool = False
) -> str:
    """Why a pattern is not used, or nothing.

    Args:
        unbounded: after so many unbounded repetitions nothing may fail; more do for short texts.
        nested: whether `[` in a class opens another one, as in all engines but Python's.
        to_the_end: whether it has to match all of a text of one line: `$` behind it may fail.
    """
    try:
        if len(pattern) > LONGEST:
            raise _Slow(f"has {len(pattern)} characters, of at most {LONGEST}")
        reader = _Reader(pattern, nested)
        alternatives = reader.alternatives(0)
        if reader.at < len(pattern):
            raise _Slow("closes a group that it does not open")
        for sequence in alternatives:
            if to_the_end and not (sequence and sequence[-1].takes_line):
                sequence.append(_Part(asserts=True))
            _check(sequence, 0, True, unbounded)
    except _Slow as why:
        return str(why)
    return ""


class _Reader:
    def __init__(self, pattern: str, nested: bool) -> None:
        self.pattern, self.nested, self.at = pattern, nested, 0

    def next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def alternatives(self, depth: int) -> list[list[_Part]]:
        if depth > DEEPEST:
            raise _Slow(f"nests groups deeper than {DEEPEST} levels")
        alternatives: list[list[_Part]] = [[]]
        while (character := self.next()) not in ("", ")"):
            if character == "|":
                self.at += 1
                alternatives.append([])
            else:
                part = self.part(depth)
                self.repeat(part)
                alternatives[-1].append(part)
        return alternatives

    def part(self, depth: int) -> _Part:
        character = self.next()
        if flags := _FLAGS.match(self.pattern, self.at):
            self.at = flags.end()
            return _Part([[]])
        if character == "(":
            self.at += 1
            opening = _OPENINGS.match(self.pattern, self.at)
            if opening is None and self.next() == "?":
                raise _Slow(f"has a group of an unknown kind at character {self.at}")
            self.at = opening.end() if opening else self.at
            inside = _Part(self.alternatives(depth + 1), bool(opening and opening["looks"]))
            if self.next() != ")":
                raise _Slow("has a group without an end")
            self.at += 1
            return inside
        if character == "[":
            self.skip_class(depth)
            return _Part()
        if character == "\\":
            return _Part(asserts=self.escape() in _ASSERTED)
        self.at += 1
        return _Part(asserts=character in "^$", any=character == ".")

    def escape(self) -> str:
        escape = _ESCAPES.match(self.pattern, self.at)
        if escape is None:
            raise _Slow(f"has an escape of an unknown kind at character {self.at}")
        self.at = escape.end()
        return escape[0]

    def skip_class(self, depth: int) -> None:
        if depth > DEEPEST:
            raise _Slow(f"nests classes deeper than {DEEPEST} levels")
        self.at += 1 + self.pattern.startswith("^", self.at + 1)
        if self.next() == "]":
            raise _Slow(f"has a class of characters that begins with ] at character {self.at}")
        while (character := self.next()) != "]":
            if character == "\\":
                self.escape()
            elif character == "[":
                if not self.nested:
                    raise _Slow(f"has a class of characters with a bare [ at character {self.at}")
                self.skip_class(depth + 1)
            elif character:
                self.at += 1
            else:
                raise _Slow("has a class of characters without an end")
        self.at += 1

    def repeat(self, part: _Part) -> None:
        character, counts = self.next(), _COUNTS.match(self.pattern, self.at)
        if character and character in "*+?":
            part.least, most = int(character == "+"), 1 if character == "?" else None
            self.at += 1
        elif counts is not None and (counts[1] or counts[3]):
            least, most = int(counts[1] or 0), int(counts[3]) if counts[3] else None
            part.least, self.at = least, counts.end()
            most = most if counts[2] else least
        else:
            return
        part.many = most is None or most > _FEW
        part.takes_line = part.any and most is None
        part.most = _FEW + 1 if most is None else most
        if character != "{" and self.next() and self.next() in "?+":
            self.at += 1  # as few as possible, or without going back
        if self.next() and self.next() in "*+?{":
            raise _Slow(f"repeats a repetition at character {self.at}")


def _check(sequence: list[_Part], before: int, last: bool, unbounded: int) -> tuple[int, int]:
    """(unbounded repetitions at its end, of `before`; the choices in it).

    `last`: all that follows may be empty.
    """
    choices = 1
    for n, part in enumerate(sequence):
        ends = last and _may_be_empty(sequence[n + 1 :])
        if before >= unbounded and not part.may_be_empty():
            raise _Slow(f"may try all lengths of {before} repetitions before it fails")
        if part.alternatives is not None:
            if part.most > 1 and not _has_one_length(part.alternatives):
                raise _Slow("repeats a group that itself repeats, or chooses")
            inside = 0 if part.least == 0 and ends else before
            checked = [_check(each, inside, ends, unbounded) for each in part.alternatives]
            before = before if part.asserts else max(before, *(after for after, _ in checked))
            choices *= sum(count for _, count in checked)
        if part.many:
            before += 1
        else:
            choices *= max(part.most - part.least, 0) + 1
        if choices > _CHOICES:
            raise _Slow(f"may choose in more than {_CHOICES} ways before it fails")
    return before, choices


def _has_one_length(alternatives: list[list[_Part]]) -> bool:
    return len(alternatives) == 1 and all(
        part.least == part.most
        and not part.many
        and (part.alternatives is None or _has_one_length(part.alternatives))
        for part in alternatives[0]
    )
