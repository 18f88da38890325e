"""tools/bench.py: what it prints of both sides."""

from pathlib import Path

import bench
import pytest


def test_import_load_and_first_logits_of_both_sides_are_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that nobody holds one side's load against the other's import."""
    steps = {"torch": 1.0, "again": 0.5, "wall": 2.0}
    ours = {**steps, "import": 0.1, "load": 0.2, "first": 0.1}
    ours |= {"import_mb": 1.0, "load_mb": 2.0, "first_mb": 3.0}
    theirs = {**steps, "import": 3.0, "load": 0.4, "first": 0.6, "wall": 6.0}
    theirs |= {"import_mb": 100.0, "load_mb": 4.0, "first_mb": 5.0}
    row = bench.phases([ours], [theirs])
    assert row["library_ratio"] == pytest.approx(10) and row["process_ratio"] == 3
    bench.print_row({"case": "x", "cache": "warm", **row})
    head, *sides = capsys.readouterr().out.splitlines()
    assert head == "x, warm cache: library 10.0x, process 3.0x faster"
    assert [" ".join(line.split()) for line in sides] == [
        "zoo import 100.0 ms 1.0 MB | load 200.0 ms 2.0 MB | first 100.0 ms 3.0 MB "
        "| load again 500.0 ms",
        "reference import 3000.0 ms 100.0 MB | load 400.0 ms 4.0 MB | first 600.0 ms 5.0 MB "
        "| load again 500.0 ms",
    ]


def test_both_sides_import_the_class_before_they_load(tmp_path: Path) -> None:
    ours = bench.zoo_script(tmp_path, "gpt2")
    theirs = bench.reference_script(tmp_path, "GPT2LMHeadModel")
    assert ours.index("import zoo.models.gpt2") < ours.index("t2, a2 =") < ours.index("m = load(")
    assert (
        theirs.index("import GPT2LMHeadModel") < theirs.index("t2, a2 =") < theirs.index("m = GPT2")
    )
