"""File formats: each lists, reads or writes named tensors; none knows what a model is."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zoo.errors import CorruptCheckpoint, DtypeMismatch, NotACheckpoint, UnsafePath, listing

if TYPE_CHECKING:
    import torch

# dtype code: (bits, torch's name), from the smallest to the largest. The order is the format's own:
# a safetensors file holds its tensors by descending dtype, then by name.
_DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, None),  # torch counts these in pairs, the file counts each
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
BITS = {code: bits for code, (bits, _) in _DTYPES.items()}
_NAMED = {name: code for code, (_, name) in _DTYPES.items() if name}
RANK = {code: rank for rank, code in enumerate(_DTYPES)}


class TensorInfo(NamedTuple):
    """Name, shape and dtype of one tensor, as a header declares them."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, rounded up."""
        return (self.numel * BITS[self.dtype] + 7) // 8


class Layout(NamedTuple):
    """The plan of a file: its first bytes, where each tensor starts behind them, and the rest.

    `seal` returns (position in the file, bytes) of everything that is neither head nor tensor, from
    each tensor's CRC-32.
    """

    head: bytes
    starts: dict[str, int]
    size: int  # bytes of everything behind the head
    seal: Callable[[Mapping[str, int]], list[tuple[int, bytes]]] | None = None


@cache
def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code.

    Raises:
        DtypeMismatch: If this version of torch has no such dtype.
    """
    import torch

    name = _DTYPES[code][1] if code in _DTYPES else None
    dtype: torch.dtype | None = getattr(torch, name, None) if name else None
    if dtype is None:
        raise DtypeMismatch(f"dtype {code}: this torch has no such tensors")
    return dtype


@cache
def _codes() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, n): c for c, (_, n) in _DTYPES.items() if n and hasattr(torch, n)}


def dtype_code(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype.

    Raises:
        DtypeMismatch: If no checkpoint format has a code for it.
    """
    code = _codes().get(dtype)
    if code is None:
        raise DtypeMismatch(f"{dtype}: no checkpoint format has a code for this dtype")
    return code


def named_dtype(name: str) -> str | None:
    """Return the code of a dtype from torch's name for it, without importing torch."""
    return _NAMED.get(name)


def itemsize(code: str) -> int:
    """Return the bytes of one element of a dtype."""
    bits = BITS.get(code)
    if bits is None or bits % 8:
        raise DtypeMismatch(f"dtype {code}: its elements are not whole bytes")
    return bits // 8


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse names of tensors with line breaks, which would break messages."""
    if broken := [repr(name)[:100] for name in names if len(name.splitlines()) > 1]:
        raise CorruptCheckpoint(f"{path}: names of tensors with line breaks: {listing(broken, 5)}")


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Devices and FIFOs are refused and never opened.

    Raises:
        NotACheckpoint: If the file cannot be opened.
        UnsafePath: If it is not a regular file.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise NotACheckpoint(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    raise UnsafePath(f"{path}: is not a regular file, so it was not opened")
