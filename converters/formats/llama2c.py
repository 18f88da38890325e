"""llama2.c's `.bin`: a header of sizes, then arrays without names in a fixed order."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from converters.formats import Layout, TensorInfo, open_regular
from converters.formats.source import SourceFile
from zoo.errors import (
    ConfigError,
    CorruptCheckpoint,
    LossyExport,
    MissingTensors,
    did_you_mean,
)

if TYPE_CHECKING:
    import torch

    from converters.lazy import Read

MAGIC = 0x616B3432
_SIZES = struct.Struct("<7i")
_HEAD = 256  # bytes, in versions with a magic number
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
# more than any size can be, so that arbitrary bytes are not taken for a header
_MOST = (1 << 20, 1 << 22, 1 << 12, 1 << 16, 1 << 16, 1 << 26, 1 << 26)


class Header(NamedTuple):
    """The sizes in front of the arrays."""

    version: int
    sizes: tuple[int, ...]  # in the order of FIELDS, all positive
    shared: bool  # the classifier is the embedding
    group: int = 0  # numbers that share a scale, in version 2

    @property
    def values(self) -> dict[str, Any]:
        """The sizes by llama2.c's names."""
        named = dict(zip(FIELDS, self.sizes, strict=True))
        return {**named, "shared_classifier": self.shared}

    @property
    def size(self) -> int:
        """Bytes of the header."""
        return _SIZES.size if self.version == 0 else _HEAD

    def pack(self) -> bytes:
        """Return the bytes of the header."""
        if self.version == 0:
            *sizes, vocab, length = self.sizes  # negative vocabulary: the classifier is separate
            return _SIZES.pack(*sizes, vocab if self.shared else -vocab, length)
        head = struct.pack("<Ii7iB", MAGIC, self.version, *self.sizes, self.shared)
        head += struct.pack("<i", self.group) if self.version == 2 else b""
        return head.ljust(_HEAD, b"\0")

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) in file order; the names are those of llama2.c's structs."""
        dim, hidden, layers, heads, kv_heads, vocab, length = self.sizes
        kv, half = dim // heads * kv_heads, dim // heads // 2
        norms = {"rms_att_weight": (layers, dim), "rms_ffn_weight": (layers, dim)}
        last = {"rms_final_weight": (dim,)}
        attention = {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
        mlp = {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
        table = {"token_embedding_table": (vocab, dim)}
        own = {} if self.shared else {"wcls": (vocab, dim)}
        stacked = {n: (layers, *s) for n, s in {**attention, **mlp}.items()}
        if self.version == 0:
            first = {"rms_att_weight": norms["rms_att_weight"]}
            second = {"rms_ffn_weight": norms["rms_ffn_weight"]}
            turns = {f"freq_cis_{part}": (length, half) for part in ("real", "imag")}
            middle = {n: stacked[n] for n in attention}
            behind = {n: stacked[n] for n in mlp}
            every = {**table, **first, **middle, **second, **behind, **last, **turns, **own}
        elif self.version == 1:
            every = {**norms, **last, **table, **stacked, **own}
        else:
            every = {**norms, **last, **table}
            for name, shape in {**attention, **mlp}.items():
                every |= {f"{name}.{n}": shape for n in range(layers)}
            every |= own
        yield from every.items()

    def groups(self, name: str) -> bool:
        """Return whether an array is stored as int8 numbers and a scale for each group."""
        return self.version == 2 and not name.startswith("rms_")

    def nbytes(self, name: str, count: int) -> int:
        """Return the bytes of `count` numbers of an array."""
        return count + count // self.group * 4 if self.groups(name) else 4 * count

    def problem(self) -> str:
        """Return what is wrong with the sizes; empty if nothing is."""
        dim, _, _, heads, kv_heads, _, _ = self.sizes
        for name, value, most in zip(FIELDS, self.sizes, _MOST, strict=True):
            if not 0 < value <= most:
                return f"{name} is {value}, and it may be 1 to {most}"
        if dim % heads or dim // heads % 2:
            return f"n_heads {heads} does not divide dim {dim} into heads of an even width"
        if heads % kv_heads:
            return f"n_kv_heads {kv_heads} does not divide n_heads {heads}"
        if self.version == 2:
            if self.group < 1:
                return f"group_size is {self.group}"
            ragged = [n for n, s in self.arrays() if self.groups(n) and prod(s) % self.group]
            if ragged:
                return f"group_size {self.group} does not divide {ragged[0]}"
        return ""

    def starts(self) -> tuple[dict[str, int], int]:
        """Return (start of each array, end of the file)."""
        at, starts = self.size, dict[str, int]()
        for name, shape in self.arrays():
            starts[name] = at
            at += self.nbytes(name, prod(shape))
        return starts, at


def recognizes(head: bytes, size: int) -> bool:
    """Return whether a file begins like llama2.c's.

    Version 0 has no magic number, so its sizes have to be plausible.
    """
    if len(head) >= 8 and struct.unpack_from("<I", head)[0] == MAGIC:
        return True
    return len(head) >= _SIZES.size and size > _SIZES.size and not _version_0(head).problem()


def _version_0(head: bytes) -> Header:
    *sizes, vocab, length = _SIZES.unpack_from(head)
    return Header(0, (*sizes, abs(vocab), length), vocab > 0)


def _parse(path: Path, head: bytes) -> Header:
    if len(head) < _SIZES.size:
        raise CorruptCheckpoint(f"{path}: {len(head)} bytes are no header of llama2.c's")
    if struct.unpack_from("<I", head)[0] != MAGIC:
        header = _version_0(head)
    else:
        if len(head) < _HEAD:
            raise CorruptCheckpoint(f"{path}: {len(head)} bytes, and its header alone has {_HEAD}")
        _, version, *sizes, shared = struct.unpack_from("<Ii7iB", head)
        group = struct.unpack_from("<i", head, struct.calcsize("<Ii7iB"))[0]
        if version not in (1, 2):
            raise CorruptCheckpoint(f"{path}: version {version} of llama2.c's; 0, 1 and 2 are read")
        if shared not in (0, 1):
            raise CorruptCheckpoint(f"{path}: shared_classifier is {shared}; expected 0 or 1")
        header = Header(version, tuple(sizes), bool(shared), group if version == 2 else 0)
    if problem := header.problem():
        raise CorruptCheckpoint(f"{path}: header of llama2.c, version {header.version}: {problem}")
    return header


class Llama2cReader:
    """A llama2.c file; its sizes are checked against the size of the file when opened."""

    def __init__(self, path: Path, mmap: bool | None = None) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            self.header = _parse(path, os.pread(fd, _HEAD, 0))
            self._starts, end = self.header.starts()
            if size != end:
                cause = "Truncated? Download or copy it again" if size < end else "Bytes trail"
                raise CorruptCheckpoint(
                    f"{path}: {size} bytes, and its header (version {self.header.version}: "
                    f"{self.header.values}) makes {end}. {cause}"
                )
            self._file = SourceFile(path, fd, mmap is True)
        finally:
            os.close(fd)
        self.values: dict[str, Any] = self.header.values
        self.tensors = {n: TensorInfo(n, shape, "F32") for n, shape in self.header.arrays()}
        coarse = f"int8 in groups of {self.header.group}"
        self.quantized = {n: coarse for n in self.tensors if self.header.groups(n)}

    def size(self, name: str) -> int:
        """Return the bytes that an array takes in the file."""
        info = self.tensors[name]
        groups = self.header.groups(name)
        return info.numel + info.numel // self.header.group * 4 if groups else info.nbytes

    def span(self, name: str) -> tuple[int, int] | None:
        """Return where an array's bytes are; None if it is quantized."""
        if self.header.groups(name):
            return None
        start = self._starts[name]
        return start, start + self.tensors[name].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of the map or a copy; in version 2 dequantized."""
        if name not in self.tensors:
            near = did_you_mean(name, self.tensors)
            raise MissingTensors(f"{self.path}: has no tensor {name}.{near}")
        info = self.tensors[name]
        if self.header.groups(name):
            return self.numbers(name, *(slice(0, size) for size in info.shape))
        return self._file.tensor(self._starts[name], info.dtype, info.shape)

    def decoder(self, name: str) -> Read | None:
        """Return what reads or decodes a box of an array; None if `tensor` is a view of a map."""
        if self.header.groups(name):
            return partial(self.numbers, name)
        return self._file.boxes(self._starts[name], *reversed(self.tensors[name][1:]))

    def numbers(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """Return (rows, columns) of a quantized array; a group may span two rows."""
        import torch

        group, at, info = self.header.group, self._starts[name], self.tensors[name]
        width = info.shape[1]
        whole = self._file.box(at, "I8", info.shape, rows, columns)
        down, across = (torch.arange(side.start, side.stop) for side in (rows, columns))
        of = (down[:, None] * width + across) // group
        first, last = int(of[0, 0]), int(of[-1, -1]) + 1
        # scales follow the numbers, one byte each, without alignment
        scales = self._file.tensor(at + info.numel + 4 * first, "F32", (last - first,))
        return whole.float() * scales[of - first]


# --- writing -------------------------------------------------------------------------------------


def header_for(values: Mapping[str, Any], version: int, group: int = 64) -> Header:
    """Return the header for `values`; `group` is halved until it divides the rows."""
    sizes = tuple(values[name] for name in FIELDS)
    if version == 2:
        while group > 1 and sizes[0] % group:
            group //= 2
    header = Header(version, sizes, bool(values["shared_classifier"]), group if version == 2 else 0)
    if problem := header.problem():
        raise ConfigError(f"llama2.c, version {version}: {problem}")
    return header


def lay_out(header: Header, infos: Mapping[str, TensorInfo], where: Any) -> Layout:
    """Lay out these arrays; only rotary tables may be missing from them."""
    wanted = {n: s for n, s in header.arrays() if not n.startswith("freq_cis_")}
    if difference := sorted(wanted.keys() ^ infos.keys()):
        raise LossyExport(f"{where}: llama2.c has no place for, or lacks, {difference[0]}")
    for name, shape in wanted.items():
        assert infos[name].shape == shape, f"{name}: {infos[name].shape} and not {shape}"
    starts, end = header.starts()
    head = header.pack()
    places = {name: at - len(head) for name, at in starts.items()}
    return Layout(head, places, end - len(head))


def rotary_tables(header: Header, base: float = 10000.0) -> dict[str, torch.Tensor]:
    """Return the cosines and sines of version 0, which llama2.c skips and recomputes."""
    import torch

    length, width = header.sizes[6], header.sizes[0] // header.sizes[3]
    steps = torch.arange(0, width, 2).float() / width
    angles = torch.outer(torch.arange(length), 1.0 / base**steps).float()
    return {"freq_cis_real": angles.cos(), "freq_cis_imag": angles.sin()}


__all__ = ["Header", "Llama2cReader", "header_for", "lay_out", "recognizes"]
