"""torch.save's pickle, read as data: the few opcodes of a dict of tensors, and no others.

Python's unpickler calls what a file names, and torch's needs torch. Here names are only compared.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import CorruptCheckpoint, ResourceLimit, listing

MAX_RANK = 64  # torch's
MAX_GIVEN = 8
MAX_MEMORY = 64 << 20  # for all objects, besides the pickle itself
EXPLAINED = 1 << 19  # bytes of a pickle that are read again to explain a fault
# Everything that a dict of plain tensors needs, and NumPy's numbers.
_NEEDED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch (\w+Storage|Size|u?int\d+|float\d+\w*|bfloat16|complex\d+|bool)"
    r"|torch\.storage (Untyped|Typed)Storage"
    r"|numpy\._?core\.multiarray scalar|numpy dtype|_codecs encode"
)
# opcodes that refer to a class by earlier operands or by a number
_HIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"}
_STORED = {  # a storage's class -> torch's dtype
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Untyped": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


class Storage(NamedTuple):
    """A record of `numel` numbers of torch's `dtype`."""

    key: str
    dtype: str
    numel: int


class StoredArray(NamedTuple):
    """A tensor: a strided view of a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class NumpyType(NamedTuple):
    """The dtype of a NumPy number."""

    code: str


_NUMPY = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}


class Name(NamedTuple):
    """A module and a name that a pickle refers to; it is never imported."""

    text: str

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.text.rpartition(" ")[2]


def read(path: Path, data: bytes) -> Any:
    """Return the pickled dicts, lists, tuples, text, numbers and `StoredArray`s.

    Raises:
        CorruptCheckpoint: For anything else, by name. Nothing is executed.
    """
    try:
        return run(data)[0]
    except ResourceLimit as error:
        raise ResourceLimit(f"{path}: {error}. Nothing was run.") from None
    except Exception as error:  # malformed operands raise errors of any kind
        raise refusal(path, data, error) from None


def refusal(path: Path, data: bytes, error: Exception) -> CorruptCheckpoint:
    """Return the error that explains why a pickle is not read."""
    return CorruptCheckpoint(f"{path}: {_explained(data, error)}")


def _explained(data: bytes, error: Exception) -> str:
    if len(data) > EXPLAINED:
        return f"its pickle is none that torch.save writes ({error}). Nothing was run."
    strange, named, words = set[str](), set[str](), list[str]()
    try:
        for code, arg, _ in pickletools.genops(data):
            if code.name in _HIDDEN:
                strange.add(code.name)
            elif code.name == "GLOBAL":
                named.add(str(arg))
            elif "UNICODE" in code.name:
                words.append(str(arg))
    except Exception as why:  # see above
        return f"it holds no pickle, or a damaged one: {why}"
    if strange:
        return (
            f"its pickle names what it needs by {', '.join(sorted(strange))}, as torch.save does "
            f"not; among its words: {listing(words, 5)}. Nothing was run. Save the bare "
            "state_dict() again with torch.save's own protocol"
        )
    if blocked := sorted(name for name in named if not _NEEDED.fullmatch(name)):
        names = listing(name.replace(" ", ".") for name in blocked)
        return (
            f"its pickle asks for {names}, which weights do not need. Nothing was run. "
            "If you trust its author, save the bare state_dict() again from the original code."
        )
    return f"its pickle is none that torch.save writes ({error}). Nothing was run."


# --- the opcodes ---------------------------------------------------------------------------------

_NUMBERS = {
    b"J": struct.Struct("<i"),
    b"K": struct.Struct("<B"),
    b"M": struct.Struct("<H"),
    b"G": struct.Struct(">d"),
    b"q": struct.Struct("<B"),
    b"r": struct.Struct("<I"),
    b"h": struct.Struct("<B"),
    b"j": struct.Struct("<I"),
    b"\x80": struct.Struct("<B"),
}
_TEXTS = {b"X": struct.Struct("<I"), b"U": struct.Struct("<B"), b"\x8a": struct.Struct("<B")}
_NEW: dict[bytes, Callable[[], Any]] = {
    b"}": dict,
    b"]": list,
    b"\x8f": list,  # a set is read as a list
    b")": tuple,
    b"N": lambda: None,
    b"\x88": lambda: True,
    b"\x89": lambda: False,
}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
# Bytes that Python takes for an opcode besides a slot of the stack: a list or a dict, a memo entry,
# a tuple (its items have slots already), a number, a call, a text.
_COSTS = {
    **dict.fromkeys((b"}", b"]", b"\x8f"), 72),
    **dict.fromkeys((b"q", b"r"), 100),
    **dict.fromkeys((b"t", b"\x85", b"\x86", b"\x87"), 72),
    **dict.fromkeys((b"J", b"M", b"G"), 32),
    **dict.fromkeys((b"Q", b"R", b"\x81", b"c"), 100),
    **dict.fromkeys((b"X", b"U", b"\x8a"), 64),
}
_SLOT = 8


def run(data: bytes, at: int = 0, storages: dict[str, Storage] | None = None) -> tuple[Any, int]:
    """Return (the object pickled at position `at`, the position behind it).

    Storages are collected in `storages` if it is given.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    left = MAX_MEMORY

    def above(start: int) -> list[Any]:
        if start < 0:
            raise ValueError("it takes what it did not push")
        items = stack[start:]
        del stack[start:]
        return items

    while True:
        code = data[at : at + 1]
        at += 1
        left -= _SLOT + _COSTS.get(code, 0)
        if left < 0:
            raise ResourceLimit(f"its pickle takes more than {MAX_MEMORY >> 20} MB of memory")
        if (number := _NUMBERS.get(code)) is not None:
            (value,) = number.unpack_from(data, at)
            at += number.size
            if code in b"qr":
                memo[value] = stack[-1]
            elif code in b"hj":
                stack.append(memo[value])
            elif code != b"\x80":  # the protocol's
                stack.append(value)
        elif (make := _NEW.get(code)) is not None:
            stack.append(make())
        elif code == b"(":
            marks.append(len(stack))
        elif code == b"t":
            stack.append(tuple(above(marks.pop())))
        elif (count := _TUPLES.get(code)) is not None:
            stack.append(tuple(above(len(stack) - count)))
        elif (length := _TEXTS.get(code)) is not None:
            (size,) = length.unpack_from(data, at)
            at += length.size + size
            operand = data[at - size : at]
            if len(operand) != size:
                raise ValueError("it ends within a text")
            left -= 2 * size if operand.isascii() else 5 * size
            stack.append(_literal(code, operand) if left >= 0 else None)
        elif code == b"Q":
            stack.append(storage := _storage(*stack.pop()))
            if storages is not None and storages.setdefault(storage.key, storage) != storage:
                raise ValueError(f"storage {storage.key} of two sizes")
        elif code in (b"R", b"\x81"):
            function, arguments = above(len(stack) - 2)
            stack.append(_made(function, arguments))
        elif code in (b"s", b"u"):
            pairs = above(marks.pop() if code == b"u" else len(stack) - 2)
            left -= 50 * len(pairs)  # entries of two each
            _put(stack[-1], pairs)
        elif code in (b"a", b"e", b"\x90"):
            stack[-2 if code == b"a" else marks[-1] - 1].extend(
                above(len(stack) - 1 if code == b"a" else marks.pop())
            )
        elif code == b"b":  # attributes of a dict, which are not weights
            attributes = stack.pop()
            if type(stack[-1]) is NumpyType and attributes[1] not in ("<", "|"):
                raise ValueError(f"numbers of numpy's in byte order {attributes[1]!r}")
        elif code == b"c":
            end = data.index(b"\n", data.index(b"\n", at) + 1)
            stack.append(_named(data[at:end].decode()))
            at = end + 1
        elif code == b".":
            return stack.pop(), at
        else:
            raise ValueError(f"opcode {code!r}")


