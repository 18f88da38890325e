"""Mutation testing of zoo's own code: change one thing, run the tests that cover it, see them fail.

A mutant is a file with one edit, made in a scratch copy of the checkout and never in the checkout.
`tools/mutants.yaml` names mutants that once survived, mutants that no test can tell from the
original, and the tests of each file. Every other mutant is drawn at random from the edits below.

    python tools/mutate.py                    the named mutants and a sample of 40
    python tools/mutate.py 200 --seed 3       the named ones and 200 others
    python tools/mutate.py --all              every mutant there is
    python tools/mutate.py 20 --only converters/plan.py
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Lock

import yaml

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tools" / "mutants.yaml"
CACHE = ROOT / ".mutate"
SAMPLE, SEED = 40, 14
RATE = 0.95  # of the mutants that change behavior, the share that tests must kill
LIMIT = 300.0  # seconds that a mutant gets beyond ten times what the unchanged code takes
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "report", "build", "dist")

KILLED, TIMEOUT, SURVIVED, EQUIVALENT = "killed", "killed by timeout", "survived", "equivalent"

_NEGATED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
}
_BOUNDARY: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
    ast.Mod: ("%", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: (r"\|", "&"),
    ast.BitXor: (r"\^", "&"),
}
# strings in calls of these are read by people, and no test should depend on each of their letters
_MESSAGES = re.compile(r"problem|fail|warn|print|write|error|tell|told|listing|add_argument|help")


@dataclass(frozen=True)
class Mutant:
    """One edit of one file: the bytes from `start` to `end` become `text`."""

    file: str
    line: int
    start: int
    end: int
    text: str
    what: str
    test: str = ""  # of a named mutant: what must fail under it

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def describe(self, source: bytes) -> str:
        """The lines before and after, without their indent."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        before = source[first:last].decode()
        after = (source[first : self.start] + self.text.encode() + source[self.end : last]).decode()
        return f"{_one_line(before)}  =>  {_one_line(after)}"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


class Sites(ast.NodeVisitor):
    """Collect all mutants of a module in the order of its text."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source, self.mutants = file, source, list[Mutant]()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.visit(ast.parse(source))

    # ast counts columns in bytes of UTF-8
    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def _add(self, start: int, end: int, text: str, what: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        self.mutants.append(Mutant(self.file, line, start, end, text, what))

    def _replace(self, node: ast.expr | ast.stmt, text: str, what: str) -> None:
        self._add(self._start(node), self._end(node), text, what)

    def _text(self, node: ast.expr | ast.stmt) -> str:
        return self.source[self._start(node) : self._end(node)].decode()

    def _operator(self, left: ast.expr, right: ast.expr, pattern: str, new: str, what: str) -> None:
        """Replace the operator between two operands, where nothing else there looks like it."""
        start, end = self._end(left), self._start(right)
        between = self.source[start:end].decode()
        if "#" in between:
            return
        if pattern[0].isalpha():
            pattern = rf"\b{pattern}\b"
        matches = [*re.finditer(pattern, between)]
        if len(matches) == 1:
            at = matches[0]
            self._add(start + at.start(), start + at.end(), new, what)

    def _condition(self, test: ast.expr) -> None:
        is_negated_below = isinstance(test, ast.Compare) and type(test.ops[0]) in _NEGATED
        if is_negated_below or isinstance(test, ast.UnaryOp):
            return
        self._replace(test, f"(not ({self._text(test)}))", "condition negated")

    # --- what is left alone: text for people and for the type checker ---

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self._body(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._body(node.body)

    def visit_Module(self, node: ast.Module) -> None:
        self._body(node.body)

    def _body(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            is_docstring = isinstance(statement, ast.Expr) and isinstance(
                statement.value, ast.Constant
            )
            if not is_docstring:
                self.visit(statement)

    # --- edits ---

    def visit_If(self, node: ast.If) -> None:
        if self._text(node.test) != "TYPE_CHECKING":
            self._condition(node.test)
            self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        if not isinstance(node.test, ast.Constant):
            self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
            if type(operator) in _NEGATED:
                old, new = _NEGATED[type(operator)]
                self._operator(left, right, old, new, "comparison negated")
            else:
                old, new = _BOUNDARY[type(operator)]
                self._operator(left, right, old, new, "boundary moved")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._operator(left, right, old, new, f"{old} -> {new}")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._replace(node, f"({self._text(node.operand)})", "sign or not dropped")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        is_text = isinstance(node.left, ast.JoinedStr | ast.Constant) and not isinstance(
            getattr(node.left, "value", None), int | float
        )
        if type(node.op) in _ARITHMETIC and not is_text:
            old, new = _ARITHMETIC[type(node.op)]
            self._operator(node.left, node.right, old, new, "arithmetic")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass", "statement dropped")
        if isinstance(node.op, ast.Add | ast.Sub):
            old, new = (r"\+=", "-=") if isinstance(node.op, ast.Add) else ("-=", "+=")
            self._operator(node.target, node.value, old, new, "arithmetic")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self._replace(node, "pass", "statement dropped")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None or (isinstance(node.value, ast.Constant) and not node.value.value):
            return
        self._replace(node, "return None", "returns None")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue", "break -> continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "break", "continue -> break")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else self._text(node.func)
        self.visit(node.func)
        options = (k.value for k in node.keywords if k.arg not in ("repr", "help"))
        for argument in (*node.args, *options):
            is_string = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            if not (is_string and _MESSAGES.search(name)):
                self.visit(argument)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value), "constant")
        elif isinstance(value, int):
            self._replace(node, str(value + 1), "constant + 1")
            self._replace(node, f"({value - 1})", "constant - 1")
        elif isinstance(value, str) and value and " " not in value:
            self._replace(node, repr(value + "X"), "string")


def sites(file: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a file in the order of its text."""
    unique = {(m.start, m.end, m.text): m for m in Sites(file, source).mutants}
    return [unique[place] for place in sorted(unique)]


