"""GGUF on its own: read and written to the bit as its own library does, and what is refused."""

import gc
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.checkpoint import Reader
from converters.formats import TensorInfo
from converters.formats.gguf import (
    MAX_ELEMENTS,
    MAX_HEADER,
    MAX_KEYS,
    MAX_TENSORS,
    MAX_TEXT,
    GGUFReader,
    MetadataArray,
    Value,
    lay_out,
    open_gguf,
    stored_bytes,
)
from converters.lazy import Lazy
from converters.output import Item, Output, Shard
from converters.quantized.blocks import KINDS, UNREAD, pieces_of_q8_0, quantize_q8_0
from converters.staging.stage import Stage
from converters.writer import WriteOptions, run
from zoo.errors import (
    BadIndex,
    CorruptCheckpoint,
    DuplicateTensor,
    LossyExport,
    MissingShard,
    MissingTensors,
    NonFinite,
    NotACheckpoint,
    OverflowOnCast,
    ResourceLimit,
    UnsafePath,
    UnsupportedFormat,
    ZooError,
)

short = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PLAIN = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
chance = np.random.default_rng(7)


def same(one: Any, other: Any) -> bool:
    """Bit for bit; one NaN is like another."""
    a, b = (t.contiguous().numpy() if isinstance(t, torch.Tensor) else t for t in (one, other))
    assert a.dtype == b.dtype
    if a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    bits = f"u{a.dtype.itemsize}"
    equal = np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)
    return bool((equal | (np.isnan(a) & np.isnan(b))).all())