def _literal(code: bytes, operand: bytes) -> Any:
    if code == b"\x8a":
        return int.from_bytes(operand, "little", signed=True)
    return operand.decode("utf-8" if code == b"X" else "latin-1")


def _named(text: str) -> Name:
    name = Name(text.replace("\n", " "))
    if not _NEEDED.fullmatch(name.text):
        raise ValueError(f"the name {name.text!r}")
    return name


def _put(into: Any, pairs: list[Any]) -> None:
    if type(into) is not dict or len(pairs) % 2:
        raise ValueError("items that are set in no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if key is not None and type(key) not in (str, int, float, bool):
            raise ValueError(f"a key that is a {type(key).__name__}")
        into[key] = value


def _storage(kind: str, of: Name, key: str, device: str, numel: int, view: None = None) -> Storage:
    """Make a storage. `view` of another one occurs in files before 1.6, and none since 0.4."""
    if (
        kind != "storage"
        or view is not None
        or type(key) is not str
        or type(numel) is not int
        or numel < 0
    ):
        raise ValueError("an argument that is not a storage")
    name = of.last.removesuffix("Storage")
    return Storage(key, _STORED.get(name, name), numel)


def _made(function: Any, arguments: Any) -> Any:
    """Return a tensor, a parameter or a dict; only note that other calls are there."""
    if type(function) is not Name or type(arguments) is not tuple:
        raise ValueError("a call of what is no name")
    if len(arguments) > MAX_GIVEN:  # one tuple may be an argument of many calls
        raise ValueError(f"a call with {len(arguments)} arguments")
    match function.last:
        case "OrderedDict":
            if arguments:  # written by Python 2
                raise ValueError("a dict made of another")
            return {}
        case "encode":  # bytes: protocol 2 has no opcode for them
            return arguments[0].encode("latin-1")
        case "dtype":
            return NumpyType(arguments[0])
        case "scalar":
            return struct.unpack(_NUMPY[arguments[0].code], arguments[1])[0]
        case "_rebuild_parameter" if type(arguments[0]) is StoredArray:
            return arguments[0]
        case "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3":
            storage, offset, shape, stride, *more = arguments
            dtype = more[2].last if function.last.endswith("v3") else storage.dtype
            return _array(storage, dtype, offset, shape, stride)
    return function


def _array(storage: Any, dtype: str, offset: Any, shape: Any, stride: Any) -> StoredArray:
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor of no storage")
    if len(shape) > MAX_RANK or len(shape) != len(stride):
        raise ValueError(f"a tensor of {len(shape)} axes and {len(stride)} steps")
    numbers = (offset, *shape, *stride)
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor whose shape or stride is none")
    return StoredArray(storage, dtype, offset, shape, stride)
