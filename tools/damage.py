"""Random damage to bytes and to the contents of files, with checksums that fit the damage."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

import bundles

from converters.formats import BITS, TensorInfo

Chance = random.Random
Damage = Callable[[bytes, Chance], bytes]

# what stands in real headers and configs, and what should never
WORDS = [
    *("null", "true", "false", "0", "-1", "1e400", "NaN", "Infinity", "1.5", '""', '"\\ud800"'),
    *("18446744073709551616", "-9223372036854775809", "9" * 5000, "[]", "{}", "[[]]", '"F32"'),
    *('"BF16"', '"../x"', '"/etc/passwd"', "[0,0]", "[1,0]", "[4,2]", '{"a":1,"a":2}', '"\\u0000"'),
]

# lengths and numbers that no varint should say, tags of protobuf and snappy
NUMBERS = [
    *(b"\0", b"\1", b"\x7f", b"\xff\x7f", b"\xff" * 4 + b"\x0f", b"\xff" * 9 + b"\x01"),
    *(b"\x80" * 9 + b"\x01", b"\xff" * 11, b"\x80" * 12, b"\x08", b"\x12\x80", b"\x3a\x02\x0a\0"),
    *(b"\xfc\xff\xff\xff\xff", b"\xfe\xff\xff", b"\xff\xff\xff\xff\x7f", b"\x01\0", b"\xf0\xff"),
]

# what lengths, counts, types and offsets should never be, and what they may be
WHOLE = [0, 1, 2, 7, 8, 9, 13, 31, 32, 63, 255, 1 << 16, 1 << 20]
WHOLE += [1 << n for n in range(28, 64)]
WHOLE += [n - 1 for n in WHOLE[13:]] + [(1 << 64) - n for n in (1, 2, 8, 31, 32)]
TEXTS = ["", "\0", "a", "../x", "/etc/passwd", "\ud7ff", "é" * 300, "x.0.weight", "module.", "/"]


# --- bytes ----------------------------------------------------------------------------------------


def mutated(text: bytes, chance: Chance) -> bytes:
    """Apply a few random edits: flip, cut or repeat bytes, or replace values by words."""
    data = bytearray(text)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1) if data else 0
        match chance.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                del data[at : at + chance.choice((1, 1, 2, 8, 64))]
            case 2:
                data[at:at] = chance.randbytes(chance.choice((1, 2, 9)))
            case 3:
                data[at:at] = data[at : at + chance.choice((3, 12, 60))]
            case 4:
                data[at:at] = chance.choice(WORDS).encode()
            case _:
                value = _value(data, at)
                if value is not None:
                    data[value] = chance.choice(WORDS).encode()
    return bytes(data)


def _value(data: bytearray, near: int) -> slice | None:
    """Return the span of the next value between a colon or comma and a comma or bracket."""
    start = min(
        (i + 1 for i in (data.find(b":", near), data.find(b",", near)) if i >= 0), default=0
    )
    ends = [i for i in (data.find(c, start) for c in (b",", b"}", b"]")) if i >= 0]
    return slice(start, min(ends)) if start and ends else None


def bitten(data: bytes, chance: Chance) -> bytes:
    """Apply edits to binary data: insert numbers or replace bytes by numbers."""
    if chance.random() < 0.5:
        return mutated(data, chance)
    at, word = chance.randrange(len(data) + 1), chance.choice(NUMBERS)
    return data[:at] + word + data[at + chance.choice((0, 1, len(word))) :]


def renumbered(data: bytes, chance: Chance) -> bytes:
    """Apply a few random edits to a binary header: replace numbers, or any edit."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.3:
            data = mutated(data, chance)
            continue
        width = chance.choice((4, 8))
        number = (chance.choice(WHOLE) % (1 << 8 * width)).to_bytes(width, "little")
        at = chance.randrange(len(data) + 1)
        data = data[:at] + number + data[at + width * chance.choice((1, 1, 1, 0)) :]
    return data


def cut(data: bytes, chance: Chance) -> bytes:
    """Truncate the data or append to it."""
    if chance.random() < 0.5:
        return data[: chance.randrange(len(data) + 1)]
    return data + chance.randbytes(chance.choice((1, 7, 8, 4096)))