def written(path: Path, fill: Callable[[gguf.GGUFWriter], None], **options: Any) -> Path:
    """A file as the library writes it."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- files made by hand ---------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, count: int, elements: bytes = b"") -> bytes:
    return key(name, 9, struct.pack("<IQ", kind, count) + elements)


def info(name: str | bytes, dims: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def raw(
    *parts: bytes,
    keys: int = 0,
    tensors: int = 0,
    body: bytes = b"",
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % alignment) + body


def one(*dims: int, kind: int = 0, offset: int = 0, body: bytes | None = None) -> bytes:
    """A file of one tensor."""
    body = bytes(32) if body is None else body
    return raw(info("a.weight", dims, kind, offset), tensors=1, body=body)


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- reading what the library writes --------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5), (2, 1, 3, 2)])
def test_plain_types_are_views(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    values = np.frombuffer(chance.bytes(count * 8), PLAIN[name])[:count].reshape(shape)
    path = written(tmp_path / "a.gguf", lambda w: w.add_tensor("a", values))
    reader = GGUFReader(path)
    assert reader.tensors == {"a": TensorInfo("a", shape, name)}
    assert reader.quantized == {}
    assert same(reader.tensor("a"), values)
    assert reader.tensor("a").data_ptr() == reader.tensor("a").data_ptr()
    start, end = reader.span("a")
    assert path.read_bytes()[start:end] == values.tobytes()


def test_bfloat16_is_read(tmp_path: Path) -> None:
    values = torch.randn(3, 8).bfloat16()
    bits = values.view(torch.int16).numpy().view(np.uint8)
    path = written(tmp_path / "a.gguf", lambda w: w.add_tensor("a", bits, raw_dtype=Type.BF16))
    reader = GGUFReader(path)
    assert reader.tensors == {"a": TensorInfo("a", (3, 8), "BF16")}
    assert torch.equal(reader.tensor("a"), values)


BLOCKS = {kind.name: kind for kind in KINDS.values() if kind.decode}


def blocks(name: str, *shape: int) -> np.ndarray[Any, Any]:
    """Random bytes of a type, as the library takes them; every scale there may be is met.

    The same ones whatever ran before: of a single block all numbers may be NaN.
    """
    kind, own = BLOCKS[name], np.random.default_rng(zlib.crc32(f"2{name}{shape}".encode()))
    return own.integers(0, 256, (*shape[:-1], shape[-1] // kind.block * kind.size), np.uint8)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(256,), (7, 512), (3, 5, 256), (400, 1024)])
def test_quantized_types_are_decoded_as_the_library_does(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    stored = blocks(name, *shape)
    path = written(tmp_path / "a.gguf", lambda w: w.add_tensor("a", stored, raw_dtype=Type[name]))
    reader = GGUFReader(path)
    assert reader.tensors == {"a": TensorInfo("a", shape, "F32")}
    assert reader.quantized == {"a": name}
    with np.errstate(all="ignore"):
        expected = dequantize(stored, Type[name])
    assert np.isfinite(expected).any()
    assert same(reader.tensor("a"), expected)
    matrix = expected.reshape(-1, shape[-1])
    for left, right in ((0, shape[-1]), (0, 1), (31, 33), (255, shape[-1]), (40, 97)):
        for top in (0, len(matrix) - 1):
            box = slice(top, len(matrix)), slice(left, right)
            assert same(reader.numbers("a", *box), matrix[box])


def test_kinds_are_those_of_the_library() -> None:
    for number, kind in KINDS.items():
        assert Type(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[Type(number)] == (kind.block, kind.size)
    names = {number: name for name, number in Type.__members__.items()}
    assert {number: kind.name for number, kind in KINDS.items()} | UNREAD == names


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_what_the_library_quantizes_comes_back(tmp_path: Path, name: str) -> None:
    values = chance.standard_normal((6, 512), np.float32)
    stored = quantize(values, Type[name])
    path = written(tmp_path / "a.gguf", lambda w: w.add_tensor("a", stored, raw_dtype=Type[name]))
    assert same(GGUFReader(path).tensor("a"), dequantize(stored, Type[name]))


@pytest.mark.parametrize("rows", [slice(1, 5), slice(0, 6)])
@pytest.mark.parametrize("columns", [slice(2, 4), slice(2, 7), slice(0, 7)])
def test_a_box_of_a_plain_tensor_is_read(tmp_path: Path, rows: slice, columns: slice) -> None:
    values = chance.standard_normal((6, 7), np.float32)
    path = written(tmp_path / "a.gguf", lambda w: w.add_tensor("a", values))
    read = GGUFReader(path, mmap=False).decoder("a")
    assert read is not None
    assert same(read(rows, columns), values[rows, columns])
    assert GGUFReader(path).decoder("a") is None  # a view shows it


def test_a_long_header_is_read_without_a_map(tmp_path: Path) -> None:
    texts = [f"token {n:08}" for n in range(100_000)]  # longer than what is read at first
    path = written(tmp_path / "a.gguf", lambda w: w.add_array("tokens", texts))
    reader = GGUFReader(path, mmap=False)
    path.write_bytes(b"")
    assert list(reader.values["tokens"]) == texts


def test_several_tensors_keep_their_order(tmp_path: Path) -> None:
    values = {f"blk.{n}.w": chance.standard_normal((n + 1, 3), np.float32) for n in (10, 2, 9)}

    def fill(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            writer.add_tensor(name, value)

    reader: Reader = GGUFReader(written(tmp_path / "a.gguf", fill))
    assert list(reader.tensors) == list(values)
    assert all(same(reader.tensor(name), value) for name, value in values.items())
    with pytest.raises(MissingTensors, match=r"blk\.3\.w.*Did you mean"):
        reader.tensor("blk.3.w")


SCALARS: dict[str, tuple[str, Any]] = {
    "u8": ("uint8", 255),
    "i8": ("int8", -128),
    "u16": ("uint16", 65535),
    "i16": ("int16", -32768),
    "u32": ("uint32", (1 << 32) - 1),
    "i32": ("int32", -(1 << 31)),
    "u64": ("uint64", (1 << 64) - 1),
    "i64": ("int64", -(1 << 63)),
    "f64": ("float64", 0.1),
    "bool": ("bool", True),
    "str": ("string", "Grüße 🦙"),
}


def test_every_kind_of_value(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        for kind, (name, value) in SCALARS.items():
            getattr(writer, f"add_{name}")(f"x.{kind}", value)
        writer.add_array("list.str", ["a", "", "ß"])
        writer.add_array("list.int", [3, -1])
        writer.add_array("list.float", [0.5, -2.0])
        writer.add_array("list.bool", [True, False])
        writer.add_float32("x.f32", 1e-5)

    reader = GGUFReader(written(tmp_path / "a.gguf", fill))
    assert reader.values.pop("general.architecture") == "llama"
    lists = {"str": ["a", "", "ß"], "int": [3, -1], "float": [0.5, -2.0], "bool": [True, False]}
    expected = {f"x.{kind}": value for kind, (_, value) in SCALARS.items()} | {"x.f32": 1e-5}
    assert reader.values == expected | {f"list.{name}": value for name, value in lists.items()}
    kinds = {"list.str": "[str]", "list.int": "[i32]", "list.float": "[f32]", "list.bool": "[bool]"}
    assert {k: v for k, v in reader.kinds.items() if k.startswith("list")} == kinds
    assert all(reader.kinds[f"x.{kind}"] == kind for kind in [*SCALARS, "f32"])
    assert type(reader.values["x.bool"]) is bool
    assert reader.metadata == {"general.architecture": "llama", "x.str": "Grüße 🦙"}


@short
@given(st.floats(width=32))
def test_single_precision_is_read_as_its_shortest_decimal(tmp_path: Path, value: float) -> None:
    path = put(tmp_path / "a.gguf", raw(key("a", 6, struct.pack("<f", value)), keys=1))
    actual = GGUFReader(path).values["a"]
    assert struct.pack("<f", actual) == struct.pack("<f", value)
    assert len(repr(actual)) <= len(repr(value))


def test_usual_decimals_are_what_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for value in (1e-5, 1e-6, 1e-12, 0.1, 10000.0, 500000.0, 1.0, 0.0, 8.0, 1e6, 3e38):
        put(path, raw(key("a", 6, struct.pack("<f", value)), keys=1))
        assert GGUFReader(path).values["a"] == value


def test_long_arrays_are_decoded_when_asked_for(tmp_path: Path) -> None:
    tokens = [f"▁token {n} é" for n in range(5000)]
    scores = [float(np.float32(-n / 3)) for n in range(5000)]
    flags = [n % 3 == 0 for n in range(5000)]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_array("tokens", tokens)
        writer.add_array("scores", scores)
        writer.add_array("flags", flags)
        writer.add_tensor("a", np.ones(3, np.float32))

    reader = GGUFReader(written(tmp_path / "a.gguf", fill))
    for name, expected in (("tokens", tokens), ("scores", scores), ("flags", flags)):
        actual = reader.values[name]
        assert isinstance(actual, MetadataArray)
        assert len(actual) == 5000
        assert list(actual) == list(actual) == expected
    assert repr(reader.values["tokens"]) == "<5000 str of tokens>"
    assert reader.tensor("a").tolist() == [1, 1, 1]


def test_a_large_vocabulary_opens_fast(tmp_path: Path) -> None:
    """256k tokens, half a million merges."""
    tokens = b"".join(text(f"token{n}") for n in range(256_000))
    merges = b"".join(text(f"a{n} b") for n in range(500_000))
    parts = array("tokens", 8, 256_000, tokens), array("merges", 8, 500_000, merges)
    path = put(tmp_path / "a.gguf", raw(*parts, keys=2))
    started = time.process_time()
    reader = GGUFReader(path)
    assert time.process_time() - started < 10  # 0.13 s where this was written
    tracemalloc.start()
    try:
        GGUFReader(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    *_, last = reader.values["merges"]
    assert last == "a499999 b"


def test_version_2_is_read_like_version_3(tmp_path: Path) -> None:
    data = bytearray(one(2, body=struct.pack("<2f", 1.5, -2) + bytes(24)))
    data[4] = 2
    reader = GGUFReader(put(tmp_path / "a.gguf", bytes(data)))
    assert reader.version == 2
    assert reader.tensor("a.weight").tolist() == [1.5, -2]


@pytest.mark.parametrize("alignment", [1, 2, 8, 64, 4096])
def test_any_power_of_two_aligns(tmp_path: Path, alignment: int) -> None:
    values = [chance.standard_normal(n, np.float32) for n in (3, 5)]
    bits = blocks("Q8_0", 2, 64)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        writer.add_string("general.name", "odd")  # moves what follows
        writer.add_tensor("a", values[0])
        writer.add_tensor("bytes", np.ones(3, np.int8))
        writer.add_tensor("b", values[1])
        writer.add_tensor("c", bits, raw_dtype=Type.Q8_0)

    reader = GGUFReader(written(tmp_path / "a.gguf", fill))
    assert reader.alignment == alignment
    assert same(reader.tensor("a"), values[0])
    assert same(reader.tensor("b"), values[1])
    assert reader.tensor("b").data_ptr() % 4 == 0
    with np.errstate(all="ignore"):
        assert same(reader.tensor("c"), dequantize(bits, Type.Q8_0))


def test_headers_need_no_torch(tmp_path: Path) -> None:
    path = put(tmp_path / "a.gguf", one(32, kind=8, body=bytes(64)))
    code = (
        "import sys; from pathlib import Path;"
        "from converters.formats.gguf import GGUFReader as R;"
        f"assert R(Path({str(path)!r})).quantized == {{'a.weight': 'Q8_0'}};"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)})
    assert run.returncode == 0


# --- memory ---------------------------------------------------------------------------------------


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return pytest.skip(f"no {field} here")


def sparse(path: Path, *tensors: tuple[str, tuple[int, ...], int]) -> Path:
    """A file of zeros with a header, taking no room."""
    infos, reached = b"", 0
    for name, dims, kind in tensors:
        infos += info(name, dims, kind, reached)
        reached += -(-KINDS[kind].nbytes(dims) // 32) * 32
    head = raw(infos, tensors=len(tensors))
    put(path, head)
    try:
        os.truncate(path, len(head) + reached)
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    return path


def test_a_hundred_gigabytes_are_listed_at_once(tmp_path: Path) -> None:
    tensors = [(f"blk.{n}.ffn_up.weight", (1 << 15, 1 << 13), 0) for n in range(100)]
    path = sparse(tmp_path / "a.gguf", *tensors)
    assert path.stat().st_size > 100 << 30
    before, started = memory("VmRSS"), time.process_time()
    reader = GGUFReader(path)
    assert time.process_time() - started < 10
    assert memory("VmRSS") - before < 4 << 20
    assert len(reader.tensors) == 100


def test_one_tensor_of_many_touches_no_other(tmp_path: Path) -> None:
    sizes = [
        ("a", (1 << 15, 1 << 16), 8),
        ("b", (1 << 10, 1 << 13), 8),
        ("c", (1 << 15, 1 << 17), 0),
    ]
    path = sparse(tmp_path / "a.gguf", *sizes)
    assert path.stat().st_size > 18 << 30
    reader = GGUFReader(path)
    reader.numbers("b", slice(0, 1), slice(0, 1000))  # torch's own, the first time
    gc.collect()
    before, anonymous = memory("VmRSS"), memory("RssAnon")
    b = reader.tensor("b")
    size = b.nbytes
    assert size == 32 << 20
    assert memory("RssAnon") - anonymous < size + (4 << 20)
    assert memory("VmRSS") - before < size + size // 4 + (8 << 20)  # pages of the file among them
    piece = reader.numbers("a", slice(1 << 15, (1 << 15) + 1), slice(7, 107))
    assert not piece.any()
    c = reader.tensor("c")
    assert c.shape == (1 << 17, 1 << 15)
    assert c[1 << 16, 5].item() == 0
    assert memory("VmRSS") - before < size + size // 4 + (8 << 20)
    assert not b.any()


@pytest.mark.parametrize("kind", [8, 13])  # Q8_0, Q5_K
def test_decoding_takes_the_tensor_and_little_more(tmp_path: Path, kind: int) -> None:
    path = sparse(tmp_path / "a.gguf", ("a", (1 << 10, 10), kind), ("b", (1 << 13, 1 << 12), kind))
    code = (
        "import resource; from pathlib import Path; from converters.formats.gguf import GGUFReader;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10;"
        f"reader = GGUFReader(Path({str(path)!r})); reader.tensor('a'); before = peak();"
        "b = reader.tensor('b'); start, end = reader.span('b');"
        "print(peak() - before, b.nbytes + end - start)"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    grown, size = map(int, run.stdout.split())
    assert size > 128 << 20  # the numbers, and the pages of the file that were read
    assert grown < size + (8 << 20)


def test_a_write_to_a_view_changes_no_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.gguf", one(2))
    before = path.read_bytes()
    a = GGUFReader(path).tensor("a.weight")
    a[0] = 7
    assert a.tolist() == [7, 0]
    assert path.read_bytes() == before


# --- what is refused ------------------------------------------------------------------------------

HUGE = (1 << 64) - 1
NUL = struct.pack("<Q", 0)
Corrupt, Limit, Format = CorruptCheckpoint, ResourceLimit, UnsupportedFormat
REFUSED: dict[str, tuple[bytes, type[ZooError], str]] = {
    "empty": (b"", Corrupt, "0 bytes.*at least 24"),
    "only magic": (b"GGUF", Corrupt, "4 bytes.*at least 24"),
    "no counts": (raw()[:23], Corrupt, "23 bytes.*at least 24"),
    "other magic": (b"GGUG" + raw()[4:], Corrupt, "begins with b'GGUG'"),
    "an older format": (b"tjgg" + raw()[4:], Corrupt, "from before GGUF"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", Corrupt, "LFS pointer"),
    "version 0": (raw(version=0), Format, "version 0"),
    "version 1": (raw(version=1), Format, "version 1.*32 bits"),
    "version 4": (raw(version=4), Format, "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), Format, "big-endian"),
    "2^64 tensors": (raw(tensors=HUGE), Corrupt, f"{HUGE} tensors"),
    "2^63 tensors": (raw(tensors=1 << 63), Corrupt, "tensors take"),
    "2^64 keys": (raw(keys=HUGE), Corrupt, f"{HUGE} key/values"),
    "a key too many": (
        raw(key("a", 4, bytes(4)), keys=2, alignment=1),
        Corrupt,
        "length of key 1 takes 8",
    ),
    "a tensor too many": (
        raw(info("a"), tensors=2, alignment=1),
        Corrupt,
        "length of the name of tensor 1 takes 8",
    ),
    "2^64 as a key's length": (
        raw(struct.pack("<Q", HUGE), keys=1, body=bytes(99)),
        Corrupt,
        "key 0",
    ),
    "2^63 as a text's length": (
        raw(key("a", 8, struct.pack("<Q", 1 << 63)), keys=1),
        Corrupt,
        f"a takes {1 << 63} bytes",
    ),
    "2^63 numbers": (raw(array("a", 4, 1 << 63), keys=1), Corrupt, "a takes"),
    "2^64 numbers": (raw(array("a", 12, HUGE), keys=1), Corrupt, "a takes"),
    "2^63 texts": (raw(array("a", 8, 1 << 63), keys=1), Corrupt, "a takes"),
    "one text too many": (
        raw(array("a", 8, 99, text("x") * 98), keys=1, alignment=1),
        Corrupt,
        r"a\[98\]",
    ),
    "a long text among many": (
        raw(array("a", 8, 3, text("x") + struct.pack("<Q", HUGE) + text("y")), keys=1),
        Corrupt,
        rf"a\[1\] takes {HUGE + 8} bytes",
    ),
    "a long text last": (
        raw(array("a", 8, 2, text("x") + struct.pack("<Q", 999)), keys=1),
        Corrupt,
        r"a\[1\] takes 1007 bytes",
    ),
    "array of arrays": (
        raw(array("a", 9, 1, struct.pack("<IQ", 4, 0)), keys=1),
        Format,
        "of arrays",
    ),
    "array of nothing known": (raw(array("a", 13, 1, bytes(8)), keys=1), Corrupt, "of type 13"),
    "value of nothing known": (raw(key("a", 13, bytes(8)), keys=1), Corrupt, "a is of type 13"),
    "value of type 2^32": (
        raw(key("a", 2**32 - 1, bytes(8)), keys=1),
        Corrupt,
        "of type 4294967295",
    ),
    "key twice": (raw(key("a", 4, bytes(4)) * 2, keys=2), Corrupt, "key a occurs twice"),
    "key not UTF-8": (raw(key(b"\xff", 4, bytes(4)), keys=1), Corrupt, "key 0 is not UTF-8"),
    "text not UTF-8": (
        raw(key("a", 8, text(b"ok\xc3")), keys=1),
        Corrupt,
        "a is not UTF-8 at byte 2",
    ),
    "short array not UTF-8": (
        raw(array("a", 8, 2, text("x") + text(b"\x80")), keys=1),
        Corrupt,
        r"a\[1\] is not UTF-8",
    ),
    "half a surrogate": (raw(key("a", 8, text(b"\xed\xa0\x80")), keys=1), Corrupt, "not UTF-8"),
    "bool of 2": (raw(key("a", 7, b"\x02"), keys=1), Corrupt, "a is 2, neither 0 nor 1"),
    "bool of 2 in an array": (raw(array("a", 7, 2, b"\x01\x02"), keys=1), Corrupt, r"a\[1\] is 2"),
    "alignment 0": (raw(key("general.alignment", 4, bytes(4)), keys=1), Corrupt, "alignment is 0"),
    "alignment 48": (
        raw(key("general.alignment", 4, struct.pack("<I", 48)), keys=1),
        Corrupt,
        "alignment is 48.*power of two",
    ),
    "alignment as u64": (
        raw(key("general.alignment", 10, struct.pack("<Q", 32)), keys=1),
        Corrupt,
        r"alignment is 32 \(u64\)",
    ),
    "alignment as text": (raw(key("general.alignment", 8, text("32")), keys=1), Corrupt, "32 .str"),
    "split without a number": (
        raw(key("split.count", 2, b"\x02\0"), keys=1),
        Corrupt,
        "split.no is None",
    ),
    "split beyond its count": (
        raw(key("split.count", 2, b"\x02\0"), key("split.no", 2, b"\x02\0"), keys=2),
        Corrupt,
        "split.no is 2 and split.count 2",
    ),
    "split of text": (
        raw(key("split.count", 8, text("2")), key("split.no", 2, b"\0\0"), keys=2),
        Corrupt,
        "split.count '2'",
    ),
    "name not UTF-8": (
        raw(info(b"\xfe"), tensors=1, body=bytes(32)),
        Corrupt,
        "tensor 0 is not UTF-8",
    ),
    "name of 2^64": (
        raw(struct.pack("<Q", HUGE), tensors=1, body=bytes(99)),
        Corrupt,
        "name of tensor 0",
    ),
    "tensor twice": (
        raw(info("a") * 2, tensors=2, body=bytes(32)),
        Corrupt,
        "tensor a occurs twice",
    ),
    "five axes": (one(1, 1, 1, 1, 2), Corrupt, "tensor a.weight has 5 axes"),
    "2^32 axes": (
        raw(text("a") + struct.pack("<I", 2**32 - 1), tensors=1, body=bytes(99)),
        Corrupt,
        "tensor a has 4294967295 axes",
    ),
    "an axis of 0": (one(2, 0), Corrupt, r"shape \[0, 2\] has an axis of 0"),
    "an axis of 0, others huge": (one(1 << 63, 0), Corrupt, "axis of 0"),
    "overflow": (one(1 << 32, 1 << 32), Corrupt, "overflows 64 bits"),
    "overflow to 0": (one(1 << 32, 1 << 32, 4), Corrupt, "overflows 64 bits"),
    "an axis of 2^64": (one(HUGE), Corrupt, "overflows 64 bits"),
    "an axis of 2^63 of half bytes": (one(1 << 63, kind=2), Corrupt, "overflows 64 bits"),
    "beyond the file": (one(1 << 40), Corrupt, "truncated: tensor a.weight ends"),
    "unknown type": (one(32, kind=4), Corrupt, "tensor a.weight: type 4 is unknown"),
    "type of 2^32": (one(32, kind=2**32 - 1), Corrupt, "type 4294967295 is unknown"),
    "type in long tables": (
        one(256, kind=16, body=bytes(96)),
        Format,
        "tensor a.weight is IQ2_XXS",
    ),
    "rows that are no blocks": (
        one(48, kind=8, body=bytes(64)),
        Corrupt,
        "into the 32 numbers of Q8_0",
    ),
    "rows that only together are blocks": (
        one(16, 4, kind=8, body=bytes(96)),
        Corrupt,
        r"shape \[4, 16\]: its rows do not divide",
    ),
    "a scalar in blocks": (one(kind=8, body=bytes(64)), Corrupt, "do not divide"),
    "unaligned": (one(2, offset=4, body=bytes(64)), Corrupt, "offset 4 is no multiple .* 32"),
    "hole before": (one(2, offset=32, body=bytes(64)), Corrupt, "leaves a hole after the header"),
    "offset of 2^63": (one(2, offset=1 << 63), Corrupt, "leaves a hole"),
    "offset of 2^64": (one(2, offset=HUGE - 31), Corrupt, "leaves a hole"),
    "same place": (
        raw(info("a"), info("b"), tensors=2, body=bytes(64)),
        Corrupt,
        "tensor b: starts at byte 96 and overlaps tensor a",
    ),
    "overlap": (
        raw(info("a", (16,)), info("b", (8,), offset=32), tensors=2, body=bytes(64)),
        Corrupt,
        "tensor b.*overlaps tensor a",
    ),
    "hole": (
        raw(info("a"), info("b", offset=64), tensors=2, body=bytes(96)),
        Corrupt,
        "tensor b.*hole after tensor a",
    ),
    "no data": (one(2, body=b""), Corrupt, "truncated"),
    "a byte of data less": (
        one(2, body=bytes(7)),
        Corrupt,
        "truncated: tensor a.weight ends at byte",
    ),
    "trailing": (one(2, body=bytes(33)), Corrupt, "trailing bytes"),
    "trailing without tensors": (raw(body=bytes(33)), Corrupt, "trailing bytes: the header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, kind, message = REFUSED[case]
    path = put(tmp_path / "bad.gguf", data)
    tracemalloc.start()
    try:
        started = time.process_time()
        with pytest.raises(kind, match=message) as error:
            GGUFReader(path)
        assert time.process_time() - started < 10
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert type(error.value) is kind
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        raw(),
        raw(body=b""),
        raw(alignment=1),
        raw(key("", 4, bytes(4)), keys=1),
        raw(array("a", 8, 0), keys=1),
        raw(array("a", 4, 0), keys=1),
        raw(key("split.no", 2, b"\0\0"), key("split.count", 2, b"\1\0"), keys=2),
        one(2),
        one(2, body=bytes(8)),  # the last need not be padded
        one(),
        one(1, 1, 1, 2),
        one(32, kind=8, body=bytes(34)),
        raw(info("b", offset=32), info("a"), tensors=2, body=bytes(64)),  # in another order
        raw(info("a b/ü\n"), tensors=1, body=bytes(32)),
        raw(info("a" * 64), tensors=1, body=bytes(32)),
    ],
)
def test_unusual_headers_are_accepted(tmp_path: Path, data: bytes) -> None:
    reader = GGUFReader(put(tmp_path / "good.gguf", data))
    for name, about in reader.tensors.items():
        assert reader.tensor(name).shape == about.shape


def test_all_faults_are_in_one_error(tmp_path: Path) -> None:
    parts = info("a", (0,)), info("b", kind=5), info("c", offset=1), info("d", (2,), 8)
    path = put(tmp_path / "bad.gguf", raw(*parts, tensors=4, body=bytes(99)))
    with pytest.raises(CorruptCheckpoint, match=r"tensor a: .*tensor b: .*tensor c: .*tensor d: "):
        GGUFReader(path)


def test_names_that_cannot_be_shown_are_quoted(tmp_path: Path) -> None:
    path = put(tmp_path / "bad.gguf", raw(info("a\n" * 9999, (0,)), tensors=1))
    with pytest.raises(CorruptCheckpoint) as error:
        GGUFReader(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_damage_in_a_long_array_is_named_when_met(tmp_path: Path) -> None:
    texts = text("x") * 2000 + text(b"\xff") + text("y")
    flags = bytes(1500) + b"\x07" + bytes(500)
    data = raw(array("texts", 8, 2002, texts), array("flags", 7, 2001, flags), keys=2)
    reader = GGUFReader(put(tmp_path / "bad.gguf", data))
    with pytest.raises(CorruptCheckpoint, match=r"bad\.gguf: texts\[2000\] is not UTF-8"):
        list(reader.values["texts"])
    with pytest.raises(CorruptCheckpoint, match=r"bad\.gguf: flags\[1500\] is 7"):
        list(reader.values["flags"])


def test_limits_come_before_what_they_limit(tmp_path: Path) -> None:
    """Sparse files, which are long enough for whatever their headers claim."""
    path = tmp_path / "bad.gguf"
    words = text("x") * (MAX_ELEMENTS + 1)
    cases: dict[str, bytes] = {
        f"{MAX_KEYS + 1} key/values": raw(keys=MAX_KEYS + 1),
        f"{MAX_TENSORS + 1} tensors": raw(tensors=MAX_TENSORS + 1),
        f"a ends at byte .* at most {MAX_HEADER}": raw(array("a", 10, MAX_HEADER // 8 + 1), keys=1),
        f"b and the arrays before it have more than {MAX_ELEMENTS}": raw(
            array("a", 0, MAX_ELEMENTS - 1, bytes(MAX_ELEMENTS - 1)), array("b", 8, 2), keys=2
        ),
        f"w and the arrays before it have more than {MAX_ELEMENTS}": raw(
            array("w", 8, MAX_ELEMENTS + 1, words), keys=1
        ),
        f"a and all text before it take more than {MAX_TEXT}": raw(
            key("a", 8, struct.pack("<Q", MAX_TEXT)), keys=1
        ),
        "name of tensor 0 ends at byte": raw(struct.pack("<Q", 200 << 30), tensors=1),
    }
    for message, data in cases.items():
        put(path, data)
        os.truncate(path, 300 << 30)
        tracemalloc.start()
        try:
            started = time.process_time()
            with pytest.raises(ResourceLimit, match=message):
                GGUFReader(path)
            assert time.process_time() - started < 10
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.slow
def test_the_most_that_is_read_is_read_fast(tmp_path: Path) -> None:
    words = array("w", 8, MAX_ELEMENTS - MAX_KEYS, NUL * (MAX_ELEMENTS - MAX_KEYS))
    keys = b"".join(array(f"{n}", 0, 1, b"\0") for n in range(MAX_KEYS - 1))
    infos = b"".join(info(f"{n}", offset=32 * n) for n in range(MAX_TENSORS))
    data = raw(words, keys, infos, keys=MAX_KEYS, tensors=MAX_TENSORS, body=bytes(32 * MAX_TENSORS))
    path = put(tmp_path / "a.gguf", data)
    started = time.process_time()
    reader = GGUFReader(path)
    assert time.process_time() - started < 10  # 0.9 s where this was written
    assert len(reader.tensors) == MAX_TENSORS
    tracemalloc.start()
    try:
        GGUFReader(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_the_most_text_takes_little_memory(tmp_path: Path) -> None:
    """Of a text with one wide character every other takes four bytes."""
    wide = "🦙".encode()
    body = b"a" * (MAX_TEXT - len(wide) - 1) + wide
    path = put(tmp_path / "a.gguf", raw(key("a", 8, text(body)), keys=1))
    tracemalloc.start()
    try:
        assert GGUFReader(path).values["a"][-1] == "🦙"
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + (64 << 20)
    finally:
        tracemalloc.stop()


def sample() -> bytes:
    """A small file with something of everything."""
    infos = [TensorInfo("a.weight", (2, 32), "Q8_0"), TensorInfo("b", (3,), "F32")]
    infos += [TensorInfo("c", (2, 2), "BF16"), TensorInfo("d", (), "F16")]
    values = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["<s>", "a", "ß"],
        "tokenizer.ggml.token_type": Value("[i32]", [3, 1, 1]),
        "x": Value("u64", 7),
        "y": True,
    }
    layout = lay_out(infos, values, "sample")
    return layout.head + bytes(random.Random(3).randbytes(layout.size))


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    data = sample()
    path = tmp_path / "a.gguf"
    GGUFReader(put(path, data))
    kept = len(data) - 30  # the last tensor's two bytes; what follows is padding
    for size in range(kept):
        with pytest.raises(CorruptCheckpoint):
            GGUFReader(put(path, data[:size]))
    for size in range(kept, len(data)):
        GGUFReader(put(path, data[:size]))


@settings(parent=short, max_examples=400)
@given(st.integers(0, len(sample()) - 1), st.binary(max_size=9), st.integers(0, 9))
def test_mutated_files_raise_only_our_errors(
    tmp_path: Path, at: int, patch: bytes, cut: int
) -> None:
    data = sample()
    path = put(tmp_path / "a.gguf", data[:at] + patch + data[at + cut :])
    try:
        reader = GGUFReader(path)
    except ZooError:
        return
    library = gguf.GGUFReader(path)  # what we accept, the library accepts and reads alike
    assert [tensor.name for tensor in library.tensors] == list(reader.tensors)
    assert all(n.startswith("GGUF.") or n in reader.values for n in library.fields)
    for tensor in library.tensors:
        actual = reader.tensor(tensor.name)
        with np.errstate(all="ignore"):
            if tensor.name in reader.quantized or tensor.tensor_type == Type.BF16:
                assert same(actual.float(), dequantize(tensor.data, tensor.tensor_type))
            else:
                assert same(actual, tensor.data)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(UnsafePath, match="not a regular file"):
        GGUFReader(tmp_path / "fifo.gguf")
    with pytest.raises(NotACheckpoint, match="No such file"):
        GGUFReader(tmp_path / "none.gguf")


# --- split files ----------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """Three files as the library splits them."""
    place = tmp_path / "split"
    place.mkdir()

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_string("general.name", "whole")
        for n in range(5):
            writer.add_tensor(f"t{n}", np.full((2, 3), n, np.float32))

    written(place / "m.gguf", fill, split_max_tensors=2)
    paths = sorted(place.glob("*.gguf"))
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return paths


@pytest.mark.parametrize("inputs", [0, 1, 2])
def test_a_split_is_read_as_one(split: list[Path], inputs: int) -> None:
    readers = open_gguf(split[inputs])
    assert list(readers) == [path.name for path in split]
    tensors = {name: reader for reader in readers.values() for name in reader.tensors}
    assert sorted(tensors) == [f"t{n}" for n in range(5)]
    assert all(tensors[f"t{n}"].tensor(f"t{n}").eq(n).all() for n in range(5))
    assert next(iter(readers.values())).values["general.name"] == "whole"


def test_a_whole_file_is_its_own_split(tmp_path: Path) -> None:
    path = put(tmp_path / "x-00001-of-00009.gguf", one(2))  # content decides, not the name
    assert list(open_gguf(path)) == [path.name]


def test_a_part_alone_is_refused(split: list[Path]) -> None:
    with pytest.raises(MissingShard, match="file 2 of 3"):
        GGUFReader(split[1])


def test_missing_parts_are_all_named(split: list[Path]) -> None:
    split[0].unlink()
    split[2].unlink()
    with pytest.raises(MissingShard, match=r"2 of 3 .*m-00001-of-00003.*m-00003-of-00003"):
        open_gguf(split[1])


def test_a_renamed_part_is_refused(split: list[Path]) -> None:
    other = split[0].rename(split[0].with_name("model.gguf"))
    with pytest.raises(BadIndex, match=r"model\.gguf.*file 1 of 3.*-00001-of-00003\.gguf"):
        open_gguf(other)


def test_swapped_parts_are_refused(split: list[Path]) -> None:
    data = split[1].read_bytes()
    split[1].write_bytes(split[2].read_bytes())
    split[2].write_bytes(data)
    with pytest.raises(BadIndex, match=r"00002-of-00003\.gguf says file 3 of 3, expected file 2 "):
        open_gguf(split[0])
    with pytest.raises(BadIndex, match=r"says that it is file 3 of 3, so its name should end"):
        open_gguf(split[1])


def test_a_part_that_is_whole_is_refused(split: list[Path]) -> None:
    put(split[2], one(2))
    with pytest.raises(BadIndex, match=r"00003-of-00003\.gguf says that it is whole"):
        open_gguf(split[0])


def parts(tmp_path: Path, *names: str, total: int) -> Path:
    for n, name in enumerate(names):
        values = key("split.no", 2, struct.pack("<H", n)), key("split.count", 2, b"\x02\0")
        count = key("split.tensors.count", 5, struct.pack("<i", total))
        data = raw(*values, count, info(name), keys=3, tensors=1, body=bytes(32))
        put(tmp_path / f"m-{n + 1:05d}-of-00002.gguf", data)
    return tmp_path / "m-00001-of-00002.gguf"


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DuplicateTensor, match=r"a \(m-00001-of-00002\.gguf and m-00002"):
        open_gguf(parts(tmp_path, "a", "a", total=2))


def test_tensor_counts_of_parts_are_checked(tmp_path: Path) -> None:
    assert len(open_gguf(parts(tmp_path, "a", "b", total=2))) == 2
    with pytest.raises(BadIndex, match=r"split\.tensors\.count is 3, and the files hold 2"):
        open_gguf(parts(tmp_path, "a", "b", total=3))


def test_parts_outside_the_directory_are_refused(tmp_path: Path, split: list[Path]) -> None:
    elsewhere = tmp_path / "elsewhere.gguf"
    split[2].rename(elsewhere)
    split[2].symlink_to(elsewhere)
    with pytest.raises(UnsafePath, match="out of its directory"):
        open_gguf(split[0])


# --- writing --------------------------------------------------------------------------------------


def save(path: Path, tensors: dict[str, tuple[str, torch.Tensor]], values: dict[str, Any]) -> Path:
    """In any order, each to its place, as a conversion does."""
    infos = [TensorInfo(name, tuple(t.shape), kind) for name, (kind, t) in tensors.items()]
    layout = lay_out(infos, values, path)
    with path.open("wb") as file:
        file.write(layout.head)
        file.truncate(len(layout.head) + layout.size)
        for about in reversed(infos):
            kind, tensor = tensors[about.name]
            if kind == "Q8_0":
                bits = quantize_q8_0(tensor)
            else:
                bits = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert bits.nbytes == stored_bytes(about)
            file.seek(len(layout.head) + layout.starts[about.name])
            file.write(bits.numpy().tobytes())
    return path


STOCK: dict[str, tuple[str, torch.Tensor]] = {
    "f32": ("F32", torch.randn(3, 5)),
    "f16": ("F16", torch.randn(7).half()),
    "bf16": ("BF16", torch.randn(2, 3, 5).bfloat16()),
    "q8": ("Q8_0", torch.randn(3, 64)),
    "scalar": ("F32", torch.tensor(1.5)),
    "deep": ("F32", torch.randn(2, 1, 3, 2)),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    values = {f"x.{kind}": Value(kind, value) for kind, (_, value) in SCALARS.items()}
    values |= {"list": [1, 2], "texts": ["", "ß"], "f32": 1e-5, "scores": Value("[f32]", [0.25, 3])}
    reader = gguf.GGUFReader(save(tmp_path / "a.gguf", STOCK, values))
    actual = {name: field.contents() for name, field in reader.fields.items()}
    actual = {name: value for name, value in actual.items() if not name.startswith("GGUF.")}
    assert actual.pop("f32") == np.float32(1e-5)
    assert actual == {
        n: v.value if isinstance(v, Value) else v for n, v in values.items() if n != "f32"
    }
    assert list(actual) == [name for name in values if name != "f32"]
    kinds = {name: [t.name for t in reader.fields[name].types] for name in values}
    assert kinds["list"] == ["ARRAY", "UINT32"]
    assert kinds["scores"] == ["ARRAY", "FLOAT32"]
    assert kinds["x.i8"] == ["INT8"]
    assert [tensor.name for tensor in reader.tensors] == list(STOCK)
    for tensor in reader.tensors:
        kind, value = STOCK[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tensor.data_offset % 32 == 0
        if kind == "Q8_0":
            assert same(tensor.data, quantize(value.numpy(), Type.Q8_0))
        elif kind == "BF16":
            assert same(dequantize(tensor.data, Type.BF16), value.float())
        else:
            assert same(tensor.data, value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gguf", STOCK, {"a": 1})
    reader = GGUFReader(path)
    assert list(reader.tensors) == list(STOCK)
    for name, (kind, value) in STOCK.items():
        if kind == "Q8_0":
            assert (reader.tensor(name) - value).abs().max() < value.abs().max() / 240
        else:
            assert same(reader.tensor(name).float(), value.float())
    assert save(tmp_path / "b.gguf", STOCK, {"a": 1}).read_bytes() == path.read_bytes()


def test_padding_is_zeros(tmp_path: Path) -> None:
    values = {"general.alignment": Value("u32", 256)}
    path = save(tmp_path / "a.gguf", STOCK, values)
    reader, data = GGUFReader(path), path.read_bytes()
    assert reader.alignment == 256
    spans = [reader.span(name) for name in STOCK]
    assert all(start % 256 == 0 for start, _ in spans)
    gaps = [data[end:start] for (_, end), (start, _) in pairwise([*spans, (len(data), 0)])]
    assert any(gaps)
    assert not any(any(gap) for gap in gaps)
    assert len(data) % 256 == 0


def test_a_file_read_and_written_again_is_the_same(tmp_path: Path) -> None:
    tokens = [f"t{n}" for n in range(3000)]

    def fill(writer: gguf.GGUFWriter) -> None:
        for kind, (name, value) in SCALARS.items():
            getattr(writer, f"add_{name}")(f"x.{kind}", value)
        writer.add_float32("eps", 1e-5)
        writer.add_array("tokens", tokens)
        writer.add_array("types", [1, 2, 3])
        for name, (kind, value) in STOCK.items():
            if kind in ("F32", "F16") and value.dim():
                writer.add_tensor(name, value.numpy())

    path = written(tmp_path / "a.gguf", fill)
    reader = GGUFReader(path)
    values = {name: Value(reader.kinds[name], value) for name, value in reader.values.items()}
    tensors = {name: (about.dtype, reader.tensor(name)) for name, about in reader.tensors.items()}
    assert save(tmp_path / "b.gguf", tensors, values).read_bytes() == path.read_bytes()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.one_of(
    words,
    st.booleans(),
    st.integers(0, (1 << 32) - 1),
    st.floats(width=32, allow_nan=False),
    st.lists(words, min_size=1),
    st.lists(st.integers(-128, 127)).map(lambda value: Value("[i8]", value)),
    st.lists(st.booleans(), min_size=1),
    st.integers(-(1 << 63), (1 << 63) - 1).map(lambda value: Value("i64", value)),
)


@short
@given(st.dictionaries(words.filter(bool).map(lambda name: f"k{name}"), values, max_size=6))
def test_random_metadata_comes_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = put(tmp_path / "a.gguf", lay_out([], fields, "here").head)
    actual = GGUFReader(path).values
    expected = {n: v.value if isinstance(v, Value) else v for n, v in fields.items()}
    assert list(actual) == list(expected)
    for name, value in expected.items():
        if type(value) is float:
            assert struct.pack("<f", actual[name]) == struct.pack("<f", value)
        else:
            assert (actual[name], type(actual[name])) == (value, type(value))


def about(name: str = "a", shape: tuple[int, ...] = (2,), kind: str = "F32") -> TensorInfo:
    return TensorInfo(name, shape, kind)


UNWRITABLE: dict[str, tuple[list[TensorInfo], dict[str, Any], str]] = {
    "type": ([about(kind="F64")], {}, "tensor a: F64 is none of F32, F16, Q8_0, BF16"),
    "long name": ([about("a" * 64)], {}, "does not have 1 to 63 bytes"),
    "no name": ([about("")], {}, "does not have 1 to 63 bytes"),
    "name of half a surrogate": ([about("\ud800")], {}, "its name is no text"),
    "axes": ([about(shape=(1,) * 5)], {}, "5 axes"),
    "empty": ([about(shape=(2, 0))], {}, "axis of 0"),
    "rows": ([about(shape=(64, 48), kind="Q8_0")], {}, r"\[64, 48\]: its rows do not divide"),
    "overflow": ([about(shape=(1 << 40, 1 << 40))], {}, "overflows"),
    "alignment": ([], {"general.alignment": 24}, "alignment is 24"),
    "alignment's type": ([], {"general.alignment": Value("u64", 32)}, "general.alignment"),
    "large int": ([], {"a": 1 << 32}, "a: 4294967296 is no u32"),
    "negative": ([], {"a": -1}, "a: -1 is no u32"),
    "fraction": ([], {"a": Value("i32", 0.5)}, "a: 0.5 is no i32"),
    "large float": ([], {"a": 1e39}, "is no f32"),
    "bool as a number": ([], {"a": Value("u8", True)}, "True is no u8"),
    "number as a bool": ([], {"a": Value("bool", 1)}, "1 is no bool"),
    "number as text": ([], {"a": Value("str", 1)}, "1 is no text"),
    "text as a list": ([], {"a": Value("[str]", "abc")}, "'abc' is no array"),
    "number as a list": ([], {"a": Value("[u8]", 3)}, "a: "),
    "mixed": ([], {"a": ["x", 1]}, "1 is no text"),
    "empty list": ([], {"a": []}, "no usual type"),
    "none": ([], {"a": None}, "None has no usual type"),
    "unknown kind": ([], {"a": Value("f16", 1)}, "type f16 is none of"),
    "list of lists": ([], {"a": [[1]]}, r"type \[\[u32\]\] is none of"),
    "half a surrogate": ([], {"a": "\ud800"}, "a: .*surrogates not allowed"),
    "no key": ([], {"": 1}, "keys have 1 to 65535 bytes"),
    "long key": ([], {"k" * 65536: 1}, "keys have 1 to 65535 bytes"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_tensors_and_values_that_gguf_cannot_hold_are_refused(case: str) -> None:
    infos, values, message = UNWRITABLE[case]
    with pytest.raises(LossyExport, match=message) as error:
        lay_out(infos, values, "out.gguf")
    assert "out.gguf" in str(error.value)


def test_all_that_gguf_cannot_hold_is_in_one_error() -> None:
    infos = [about("x", kind="F64"), about("y", (1,) * 5)]
    with pytest.raises(LossyExport, match=r"a: .*b: .*tensor x: .*tensor y: "):
        lay_out(infos, {"a": None, "b": -1}, "out.gguf")


def test_a_duplicate_name_is_refused_when_writing() -> None:
    with pytest.raises(DuplicateTensor, match=r"out\.gguf: a would"):
        lay_out([about(), about()], {}, "out.gguf")


def test_limits_of_reading_apply_to_writing() -> None:
    with pytest.raises(ResourceLimit, match="key/values"):
        lay_out([], {f"k{n}": 1 for n in range(MAX_KEYS + 1)}, "out.gguf")
    with pytest.raises(ResourceLimit, match="tensors"):
        lay_out([about(f"t{n}") for n in range(MAX_TENSORS + 1)], {}, "out.gguf")


class Packing:
    """A lazy array as the bytes of Q8_0: all that the engine asks of one."""

    dtype = torch.uint8

    def __init__(self, lazy: Lazy) -> None:
        self.lazy = lazy

    def pieces(self, limit: int) -> Iterator[torch.Tensor]:
        return pieces_of_q8_0(self.lazy.pieces(limit))


def test_a_conversion_writes_it_in_any_order_and_in_pieces(tmp_path: Path) -> None:
    """A shard of GGUF is a shard: a header, and places for tensors."""
    large = torch.randn(600, 128)
    stock = {**STOCK, "turned": ("F16", large.half().t()), "packed": ("Q8_0", large.t()[:, :576])}
    infos = [TensorInfo(name, tuple(t.shape), kind) for name, (kind, t) in stock.items()]
    layout = lay_out(infos, {"a": 1}, "a.gguf")
    items = []
    for info in infos:
        kind, tensor = stock[info.name]
        make: Any = partial(Lazy.of, tensor)
        if kind == "Q8_0":
            make = partial(Packing, Lazy.of(tensor))
            info = TensorInfo(info.name, (stored_bytes(info),), "U8")
        items.append(Item(info, "", make))
    output = Output((Shard("a.gguf", tuple(items), layout),))
    run(output, Stage(tmp_path), WriteOptions(memory=1 << 18))
    assert (tmp_path / "a.gguf").read_bytes() == save(
        tmp_path / "b.gguf", stock, {"a": 1}
    ).read_bytes()


# --- Q8_0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-20, 1e5])
def test_q8_0_equals_the_library(scale: float) -> None:
    values = torch.randn(17, 3, 96) * scale
    values[0, 0, :32] = 0
    actual = quantize_q8_0(values)
    assert actual.shape == (17, 3, 102)
    assert same(actual, quantize(values.numpy(), Type.Q8_0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_q8_0_quantizes_any_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(5, 64).to(dtype)
    assert same(quantize_q8_0(values), quantize(values.float().numpy(), Type.Q8_0))


def test_halves_are_rounded_away_from_zero() -> None:
    values = torch.zeros(32)
    values[:8] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    actual = quantize_q8_0(values)
    assert actual[:2].view(torch.float16).item() == 1
    assert actual[2:10].view(torch.int8).tolist() == [127, 1, 2, 3, -1, -2, -3, 127]
    assert same(actual, quantize(values.numpy(), Type.Q8_0))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 96, 100, 512])
def test_pieces_quantize_as_the_whole(size: int) -> None:
    values, shared = torch.randn(4, 128), torch.empty(size)

    def pieces() -> Iterator[torch.Tensor]:
        for piece in values.view(-1).split(size):
            yield shared[: len(piece)].copy_(piece)

    actual = [piece.clone() for piece in pieces_of_q8_0(pieces())]
    assert torch.equal(torch.cat(actual), quantize_q8_0(values).view(-1))


def test_transposed_tensors_quantize_like_contiguous_ones() -> None:
    values = torch.randn(64, 3).t()
    assert torch.equal(quantize_q8_0(values), quantize_q8_0(values.contiguous()))


def test_numbers_too_small_for_any_scale_are_zeros() -> None:
    for tiny in (1e-44, 1e-40, 1e-38):
        values = torch.full((32,), tiny)
        values[3] = 0
        assert not quantize_q8_0(values)[:2].any()
    assert not quantize_q8_0(torch.full((32,), 1e-40)).any()


def test_values_that_q8_0_cannot_hold_are_refused() -> None:
    values = torch.ones(32)
    for bad in (float("nan"), float("inf"), -float("inf")):
        values[5] = bad
        with pytest.raises(NonFinite, match="Q8_0"):
            quantize_q8_0(values)
    values[5] = 8.4e6
    with pytest.raises(OverflowOnCast, match=r"8\.4e\+06"):
        quantize_q8_0(values)
    values[5] = 8.3e6
    quantize_q8_0(values)


# --- the reference --------------------------------------------------------------------------------


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves as llama.cpp has them: pairs side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tiny_llama(path: Path, kind: str) -> Any:
    """The reference's model, and a file of its weights and what llama.cpp needs beside them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for value in model.parameters():
        value.data *= 6 if value.dim() == 2 else 1  # hot enough for a mistake to show
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.layers": "blk",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    tensors: dict[str, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, 4 if "q_proj" in name else 2)
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = (kind, value.to(dtype)) if value.dim() == 2 else ("F32", value)
    values = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.vocab_size": 67,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"t{n}" for n in range(64))],
        "tokenizer.ggml.scores": [0.0] * 67,
        "tokenizer.ggml.token_type": Value("[i32]", [2, 3, 3, *[1] * 64]),
    }
    save(path, tensors, values)
    return model


