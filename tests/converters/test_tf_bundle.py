"""TensorFlow's bundles without TensorFlow: what it wrote, to the bit; and what is refused."""

import os
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import bundles
import pytest
import torch
from torch import Tensor

from converters.formats import crc32c as sums
from converters.formats import snappy, tf_bundle, torch_dtype
from converters.formats.crc32c import crc32c
from converters.formats.safetensors import SafetensorsReader
from converters.formats.tf_bundle import TFBundleReader, find_bundle
from converters.formats.wire import Field, Malformed, message, varint
from zoo.errors import (
    AmbiguousCheckpoint,
    CorruptCheckpoint,
    MissingShard,
    MissingTensors,
    NotACheckpoint,
    ResourceLimit,
    SourceChanged,
    UnsafePath,
    UnsupportedFormat,
    ZooError,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "tf"

F32 = 1
HEADER = (b"", bundles.header())


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What makes two tensors the same, NaN included."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(raw.tolist())


BUNDLES = {
    "mixed/one": ("words", "wide"),
    "mixed/two": (),
    "mixed/snappy": ("words", "wide"),
    "gpt2": (),
    "bert": (),
    "objects": ("_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter/.ATTRIBUTES/VARIABLE_VALUE"),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the fixtures, whole: the packed index goes with the shard of the plain one."""
    home = tmp_path / "tf"
    shutil.copytree(DATA, home)
    for shard in (home / "mixed").glob("one.data-*"):
        shutil.copy(shard, shard.with_name(shard.name.replace("one", "snappy")))
    return home


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_of_tensorflow(data: Path, name: str) -> None:
    """Names, shapes, dtypes and bits are those that it was given."""
    index = find_bundle(data / name)
    reader, same = TFBundleReader(index), SafetensorsReader(index.with_name("same.safetensors"))
    assert reader.tensors == same.tensors
    assert set(reader.skipped) == set(BUNDLES[name])
    for tensor in same.tensors:
        assert bits(reader.tensor(tensor)) == bits(same.tensor(tensor)), tensor
    for tensor in reader.skipped:
        with pytest.raises(MissingTensors, match=f"{tensor} is no tensor: h"):
            reader.tensor(tensor)
    with pytest.raises(MissingTensors, match="has no tensor"):
        reader.tensor("no such")


def test_only_the_encoder_of_the_tests_is_at_hand() -> None:
    """Nothing below leans on TensorFlow."""
    assert "tensorflow" not in sys.modules


# --- CRC-32C -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, B.4
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_published_checksums(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def plainly(data: bytes) -> int:
    """By the definition, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [1, 3, 4, 4095, 4096, 4097, 5685, 5686, 10_008, 99_991])
def test_folded_crc_equals_the_definition(size: int) -> None:
    data = random.Random(size).randbytes(size)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert crc32c(data) == crc32c(tensor) == plainly(data)
    assert bytes(tensor.tolist()) == data


def test_folding_in_pieces() -> None:
    """Over several pieces, at odd lengths, by the table that is faster than bits."""
    for extra in (-1, 0, 1, 777_777):
        data = random.Random(extra).randbytes(sums._PIECE + extra)
        assert crc32c(data) == sums._finish(data, 0xFFFFFFFF)


def test_every_byte_changes_the_checksum() -> None:
    data = torch.zeros(2 * sums._PIECE, dtype=torch.uint8)
    seen = {crc32c(data)}
    places = [0, 3, 4, 5684, 5685, sums._PIECE - 1, sums._PIECE, 2 * sums._PIECE - 1]
    for at in places:
        data[at] = 1
        seen.add(crc32c(data))
        data[at] = 0
    assert len(seen) == len(places) + 1


def test_checksums_are_no_bottleneck() -> None:
    """6 GB/s on a core; a table in Python has 12 MB/s."""
    data = torch.zeros(64 << 20, dtype=torch.uint8)
    took = []
    for _ in range(5):
        started = time.process_time()
        crc32c(data)
        took.append(time.process_time() - started)
    assert len(data) / min(took) > 100e6


# --- snappy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packed", "data"),
    [
        (b"\0", b""),
        (b"\x03\x08abc", b"abc"),
        (b"\x0a\x00a\x15\x01", b"a" * 10),  # 9 more of the byte before
        (b"\x09\x08abc\x16\x03\0", b"abcabcabc"),  # a pattern runs into itself; offset of 2 bytes
        (b"\x08\x0cabcd\x0f\x04\0\0\0", b"abcdabcd"),  # offset of 4 bytes
        (b"\x04\xf0\x03abcd", b"abcd"),  # the length in a byte of its own
        (b"\x04\xf4\x03\0abcd", b"abcd"),
        (b"\x04\xfc\x03\0\0\0abcd", b"abcd"),
    ],
)
def test_snappy_blocks_are_unpacked(packed: bytes, data: bytes) -> None:
    assert snappy.unpack(packed) == data
    assert snappy.unpacked_size(packed) == len(data)


