"""The `zoo` command, and `python -m zoo`.

Imports take seconds, and Python cannot interrupt them cleanly. They happen under a handler that
ends the process at once, with one line.
"""

import os
import sys
from types import FrameType

_INTERRUPTED = 130  # ExitCode.INTERRUPTED, before anything is imported


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        import gc
        import signal

        gc.disable()  # nothing that is imported is garbage: a tenth of the time before a command

        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # or it is ignored
        if ours:
            signal.signal(signal.SIGINT, _interrupt)
        from zoo.cli.app import main as run

        code = run()
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from Python's own end
    except KeyboardInterrupt:
        _end()
    if code == _INTERRUPTED:  # threads that still run are not waited for
        sys.stdout.flush()
        os._exit(code)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but not inside an import: libraries swallow it there, or print it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> None:
    os.write(2, b"zoo: error: interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