# what the numbers' own width loses; an un-permuted head or a swapped name loses all
LOSS = {"F32": 1e-5, "F16": 5e-3, "BF16": 5e-2, "Q8_0": 5e-2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the reference's
@pytest.mark.parametrize("kind", LOSS)
def test_the_reference_loads_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from transformers import AutoModelForCausalLM, modeling_utils

    # it asks for accelerate before it reads a GGUF file, and on one device uses nothing of it
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: True)
    model = tiny_llama(tmp_path / "tiny.gguf", kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    reader, opened = GGUFReader(tmp_path / "tiny.gguf"), loaded.state_dict()
    for old, new in {"model.layers.1.mlp.up_proj": "blk.1.ffn_up", "lm_head": "output"}.items():
        assert torch.equal(opened[f"{old}.weight"], reader.tensor(f"{new}.weight").float())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, actual = model(ids).logits, loaded(ids).logits
    assert (actual - expected).abs().max() / expected.abs().max() <= LOSS[kind]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the reference's, and ctypes' of the library
@pytest.mark.parametrize("kind", LOSS)
def test_llama_cpp_loads_what_is_written(tmp_path: Path, kind: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = tiny_llama(tmp_path / "tiny.gguf", kind)
    llama = llama_cpp.Llama(
        str(tmp_path / "tiny.gguf"), logits_all=True, n_ctx=64, n_threads=1, verbose=False
    )
    ids = list(range(3, 23))
    llama.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    error = (torch.from_numpy(llama.scores[:20]) - expected).abs().max() / expected.abs().max()
    assert error <= max(LOSS[kind], 5e-3)  # it holds keys and values in half precision
