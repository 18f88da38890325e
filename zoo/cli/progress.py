"""The progress of a conversion: a line that moves, a log, or events for programs."""

import json
import sys
import time
from typing import Any

from zoo.errors import listing
from zoo.terminal import passing


class ConversionProgress:
    """Prints each event that a conversion tells it."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.total, self.last = 0, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if self.as_json:
            print(json.dumps(event), flush=True)
        elif not self.quiet:
            getattr(self, event["event"])(event)

    def start(self, event: dict[str, Any]) -> None:
        """Store the number of bytes to convert."""
        self.total = event["bytes"]

    def restart(self, event: dict[str, Any]) -> None:
        """Print that an unfinished conversion is discarded."""
        message = "the unfinished output is of another source, spec or options: starting again"
        print(message, file=sys.stderr)

    def tensor(self, event: dict[str, Any]) -> None:
        """Update the line of progress on a terminal, ten times a second at most."""
        now = time.monotonic()
        if now - self.last < 0.1 or not sys.stderr.isatty():
            return
        self.last = now
        done, seconds = event["done"], max(event["seconds"], 1e-9)
        left = (self.total - done) * seconds / max(done, 1)
        passing(
            f"{done / 1e9:.2f} of {self.total / 1e9:.2f} GB  {done / seconds / 1e6:.0f} MB/s  "
            f"{left:.0f} s left  {event['tensor']}",
            sys.stderr,
        )

    def file(self, event: dict[str, Any]) -> None:
        """Print a finished file and its size."""
        passing("", sys.stderr)
        print(f"{event['file']}  {event['bytes']:,} bytes", file=sys.stderr)

    def done(self, event: dict[str, Any]) -> None:
        """Print what was resumed, and the warnings."""
        passing("", sys.stderr)
        if event["resumed"]:
            print(f"resumed: {event['resumed']:,} bytes existed already", file=sys.stderr)
        if zeros := event["zeros"]:
            names = listing(zeros, 5)
            print(f"warning: {len(zeros)} tensors are all zero: {names}", file=sys.stderr)
        for file in event["left"]:
            print(f"warning: left behind: {file}", file=sys.stderr)
        for names in event["duplicates"]:
            print(f"warning: the same numbers under {listing(names, 5)}", file=sys.stderr)
