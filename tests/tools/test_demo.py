"""`make demo`: what it prints where nobody watches."""

import subprocess
import sys
from pathlib import Path

import pytest

from zoo import registry


@pytest.mark.slow
def test_the_demo_proves_every_architecture_in_plain_text(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/demo.py"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    table = done.stdout.partition("\nerror against")[2].splitlines()
    rows = {line.split()[0]: line for line in table[2:-1]}
    assert list(rows) == list(registry.architectures())
    assert all(row.endswith("equal") and "100%" in row for row in rows.values())
    assert table[-1].endswith("all within limits")
