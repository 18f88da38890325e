"""The child process that renders one chat template, under limits that the system enforces.

`zoo.tokenizers.chat` starts it in an isolated interpreter, so nothing of zoo is imported here. It
reads frames from stdin: first the directories of jinja2, the template and its seconds, then the
variables of one text after another. It answers each with a status and a text. Too much processor
time ends the process (not on Windows), too much memory is a MemoryError (on Linux alone).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import marshal
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

REQUEST, REPLY = struct.Struct("<Q"), struct.Struct("<cQ")
TEXT, REFUSAL, MEMORY = b"t", b"r", b"m"  # statuses of a reply
SECONDS = 0.7  # of processor time a text, and more for long conversations
SECONDS_PER_BYTE = 2e-7
USUAL_START = 0.1  # seconds to import jinja2; a slower machine gets more time in proportion
BYTES = 40 << 20  # of memory beyond what the interpreter takes
BYTES_PER_BYTE = 24  # an emoji makes four bytes of every character; several copies are alive
MOST_TEXT = 1 << 24  # characters of a rendered text
MOST_MESSAGE = 1000


class Refused(Exception):
    """The template does something forbidden, or refuses the messages itself."""


# --- the template --------------------------------------------------------------------------------


def compiled(template: str) -> Callable[[Mapping[str, Any]], str]:
    """Compile a template to a function, with the reference's filters and globals."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; here it is just its text."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Names(Namespace):
        """Refuses names with underscores, which reach Python's internals."""

        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            values = dict(*args, **kwargs)
            for name in values:
                check_public(name)
            super().__init__(values)

        def __setitem__(self, name: str, value: Any) -> None:
            check_public(name)
            super().__setitem__(name, value)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            raise Refused(f"reaches for {attribute!r} of a {type(obj).__name__}")

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": now, "namespace": Names}
    return sandbox.from_string(template).render


def check_public(name: Any) -> None:
    """Refuse to set a name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise Refused(f"sets {name!r}, a name that begins with an underscore")


def refuse(message: Any) -> NoReturn:
    """`raise_exception` of a template."""
    raise Refused(f"refuses the messages: {message}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` of a template: plain JSON, where jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def now(format: str) -> str:
    """`strftime_now` of a template."""
    return datetime.datetime.now().strftime(format)


# --- limits --------------------------------------------------------------------------------------


def address_space() -> int | None:
    """Bytes of this process's address space, or None where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()


def keep_no_files() -> None:
    """Forbid this process to write files or core dumps."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(limit, (0, 0))


@contextlib.contextmanager
def limits(seconds: float, memory: int | None) -> Iterator[None]:
    """Limit processor time, which ends the process, and memory, which raises MemoryError."""
    timed = hasattr(signal, "setitimer")
    if timed:  # the parent may have blocked or ignored the signal
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        signal.setitimer(signal.ITIMER_PROF, seconds)
    if memory is not None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)


# --- the exchange --------------------------------------------------------------------------------


def read(file: BinaryIO) -> bytes:
    """Read one frame; the end of the input ends the process."""
    head = file.read(REQUEST.size)
    data = file.read(*REQUEST.unpack(head)) if len(head) == REQUEST.size else b""
    if not data:
        raise SystemExit(0)
    return data


def answer(render: Callable[[bytes], str], request: bytes) -> tuple[bytes, bytes]:
    """Render one text: (status, text in UTF-8)."""
    from jinja2.exceptions import TemplateError

    try:
        text = render(request)
        if len(text) > MOST_TEXT:
            raise Refused(f"makes a text of {len(text)} characters; the limit is {MOST_TEXT}")
        return TEXT, text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return MEMORY, f"takes more than {BYTES >> 20} MB of memory".encode()
    except RecursionError:
        why = "nests or calls itself too deeply"
    except Refused as error:
        why = str(error)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        why = f"{f'line {line}: ' if line else ''}{error.message or type(error).__name__}"
    except Exception as error:  # what its expressions raise: a text and a number added, say
        why = f"{type(error).__name__}: {error}"
    return REFUSAL, why[:MOST_MESSAGE].encode("utf-8", "surrogatepass")


def main() -> None:
    """Answer requests until the input ends."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    directories, template, seconds = marshal.loads(read(requests))
    sys.path += directories
    import jinja2.sandbox  # noqa: F401 - before any limit

    keep_no_files()
    base = address_space()
    slowness = max(1, time.process_time() / USUAL_START)
    compile_once = functools.cache(compiled)  # within the limits, as what it makes is

    def render(request: bytes) -> str:
        return compile_once(template)(marshal.loads(request))

    while True:
        request = read(requests)
        memory = None if base is None else base + BYTES + BYTES_PER_BYTE * len(request)
        most = slowness * (seconds + SECONDS_PER_BYTE * len(request))
        with limits(most, memory):
            status, text = answer(render, request)
        replies.write(REPLY.pack(status, len(text)) + text)
        replies.flush()


if __name__ == "__main__":
    main()
