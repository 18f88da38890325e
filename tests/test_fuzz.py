"""Damaged inputs at random: `make fuzz` in short, and what the long runs have found."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_few_thousand_damaged_inputs() -> None:
    run = subprocess.run(
        [sys.executable, "tools/fuzz.py", "--scale", "0.01"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("\n0 faults\n")