def test_what_the_tests_pack_unpacks() -> None:
    """TensorFlow reads a bundle packed so when the fixtures are made."""
    chance = random.Random(3)
    for size in (0, 1, 5, 70, 5000, 70_000):
        data = bytes(chance.choice(b"ab") if n % 90 < 60 else n % 256 for n in range(size))
        packed = bundles.snappy(data)
        assert snappy.unpack(packed) == data
        assert size < 100 or len(packed) < size


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (b"\x05\x04ab", "claims 5"),  # fewer
        (b"\x01\x04ab", "more than the 1"),
        (b"\x05\x10ab", "5 literal bytes"),  # cut off
        (b"\x05\xf4\x04", "literal bytes"),
        (b"\x05\xfc\xff\xff\xff\xffab", "4294967296 literal bytes"),
        (b"\x05\x04ab\x01\0", "from 0 bytes back"),
        (b"\x06\x04ab\x01\x03", "from 3 bytes back, 2 are"),
        (b"\x06\x04ab\x02\x03", "a copy"),  # half an offset
        (b"\x06\x04ab\x0f\xff\xff\xff\xff", "from 4294967295 bytes back"),
        (b"", "cut off"),
        (b"\xff\xff\xff\xff\xff\x01", "32 bits"),
    ],
)
def test_damaged_snappy_is_refused(packed: bytes, expected: str) -> None:
    with pytest.raises(Malformed, match=expected):
        snappy.unpack(packed)


def test_snappy_cannot_claim_what_it_never_makes() -> None:
    with pytest.raises(Malformed, match="cannot unpack into 4000000000"):
        snappy.unpacked_size(bundles.varint(4_000_000_000) + b"\0x")


# --- protobuf ------------------------------------------------------------------------------------


def test_varints_are_read() -> None:
    for value in (0, 1, 127, 128, 300, (1 << 63) + 5, (1 << 64) - 1):
        assert varint(bundles.varint(value) + b"x", 0) == (value, len(bundles.varint(value)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x80" * 20, "continues after 64 bits"),
        (b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08\x80", "cut off"),
        (b"\x08", "cut off"),
        (b"\x08\x81\0", "bytes of nothing"),
        (b"\x08\1\x08\2", "field a occurs twice"),
        (b"\x12\5ab", "field b has 5 bytes, 2 are there"),
        (b"\x12" + b"\xff" * 9 + b"\x01", "18446744073709551615 bytes"),
        (b"\x1d\1\2\3", "field c has 4 bytes, 3"),
        (b"\x0a\0", "field 1 of wire type 2"),
        (b"\x0b", "field 1 of wire type 3"),
        (b"\x78\1", "field 15 of wire type 0"),
        (b"\x12\0" * 4, "field b occurs more than 3 times"),
    ],
)
def test_damaged_messages_are_refused(data: bytes, expected: str) -> None:
    schema = {1: Field("a"), 2: Field("b", 2, 3), 3: Field("c", 5)}
    assert message(b"\x12\1x\x08\x96\1\x1d\1\0\0\0\x12\0", schema) == {
        "a": 150,
        "b": [b"x", b""],
        "c": 1,
    }
    with pytest.raises(Malformed, match=expected):
        message(data, schema)


# --- what TensorFlow wrote -----------------------------------------------------------------------


def test_the_fixtures_are_of_the_kinds_they_stand_for(data: Path) -> None:
    """Two shards, packed blocks, slices in two files, all dtypes, bytes out of line."""
    two = TFBundleReader(data / "mixed" / "two.index")
    assert [path.name for path in two.files] == [
        "two.index",
        "two.data-00000-of-00002",
        "two.data-00001-of-00002",
    ]
    assert {p.part.shard for pieces in two._pieces.values() for p in pieces} == {0, 1}
    assert {len(two._pieces["cut/rows"]), len(two._pieces["cut/columns"])} == {2, 3}
    packed = (data / "mixed" / "snappy.index").read_bytes()
    assert len(packed) < (data / "mixed" / "one.index").stat().st_size
    assert any(p.part.start % 4 for p in two._pieces["kinds/float32"])
    assert len({info.dtype for info in two.tensors.values()}) == 16
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 200_000


def test_names_as_openai_and_google_have_them(data: Path) -> None:
    gpt2 = TFBundleReader(find_bundle(data / "gpt2")).tensors
    assert gpt2["model/h0/attn/c_attn/w"].shape == (1, 12, 36)
    assert gpt2["model/wte"].shape == (53, 12)
    bert = TFBundleReader(find_bundle(data / "bert")).tensors
    assert bert["bert/encoder/layer_0/attention/self/query/kernel/adam_v"].shape == (12, 12)
    assert bert["global_step"] == ("global_step", (), "I64")


# --- reading -------------------------------------------------------------------------------------


def small(place: Path, **options: object) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(3, dtype=torch.int8), "c": torch.randn(5)}
    return bundles.bundle(place / "m", tensors, **options), tensors  # type: ignore[arg-type]


