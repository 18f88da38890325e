"""What every test relies on: no network but loopback, one thread, real material where it is."""

import fcntl
import functools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from source_tree import SourceTree

# seconds that a subprocess may take on a machine that does other things too
PATIENCE = 600

# before torch or huggingface_hub is imported, here or in a subprocess
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)

# what a shell runs in the background ignores Ctrl-C, and so would the programs that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only loopback can be reached: a test that needs more is wrong wherever it runs."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
                "127.0.0.1",
                "::1",
                "localhost",
            ):
                raise OSError(f"a test reached for {address}")
            return real(self, address)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even loopback: opening a socket is an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Reset torch.compile before and after: it counts how often a process compiled each function.

    Models of several architectures share one `forward`, and beyond a limit none is compiled.
    """
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The directory of real material that ZOO_FIXTURES names; skips where there is none."""
    place = os.environ.get("ZOO_FIXTURES")
    if not place:
        pytest.skip("ZOO_FIXTURES is not set: no real material to check against")
    path = Path(place)
    if not path.is_dir():
        pytest.fail(f"ZOO_FIXTURES={place} is no directory")
    return path


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this session that all its workers share."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def made(shared_tmp: Path) -> Callable[..., Path]:
    """A hot checkpoint of an architecture, its first variant unless another is asked for.

    Each is made once a session, by the worker that asks first, and used by all: a test that writes
    to one copies it before.
    """
    import torch

    from zoo import registry
    from zoo.parity.fixtures import hot_checkpoint

    @functools.cache
    def make(name: str, variant: str = "", *, seed: int = 0, dtype: str = "float32") -> Path:
        entry = registry.architectures()[name]
        variant = variant or next(iter(entry.variants))
        key = f"{name}-{variant}-{entry.variants[variant]['class']}-{seed}-{dtype}"
        finished = shared_tmp / key
        with open(shared_tmp / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                with TemporaryDirectory(dir=shared_tmp) as scratch:
                    directory = Path(scratch) / "made" / name
                    hot_checkpoint(
                        entry, variant, directory, seed=seed, dtype=getattr(torch, dtype)
                    )
                    directory.parent.rename(finished)
        return finished / name

    return make


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def code() -> SourceTree:
    """The project's Python files, each parsed once."""
    return SourceTree(ROOT)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory that is also the current one."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
