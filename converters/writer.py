"""Write an output: read, rearrange, cast, check and hash each tensor, and put it in its file.

A tensor passes through in pieces of bounded size. A few threads write tensors side by side, each
to its own position in its file. The journal records what is finished, so that a run that was killed
resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from converters.block_codes import in_units
from converters.formats import open_regular, torch_dtype
from converters.memory import is_shortage
from converters.output import ZEROS, Item, Output, Shard, hash_file, identity
from converters.staging.stage import Stage
from converters.threads import one_thread_each
from zoo.errors import (
    CorruptCheckpoint,
    NonFinite,
    OverflowOnCast,
    SourceChanged,
    ZooError,
    listing,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor

    from converters.lazy import Lazy

MEMORY = 64 << 20
_COPY = 256 << 10  # bytes copied at a time: a buffer that stays in the second-level cache
_PAGE = 4 << 10
_TURN = 512 << 10  # bytes rearranged at a time
_SLAB = 6 << 20  # bytes read at a time by all threads: the more, the longer the runs of a matrix
# that is transposed as it is read
_FEW = 16 << 10
_LARGE = 64 << 10  # equal tensors of so many bytes are not equal by chance

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class WriteOptions:
    """How an output is written."""

    memory: int = MEMORY  # bytes of buffers, all threads together
    threads: int = 0  # as many as the machine has, up to four
    sha256: bool = True  # of sources and outputs; each tensor's own digest is always taken
    allow_nonfinite: bool = False
    tell: Tell = lambda event: None

    @property
    def workers(self) -> int:
        """Number of threads."""
        return self.threads or min(4, len(os.sched_getaffinity(0)))


@dataclass
class WriteReport:
    """Digests and observations of everything that was written."""

    tensors: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> tensor -> xxh3
    files: dict[str, str] = field(default_factory=dict)  # file -> sha256
    sources: dict[str, str] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)  # file -> xxh3 of the bytes outside tensors
    zeros: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)  # names that hold the same numbers
    resumed: int = 0  # bytes that an earlier run had written

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for a journal."""
        return asdict(self)

    @classmethod
    def joined(cls, parts: Iterable[dict[str, Any]], output: Output) -> WriteReport:
        """Join the reports of an output's parts."""
        whole = cls()
        for part in parts:
            for name in ("tensors", "files", "sources", "rest"):
                getattr(whole, name).update(part[name])
            whole.zeros += part["zeros"]
            whole.resumed += part["resumed"]
        whole.put_in_order(output)
        return whole

    def put_in_order(self, output: Output) -> None:
        """Sort what threads and parts observed into the order of the files."""
        zeros, same = set(self.zeros), dict[str, list[str]]()
        self.zeros = []
        for shard in output.shards:
            seen = self.tensors.get(shard.name, {})
            self.tensors[shard.name] = {item.name: seen[item.name] for item in shard.items}
            self.zeros += [item.name for item in shard.items if item.name in zeros]
            for item in shard.items:
                if item.nbytes >= _LARGE and item.name not in zeros:
                    same.setdefault(seen[item.name], []).append(item.name)
        self.duplicates = [names for names in same.values() if len(names) > 1]


def run(output: Output, stage: Stage, options: WriteOptions) -> WriteReport:
    """Write every file of tensors into the stage and flush it to the disk.

    Args:
        output: The files to write and where their tensors come from.
        stage: The directory being filled, with its journal.
        options: Memory, threads and checks.

    Returns:
        Digests of everything written, and which tensors are all zero or equal.

    Raises:
        NonFinite: If a tensor holds NaN or infinity and `options` do not allow it.
        OverflowOnCast: If a value is too large for the dtype it is cast to.
        SourceChanged: If a source file changed meanwhile.
        CorruptCheckpoint: If a source file is damaged.
    """
    with one_thread_each():  # the threads here are the parallelism
        return _Run(output, stage, options).run()


