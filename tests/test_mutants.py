"""The mutation gate: every planted bug is noticed wherever it can be planted."""

from collections.abc import Iterator

import pytest
import torch

from zoo import registry
from zoo.parity.mutants import MUTANTS, Bench, Mutant, hunt
from zoo.registry import Architecture

ARCHITECTURES = list(registry.architectures().values())


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bench]]:
    scratch = tmp_path_factory.mktemp("mutants")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {entry.name: Bench(entry, scratch) for entry in ARCHITECTURES}
    torch.set_num_threads(threads)


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 20
    assert {bug.kind for bug in MUTANTS.values()} == {"mapping", "config", "model"}


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("bug", MUTANTS.values(), ids=lambda bug: bug.name)
def test_mutant(entry: Architecture, bug: Mutant, benches: dict[str, Bench]) -> None:
    verdict = hunt(benches[entry.name], bug)
    if verdict.status == "n.a.":
        pytest.skip("not applicable: nothing here that the bug could be planted in")
    assert verdict.status == "killed"
