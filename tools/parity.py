"""Run parity from a checkout: `NAME|DIR` or `--all`.

`--mutants` runs the gate of planted bugs, `--formats` the round trips between dialects, and
`--diagnose` locates the planted bugs. `--record` writes the last two to zoo/evidence.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    if "--mutants" in sys.argv[1:]:
        from zoo.diagnosis.gate import main

        sys.exit(main())
    if "--formats" in sys.argv[1:]:
        from zoo.parity.gates.formats import main as formats

        files = Path(__file__).parents[1] / "tests" / "data"
        arguments = [word for word in sys.argv[1:] if word != "--formats"]
        sys.exit(formats(["--files", str(files), *arguments]))
    if "--diagnose" in sys.argv[1:]:
        from zoo.diagnosis.diff.planted import main as trace

        sys.exit(trace([word for word in sys.argv[1:] if word != "--diagnose"]))
    from zoo.cli.app import main as zoo

    sys.exit(zoo(["verify", *sys.argv[1:]]))