def flipped(data: bytes, chance: Chance) -> bytes:
    """Change some bytes and keep the length."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 4, 64)) if data else 0):
        out[chance.randrange(len(out))] = chance.randrange(256)
    return bytes(out)


# --- values ---------------------------------------------------------------------------------------

# of a config: what is near enough to be believed, and what is not
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, 8, 64, 512, 4096, 100_000, -1, -8, 1 << 31, 1 << 53),
    *((1 << 63) - 1, 1 << 64, 10**30, 0.0, 0.5, 1.5, -1.0, 1e-45, 1e308, "", "x", "silu", "4"),
    *([], [1], [2, 2], ["x"], [[0]], {}, {"a": 1}, {"0": 0}, {"rope_type": "llama3"}, "é\n"),
]


def altered(value: Any, chance: Chance) -> Any:
    """Replace, rename, remove, repeat or move a few parts of plain data."""
    value = deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return deepcopy(chance.choice(VALUES))
        holder, key = chance.choice(places)
        match chance.randrange(8):
            case 0:
                del holder[key]
            case 1:
                other, its = chance.choice(places)
                if its in other if isinstance(other, dict) else its < len(other):
                    holder[key] = deepcopy(other[its])
            case 2 if isinstance(holder, dict):
                holder[chance.choice((f"{key}x", key[:-1], *TEXTS))] = holder.pop(key)
            case 3 if isinstance(holder, list):
                holder.extend(holder[: chance.choice((1, 100))])
            case 4:
                holder[key] = [holder[key]] * chance.choice((1, 2, 50))
            case 5 if type(holder[key]) is int:
                holder[key] += chance.choice((-1, 1, holder[key], 1 << 32))
            case _:
                holder[key] = deepcopy(chance.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def reworded(data: bytes, chance: Chance) -> bytes:
    """Damage a JSON file: its values or its text."""
    if chance.random() < 0.3:
        return mutated(data, chance)
    return json.dumps(altered(json.loads(data), chance)).encode()


# --- tensors --------------------------------------------------------------------------------------

CODES = [code for code, bits in BITS.items() if bits >= 8]


def reshaped(
    infos: Sequence[TensorInfo], chance: Chance, dtypes: Sequence[str]
) -> list[TensorInfo]:
    """Remove, repeat, rename, reshape or cast tensors; the result is a valid list."""
    by_name = {info.name: info for info in infos}
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not by_name:
            break
        info = by_name[chance.choice(list(by_name))]
        name, shape = info.name, list(info.shape)
        match chance.randrange(7):
            case 0:
                del by_name[name]
                continue
            case 1:
                del by_name[name]
                info = info._replace(name=_renamed(name, list(by_name), chance))
            case 2:
                info = info._replace(name=_renamed(name, [], chance))
            case 3:
                info = info._replace(dtype=chance.choice(dtypes))
            case 4:
                chance.shuffle(shape)
            case 5:
                at = chance.randrange(len(shape) + 1)
                shape[at : at + chance.randrange(2)] = chance.choices((0, 1, 2, 8), k=at % 2 + 1)
            case _ if shape:
                at = chance.randrange(len(shape))
                shape[at] = chance.choice((0, 1, shape[at] + 1, shape[at] // 2, 2 * shape[at]))
        by_name[info.name] = info._replace(shape=tuple(shape))
    return list(by_name.values())


def _renamed(name: str, others: list[str], chance: Chance) -> str:
    parts = name.split(".")
    at = chance.randrange(len(parts))
    parts[at] = chance.choice((*TEXTS, "0", "1", "00", "9" * 400, "weight", "bias", parts[at] * 2))
    return chance.choice((".".join(parts), f"module.{name}", f"{name}.x", *others[:1]))


# --- pickles --------------------------------------------------------------------------------------

GLOBALS = [
    *("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage"),
    *("torch._utils\n_rebuild_tensor", "torch._utils\n_rebuild_parameter", "torch\nSize"),
    *("torch._utils\n_rebuild_tensor_v3", "torch\nLongStorage", "torch\nBoolStorage"),
    *("torch\nComplexDoubleStorage", "torch\nfloat32", "torch\nfloat8_e4m3fn", "torch\nbool"),
    *("torch.storage\nUntypedStorage", "torch.storage\nTypedStorage", "builtins\nbytearray"),
    *("os\nsystem", "torch\nNoStorage", "torch.serialization\n_get_layout", "é\nx"),
]
_CODES = [bytes((code,)) for code in b"(})]ltaesuRbQ0102N\x85\x86\x87\x88\x89\x8f\x91\x94."]
_CODES += [b"h\0", b"h\5", b"q\0", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\x7f"]
_CODES += [b"\x8b\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\0", b"\x93"]
_CODES += [b"\x80\x05", b"I99\n", b"L" + b"9" * 5000 + b"L\n", b"G" + b"\x7f\xf0" + bytes(6)]


@lru_cache(maxsize=64)
def _steps(data: bytes) -> list[tuple[str, bytes]]:
    """Yield (name of an opcode, its bytes) of a valid pickle."""
    codes = [(code.name, at) for code, _, at in pickletools.genops(data)]
    ends = [at for _, at in codes[1:]] + [len(data)]
    return [(name, data[at:end]) for (name, at), end in zip(codes, ends, strict=True)]


def repickled(data: bytes, chance: Chance) -> bytes:
    """Replace numbers, words and classes; move, remove or insert opcodes."""
    steps = list(_steps(data))
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(steps))
        if (kind := chance.randrange(8)) < 5:  # most operands are of little interest
            wanted = ("BININT", "LONG") if kind < 3 else ("UNICODE",) if kind == 3 else ("GLOBAL",)
            of = [n for n, (name, _) in enumerate(steps) if any(w in name for w in wanted)]
            at = chance.choice(of or [at])
        match kind:
            case 0 | 1 | 2:
                steps[at] = ("BININT", _integer(chance))
            case 3:
                words = [step for step in steps if step[0] == "BINUNICODE"]
                text = chance.choice(TEXTS).encode(errors="surrogatepass")
                other = ("BINUNICODE", b"X" + struct.pack("<I", len(text)) + text)
                steps[at] = chance.choice((other, *chance.choices(words, k=3))) if words else other
            case 4:
                steps[at] = ("GLOBAL", b"c" + chance.choice(GLOBALS).encode() + b"\n")
            case 5:
                del steps[at : at + chance.choice((1, 1, 2, 8))]
            case 6:
                steps[at:at] = chance.choices(steps, k=2)
            case _:
                steps[at:at] = [("", chance.choice(_CODES))]
        if not steps:
            break
    return b"".join(step for _, step in steps)


def _integer(chance: Chance) -> bytes:
    number = chance.choice((*WHOLE, -1, -2, -(1 << 31), -(1 << 63)))
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


# --- zips -----------------------------------------------------------------------------------------


def records(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(entries: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


@lru_cache(maxsize=64)
def _records(data: bytes) -> list[tuple[str, bytes]]:
    return records(data)


def rezipped(data: bytes, chance: Chance) -> bytes:
    """Damage a zip of torch.save: pickle or records before the checksums, or the whole file."""
    kind = chance.randrange(10)
    if kind == 0:
        return cut(data, chance) if chance.random() < 0.3 else flipped(data, chance)
    if kind == 1:
        at = data.rfind(b"PK\x01\x02") - chance.choice((0, 60, 600))  # in the directory
        return data[:at] + renumbered(data[at:], chance)
    entries = list(_records(data))
    if kind > 3:
        at = next(n for n, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
        entries[at] = entries[at][0], repickled(entries[at][1], chance)
        return zipped(entries)
    at = chance.randrange(len(entries))
    name, content = entries[at]
    match chance.randrange(6):
        case 0:
            del entries[at]
        case 1:
            entries[at] = name, cut(content, chance)
        case 2:
            entries[at] = name.replace("/data", chance.choice(("/../data", "/other", ""))), content
        case 3:
            entries[at:at] = [(f"{name}{chance.choice(('', '0', '1'))}", content)]
        case 4:
            chance.shuffle(entries)
        case _:
            return zipped(entries, zipfile.ZIP_DEFLATED)
    return zipped(entries)


# --- messages of protobuf -------------------------------------------------------------------------


def retold(data: bytes, chance: Chance, inner: Mapping[int, Any]) -> bytes:
    """Remove, repeat, move, renumber or change fields of a message.

    `inner` names those that are messages, and which of theirs are.
    """
    try:
        fields = list(_fields(data))
    except IndexError:  # damaged already
        return bitten(data, chance)
    for _ in range(chance.choice((1, 1, 2, 4)) if fields else 0):
        at = chance.randrange(len(fields))
        number, sort, value = fields[at]
        match chance.randrange(8):
            case 0:
                fields[at : at + chance.choice((1, 1, 8, 64))] = []
            case 1:
                fields[at:at] = [fields[at]] * chance.choice((1, 1, 200))
            case 2:
                fields[at] = chance.choice((0, 1, number + 1, 35, 1 << 28)), sort, value
            case 3:
                chance.shuffle(fields)
            case 4 if sort == 0:
                fields[at] = number, 0, bundles.varint(chance.choice((*WHOLE, *range(8))))
            case 5 if sort == 5:
                fields[at] = number, 5, struct.pack("<I", chance.choice(WHOLE) & 0xFFFFFFFF)
            case _ if sort == 2:
                again = number in inner and chance.random() < 0.8
                made = retold(value, chance, inner[number]) if again else bitten(value, chance)
                fields[at] = number, 2, made
        if not fields:
            break
    return b"".join(
        bundles.part(n, v) if sort == 2 else bundles.varint(n << 3 | sort) + v
        for n, sort, v in fields
    )


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, wire type, bytes of the value) of a valid message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        start = at
        if key & 7 == 2:
            size, start = _varint(data, at)
            at = start + size
        elif key & 7 == 0:
            at = _varint(data, at)[1]
        else:
            at += 8 if key & 7 == 1 else 4
        yield key >> 3, key & 7, data[start:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