def damages(output: Output, directory: Path, finished: dict[str, Any]) -> Iterator[str]:
    """Yield every difference between the files of tensors and a part's report of them."""
    for shard in output.shards:
        digests, path = finished["tensors"][shard.name], directory / shard.name
        try:
            fd = open_regular(path)
        except ZooError:
            yield f"{shard.name} is gone"
            continue
        try:
            head = shard.layout.head
            if os.fstat(fd).st_size != shard.size or os.pread(fd, len(head), 0) != head:
                yield f"{shard.name} is of another layout"
                continue
            buffer = memoryview(bytearray(_COPY))
            for item in shard.items:
                digest, _ = _digest(fd, shard.start(item), item.nbytes, buffer)
                if digest != digests[item.name]:
                    yield f"{shard.name}: {item.name} differs"
            if _rest(shard, fd, buffer) != finished["rest"][shard.name]:
                yield f"{shard.name}: bytes outside its tensors differ"
        finally:
            os.close(fd)


def _digest(
    fd: int, start: int, size: int, buffer: memoryview, sums: bool = False
) -> tuple[str, int]:
    """Return (xxh3, CRC-32 if `sums`) of bytes in a file."""
    state, crc = xxhash.xxh3_128(), 0
    for piece in _read(fd, start, size, buffer):
        state.update(piece)
        crc = zlib.crc32(piece, crc) if sums else 0
    return state.hexdigest(), crc


def _rest(shard: Shard, fd: int, buffer: memoryview) -> str:
    """Return the digest of all bytes outside the tensors: the head, gaps and the tail."""
    state, reached = xxhash.xxh3_128(), 0
    places = sorted((shard.start(item), item.nbytes) for item in shard.items)
    for start, size in (*places, (shard.size, 0)):
        for piece in _read(fd, reached, start - reached, buffer):
            state.update(piece)
        reached = start + size
    return state.hexdigest()


def write_small_files(output: Output, directory: Path, report: WriteReport) -> None:
    """Write the files without tensors, and record their digests."""
    for name, text in output.texts.items():
        path = _fresh(directory / name)
        with path.open("xb") as file:
            file.write(text)
        report.files[name] = hashlib.sha256(text).hexdigest()
    for name, source in output.carried.items():
        path = _fresh(directory / name)
        shutil.copyfile(source, path)
        report.files[name] = hash_file(path)