def test_views_of_the_mapped_file(tmp_path: Path) -> None:
    path, tensors = small(tmp_path)
    shard = tmp_path / "m.data-00000-of-00001"
    before = shard.read_bytes()
    reader = TFBundleReader(path, mmap=True)
    one, other = reader.tensor("a"), reader.tensor("a")
    assert one.data_ptr() == other.data_ptr()
    one.zero_()
    assert shard.read_bytes() == before
    bad = reader.tensor("c")  # behind three bytes: copied, so that kernels find it aligned
    assert bad.data_ptr() % 4 == 0
    assert bits(bad) == bits(tensors["c"])


def test_checksums_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = small(tmp_path, cut={"a": (0, (1, 2))})
    made: list[int] = []
    monkeypatch.setattr(
        tf_bundle,
        "crc32c_read",
        lambda size, read: made.append(size) or sums.crc32c_read(size, read),
    )
    reader = TFBundleReader(path)
    assert made == []
    for _ in range(3):
        reader.tensor("a")
        reader.tensor("c")
    assert sorted(made) == [16, 20, 32]


def test_headers_need_no_torch(data: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from converters.formats.tf_bundle import TFBundleReader as R, find_bundle as f;"
        f"assert len(R(f(Path({str(data / 'gpt2')!r}))).tensors) == 40;"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_joined(tmp_path: Path, axis: int) -> None:
    tensor = torch.arange(2.0 * 3 * 500).view(2, 3, 500).transpose(axis, 2).contiguous()
    path = bundles.bundle(
        tmp_path / "m", {"t": tensor}, shards=2, cut={"t": (axis, (1, 60, 4, 135, 300))}
    )
    assert bits(TFBundleReader(path).tensor("t")) == bits(tensor)


def test_every_dtype_joins(tmp_path: Path) -> None:
    tensors = {
        code: torch.arange(4 * 16, dtype=torch.uint8).view(4, 16).view(torch_dtype(code))
        for code in bundles.NUMBERS
        if code != "BOOL"
    }
    cut = dict.fromkeys(tensors, (0, (1, 3)))
    reader = TFBundleReader(bundles.bundle(tmp_path / "m", tensors, cut=cut))
    for code, tensor in tensors.items():
        assert bits(reader.tensor(code)) == bits(tensor)


# --- what is refused -----------------------------------------------------------------------------

Pairs = Sequence[tuple[bytes, bytes]]
TWO = bytes(range(8))
GOOD = (b"a", bundles.entry(F32, (2,), TWO))


def placed(home: Path, index: bytes, *shards: bytes) -> Path:
    for number, data in enumerate(shards):
        (home / f"m.data-{number:05d}-of-{len(shards):05d}").write_bytes(data)
    (home / "m.index").write_bytes(index)
    return home / "m.index"


def refused(path: Path, kind: type[ZooError], *expected: str) -> None:
    """On opening, naming the file and the fault."""
    started = time.process_time()
    with pytest.raises(kind) as caught:
        TFBundleReader(path)
    assert time.process_time() - started < 10
    assert type(caught.value) is kind
    assert str(path.parent) in str(caught.value)
    for word in expected:
        assert word in str(caught.value)


def test_the_sound_one_opens(tmp_path: Path) -> None:
    """What the cases below change in one place."""
    path = placed(tmp_path, bundles.index([HEADER, GOOD]), TWO)
    assert bits(TFBundleReader(path).tensor("a"))[2] == TWO


def entry(**changes: int) -> Pairs:
    return [HEADER, (b"a", bundles.entry(F32, (2,), TWO, **changes))]


def shaped(dims: bytes, data: bytes = b"") -> Pairs:
    text = bundles.number(1, F32) + bundles.part(2, dims) + bundles.number(5, len(data))
    return [HEADER, (b"a", text), *TAIL]


TAIL = [(b"z", bundles.entry(F32, (2,), TWO))]
AXIS = bundles.part(2, bundles.number(1, 2))
PAIRS: dict[str, tuple[Pairs, type[ZooError], tuple[str, ...]]] = {
    "no entries": ([], CorruptCheckpoint, ("no header",)),
    "no header": ([GOOD], CorruptCheckpoint, ("no header",)),
    "header of nothing": ([(b"", b""), GOOD], CorruptCheckpoint, ("header", "0 shards")),
    "header cut off": ([(b"", b"\x08"), GOOD], CorruptCheckpoint, ("header", "cut off")),
    "big endian": ([(b"", bundles.header(1, 1)), GOOD], UnsupportedFormat, ("big-endian",)),
    "newer": ([(b"", bundles.header(least=2)), GOOD], UnsupportedFormat, ("version 2",)),
    "too many shards": ([(b"", bundles.header(1 << 40)), GOOD], ResourceLimit, ("1099511627776",)),
    "more shards": ([(b"", bundles.header(3)), GOOD], MissingShard, ("3 of its 3", "m.data-00000")),
    "another shard": (entry(shard=1), CorruptCheckpoint, ("tensor a", "shard 1 of 1")),
    "a negative shard": (entry(shard=-1), CorruptCheckpoint, ("tensor a", "shard 1844")),
    "beyond the shard": (entry(offset=1), CorruptCheckpoint, ("tensor a", "1 to 9", "has 8")),
    "far beyond": (entry(offset=(1 << 63) - 4), CorruptCheckpoint, ("tensor a", "which has 8")),
    "before the shard": (entry(offset=-8), CorruptCheckpoint, ("tensor a", "at byte -8")),
    "a size that is another": (entry(size=4), CorruptCheckpoint, ("[2] of F32 takes 8", "says 4")),
    "a negative size": (entry(size=-8), CorruptCheckpoint, ("tensor a", "-8 bytes")),
    "overlapping": (
        [HEADER, GOOD, (b"b", bundles.entry(F32, (1,), TWO[4:], offset=4))],
        CorruptCheckpoint,
        ("tensor b", "4 to 8", "overlap a, which ends at 8"),
    ),
    "overlapping by a byte": (
        [
            HEADER,
            (b"a", bundles.entry(4, (5,), TWO[:5])),
            (b"b", bundles.entry(4, (4,), TWO[4:], offset=4)),
        ],
        CorruptCheckpoint,
        ("tensor b", "4 to 8", "overlap a, which ends at 5"),
    ),
    "twice the same": ([HEADER, GOOD, (b"b", GOOD[1])], CorruptCheckpoint, ("overlap a",)),
    "bytes of nobody": (
        [HEADER, (b"a", bundles.entry(F32, (1,), TWO[:4]))],
        CorruptCheckpoint,
        ("trailing bytes in m.data", "8 bytes, and a ends at 4"),
    ),
    "no dtype": ([HEADER, (b"a", b"")], CorruptCheckpoint, ("tensor a", "dtype 0")),
    "a dtype that is none": (
        [HEADER, (b"a", bundles.entry(101, (2,), TWO))],
        CorruptCheckpoint,
        ("tensor a", "dtype 101"),
    ),
    "text beyond the shard": (
        [HEADER, (b"a", bundles.entry(7, (2,), TWO + TWO))],
        CorruptCheckpoint,
        ("tensor a", "which has 8"),
    ),
    "a negative axis": (
        shaped(bundles.part(2, bundles.number(1, -1))),
        CorruptCheckpoint,
        ("tensor a", "[-1]", "negative"),
    ),
    "an unknown rank": (shaped(bundles.number(3, 1)), CorruptCheckpoint, ("rank is not known",)),
    "too many axes": (shaped(AXIS * 9), CorruptCheckpoint, ("tensor a", "more than 8")),
    "overflow": (
        shaped(bundles.part(2, bundles.number(1, 1 << 62)) * 4),
        CorruptCheckpoint,
        ("tensor a", "overflows"),
    ),
    "overflow of nothing": (
        shaped(bundles.part(2, b"") + bundles.part(2, bundles.number(1, 1 << 62)) * 3),
        CorruptCheckpoint,
        ("tensor a", "[0, 4611", "overflows"),
    ),
    "a field that is none": (
        [HEADER, (b"a", GOOD[1] + bundles.number(9, 1))],
        CorruptCheckpoint,
        ("tensor a", "field 9"),
    ),
    "a length that is none": (
        [HEADER, (b"a", GOOD[1] + b"\x3a\xff\xff\xff\x7f")],
        CorruptCheckpoint,
        ("tensor a", "field slices has 268435455 bytes"),
    ),
    "a name that is no text": ([HEADER, (b"\xff", GOOD[1])], CorruptCheckpoint, ("utf-8", "\\xff")),
    "a slice of nothing": (
        [HEADER, (b"\0a", bundles.entry(F32, (0,))), GOOD],
        CorruptCheckpoint,
        ("slice of no tensor",),
    ),
}


@pytest.mark.parametrize("packed", [0, 1], ids=["plain", "snappy"])
@pytest.mark.parametrize("case", PAIRS)
def test_entries_that_are_refused(tmp_path: Path, case: str, packed: int) -> None:
    pairs, kind, expected = PAIRS[case]
    refused(placed(tmp_path, bundles.index(pairs, packed), TWO), kind, *expected)


def test_all_faults_are_in_one_error(tmp_path: Path) -> None:
    bad = [(b"%d" % n, bundles.entry(F32, (2,), TWO, size=n)) for n in range(3)]
    refused(
        placed(tmp_path, bundles.index([HEADER, *bad]), TWO), CorruptCheckpoint, "0:", "1:", "2:"
    )


def cut(cuts: Sequence[Sequence[tuple[int, int]]], dims: Sequence[int] = (2, 2)) -> Pairs:
    """A tensor whose slices are as said, and whose parts are the first row and the second."""
    rows = [[(0, 1), (0, -1)], [(1, 1), (0, -1)]]
    parts = [
        (tf_bundle.slice_key(b"t", row), bundles.entry(F32, (1, 2), TWO, offset=8 * n))
        for n, row in enumerate(rows)
    ]
    return [HEADER, *parts, (b"t", bundles.slices(F32, dims, cuts))]


FIRST, SECOND = [(0, 1), (0, -1)], [(1, 1), (0, -1)]


def test_sound_slices_are_joined(tmp_path: Path) -> None:
    path = placed(tmp_path, bundles.index(cut([SECOND, FIRST])), TWO + TWO)
    assert bits(TFBundleReader(path).tensor("t"))[2] == TWO + TWO


@pytest.mark.parametrize(
    ("pairs", "kind", "expected"),
    [
        (cut([FIRST]), CorruptCheckpoint, ("tensor t", "end at 1 of axis 0, which has 2")),
        (cut([FIRST, FIRST]), CorruptCheckpoint, ("tensor t", "from 0 on axis 0 occurs twice")),
        (cut([FIRST, SECOND], (3, 2)), CorruptCheckpoint, ("end at 2 of axis 0, which has 3",)),
        (cut([FIRST, SECOND], (2, 3)), CorruptCheckpoint, ("is [1, 2] of dtype 1, not [1, 3]",)),
        (cut([FIRST, [(1, 2), (0, -1)]]), CorruptCheckpoint, ("2 from 1 on axis 0 of 2",)),
        (cut([[(-1, 1), (0, -1)]]), CorruptCheckpoint, ("1 from -1 on axis 0",)),
        (cut([[(5, -1), (0, -1)]]), CorruptCheckpoint, ("from 5 on axis 0",)),
        (cut([[(0, 1)]]), CorruptCheckpoint, ("a slice has 1 axes, the tensor 2",)),
        (cut([[(0, 1), (0, 1)]]), CorruptCheckpoint, ("not in the index",)),
        (
            [
                *cut([FIRST, SECOND])[:-1],
                (b"t", cut([FIRST, SECOND])[-1][1] + bundles.number(5, 8)),
            ],
            CorruptCheckpoint,
            ("has slices, and bytes of its own",),
        ),
    ],
)
def test_slices_that_are_refused(
    tmp_path: Path, pairs: Pairs, kind: type[ZooError], expected: tuple[str, ...]
) -> None:
    refused(placed(tmp_path, bundles.index(pairs), TWO + TWO), kind, *expected)


def test_slices_that_overlap_and_leave_a_hole(tmp_path: Path) -> None:
    """Their rows add up."""
    spans = [[(0, 2)], [(1, 2)]]
    parts = [
        (tf_bundle.slice_key(b"t", span), bundles.entry(F32, (2,), TWO, offset=8 * n))
        for n, span in enumerate(spans)
    ]
    pairs = [HEADER, *parts, (b"t", bundles.slices(F32, (4,), spans))]
    path = placed(tmp_path, bundles.index(pairs), TWO + TWO)
    refused(path, CorruptCheckpoint, "tensor t", "reach 2 of axis 0 and go on at 1")


def test_slices_along_two_axes_are_refused_by_name(tmp_path: Path) -> None:
    spans = [[(a, 1), (b, 1)] for a in (0, 1) for b in (0, 1)]
    parts = [
        (tf_bundle.slice_key(b"t", span), bundles.entry(F32, (1, 1), TWO[:4], offset=4 * n))
        for n, span in enumerate(spans)
    ]
    pairs = [HEADER, *parts, (b"t", bundles.slices(F32, (2, 2), spans))]
    refused(placed(tmp_path, bundles.index(pairs), TWO + TWO), UnsupportedFormat, "t is", "0, 1")


# --- tables --------------------------------------------------------------------------------------


def restarts(*numbers: int, keep: int = 1) -> bytes:
    """The sound block with other restarts."""
    block = bundles.block([HEADER, GOOD])
    return block[: -8 * keep] + struct.pack(f"<{len(numbers)}I", *numbers)


def one(contents: bytes, kind: int = 0, bound: bytes = b"a") -> bytes:
    return bundles.table([(bound, contents, kind)])


BLOCK = bundles.block([HEADER, GOOD])
RAW = b"".join(
    (bundles.varint(0), bundles.varint(0), bundles.varint(len(HEADER[1])), HEADER[1])
)  # the header's entry
EMPTY = bundles.block([])
INDEX = bundles.block([(b"a", bundles.varint(0) + bundles.varint(len(BLOCK)))], 1)


def footer(
    meta: tuple[int, int] = (len(BLOCK) + 5, len(EMPTY)),
    index: tuple[int, int] = (len(BLOCK) + len(EMPTY) + 10, len(INDEX)),
) -> bytes:
    """The sound table with other handles at its end."""
    handles = b"".join(map(bundles.varint, (*meta, *index)))
    return one(BLOCK)[:-48] + handles.ljust(40, b"\0") + bundles.MAGIC


def raw_index(index: bytes) -> bytes:
    """The sound table with another index block."""
    body = bundles.sealed(BLOCK) + bundles.sealed(EMPTY)
    handles = (len(BLOCK) + 5, len(EMPTY), len(body), len(index))
    end = b"".join(map(bundles.varint, handles)).ljust(40, b"\0") + bundles.MAGIC
    return body + bundles.sealed(index) + end


def pointed(*handles: tuple[int, int]) -> bytes:
    pairs = [(b"a%d" % n, b"".join(map(bundles.varint, h))) for n, h in enumerate(handles)]
    return raw_index(bundles.block(pairs, 1))


assert footer() == one(BLOCK)  # else the cases below would be wrong in more than one place
# large ones are made when their test runs
TABLES: dict[str, tuple[bytes | Callable[[], bytes], type[ZooError], tuple[str, ...]]] = {
    "empty": (b"", CorruptCheckpoint, ("0 bytes", "nothing")),
    "short": (bundles.MAGIC, CorruptCheckpoint, ("8 bytes",)),
    "another magic": (one(BLOCK)[:-1] + b"\0", CorruptCheckpoint, ("57fb808b247547db", "00. T")),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
        CorruptCheckpoint,
        ("Git LFS pointer",),
    ),
    "packed in a third way": (one(BLOCK, 2), CorruptCheckpoint, ("block at byte 0", "way 2")),
    "no snappy": (one(BLOCK, 1), CorruptCheckpoint, ("block at byte 0", "snappy")),
    "a bomb": (
        one(bundles.varint(1 << 32) + b"\0a", 1),
        CorruptCheckpoint,
        ("block at byte 0", "32 bits"),
    ),
    "a smaller bomb": (
        one(bundles.varint((4 << 20) + 1) + b"\0a" + b"\xfe\1\0" * 70_000, 1),
        ResourceLimit,
        ("unpacks into more than 4194304",),
    ),
    "no restarts": (one(b""), CorruptCheckpoint, ("0 bytes cannot hold",)),
    "more restarts than bytes": (one(restarts(0, 1 << 31)), CorruptCheckpoint, ("2147483648",)),
    "a restart in an entry": (
        one(restarts(3, 1)),
        CorruptCheckpoint,
        ("restart 0 of 1 is byte 3",),
    ),
    "a restart at the end": (
        one(restarts(0, len(BLOCK) - 8, 2)),
        CorruptCheckpoint,
        ("restart 1 of 2",),
    ),
    "restarts out of order": (
        one(restarts(len(RAW), 0, 2)),
        CorruptCheckpoint,
        ("restart",),
    ),
    "a restart that shares": (
        one(b"\0\1\0a\1\1\0b" + struct.pack("<3I", 0, 4, 2), bound=b"b"),
        CorruptCheckpoint,
        ("the entry at restart 4 shares 1 bytes",),
    ),
    "a key shares with nothing": (
        one(b"\x05\0\0" + struct.pack("<2I", 0, 1)),
        CorruptCheckpoint,
        ("shares 5 bytes with a key of 0",),
    ),
    "an entry beyond its block": (
        one(b"\0\x7f\x7f" + struct.pack("<2I", 0, 1)),
        CorruptCheckpoint,
        ("an entry of 254 bytes",),
    ),
    "an endless number": (
        one(b"\x80" * 9 + struct.pack("<2I", 0, 1)),
        CorruptCheckpoint,
        ("32 bits",),
    ),
    "keys out of order": (
        one(bundles.block([HEADER, (b"b", GOOD[1]), GOOD]), bound=b"b"),
        CorruptCheckpoint,
        ("key 'a' does not come after 'b'",),
    ),
    "a key twice": (
        bundles.index([HEADER, GOOD, GOOD]),
        CorruptCheckpoint,
        ("key 'a' does not come after 'a'",),
    ),
    "a key twice in two blocks": (
        bundles.index([HEADER, GOOD, GOOD], size=2),
        CorruptCheckpoint,
        ("index block", "key 'a' does not come after 'a'"),
    ),
    "a key beyond its bound": (one(BLOCK, bound=b"A"), CorruptCheckpoint, ("'a' is greater than",)),
    "too many entries": (
        lambda: bundles.index([(b"%05d" % n, b"") for n in range(33_000)]),
        ResourceLimit,
        ("more than 32768 entries",),
    ),
    "too large": (bytes((2 << 20) + 1), ResourceLimit, ("2097153 bytes",)),
    "long names, each in a few bytes": (
        lambda: bundles.index([(b"x" * 9000 + b"%04d" % n, b"") for n in range(1000)], size=1000),
        ResourceLimit,
        ("unpacks into more",),
    ),
    "filters": (
        footer(meta=(0, len(BLOCK))),
        CorruptCheckpoint,
        ("meta block", "filters"),
    ),
    "a block beyond the file": (
        footer(index=(0, 1 << 40)),
        CorruptCheckpoint,
        ("footer", "1099511627776 bytes at byte 0"),
    ),
    "a block beyond all": (footer(index=((1 << 64) - 1, 8)), CorruptCheckpoint, ("footer", "1844")),
    "a block over the footer": (
        footer(index=(len(one(BLOCK)) - 58, 10)),
        CorruptCheckpoint,
        ("footer begins at",),
    ),
    "a block that is another's": (
        pointed((0, len(BLOCK)), (0, len(BLOCK))),
        CorruptCheckpoint,
        ("overlaps the one before",),
    ),
    "a block of no bytes": (pointed(), CorruptCheckpoint, ("leaves a hole", "ends at 0")),
    "a block that points out": (pointed((0, 1 << 30)), CorruptCheckpoint, ("index block", "10737")),
    "a block that is cut": (pointed((0, len(BLOCK) - 1)), CorruptCheckpoint, ("leaves a hole",)),
    "a handle cut off": (
        raw_index(bundles.block([(b"a", b"\0")], 1)),
        CorruptCheckpoint,
        ("index block", "cut off"),
    ),
    "bounds out of order": (
        bundles.table([(b"b", bundles.block([HEADER]), 0), (b"a", bundles.block([GOOD]), 0)]),
        CorruptCheckpoint,
        ("index block", "'a' does not come after 'b'"),
    ),
    "a sum that is another": (
        one(BLOCK).replace(b"\x08", b"\x09", 1),
        CorruptCheckpoint,
        ("block at byte 0", "CRC", "expected"),
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_refused(tmp_path: Path, case: str) -> None:
    data, kind, expected = TABLES[case]
    refused(placed(tmp_path, data if isinstance(data, bytes) else data(), TWO), kind, *expected)


def test_every_flipped_bit_of_an_index_is_seen(tmp_path: Path) -> None:
    data = bundles.index([HEADER, GOOD])
    placed(tmp_path, data, TWO)
    passed = []
    for at in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[at // 8] ^= 1 << at % 8
        (tmp_path / "m.index").write_bytes(wrong)
        try:
            TFBundleReader(tmp_path / "m.index")
        except (CorruptCheckpoint, ResourceLimit):
            continue
        passed.append(at)
    assert passed == []


def test_every_truncation_of_an_index_is_seen(tmp_path: Path) -> None:
    data = bundles.index([HEADER, GOOD])
    for size in range(len(data)):
        refused(placed(tmp_path, data[:size], TWO), CorruptCheckpoint)
    refused(placed(tmp_path, data + b"\0", TWO), CorruptCheckpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pairs",
    [
        lambda: [HEADER, *((b"%05d" % n, bundles.entry(F32, (0, 4))) for n in range(30_000))],
        lambda: [HEADER, (b"a", bundles.part(7, b"") * 900_000)],
        lambda: [HEADER, (b"a", bundles.part(2, bundles.part(2, b"") * 900_000))],
    ],
    ids=["entries", "slices", "axes"],
)
def test_memory_and_time_are_bounded(tmp_path: Path, pairs: Callable[[], Pairs]) -> None:
    path = placed(tmp_path, bundles.index(pairs()), b"")
    started = time.process_time()
    with suppress(CorruptCheckpoint):
        TFBundleReader(path)
    assert time.process_time() - started < 10
    tracemalloc.start()
    with suppress(CorruptCheckpoint):
        TFBundleReader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size + (64 << 20)


# --- shards --------------------------------------------------------------------------------------


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    path, _ = small(tmp_path, shards=2)
    shard = tmp_path / "m.data-00001-of-00002"
    data = bytearray(shard.read_bytes())
    data[5] ^= 4
    shard.write_bytes(data)
    reader = TFBundleReader(path)
    (hurt,) = (n for n in "abc" if reader._pieces[n][0].part[:2] == (1, 0))
    with pytest.raises(CorruptCheckpoint, match=rf"{shard.name}: tensor {hurt}, .* CRC \w+, expec"):
        reader.tensor(hurt)
    for name in set("abc") - {hurt}:
        if reader._pieces[name][0].part.shard == 0:
            reader.tensor(name)


def test_shards_that_are_missing_cut_or_longer(tmp_path: Path) -> None:
    path, _ = small(tmp_path, shards=3)
    shard = tmp_path / "m.data-00001-of-00003"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    refused(path, CorruptCheckpoint, shard.name, "truncated?")
    shard.write_bytes(data + b"\0")
    refused(path, CorruptCheckpoint, shard.name, "trailing bytes")
    shard.unlink()
    (tmp_path / "m.data-00002-of-00003").unlink()
    refused(path, MissingShard, "2 of its 3 shards", shard.name, "m.data-00002-of-00003")


def test_shards_lie_beside_their_index(tmp_path: Path) -> None:
    """A link that leads out is not followed; a device is not opened."""
    place = tmp_path / "in"
    place.mkdir()
    path, tensors = small(place)
    shard = place / "m.data-00000-of-00001"
    outside = tmp_path / "elsewhere"
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(path, UnsafePath, str(outside))
    shard.unlink()
    shard.mkdir()
    refused(path, UnsafePath, "not a regular file")
    shard.rmdir()
    os.mkfifo(shard)
    refused(path, UnsafePath, "not a regular file")
    shard.unlink()
    outside.rename(place / "blob")
    shard.symlink_to("blob")
    assert bits(TFBundleReader(path).tensor("a")) == bits(tensors["a"])


def test_a_shard_that_changes_is_refused(tmp_path: Path) -> None:
    path, _ = small(tmp_path)
    reader = TFBundleReader(path)
    shard = tmp_path / "m.data-00000-of-00001"
    shard.write_bytes(bytes(shard.stat().st_size + 8))
    with pytest.raises(SourceChanged, match="changed after its header was read"):
        reader.tensor("a")


def test_files_that_are_no_index_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "m.data-00000-of-00001", NotACheckpoint, ".index")
    refused(tmp_path / "m.index", NotACheckpoint, "No such file")
    (tmp_path / "m.index").mkdir()
    refused(tmp_path / "m.index", UnsafePath)


# --- which bundle --------------------------------------------------------------------------------


def test_a_bundle_is_opened_by_index_prefix_or_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = small(tmp_path)
    assert find_bundle(path) == find_bundle(tmp_path / "m") == find_bundle(tmp_path) == path
    monkeypatch.chdir(tmp_path)
    assert find_bundle(Path()) == find_bundle(Path("m")) == Path("m.index")


def test_several_bundles_in_one_directory_are_ambiguous(tmp_path: Path) -> None:
    for name in ("one.index", "two.index"):
        (tmp_path / name).touch()
    with pytest.raises(AmbiguousCheckpoint, match=r"one\.index, two\.index"):
        find_bundle(tmp_path)
    note = tmp_path / "checkpoint"
    for named in ("two", "./two", "/mnt/of/another/machine/two"):
        note.write_text(f'model_checkpoint_path: "{named}"\nall_model_checkpoint_paths: "one"\n')
        assert find_bundle(tmp_path) == tmp_path / "two.index"
    note.write_text("weights of mine\n")  # somebody else's file
    with pytest.raises(AmbiguousCheckpoint):
        find_bundle(tmp_path)
    note.write_text('model_checkpoint_path: "three"\n')
    with pytest.raises(MissingShard, match=r"names three\.index, found one\.index, two\.index"):
        find_bundle(tmp_path)


@pytest.mark.parametrize("name", ["../two", "a/b", "", "/", "..", "a\\\\b", "\\342\\204"])
def test_a_checkpoint_file_that_points_elsewhere_stays_in_its_directory(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "two.index").touch()
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n')
    with pytest.raises(UnsafePath, match="no file beside it"):
        find_bundle(tmp_path)


def test_a_directory_without_a_bundle_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "m"):
        with pytest.raises(NotACheckpoint, match="no tensor bundle"):
            find_bundle(path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x.index").touch()
    assert find_bundle(tmp_path / "x") == tmp_path / "x.index"
    (tmp_path / "x" / "y.index").touch()
    with pytest.raises(AmbiguousCheckpoint, match="Name one"):
        find_bundle(tmp_path / "x")
    os.mkfifo(tmp_path / "x" / "checkpoint")
    with pytest.raises(UnsafePath):
        find_bundle(tmp_path / "x")
