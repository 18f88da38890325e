"""Publication: a directory appears whole or not at all, and what was there survives any failure."""

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE

from converters.staging import publishing
from converters.staging.destination import files_below, refuse_all
from converters.staging.stage import resumable, staged
from zoo.errors import OutputExists, ZooError


def tree(directory: Path) -> dict[str, str]:
    """Everything below, lock and litter included."""
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else "/"
        for path in sorted(directory.rglob("*"))
    }


def everything(place: Path) -> list[str]:
    """All files of a destination, as if all were a checkpoint's."""
    if place.is_symlink() or not place.is_dir():
        return []
    return [name for name, is_directory in files_below(place) if not is_directory]


def publish(place: Path, text: str = "new", *, force: bool = False) -> None:
    with staged(place, everything if force else refuse_all) as stage:
        (stage / "a").write_text(text)
        (stage / "sub").mkdir()
        (stage / "sub" / "b").write_text(text)


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with staged(place) as stage:
        assert stage.parent == tmp_path
        assert stage.name.startswith(".out.zoo-partial")
        (stage / "a").write_text("new")
        assert not place.exists()
    assert tree(tmp_path) == {"out": "/", "out/a": "new"}


def test_parents_are_made_and_unmade(tmp_path: Path) -> None:
    place = tmp_path / "x" / "y" / "out"
    with pytest.raises(KeyboardInterrupt), staged(place):
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}
    publish(place)
    assert (place / "a").read_text() == "new"


def test_an_existing_destination_needs_force(tmp_path: Path) -> None:
    place = tmp_path / "out"
    publish(place, "old")
    with pytest.raises(OutputExists, match=r"out.*force=True"):
        publish(place)
    assert (place / "a").read_text() == "old"
    publish(place, force=True)
    assert tree(tmp_path) == {"out": "/", "out/a": "new", "out/sub": "/", "out/sub/b": "new"}
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputExists):
        publish(file)
    assert file.read_text() == "mine"
    publish(file, force=True)
    assert (file / "a").read_text() == "new"
    empty = tmp_path / "empty"
    empty.mkdir()
    publish(empty)
    assert (empty / "a").read_text() == "new"


def test_a_destination_that_appears_while_writing_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(OutputExists), staged(place) as stage:
        (stage / "a").write_text("new")
        place.mkdir()
        (place / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"out": "/", "out/theirs": "theirs"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [True, False])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], force: bool
) -> None:
    place = tmp_path / "out"
    if force:
        publish(place, "old")
    before = tree(tmp_path)
    with pytest.raises(error), staged(place, everything if force else refuse_all) as stage:
        (stage / "a").write_text("half")
        raise error
    assert tree(tmp_path) == before


