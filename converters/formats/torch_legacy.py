"""torch.save's format from before 1.6: pickles one behind the other, then each storage's numbers.

It has no checksums: a flipped bit among the numbers does not show.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from converters.formats import itemsize, named_dtype, torch_pickle
from converters.formats.torch_pickle import Storage
from zoo.errors import CorruptCheckpoint, ResourceLimit

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
MAX_PICKLE = 64 << 20  # names, shapes and strides: 100 bytes a tensor
_VERSION = 1001
_COUNT = struct.Struct("<q")


def read(path: Path, file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return (the saved object, storage -> (start, bytes))."""
    fd = file.fileno()
    size = os.fstat(fd).st_size
    head = _Pickles(path, os.pread(fd, min(size, MAX_PICKLE), 0))
    head.next()  # the magic number
    version, about = head.next(), head.next()
    if version != _VERSION or not isinstance(about, dict) or about.get("little_endian") is not True:
        raise CorruptCheckpoint(
            f"{path}: torch's format from before 1.6, of version {version!r} and {about!r}; "
            f"expected version {_VERSION} and little-endian numbers"
        )
    saved = head.next()
    keys = head.next()
    if not isinstance(keys, list) or set(keys) != head.storages.keys():
        raise CorruptCheckpoint(f"{path}: its two lists of storages disagree")
    return saved, _places(path, fd, size, head.at, [head.storages[key] for key in keys])


def _places(
    path: Path, fd: int, size: int, at: int, storages: list[Storage]
) -> dict[str, tuple[int, int]]:
    """Return where each storage is: a count of numbers, then the numbers, to the file's end."""
    places: dict[str, tuple[int, int]] = {}
    for storage in storages:
        count = os.pread(fd, _COUNT.size, at)
        code = named_dtype(storage.dtype)
        if count != _COUNT.pack(storage.numel) or code is None:
            actual = f"{_COUNT.unpack(count)[0]}" if len(count) == _COUNT.size else "the file's end"
            raise CorruptCheckpoint(
                f"{path}: storage {storage.key} at byte {at}: expected {storage.numel} numbers of "
                f"{storage.dtype}, found {actual}. Truncated? Download or copy it again."
            )
        start, length = at + _COUNT.size, storage.numel * itemsize(code)
        places[storage.key], at = (start, length), start + length
    if at != size:
        raise CorruptCheckpoint(f"{path}: its storages end at byte {at}, the file at {size}")
    return places


class _Pickles:
    """Reads consecutive pickles."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0
        self.storages: dict[str, Storage] = {}

    def next(self) -> Any:
        """Read one pickle."""
        try:
            value, self.at = torch_pickle.run(self.data, self.at, self.storages)
        except ResourceLimit as error:
            raise ResourceLimit(f"{self.path}: {error}. Nothing was run.") from None
        except Exception as error:  # malformed operands raise errors of any kind
            if len(self.data) == MAX_PICKLE:
                raise ResourceLimit(
                    f"{self.path}: its pickles are longer than the {MAX_PICKLE} bytes that are read"
                ) from None
            raise torch_pickle.refusal(self.path, self.data[self.at :], error) from None
        return value
