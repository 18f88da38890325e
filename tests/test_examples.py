"""The examples in docstrings of public names and verbs do what they say."""

import doctest
import inspect
from typing import Any

import pytest

import zoo
from zoo import verbs

TARGETS = {
    **{f"zoo.{name}": target for name, target in zoo.PUBLIC.items() if ":" in target},
    **{f"Model.{name}": target.strip("@()") for name, target in zoo.VERBS.items()},
}


def examples(target: str) -> list[doctest.DocTest]:
    value: Any = verbs.resolve(*target.split(":"))
    if not inspect.isfunction(value):
        return []
    tests = doctest.DocTestFinder(recurse=False).find(value, globs={})
    return [test for test in tests if test.examples]


WITH_EXAMPLES = {name: tests for name, target in TARGETS.items() if (tests := examples(target))}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_an_example_does_what_it_says(name: str, in_tmp: object) -> None:
    for test in WITH_EXAMPLES[name]:
        outcome = doctest.DocTestRunner().run(test)
        assert outcome.failed == 0 and outcome.attempted > 0


def test_what_every_user_calls_first_has_an_example() -> None:
    assert {"zoo.load", "zoo.info", "zoo.list", "Model.from_pretrained"} <= WITH_EXAMPLES.keys()