def test_system_errors_are_one_clear_line(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(ZooError, match=r"out: not written: No space left on device"), staged(place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"not written: .*file"), staged(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ZooError, match="bytes needed"), staged(place, size=1 << 60):
        pass
    with pytest.raises(OutputExists, match="root"), staged("/", everything):
        pass
    with pytest.raises(OutputExists, match="mounted"), staged("/proc", everything):
        pass
    assert tree(tmp_path) == {"file": ""}


def test_all_that_is_free_may_be_used_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    with staged(tmp_path / "out", size=100):
        pass
    with (
        pytest.raises(ZooError, match="101 bytes needed, 100 free"),
        staged(tmp_path / "more", size=101),
    ):
        pass
    assert tree(tmp_path) == {"out": "/"}


@pytest.mark.parametrize(
    ("step", "atomic", "calls"),
    [
        ("mkdir", True, 2),
        ("fsync", True, 6),
        ("fsync", False, 6),
        ("rename", False, 2),
        ("_exchange", True, 1),
    ],
)
def test_a_failure_at_any_step_leaves_old_or_new(
    tmp_path: Path, step: str, atomic: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its calls; never a mixture, never litter, never in silence."""
    place = tmp_path / "out"
    publish(place, "old")
    old = tree(tmp_path)
    owner = os if hasattr(os, step) else publishing
    real = getattr(owner, step)
    for nth in range(1, calls + 2):
        count = 0

        def failing(*args: object, nth: int = nth) -> object:
            nonlocal count
            count += 1
            if count == nth:
                raise OSError(errno.EIO, "broken disk")
            return real(*args)

        with monkeypatch.context() as patch:
            if not atomic:
                patch.setattr(publishing, "_exchange", lambda *_: False)
            patch.setattr(owner, step, failing)
            if nth <= calls:
                with pytest.raises(ZooError, match="broken disk"):
                    publish(place, "new", force=True)
            else:
                publish(place, "new", force=True)
        left = tree(tmp_path)
        assert left.keys() == old.keys()
        assert set(left.values()) - {"/"} in ({"old"}, {"new"})
        publish(place, "old", force=True)


def test_a_replacement_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not publishing._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    publish(place, "old")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("two steps"))
    publish(place, force=True)
    assert (place / "a").read_text() == "new"
    with pytest.raises(FileNotFoundError):
        publishing._exchange(tmp_path / "a", tmp_path / "absent")


def test_a_replacement_without_an_atomic_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    publish(place, "old")
    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    publish(place, force=True)
    assert tree(tmp_path) == {"out": "/", "out/a": "new", "out/sub": "/", "out/sub/b": "new"}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_a_system_that_cannot_exchange_names_renames_twice(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSYS: the kernel has no renameat2. EINVAL: the file system does not know the flag."""

    def renameat2(*args: object) -> int:
        ctypes.set_errno(code)
        return -1

    place = tmp_path / "out"
    publish(place, "old")
    library = SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *args, **kwargs: library)
    publish(place, force=True)
    assert tree(tmp_path) == {"out": "/", "out/a": "new", "out/sub": "/", "out/sub/b": "new"}
    code = errno.EACCES
    with pytest.raises(ZooError, match="Permission denied"):
        publish(place, "newer", force=True)
    assert (place / "a").read_text() == "new"


def test_a_replacement_killed_halfway_is_undone(tmp_path: Path) -> None:
    place = tmp_path / "out"
    publish(place, "old")
    place.rename(tmp_path / ".out.zoo-replaced")
    with pytest.raises(OutputExists):
        publish(place)
    assert (place / "a").read_text() == "old"
    assert not (tmp_path / ".out.zoo-replaced").exists()


def test_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    target, place = tmp_path / "target", tmp_path / "out"
    publish(target, "theirs")
    place.symlink_to(target)
    with pytest.raises(OutputExists):
        publish(place)
    publish(place, force=True)
    assert not place.is_symlink()
    assert (place / "a").read_text() == "new"
    assert (target / "a").read_text() == "theirs"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "hole").symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputExists):
        publish(tmp_path / "hole")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExists):
        publish(dangling)
    trap = tmp_path / ".trap.zoo-partial"
    trap.symlink_to(target)
    publish(tmp_path / "trap")
    assert (target / "a").read_text() == "theirs"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        publish(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o640


def test_files_and_folders_reach_the_disk_before_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        sync(fd)

    def moved(one: Path, other: Path) -> None:
        events.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved)
    publish(tmp_path / "out")
    assert set(events[:4]) == {"a", "b", "sub", ".out.zoo-partial"}
    assert events[3:] == [".out.zoo-partial", ".out.zoo-lock", "rename", tmp_path.name]


def test_long_and_unusual_names_are_staged(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 120, "with space", "-dash", ".hidden"):
        publish(tmp_path / name)
        assert (tmp_path / name / "a").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 5


def test_a_relative_destination_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(Path("out"))
    assert (tmp_path / "out" / "a").exists()


# --- what a killed run left ----------------------------------------------------------------------


def journal(place: Path, *entries: object, torn: bytes = b"") -> Path:
    path = place.with_name(f".{place.name}.zoo-lock")
    lines = [json.dumps(entry).encode() + b"\n" for entry in entries]
    path.write_bytes(b"".join(lines) + torn)
    return path