def compiles(mutant: Mutant) -> bool:
    """Return whether the mutated code compiles; if not, every test would kill it."""
    try:
        compile(mutant.apply((ROOT / mutant.file).read_bytes()), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


# --- named mutants -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cases:
    """tools/mutants.yaml."""

    tests: dict[str, tuple[str, ...]]  # file -> the tests that cover it
    named: tuple[Mutant, ...]
    equivalent: dict[tuple[str, str], str]  # (file, the edit in words) -> reason

    def covering(self, mutant: Mutant) -> tuple[str, ...]:
        return (mutant.test,) if mutant.test else self.tests[mutant.file]


class CasesError(Exception):
    """tools/mutants.yaml does not fit the code."""


def read_cases(root: Path = ROOT) -> Cases:
    data = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    problems, named = list[str](), list[Mutant]()
    for case in data["named"]:
        file, old, new = case["file"], case["source"], case["mutated"]
        source = (root / file).read_bytes()
        if (count := source.count(old.encode())) != 1:
            problems.append(f"{file}: {count} times in it, expected once: {old}")
            continue
        start = source.index(old.encode())
        line = source.count(b"\n", 0, start) + 1
        end = start + len(old.encode())
        named.append(Mutant(file, line, start, end, new, case["why"], case["test"]))
    tests = {test for names in data["tests"].values() for test in names}
    tests |= {case["test"].partition("::")[0] for case in data["named"]}
    for file in sorted({*data["tests"], *tests}):
        if not (root / file).is_file():
            problems.append(f"{file}: no such file")
    if problems:
        raise CasesError("\n".join(["tools/mutants.yaml does not fit the code:", *problems]))
    by_file = {file: tuple(names) for file, names in data["tests"].items()}
    equivalent = {(case["file"], case["edit"]): case["reason"] for case in data["equivalent"]}
    return Cases(by_file, tuple(named), equivalent)


# --- running -------------------------------------------------------------------------------------


class Journal:
    """Verdicts of earlier runs; an entry is valid while the mutant and its tests are the same."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, dict[str, str]()
        for line in path.read_text().splitlines() if path.is_file() else ():
            entry = json.loads(line)
            self.entries[entry["key"]] = entry["verdict"]

    def record(self, key: str, verdict: str, output: str) -> None:
        self.entries[key] = verdict
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "verdict": verdict, "mutant": output}) + "\n")


def key(mutant: Mutant, source: bytes, tests: Iterable[str]) -> str:
    digest = hashlib.sha256(mutant.apply(source))
    for test in tests:
        digest.update(test.encode() + (ROOT / test.partition("::")[0]).read_bytes())
    return digest.hexdigest()[:24]


def copy_checkout(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=IGNORED)
    return target


def run_tests(copy: Path, test: str, limit: float) -> tuple[bool, bool, str]:
    """Return (whether all tests pass, whether they timed out, the last lines of output)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*command, "-m", "not long and not release", test],
        cwd=copy,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        process.communicate()
        return False, True, ""
    if process.returncode > 2:  # below 0 a signal ended it, which a mutant may well bring about
        raise CasesError(f"pytest {test} ended with {process.returncode}:\n{out[-2000:]}")
    return process.returncode == 0, False, out[-2000:]


