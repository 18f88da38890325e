"""One file of a hub's repository, downloaded into the cache that huggingface_hub reads.

The hub names each file's bytes by their digest. A file takes its name in the cache only when its
bytes have that digest; nothing else that arrives is kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from zoo.errors import ChecksumMismatch, CorruptCheckpoint, SourceError

COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SMALL = 16 << 20  # bytes: files up to this size are compared with their digest at every load


class RemoteFile(NamedTuple):
    """A file of one commit, and where the cache has it."""

    url: str
    name: str
    folder: Path  # of the repository, in the cache
    revision: str
    commit: str
    digest: str
    size: int | None
    xet: Any  # how to fetch it from chunk storage, where the repository uses that

    @property
    def blob(self) -> Path:
        """Where its bytes lie, under their digest."""
        return self.folder / "blobs" / self.digest

    @property
    def pointer(self) -> Path:
        """Where it lies under its own name."""
        return self.folder / "snapshots" / self.commit / self.name


def ask(repo: str, name: str, revision: str, folder: Path, token: str | bool | None) -> RemoteFile:
    """Ask the hub for a file's commit and digest."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, name, revision=revision)
    try:
        answer = get_hf_file_metadata(url, token=token, retry_on_errors=True)
    except errors.RemoteEntryNotFoundError as error:
        commit = error.response.headers.get("X-Repo-Commit")
        if commit is not None and COMMIT.fullmatch(commit):
            _note_absent(folder, name, revision, commit)
        raise
    where = f"{repo}: the answer to {url}"
    for header, value, pattern, expected in (
        ("X-Repo-Commit", answer.commit_hash, COMMIT, "40 hexadecimal digits"),
        ("ETag", answer.etag, _DIGEST, "40 or 64 hexadecimal digits"),
    ):
        if value is None:
            raise SourceError(f"{where} has no {header}, so it is not a model hub's")
        if pattern.fullmatch(value) is None:
            raise SourceError(f"{where}: {header}: expected {expected}, found {value[:80]!r}")
    if answer.size is not None and answer.size < 0:
        raise SourceError(f"{where}: a file of {answer.size} bytes")
    commit, digest = str(answer.commit_hash), str(answer.etag)
    pinned = hf_hub_url(repo, name, revision=commit)
    xet = answer.xet_file_data
    return RemoteFile(pinned, name, folder, revision, commit, digest, answer.size, xet)


def fetch(entry: RemoteFile, token: str | bool | None, progress: Any, stopped: Event) -> Path:
    """Return the file in the cache: downloaded, checked, and only then under its name.

    A download in another thread ends, and leaves nothing, once `stopped` is set.
    """
    from huggingface_hub.utils import WeakFileLock

    if not (entry.pointer.is_file() and _is_intact(entry, entry.pointer)):
        for parent in (entry.blob.parent, entry.pointer.parent):
            parent.mkdir(parents=True, exist_ok=True)
        locks = entry.folder.parent / ".locks" / entry.folder.name
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{entry.digest}.lock"):
            if not (entry.blob.is_file() and _is_intact(entry, entry.blob)):
                _download(entry, token, progress, stopped)
        _link(entry)
    _note_commit(entry.folder, entry.revision, entry.commit)
    return entry.pointer


def _download(entry: RemoteFile, token: str | bool | None, progress: Any, stopped: Event) -> None:
    from huggingface_hub.file_download import http_get, is_xet_available, xet_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token)
    part = entry.blob.with_name(f"{entry.digest}.{uuid.uuid4().hex[:8]}.incomplete")
    # hf_hub_download gives its files the mode that open() does, and so does this
    try:
        if entry.xet is not None and is_xet_available():
            part.touch()
            xet_get(
                incomplete_path=part,
                xet_file_data=entry.xet,
                headers=headers,
                expected_size=entry.size,
                displayed_filename=entry.name,
                tqdm_class=progress,
            )
        else:
            with _Bounded(part, entry.size, stopped) as file:
                http_get(
                    entry.url,
                    file,
                    headers=headers,
                    expected_size=entry.size,
                    displayed_filename=entry.name,
                    tqdm_class=progress,
                )
        if (actual := _digest(part, entry.digest)) != entry.digest:
            raise ChecksumMismatch(
                f"{entry.url}: the bytes that arrived ({part.stat().st_size:,}) are not those that "
                f"the hub names: {_kind(entry.digest)} {entry.digest} expected, {actual} found. "
                "Nothing was kept; run the command again"
            )
        os.replace(part, entry.blob)
    finally:
        part.unlink(missing_ok=True)


