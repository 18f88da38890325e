"""The mutation gate: every planted bug is noticed wherever it can be planted."""

from collections.abc import Iterator

import pytest
import torch

from zoo import registry
from zoo.parity.gates import mutants
from zoo.parity.gates.mutants import MUTANTS, Bench, Mutant, Verdict, hunt


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Bench]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scratch = tmp_path_factory.mktemp("mutants")
    yield [Bench(entry, scratch) for entry in registry.architectures().values()]
    torch.set_num_threads(threads)


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 20
    assert {bug.kind for bug in MUTANTS.values()} == {"mapping", "config", "model"}


@pytest.mark.parametrize("kind", ["mapping", "config", "model"])
def test_a_planted_bug_is_killed(kind: str, benches: list[Bench]) -> None:
    """One of each kind in the first architecture that has a place for it."""
    bench, (variant, *_) = benches[0], benches[0].entry.variants
    bugs = (bug for bug in MUTANTS.values() if bug.kind == kind)
    verdicts = (hunt(bench, bug, [variant]) for bug in bugs)
    assert next(v.status for v in verdicts if v.status != "n.a.") == "killed"


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS.values(), ids=lambda bug: bug.name)
def test_mutant(bug: Mutant, benches: list[Bench]) -> None:
    verdicts = [hunt(bench, bug) for bench in benches]
    assert not [v for v in verdicts if v.status == "SURVIVED"]
    assert any(v.status == "killed" for v in verdicts), "nowhere to plant it: this proves nothing"


def test_the_gate_can_fail(benches: list[Bench]) -> None:
    """A bug that changes nothing survives, and one that cannot be planted is no success."""
    bench = benches[0]
    harmless = Mutant("harmless", "model", lambda model: None)
    impossible = Mutant("impossible", "model", lambda model: mutants.need(False))
    first = next(iter(bench.entry.variants))
    assert hunt(bench, harmless, [first]).status == "SURVIVED"
    assert hunt(bench, impossible, [first]).status == "n.a."


def test_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for status, code in (("killed", 0), ("n.a.", 0), ("SURVIVED", 1)):
        verdicts = [Verdict("a", bug.name, bug.kind, status) for bug in MUTANTS.values()]  # type: ignore[arg-type]
        monkeypatch.setattr(mutants, "run", lambda seen, verdicts=verdicts: verdicts)
        assert mutants.main() == code
        assert status in capsys.readouterr().out