class Runner:
    """Judges mutants in scratch copies of the checkout, as many at a time as there are copies."""

    def __init__(self, copies: Iterable[Path]) -> None:
        self.copies: Queue[Path] = Queue()
        for copy in copies:
            self.copies.put(copy)
        self.limits: dict[str, float] = {}  # file of tests -> seconds a mutant may take
        self.lock = Lock()

    def judge(self, mutant: Mutant, tests: Sequence[str]) -> str:
        copy = self.copies.get()
        path = copy / mutant.file
        source = path.read_bytes()
        try:
            for test in tests:  # the nearest first: most mutants need only that
                limit = self._limit(copy, test)
                path.write_bytes(mutant.apply(source))
                passed, late, _ = run_tests(copy, test, limit)
                path.write_bytes(source)
                if not passed:
                    return TIMEOUT if late else KILLED
            return SURVIVED
        finally:
            path.write_bytes(source)
            self.copies.put(copy)

    def _limit(self, copy: Path, test: str) -> float:
        """Measure the duration on the unchanged code, where all tests must pass."""
        with self.lock:
            if test not in self.limits:
                began = time.monotonic()
                passed, _, out = run_tests(copy, test, 3600)
                if not passed:
                    raise CasesError(f"{test} fails on the unchanged code:\n{out}")
                self.limits[test] = LIMIT + 10 * (time.monotonic() - began)
            return self.limits[test]


def run(mutants: Sequence[Mutant], cases: Cases, jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Yield (mutant, verdict), first those of the journal."""
    journal = Journal(CACHE / "journal.jsonl")
    sources = {file: (ROOT / file).read_bytes() for file in {m.file for m in mutants}}
    todo: dict[str, Mutant] = {}
    for mutant in mutants:
        source = sources[mutant.file]
        if (mutant.file, mutant.describe(source)) in cases.equivalent:
            yield mutant, EQUIVALENT
            continue
        name = key(mutant, source, cases.covering(mutant))
        if verdict := journal.entries.get(name):
            yield mutant, verdict
        else:
            todo[name] = mutant
    if not todo:
        return
    with TemporaryDirectory(prefix="zoo-mutate-") as scratch, ThreadPoolExecutor(jobs) as pool:
        runner = Runner(copy_checkout(Path(scratch, str(n))) for n in range(jobs))
        verdicts = {
            pool.submit(runner.judge, mutant, cases.covering(mutant)): name
            for name, mutant in todo.items()
        }
        try:
            for future in as_completed(verdicts):
                mutant, verdict = todo[verdicts[future]], future.result()
                edit = mutant.describe(sources[mutant.file])
                journal.record(verdicts[future], verdict, f"{mutant.file}: {edit}")
                yield mutant, verdict
        finally:
            pool.shutdown(cancel_futures=True)


def chosen(cases: Cases, count: int, seed: int, only: Sequence[str]) -> Iterator[Mutant]:
    """Draw `count` mutants from all files; all of them if `count` is negative."""
    files = [file for file in cases.tests if not only or file in only] if count else []
    pool = [m for file in files for m in sites(file, (ROOT / file).read_bytes())]
    if count >= 0:
        random.Random(seed).shuffle(pool)
    return islice(filter(compiles, pool), count if count >= 0 else None)


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("count", nargs="?", type=int, default=SAMPLE, help="mutants to draw")
    parser.add_argument("--all", action="store_true", help="every mutant instead of a sample")
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"seed of the sample (default: {SEED})"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="mutate these files")
    parser.add_argument("--jobs", type=int, default=1, help="scratch copies to use (default: 1)")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    parser.add_argument("--no-named", action="store_true", help="leave out the named mutants")
    asked = parser.parse_args()
    cases = read_cases()
    if unknown := [file for file in asked.only if file not in cases.tests]:
        parser.error(f"--only {unknown[0]}: tools/mutants.yaml names no tests for it")
    named = [m for m in cases.named if not asked.only or m.file in asked.only]
    named = [] if asked.no_named else named
    drawn = chosen(cases, -1 if asked.all else asked.count, asked.seed, asked.only)
    sources = {file: (ROOT / file).read_bytes() for file in cases.tests}
    mutants = [*named, *drawn]
    if asked.list:
        for mutant in mutants:
            print(f"{mutant.file}:{mutant.line}: {mutant.describe(sources[mutant.file])}")
        return 0
    counts: dict[str, int] = dict.fromkeys((KILLED, TIMEOUT, EQUIVALENT, SURVIVED), 0)
    survivors: list[Mutant] = []
    for done, (mutant, verdict) in enumerate(run(mutants, cases, asked.jobs), 1):
        counts[verdict] += 1
        if verdict == SURVIVED:
            survivors.append(mutant)
        edit = mutant.describe(sources[mutant.file])
        print(f"{done}/{len(mutants)} {verdict}: {mutant.file}:{mutant.line}: {edit}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    changed = len(mutants) - counts[EQUIVALENT]
    rate = 1 - len(survivors) / changed if changed else 1.0
    print(f"{rate:.1%} of {changed} mutants are killed (expected: {RATE:.0%})")
    missed = [mutant for mutant in survivors if mutant in cases.named]
    for mutant in missed:
        print(f"a named mutant survived: {mutant.file}:{mutant.line}: {mutant.what}")
    if survivors:
        print("Write a test for each survivor, or list it under `equivalent` in", end=" ")
        print(f"{CASES.relative_to(ROOT)} with the reason.")
    return int(bool(missed) or rate < RATE)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CasesError as error:
        sys.exit(str(error))
