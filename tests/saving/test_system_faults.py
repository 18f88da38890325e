"""A conversion under a shim that kills it, tears writes, fails calls: `make faults` in short."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("cc") is None or not sys.platform.startswith("linux"),
    reason="the shim needs a C compiler and a loader that preloads",
)
def test_a_call_in_thirty_may_fail() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    run = subprocess.run(
        [sys.executable, "tools/faults.py", "--every", "31"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 of them not survived" in run.stdout
    assert int(run.stdout.splitlines()[-1].split()[0]) >= 90
