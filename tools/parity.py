"""Parity from a checkout: `parity.py NAME|DIR` or `--all`, and `--mutants` for the gate."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    if "--mutants" in sys.argv[1:]:
        from zoo.parity.mutants import main

        sys.exit(main())
    from zoo.cli import main as zoo

    sys.exit(zoo(["verify", *sys.argv[1:]]))
