"""Regular expressions from files: refuse those that a backtracking matcher may be slow with.

Where a sequence fails, such a matcher tries every length of every unbounded repetition before the
position of the failure. So a pattern is accepted only if nothing that may fail follows the second
of two unbounded repetitions in a sequence, if repeated groups have one length, and if all other
choices of a sequence together are few. Matching at one character then takes time linear in the
text. All published pre-tokenizers that we know of are accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LONGEST = 1 << 13  # characters of a pattern
DEEPEST = 20  # groups in groups
_FEW = 16  # a repetition of at most so many does not count as unbounded
_CHOICES = 1 << 12  # ways to match one sequence, without its unbounded repetitions
_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}")
_OPENINGS = re.compile(r"\?(?:[ims-]*:|P?<[A-Za-z_]\w*>|(?P<looks><?[=!]))")
_FLAGS = re.compile(r"\(\?[ims-]+\)")
# no others, such as \\c, which includes the character behind it in some engines only
_ESCAPES = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}"
    r"|[sSdDwWbBAZzGnrtfvhH]|[^A-Za-z0-9])"
)
_ASSERTED = {"\\b", "\\B", "\\A", "\\Z", "\\z", "\\G"}  # match no character, and may fail


class _Slow(Exception):
    """The reason why a pattern is refused."""


@dataclass
class _Part:
    """A part that may be repeated: a group with alternatives, or a character."""

    alternatives: list[list[_Part]] | None = None
    asserts: bool = False
    least: int = 1
    most: int = 1
    many: bool = field(init=False, default=False)
    any: bool = False  # character of a line
    takes_line: bool = field(init=False, default=False)  # matches the rest of it

    def may_be_empty(self) -> bool:
        """Whether it always matches, if only the empty string."""
        if self.asserts:
            return False  # an assertion may fail
        inside = self.alternatives is not None and any(map(_may_be_empty, self.alternatives))
        return self.least == 0 or inside


def _may_be_empty(sequence: list[_Part]) -> bool:
    return all(part.may_be_empty() for part in sequence)


def why_slow(
    pattern: str, unbounded: int = 2, *, nested: bool = True, to_the_end: bool = False
) -> str:
    """Why a pattern is refused, or "" if it is accepted.

    Args:
        pattern: a regular expression.
        unbounded: after so many unbounded repetitions nothing may fail; 3 is fine for short texts.
        nested: whether `[` in a class opens another class, as in all engines but Python's.
        to_the_end: whether it has to match a whole text of one line, as if `$` followed.
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
        """The next character, or "" at the end."""
        return self.pattern[self.at : self.at + 1]

    def alternatives(self, depth: int) -> list[list[_Part]]:
        """Read sequences separated by `|`."""
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
        """Read a group, a class, an escape or a character."""
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
        """Read an escape."""
        escape = _ESCAPES.match(self.pattern, self.at)
        if escape is None:
            raise _Slow(f"has an escape of an unknown kind at character {self.at}")
        self.at = escape.end()
        return escape[0]

    def skip_class(self, depth: int) -> None:
        """Skip a class of characters."""
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
        """Read a repetition, if one follows a part."""
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
    """(unbounded repetitions up to its end, counting `before`; the number of choices in it).

    `last`: everything that follows may be empty.
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
