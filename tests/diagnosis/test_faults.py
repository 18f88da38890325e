"""The catalogue of faults: one row is planted, diagnosed by diff and searched by diagnose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build, hot

import zoo
from zoo import registry
from zoo.diagnosis.edits import applied
from zoo.diagnosis.families import Exchange, Family, PermutedRows
from zoo.diagnosis.faults import FAULTS, Fault, hypotheses, planted_faults
from zoo.diagnosis.gate import Bench, hunt, planted
from zoo.loading import load_directory

ARCHITECTURES = registry.architectures()
NEW = {
    # mistakes that no row of the table is about
    "norm1_bias_norm2_bias_exchanged": ("gpt2", Exchange.of("norm1.bias", "norm2.bias")),
    "v_rows_of_each_head_in_halves": ("llama", PermutedRows(("v",), "{} two e", "{} e two")),
}


@pytest.mark.parametrize("name", NEW)
def test_a_new_row_is_planted_diagnosed_and_searched(
    name: str,
    made: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    architecture, edit = NEW[name]
    entry = ARCHITECTURES[architecture]
    monkeypatch.setitem(FAULTS, name, Fault(name, edit, at=r"in .*blocks\.0\.attn\.out$"))
    fault = FAULTS[name]

    # the gate plants it, and the parity checks notice
    assert fault in planted_faults()
    verdict = hunt(Bench(entry, tmp_path), fault, [next(iter(entry.variants))])
    assert verdict.status == "killed", verdict

    # `zoo diff` names it and undoes it
    load = functools.partial(load_directory, made(architecture), entry)
    wrong = planted(load, fault, entry, torch.float64)
    cause = zoo.diff(wrong, made(architecture)).causes[0]
    assert cause.fault == name and cause.restored, cause

    # `zoo diagnose` searches for it: its edit gives the right model back, bit by bit
    right = dict(load(dtype=torch.float64).named_parameters())
    (undo,) = [h for h in hypotheses(wrong) if h.fault == name and h.parameters and not h.across]
    with applied(wrong, undo):
        assert all(torch.equal(p, right[n]) for n, p in wrong.named_parameters())


def test_names_can_be_searched_for() -> None:
    for name, fault in FAULTS.items():
        assert name == fault.name
        assert name.replace("+", "").replace("-", "").isidentifier(), name


def test_every_family_is_used() -> None:
    """No second way to do a thing: a family without a row is dead."""

    def subclasses(family: type) -> set[type]:
        return {each for sub in family.__subclasses__() for each in (sub, *subclasses(sub))}

    assert {type(fault.edit) for fault in FAULTS.values()} == subclasses(Family)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5"])
def test_a_hypothesis_bears_its_faults_name(name: str) -> None:
    model = hot(build(name))
    some = list(hypotheses(model))
    assert {h.fault for h in some} <= FAULTS.keys()
    assert len({h.fault for h in some}) > 20
