"""Chat templates: untrusted jinja, rendered in a child process with limited time and memory.

A few lines of a template could run or grow forever, and no list of harmless operations is complete.
So the system limits the child's processor time and memory (`zoo.tokenizers.template_process`), and
within them it may do what the reference's sandbox allows. A child serves one template and stays
alive for the next text.
"""

from __future__ import annotations

import atexit
import importlib.util
import marshal
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo.errors import MissingDependency, TemplateError
from zoo.tokenizers import template_process as child

MOST_SOURCE = 1 << 18  # characters of a template; published ones have some 20 thousand
MOST_IDLE = 4  # child processes that wait for the next text of their template
WALL_SECONDS = 20.0  # for a child that uses no processor time either
# the child's whole environment: the time zone, and what its interpreter needs
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def render(template: str, variables: Mapping[str, Any], where: str) -> str:
    """Render a template with these variables.

    Raises:
        TemplateError: the template refuses the messages, breaks a rule of jinja, or exceeds a
            limit.
    """
    try:
        if len(template) > MOST_SOURCE:
            raise TemplateError(f"expected at most {MOST_SOURCE} characters, found {len(template)}")
        return _rendered(template, marshal.dumps(_plain(variables), 4))
    except TemplateError as error:
        raise TemplateError(f"{where}: {error}") from None
    except (RecursionError, ValueError):  # marshal's own limit
        raise TemplateError(f"{where}: the messages or variables nest too deeply") from None


def _plain(value: Any) -> Any:
    """Copy a value as plain types: the sandbox cannot judge methods of the caller's classes."""
    match value:
        case bool() | None:
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    kind = type(value).__name__
    raise TemplateError(f"expected texts, numbers, lists and mappings, found a {kind}")


# --- child processes -----------------------------------------------------------------------------


class _Ended(Exception):
    """A child process ended before its reply did; holds why."""


class _Renderer:
    """A child process and the template that it renders."""

    def __init__(self, template: str) -> None:
        self.template, self.is_used = template, False
        start = marshal.dumps((_directories(), template, child.SECONDS), 4)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", child.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C at the terminal is for its parent alone
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise TemplateError(f"its process does not start: {sys.executable}: {error}") from None
        self._start = child.REQUEST.pack(len(start)) + start

    def ask(self, request: bytes) -> tuple[bytes, str]:
        """(status, text) of the reply."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(WALL_SECONDS, self._process.kill)
        timer.daemon = True
        timer.start()
        head = text = b""
        try:
            self._process.stdin.write(self._start + child.REQUEST.pack(len(request)) + request)
            self._process.stdin.flush()
            self._start, self.is_used = b"", True
            head = self._process.stdout.read(child.REPLY.size)
            status, size = child.REPLY.unpack(head)
            if size <= 4 * child.MOST_TEXT:  # bytes of UTF-8
                text = self._process.stdout.read(size)
            if len(text) == size:
                return status, text.decode("utf-8", "surrogatepass")
        except (OSError, struct.error):
            pass
        finally:
            timer.cancel()
        raise _Ended(self._reason())

    def _reason(self) -> str:
        assert self._process.stdout is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        if code == -getattr(signal, "SIGPROF", 0):
            return f"takes more than {child.SECONDS} seconds of processor time"
        return f"its process ended without a text, with status {code}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self.close_pipes()

    def leave(self) -> None:
        """Close the copied pipes after a fork: the process is the parent's."""
        self._process.returncode = 0
        self.close_pipes()

    def close_pipes(self) -> None:
        for file in (self._process.stdin, self._process.stdout):
            assert file is not None
            with suppress(OSError):
                file.close()


def _directories() -> list[str]:
    """The directories of jinja2 and what it imports: all of our sys.path that the child gets."""
    directories = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise MissingDependency(f"chat templates need {name}: pip install jinja2")
        directories.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(directories))


_idle: list[_Renderer] = []
_lock = threading.Lock()


def _rendered(template: str, request: bytes) -> str:
    while True:
        renderer = _take(template)
        was_used = renderer.is_used
        try:
            status, text = renderer.ask(request)
        except _Ended as error:
            status, text = child.MEMORY, str(error)
        except BaseException:  # Ctrl-C: its reply would answer the next request
            renderer.close()
            raise
        if status == child.TEXT:
            _keep(renderer)
            return text
        if status == child.REFUSAL:
            _keep(renderer)
            raise TemplateError(text)
        renderer.close()
        if not was_used:  # a used one may fail for what it kept of earlier texts: try a fresh one
            raise TemplateError(text)


def _take(template: str) -> _Renderer:
    with _lock:
        renderer = next((each for each in _idle if each.template == template), None)
        if renderer is not None:
            _idle.remove(renderer)
    return renderer or _Renderer(template)


def _keep(renderer: _Renderer) -> None:
    with _lock:
        _idle.append(renderer)
        surplus = _idle[:-MOST_IDLE]
        del _idle[:-MOST_IDLE]
    for each in surplus:
        each.close()


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()


def _leave_all() -> None:
    """Forget all renderers in a forked process: they belong to the parent."""
    global _lock
    _lock = threading.Lock()
    while _idle:
        _idle.pop().leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)