def _fresh(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _largest_first(item: Item) -> int:
    """Sort key: no thread is left alone with a large tensor at the end."""
    return -item.nbytes


class _Run:
    def __init__(self, output: Output, stage: Stage, options: WriteOptions) -> None:
        self.output, self.stage, self.options = output, stage, options
        self.sources = {path: open_regular(path) for path in output.sources}
        self.report = WriteReport()
        self.lock = threading.Lock()
        self.faults: list[str] = []  # tensors that are not finite
        self.overflows: list[str] = []
        self.done, self.began = 0, time.monotonic()
        self.left = {shard.name: len(shard.items) for shard in output.shards}
        self.sums: dict[str, dict[str, int]] = {shard.name: {} for shard in output.shards}
        self.buffers = threading.local()
        each = options.memory // options.workers  # for two buffers, and what is read at a time
        self.turn = max(64 << 10, min(_TURN, each // 3 // _PAGE * _PAGE))
        self.copy = min(_COPY, self.turn)
        self.slab = max(self.turn, min(_SLAB // options.workers, each - 2 * self.turn))

    def run(self) -> WriteReport:
        try:
            self._check_sources()
            report = self._run()
            self._check_sources()  # nothing was read while it changed
            return report
        except (CorruptCheckpoint, SourceChanged):
            self._check_sources()  # the likelier cause, and it names the file
            raise
        except RuntimeError as error:
            if is_shortage(error):  # torch's allocator reports it as a RuntimeError
                raise MemoryError(str(error)) from None
            raise
        finally:
            for fd in self.sources.values():
                os.close(fd)

    def _check_sources(self) -> None:
        """Check that the open source files are those of the plan, unchanged."""
        identities = {path: identity(os.fstat(fd)) for path, fd in self.sources.items()}
        changed = [path for path, seen in self.output.seen.items() if identities.get(path) != seen]
        if changed:
            raise SourceChanged(
                f"{listing(map(str, changed))}: changed while it was read. Put it back as it was, "
                "and the same command resumes; otherwise convert it again"
            )

    def _run(self) -> WriteReport:
        total = sum(shard.size for shard in self.output.shards)
        self.options.tell({"event": "start", "bytes": total, "files": len(self.output.shards)})
        records = self._resumed_tensors()
        self.stage.record({"sources": self.output.identity()})
        files = {shard.name: self._open(shard, records) for shard in self.output.shards}
        pool = ThreadPoolExecutor(self.options.workers, thread_name_prefix="zoo-convert")
        futures: list[Future[Any]] = []
        try:
            for shard in self.output.shards:
                kept = records.get(shard.name, {})
                futures += [
                    pool.submit(self._item, shard, item, files[shard.name], kept.get(item.name))
                    for item in sorted(shard.items, key=_largest_first)
                ]
                if not shard.items:
                    futures.append(pool.submit(self._finish, shard, files[shard.name]))
            if self.options.sha256:  # beside the hash of the last file
                hashed = self.output.hashed
                hashed = self.output.sources if hashed is None else hashed
                futures += [pool.submit(self._hash_source, path) for path in hashed]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for fd in files.values():
                os.close(fd)
        if self.faults:
            hint = f"; pass {option('allow_nonfinite')} to keep such values"
            raise NonFinite(f"not finite: {listing(self.faults)}{hint}")
        if self.overflows:
            raise OverflowOnCast(f"too large for the dtype asked for: {listing(self.overflows)}")
        self.report.put_in_order(self.output)
        return self.report

    # --- files ---

    def _resumed_tensors(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return file -> tensor -> record of what an earlier run wrote.

        "same" in a record: its sources have not changed since.
        """
        tensors: dict[str, dict[str, dict[str, Any]]] = {}
        mine, theirs = self.output.identity(), None
        for entry in self.stage.records:
            theirs = entry.get("sources", theirs)
            entry = {**entry, "same": theirs == mine}
            words = [entry.get(name) for name in ("file", "tensor", "xxh3", "nonfinite")]
            if all(isinstance(word, str) for word in words) and type(entry.get("zero")) is bool:
                tensors.setdefault(entry["file"], {})[entry["tensor"]] = entry
        return tensors

    def _open(self, shard: Shard, digests: dict[str, Any]) -> int:
        """Open a file at full size with its header; keep an earlier run's content if it fits."""
        path = self.stage.path / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o666)
        head = shard.layout.head
        size = os.fstat(fd).st_size
        if size != shard.size or os.pread(fd, len(head), 0) != head:
            digests.pop(shard.name, None)
            if size:  # ext4 writes a file that was cut to nothing as soon as it is closed
                os.ftruncate(fd, 0)
            _write(fd, memoryview(head), 0)
            os.ftruncate(fd, shard.size)
        return fd

    def _hash_source(self, path: Path) -> None:
        with os.fdopen(os.dup(self.sources[path]), "rb") as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with self.lock:
            self.report.sources[path.name] = digest

    def _finish(self, shard: Shard, fd: int) -> None:
        seal = shard.layout.seal
        for place, data in seal(self.sums[shard.name]) if seal is not None else ():
            _write(fd, memoryview(data), place)
        digest = _rest(shard, fd, self._buffer()[: self.copy])
        with self.lock:
            self.report.rest[shard.name] = digest
        os.fsync(fd)
        digest = hash_file(self.stage.path / shard.name) if self.options.sha256 else ""
        with self.lock:
            if digest:
                self.report.files[shard.name] = digest
            self.options.tell({"event": "file", "file": shard.name, "bytes": shard.size})

    # --- tensors ---

    def _item(self, shard: Shard, item: Item, fd: int, kept: dict[str, Any] | None) -> None:
        start, sums = shard.start(item), shard.layout.seal is not None
        there, crc = "", 0
        if kept is not None:
            there, crc = _digest(fd, start, item.nbytes, self._buffer()[: self.copy], sums)
        if kept is not None and there != kept["xxh3"]:
            kept = None
        if kept is not None and kept["same"]:
            digest, zero = kept["xxh3"], kept["zero"]
            with self.lock:
                self.report.resumed += item.nbytes
                self._note(item, kept["nonfinite"])
        else:
            # a source that was touched since may still give the same bytes
            if kept is not None:
                digest, crc, look = self._go_through(item, None, start, sums)
            if kept is None or digest != there:
                digest, crc, look = self._go_through(item, fd, start, sums)
            zero, resumed = look.zero, kept is not None and digest == there
            entry = {"file": shard.name, "tensor": item.name, "xxh3": digest}
            with self.lock:
                self.report.resumed += item.nbytes if resumed else 0
                self._note(item, look.nonfinite)
                if look.overflow:  # no later run can use it
                    self.overflows.append(_located(item, look.overflow))
                else:
                    self.stage.record({**entry, "zero": zero, "nonfinite": look.nonfinite})
        with self.lock:
            self.report.tensors.setdefault(shard.name, {})[item.name] = digest
            if zero and item.rule != ZEROS:
                self.report.zeros.append(item.name)
            self.sums[shard.name][item.name] = crc
            self.left[shard.name] -= 1
            last = self.left[shard.name] == 0
            self.done += item.nbytes
            event = {"event": "tensor", "tensor": item.name, "file": shard.name, "done": self.done}
            self.options.tell({**event, "seconds": time.monotonic() - self.began})
        if last:
            self._finish(shard, fd)

    def _note(self, item: Item, nonfinite: str) -> None:
        if nonfinite and not self.options.allow_nonfinite:
            self.faults.append(_located(item, nonfinite))

    def _go_through(
        self, item: Item, fd: int | None, start: int, sums: bool
    ) -> tuple[str, int, _Look]:
        """Return (xxh3, CRC-32, what was observed) of what the sources give.

        It is written where there is an `fd`.
        """
        state, crc, look, end = xxhash.xxh3_128(), 0, _Look(item), start + item.nbytes
        for piece in self._pieces(item, look, start):
            state.update(piece)
            crc = zlib.crc32(piece, crc) if sums else 0
            start += len(piece) if fd is None else _write(fd, piece, start)
        assert start == end, f"{item.name}: {start - end} bytes more than planned"
        return state.hexdigest(), crc, look

    def _buffer(self, name: str = "pieces") -> memoryview:
        """Return this thread's buffer of a name."""
        if not hasattr(self.buffers, name):
            setattr(self.buffers, name, memoryview(bytearray(self.turn)))
        buffer: memoryview = getattr(self.buffers, name)
        return buffer

    def _pieces(self, item: Item, look: _Look, start: int) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order.

        Copied pieces end where the pages of the output, which begins at `start`, end.
        """
        import torch

        if item.nbytes == 0:
            return
        if item.coding is not None:
            # numbers, the rest that waits for a whole unit, and their bytes are in memory together
            buffer = self._buffer()
            room = torch.frombuffer(buffer, dtype=torch.uint8)  # Tensor.numpy would need NumPy
            for numbers, coded in in_units(self._views(item.make(), 4), item.coding):
                look.at(numbers)
                for part in coded.reshape(-1).split(len(buffer)):
                    room[: len(part)].copy_(part)
                    yield buffer[: len(part)]
            return
        buffer, dtype = self._buffer(), torch_dtype(item.info.dtype)
        if item.span is not None:
            fd, short, size = self.sources[item.span.path], start % _PAGE, item.info.nbytes
            for piece in _read(fd, item.span.start, size, buffer[: self.copy], short):
                look.at(torch.frombuffer(piece, dtype=dtype))
                yield piece
            return
        room, aside = (torch.frombuffer(b, dtype=dtype) for b in (buffer, self._buffer("aside")))
        lazy = item.make()
        width = max(lazy.dtype.itemsize, dtype.itemsize)
        for view in self._views(lazy, width):
            out = room[: view.numel()].view(view.shape)
            _fill(out, view, aside)
            look.at(out, view)
            yield buffer[: out.nbytes]

    def _views(self, lazy: Lazy, width: int) -> Iterator[Tensor]:
        """Yield an array's numbers, `width` bytes each, as many as are rearranged at a time."""
        for piece in lazy.pieces(self.slab * lazy.dtype.itemsize // width):
            yield from _cut(piece, max(1, self.turn // width))


def _cut(view: Tensor, most: int) -> Iterator[Tensor]:
    """Yield the same numbers in the same order, in views of at most `most`."""
    if view.numel() <= most:
        yield view
        return
    step = most // (view.numel() // len(view))
    for part in view.split(step) if step else view:
        yield from _cut(part, most)


def _fill(out: Tensor, view: Tensor, aside: Tensor) -> None:
    """Copy the numbers of `view` to `out`.

    A transposed matrix is first copied along its rows, since torch transposes contiguous memory in
    blocks.
    """
    flat = view.squeeze()
    if flat.dim() == 2 and flat.stride(0) == 1 and flat.stride(1) != 1:
        rows = aside[: flat.numel()].view(flat.shape[1], flat.shape[0])
        rows.copy_(flat.t())
        flat, out = rows.t(), out.view(flat.shape)
        out.copy_(flat)
    else:
        out.copy_(view)


def _located(item: Item, fault: str) -> str:
    """Name a faulty tensor and its sources."""
    return f"{item.name}{fault}" + (f" (from {item.source})" if item.source else "")


class _Look:
    """Observes the numbers of one tensor as they pass."""

    def __init__(self, item: Item) -> None:
        self.cast, self.shape = bool(item.stored), item.info.shape
        self.zero, self.nonfinite, self.overflow = True, "", ""
        self.seen = 0  # numbers observed so far

    def at(self, piece: Tensor, before: Tensor | None = None) -> None:
        """Observe a piece; `before` is the piece before its cast."""
        import torch

        if not piece.is_floating_point():
            self.zero = self.zero and not piece.any().item()
            return
        # a sum of finite terms is finite, unless they are too large together
        wide = torch.float64 if piece.dtype == torch.float64 else torch.float32
        # torch widens all terms before it adds them, so narrow numbers are added a few at a time
        parts = (piece,) if piece.dtype == wide else piece.reshape(-1).split(_FEW)
        total = sum(part.sum(dtype=wide).item() for part in parts)
        if total != 0 or (self.zero and piece.any().item()):
            self.zero = False
        if total - total != 0:
            nonfinite = ~piece.to(wide).isfinite()  # narrow types have no isfinite
            if self.cast and before is not None:
                over = nonfinite & before.to(torch.float64).isfinite()
                self.overflow = self.overflow or self._first(over, before)
                nonfinite &= ~over
            self.nonfinite = self.nonfinite or self._first(nonfinite, piece)
        self.seen += piece.numel()

    def _first(self, where: Tensor, values: Tensor) -> str:
        """Return the first position and value, such as `[2, 7] is nan`; empty if there is none."""
        import torch

        if not where.any().item():
            return ""
        place = int(where.flatten().int().argmax())
        at = torch.unravel_index(torch.tensor(self.seen + place), self.shape)
        return f"{[int(n) for n in at]} is {values.flatten()[place].item():g}"


def _read(
    fd: int, start: int, size: int, buffer: memoryview, short: int = 0
) -> Iterator[memoryview]:
    """Yield pieces as long as the buffer; the first is `short` bytes shorter."""
    while size:
        piece = buffer[: min(size, len(buffer) - short)]
        short = 0
        count = os.preadv(fd, [piece], start)
        if count == 0:
            raise SourceChanged("a source became shorter while it was read")
        if count < len(piece):
            piece = piece[:count]
        yield piece
        start, size = start + count, size - count


def _write(fd: int, data: memoryview, start: int) -> int:
    """Write in strides that end at page boundaries; longer runs of pages are often not free."""
    written = 0
    while written < len(data):
        stride = _COPY - (start + written) % _PAGE
        written += os.pwrite(fd, data[written : written + stride], start + written)
    return written
