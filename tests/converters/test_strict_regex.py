"""Which regular expressions of a file are used: those that a backtracking matcher is quick with."""

import pytest

from converters.strict_regex import why_slow
from zoo.tokenizers.bytelevel import PATTERNS

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PUBLISHED = [
    *PATTERNS.values(),
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}|\p{{N}}{{1,3}}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}&&[^\p{{Han}}]]*{_LOWER}+{_ENDS}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"(?=(\d{3})+(?!\d))",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"^\s+|\s+$",
    " {2,}",
    "",
]
SLOW = {
    r"(a+)+$": "repeats a group that itself repeats",
    r"(a|a)*b": "repeats a group that itself repeats, or chooses",
    r"(.?){60}x": "repeats a group",
    r"(\w+\s?)*z": "repeats a group",
    r"((a{0,10}){0,10}){0,10}b": "repeats a group",
    r"(?>a*)*": "a group of an unknown kind",
    r"a*a*a*b": "all lengths of 3 repetitions",
    r"a*(a*c)?d*e": "all lengths of 2 repetitions",
    r"(?=a*a*b)": "all lengths of 2 repetitions",
    "a{1,100}b{1,100}c": "all lengths of 2 repetitions",
    ".?" * 40 + "b": "choose in more than 4096 ways",
    "(a|a)" * 30 + "b": "choose in more than 4096 ways",
    "a{0,9}" * 9 + "b": "choose in more than 4096 ways",
    "a**": "repeats a repetition",
    "a{2,9}+": "repeats a repetition",
    r"(.*)\1": "escape of an unknown kind",
    r"\c[(a+)+$]": "escape of an unknown kind",
    r"[\c[](a+)+$]]": "escape of an unknown kind",
    "[](a+)+$]": "begins with ]",
    "(?R)": "a group of an unknown kind",
    "(?x)#(\n(a+)+": "a group of an unknown kind",
    "(" * 99 + ")" * 99: "nests groups deeper",
    "[" * 99 + "a" + "]" * 99: "nests classes deeper",
    "a" * 9999: "has 9999 characters",
    "(": "without an end",
    "[a": "without an end",
    "a)": "closes a group",
}


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_are_used(pattern: str) -> None:
    assert why_slow(pattern) == ""


@pytest.mark.parametrize("pattern", SLOW, ids=lambda p: p[:20])
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    assert SLOW[pattern] in why_slow(pattern)


def test_a_bare_bracket_in_a_class_where_classes_do_not_nest() -> None:
    assert not why_slow("[[x](a+)+$|x]]")  # all of it is a class
    assert "a bare [" in why_slow("[[x](a+)+$|x]]", nested=False)  # Python's ends at the first ]


def test_short_texts_can_do_with_more_repetitions() -> None:
    assert why_slow(r".*layers\.\d+\.q_proj") and not why_slow(r".*layers\.\d+\.q_proj", 3)
