"""`python tools/convert.py SRC …` is `zoo convert SRC …`, from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.cli.app import main

sys.exit(main(["convert", *sys.argv[1:]]))