class _Bounded(io.FileIO):
    """A file that refuses to grow past its published size."""

    def __init__(self, path: Path, limit: int | None, stopped: Event) -> None:
        super().__init__(path, "w")
        self._limit, self._stopped = limit, stopped

    def write(self, data: Any) -> int:
        if self._stopped.is_set():
            raise SourceError("the download was stopped")
        if self._limit is not None and self.tell() + len(data) > self._limit:
            raise SourceError(f"the hub sends more than the {self._limit:,} bytes it announced")
        view = memoryview(data)
        while view:  # the system may take less than all
            view = view[super().write(view) :]
        return len(data)


# --- what is in the cache ------------------------------------------------------------------------


def damaged_blob(path: Path, whole: bool = False) -> Path | None:
    """The blob behind a file in a hub's cache, if its bytes do not have the digest in its name.

    Large files are hashed only when `whole` asks for it.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name != "blobs" or _DIGEST.fullmatch(blob.name) is None or not blob.is_file():
        return None
    if not whole and blob.stat().st_size > _SMALL:
        return None
    return blob if _digest(blob, blob.name) != blob.name else None


def _is_intact(entry: RemoteFile, path: Path) -> bool:
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return False
    return damaged_blob(path) is None


def _digest(path: Path, like: str) -> str:
    """A file's digest of the same kind: sha256, or git's sha1 of a blob."""
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        total = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while piece := file.read(1 << 20):
            total.update(piece)
        return total.hexdigest()


def _kind(digest: str) -> str:
    return "sha256" if len(digest) == 64 else "git's sha1"


def _link(entry: RemoteFile) -> None:
    target = os.path.relpath(entry.blob, entry.pointer.parent)
    if entry.pointer.is_symlink() and os.readlink(entry.pointer) == target:
        return
    part = entry.pointer.with_name(f".{uuid.uuid4().hex[:8]}.link")
    try:
        try:
            os.symlink(target, part)
        except OSError:  # a file system without links
            shutil.copyfile(entry.blob, part)
        os.replace(part, entry.pointer)
    finally:
        part.unlink(missing_ok=True)


def _note_commit(folder: Path, revision: str, commit: str) -> None:
    """Record the commit that a branch stands for, if the cache can be written."""
    ref = folder / "refs" / revision
    if revision == commit or (ref.is_file() and ref.read_text() == commit):
        return
    part = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(commit)
        os.replace(part, ref)
    except OSError:
        part.unlink(missing_ok=True)


def _note_absent(folder: Path, name: str, revision: str, commit: str) -> None:
    """Record that a commit has no such file, so that nobody asks again."""
    place = folder / ".no_exist" / commit / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    except OSError:
        return
    _note_commit(folder, revision, commit)


@contextmanager
def naming_damaged_blobs(directory: Path) -> Iterator[None]:
    """Add to an error of a corrupt checkpoint which cached files do not match their digest."""
    try:
        yield
    except CorruptCheckpoint as error:
        blobs = [damaged_blob(path, whole=True) for path in sorted(directory.iterdir())]
        lines = [f"{damage(blob)}, and load again" for blob in blobs if blob is not None]
        if not lines:
            raise
        raise CorruptCheckpoint("\n  ".join([str(error), *lines])) from None


def damage(blob: Path) -> str:
    """Say that a blob is damaged, and what to do."""
    size = f"{blob.stat().st_size:,} bytes"
    return f"{blob} is damaged ({size}, which do not have the digest in its name): delete it"
