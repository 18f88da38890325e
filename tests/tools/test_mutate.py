"""The runner of mutation tests: which edits it makes, and that it judges by the tests."""

import sys
from pathlib import Path

import mutate
import pytest
from mutate import EQUIVALENT, KILLED, ROOT, SURVIVED, Cases, read_cases, sites

SOURCE = b'''"""A docstring with 1 and "words"."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

LIMIT = 3  # \xe2\x80\xa6 columns are counted in bytes


def clip(x: int, low: int = 0) -> int:
    """Not this: 5 < 6."""
    for n in range(2):
        if n in (7,) and x:
            break
    if x < low:
        raise ValueError(f"{x} < {low}")
    x += 1
    print("a message")
    return x - LIMIT
'''


def test_every_edit_is_one_of_those_described_and_compiles() -> None:
    mutants = sites("x.py", SOURCE)
    edits = {(SOURCE[m.start : m.end].decode(), m.text) for m in mutants}
    assert edits == {
        ("3", "4"),
        ("3", "(2)"),
        ("0", "1"),
        ("0", "(-1)"),
        ("2", "3"),
        ("2", "(1)"),
        ("in", "not in"),
        ("7", "8"),
        ("7", "(6)"),
        ("n in (7,) and x", "(not (n in (7,) and x))"),
        ("and", "or"),
        ("break", "continue"),
        ("x < low", "(not (x < low))"),
        ("<", "<="),
        ("x += 1", "pass"),
        ("+=", "-="),
        ("1", "2"),
        ("1", "(0)"),
        ('print("a message")', "pass"),
        ("return x - LIMIT", "return None"),
        ("-", "+"),
    }
    results = {m.apply(SOURCE) for m in mutants}
    assert len(results) == len(mutants) and SOURCE not in results
    for text in results:
        compile(text, "x.py", "exec")


def test_the_named_mutants_fit_the_code() -> None:
    """A change of the code that they no longer fit is followed in tools/mutants.yaml."""
    cases = mutate.read_cases()
    assert len(cases.named) >= 20
    for mutant in cases.named:
        source = (mutate.ROOT / mutant.file).read_bytes()
        compile(mutant.apply(source), mutant.file, "exec")
        test, _, name = mutant.test.rpartition("::")
        assert f"def {name}(" in (mutate.ROOT / test.partition("::")[0]).read_text(), mutant.test
    edits = [
        (file, mutant.describe((mutate.ROOT / file).read_bytes()))
        for file in {file for file, _ in cases.equivalent}
        for mutant in sites(file, (mutate.ROOT / file).read_bytes())
    ]
    assert not cases.equivalent.keys() - {*edits}


def test_every_file_of_the_folders_that_are_mutated_has_tests() -> None:
    """Files of one `__init__` line hold no code to be mutated."""
    paths = [*(ROOT / "converters").rglob("*.py"), *(ROOT / "zoo" / "tokenizers").glob("*.py")]
    names = {p.relative_to(ROOT).as_posix() for p in paths if p.name != "__init__.py"}
    assert names <= read_cases().tests.keys()


def test_a_sample_is_the_same_each_time() -> None:
    cases = mutate.read_cases()
    first, again = ([*mutate.chosen(cases, 5, 14, ["converters/plan.py"])] for _ in range(2))
    assert first == again and len({*first}) == 5
    assert {mutant.file for mutant in first} == {"converters/plan.py"}


@pytest.mark.slow
def test_mutants_are_judged_by_their_tests_in_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a second run takes the verdicts from its journal, as long as code and tests are these."""
    source = b"def least(a: int, b: int) -> int:\n    return a if a < b else b\n"
    (tmp_path / "least.py").write_bytes(source)
    test = tmp_path / "test_least.py"
    test.write_text("from least import least\ndef test(): assert least(1, 2) == least(2, 1) == 1\n")
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\nmarkers = ['long', 'release']\npythonpath = ['.']\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "CACHE", tmp_path / ".mutate")
    mutants = sites("least.py", source)
    named = {m.text: m for m in mutants}
    bound, none = named["<="], named["return None"]
    reason = {("least.py", named["(not (a < b))"].describe(source)): "for the test"}
    cases = Cases({"least.py": ("test_least.py",)}, (), reason)
    verdicts = dict(mutate.run(mutants, cases, 1))
    assert verdicts[bound] == SURVIVED and verdicts[none] == KILLED
    assert verdicts[named["(not (a < b))"]] == EQUIVALENT and len(verdicts) == 3
    assert (tmp_path / "least.py").read_bytes() == source
    monkeypatch.setattr(mutate, "run_tests", lambda *_: pytest.fail("not from the journal"))
    assert dict(mutate.run(mutants, cases, 1)) == verdicts
    test.write_text(test.read_text() + "# changed\n")
    with pytest.raises(BaseException, match="not from the journal"):
        dict(mutate.run(mutants, cases, 1))


def test_a_file_of_cases_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mutants.yaml"
    monkeypatch.setattr(mutate, "CASES", path)
    path.write_text(
        "tests: {converters/plan.py: [tests/gone.py]}\nequivalent: []\nnamed:\n"
        "- {file: converters/plan.py, source: no such line, mutated: x, why: y, test: tests/no}\n"
    )
    with pytest.raises(mutate.CasesError, match=r"0 times .*no such line\ntests/gone\.py: no such"):
        mutate.read_cases()


def test_a_mutant_that_never_ends_is_killed_by_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "sh"
    script.write_text("#!/bin/sh\nsleep 1000\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert mutate.run_tests(tmp_path, "test_x.py", 0.2) == (False, True, "")
