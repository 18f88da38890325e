"""The mutation gate: every planted fault is noticed wherever it can be planted."""

from collections.abc import Iterator

import pytest
import torch

from zoo import registry
from zoo.diagnosis import gate
from zoo.diagnosis.families import Code
from zoo.diagnosis.faults import Fault, planted_faults
from zoo.diagnosis.gate import Bench, Verdict, hunt
from zoo.diagnosis.planting import need


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Bench]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scratch = tmp_path_factory.mktemp("mutants")
    yield [Bench(entry, scratch) for entry in registry.architectures().values()]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["mapping", "config", "model"])
def test_a_planted_bug_is_killed(kind: str, benches: list[Bench]) -> None:
    """One of each kind in the first architecture that has a place for it."""
    bench, (variant, *_) = benches[0], benches[0].entry.variants
    faults = (fault for fault in planted_faults() if fault.kind == kind)
    verdicts = (hunt(bench, fault, [variant]) for fault in faults)
    assert next(v.status for v in verdicts if v.status != "n.a.") == "killed"


def test_bugs_of_every_kind_are_planted() -> None:
    assert len(planted_faults()) >= 20
    assert {fault.kind for fault in planted_faults()} == {"mapping", "config", "model"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", planted_faults(), ids=lambda fault: fault.name)
def test_every_planted_bug_is_killed_where_it_applies(fault: Fault, benches: list[Bench]) -> None:
    verdicts = [hunt(bench, fault) for bench in benches]
    assert not [v for v in verdicts if v.status == "SURVIVED"]
    assert any(v.status == "killed" for v in verdicts), "nowhere to plant it: this proves nothing"


def test_the_gate_can_fail(benches: list[Bench]) -> None:
    """A fault that changes nothing survives, and one that cannot be planted is no success."""
    bench = benches[0]
    harmless = Fault("harmless", Code(lambda model: None))
    impossible = Fault("impossible", Code(lambda model: need(False)))
    first = next(iter(bench.entry.variants))
    assert hunt(bench, harmless, [first]).status == "SURVIVED"
    assert hunt(bench, impossible, [first]).status == "n.a."


def test_exit_code_is_one_where_a_bug_survives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, code in (("killed", 0), ("n.a.", 0), ("SURVIVED", 1)):
        verdicts = [Verdict("a", fault.name, fault.kind, status) for fault in planted_faults()]  # type: ignore[arg-type]
        monkeypatch.setattr(gate, "run", lambda seen, verdicts=verdicts: verdicts)
        assert gate.main() == code
        assert status in capsys.readouterr().out