def test_a_directory_that_was_being_renamed_is_published_only_if_it_is_that_one(
    tmp_path: Path,
) -> None:
    place = tmp_path / "out"
    publish(place, "whole")
    inode = place.stat().st_ino
    journal(place, {"job": "j"}, {"publishing": inode, "of": "j s"})
    with resumable(place, "j", sources="s") as stage:
        assert stage.published
    assert tree(tmp_path).keys() == {"out", "out/a", "out/sub", "out/sub/b"}
    for note in ({"publishing": inode + 1, "of": "j s"}, {"publishing": inode, "of": "j t"}):
        journal(place, {"job": "j"}, note)
        again = resumable(place, "j", sources="s")
        with pytest.raises(OutputExists, match="exists already"), again:
            pass
    assert (place / "a").read_text() == "whole"


def test_a_torn_line_is_cut_off_before_a_journal_goes_on(tmp_path: Path) -> None:
    """What was torn is longer than what follows: its end may not be left behind that."""
    place = tmp_path / "out"
    (tmp_path / ".out.zoo-partial").mkdir()
    torn = b'{"tensor": "' + b"x" * 100
    path = journal(place, {"job": "j"}, {"tensor": "a"}, torn=torn)
    with pytest.raises(KeyboardInterrupt), resumable(place, "j") as stage:
        assert stage.records == [{"tensor": "a"}]
        stage.record({"tensor": "b"})
        raise KeyboardInterrupt
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines == [{"job": "j"}, {"tensor": "a"}, {"tensor": "b"}]


# --- other writers -------------------------------------------------------------------------------


@contextmanager
def child(target: object, *args: object) -> Iterator[multiprocessing.process.BaseProcess]:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)  # type: ignore[arg-type]
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _hold(place: Path, started: Path) -> None:
    with staged(place) as stage:
        (stage / "a").write_text("half")
        started.touch()
        time.sleep(PATIENCE)


def wait_for(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if path.exists():
            return
        time.sleep(0.005)
    pytest.fail(f"{path} never came")


def test_a_second_writer_is_refused_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    place, started = tmp_path / "out", tmp_path / "started"
    with child(_hold, place, started) as process:
        wait_for(started)
        with pytest.raises(OutputExists, match="another process"):
            publish(place)
        with pytest.raises(OutputExists, match="another process"):
            publish(place, force=True)
        publish(tmp_path / "other")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    started.unlink()
    assert (tmp_path / ".out.zoo-partial" / "a").read_text() == "half"
    publish(place)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["other", "out"]
    assert (place / "a").read_text() == "new"


def test_a_lock_file_that_was_just_removed_is_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real = tmp_path / ".out.zoo-lock", fcntl.flock
    tries = 0

    def flock(fd: int, operation: int) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            lock.unlink()  # by its last owner, between our open and our lock
        if tries == 2:
            lock.unlink()
            lock.touch()  # and another writer is there already
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with staged(tmp_path / "out"), lock.open() as file, pytest.raises(BlockingIOError):
        real(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert tries == 3


def test_one_of_many_concurrent_writers_publishes(tmp_path: Path) -> None:
    for turn in range(25):
        place = tmp_path / f"out{turn}"
        barrier = threading.Barrier(4)
        message: list[str] = []
        done: list[str] = []

        def write(
            text: str,
            place: Path = place,
            barrier: threading.Barrier = barrier,
            message: list[str] = message,
            done: list[str] = done,
        ) -> None:
            barrier.wait()
            try:
                publish(place, text)
                done.append(text)
            except OutputExists:
                message.append(text)

        writers = [threading.Thread(target=write, args=(str(n),)) for n in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert (len(done), len(message)) == (1, 3)
        assert {(place / "a").read_text(), (place / "sub" / "b").read_text()} == set(done)
    assert len(list(tmp_path.iterdir())) == 25
