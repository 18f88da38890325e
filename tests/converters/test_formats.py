"""Formats on their own: what is read and written to the byte, and what is refused."""

import json
import os
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tiny import write

from converters.formats import (
    BITS,
    TensorInfo,
    dtype_code,
    itemsize,
    open_regular,
    torch_dtype,
    torch_pickle,
    torch_zip,
)
from converters.formats.safetensors import (
    SafetensorsReader,
    header_order,
    lay_out,
)
from converters.formats.source import SourceFile
from converters.formats.torch_zip import TorchZipReader
from converters.strict_json import parse_json, read_json
from zoo.errors import (
    BadIndex,
    CheckpointError,
    CorruptCheckpoint,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensors,
    NotACheckpoint,
    ResourceLimit,
    SourceChanged,
    UnsafePath,
    UnsupportedZip,
    ZooError,
)

short = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
codes = [code for code in BITS if code not in ("F4", "F6_E2M3", "F6_E3M2")]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes in any dtype; booleans are 0 or 1."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


def raw(header: str | bytes, body: bytes = b"", pad: bool = False) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-len(text) % 8 if pad else 0)
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def header(**entries: object) -> str:
    return json.dumps(entries)


# --- dtypes --------------------------------------------------------------------------------------


def env(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


# --- safetensors, read ---------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__" and len(name.splitlines()) < 2
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
stocks = st.dictionaries(names, st.tuples(shapes, st.sampled_from(codes)), max_size=6)
notes = st.none() | st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])))


def drawn(stock: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, torch.Tensor]:
    return {name: random(shape, torch_dtype(code)) for name, (shape, code) in stock.items()}


@short
@given(stocks)
def test_reads_what_the_library_writes(
    tmp_path: Path, stock: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    tensors, path = drawn(stock), tmp_path / "a.safetensors"
    save_file(tensors, path, {"format": "pt"})
    reader = SafetensorsReader(path)
    assert reader.metadata == {"format": "pt"}
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert reader.tensors[name] == TensorInfo(name, tuple(tensor.shape), stock[name][1])
        assert reader.tensors[name].nbytes == tensor.nbytes
        assert same(reader.tensor(name), tensor)
        start, end = reader.span(name)
        assert path.read_bytes()[start:end] == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_codes_go_both_ways() -> None:
    for code in codes:
        assert dtype_code(torch_dtype(code)) == code
        assert itemsize(code) == torch_dtype(code).itemsize
    with pytest.raises(DtypeMismatch, match="F4"):
        torch_dtype("F4")
    with pytest.raises(DtypeMismatch, match="complex128"):
        dtype_code(torch.complex128)
    with pytest.raises(DtypeMismatch, match="F6_E2M3"):
        itemsize("F6_E2M3")


def test_headers_need_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    code = (
        "import sys; from pathlib import Path;"
        "from converters.opening import open_checkpoint;"
        "from converters.formats.safetensors import SafetensorsReader as R;"
        f"assert R(Path({str(tmp_path / 'a.safetensors')!r})).tensors['a'].shape == (2,);"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code], env(root)) == 0


def test_unaligned_tensors_are_read_correctly(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for shift in range(8):  # the header's length moves every tensor
        values = struct.pack("<2f", 1.5, -2.5)
        wide = struct.pack("<d", 3.25)
        text = header(a=entry(), b=entry(dtype="F64", shape=[], data_offsets=[8, 16]))
        path.write_bytes(raw(text + " " * shift, values + wide))
        reader = SafetensorsReader(path)
        assert reader.tensor("a").tolist() == [1.5, -2.5]
        assert reader.tensor("b").item() == 3.25
        assert reader.tensor("b").shape == ()
        assert reader.tensor("a").data_ptr() % 4 == reader.tensor("b").data_ptr() % 8 == 0


def test_tensors_are_views_of_a_private_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    size = 64 << 20
    save_file({"a": torch.zeros(size // 4), "b": torch.ones(3)}, path)
    before = path.read_bytes()[-100:]
    reader = SafetensorsReader(path)
    anonymous = memory("RssAnon")
    a = reader.tensor("a")
    assert float(a.sum()) == 0.0
    assert memory("RssAnon") - anonymous < 4 << 20
    assert a.untyped_storage().nbytes() == size  # so that saving a tensor saves no more than it
    assert a.data_ptr() == reader.tensor("a").data_ptr()
    a[-1] = 7.0
    assert path.read_bytes()[-100:] == before
    b = reader.tensor("b")
    del reader
    assert b.tolist() == [1, 1, 1]  # the mapping lives as long as a view of it


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return pytest.skip(f"no {field} here")


def test_opening_maps_nothing_and_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path)
    reader = SafetensorsReader(path)
    with pytest.raises(MissingTensors, match=r"a1.*Did you mean a"):
        reader.tensor("a1")
    assert str(path) not in Path("/proc/self/maps").read_text()
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(SourceChanged, match="changed after"):
        reader.tensor("a")


def test_many_tensors_are_listed_fast(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shape = (3, 5)
    save_file(
        {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(shape) for i in range(201)}, path
    )
    best = 1.0
    for _ in range(20):
        start = time.process_time()
        SafetensorsReader(path)
        best = min(best, time.process_time() - start)
    assert best < 0.02  # 1 ms where this was written


F32 = struct.pack("<2f", 1, 2)
REFUSED = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x01\x02", "2 bytes"),
    "only a length": (struct.pack("<Q", 2), "should have 2 bytes, and 0"),
    "100 GB": (struct.pack("<Q", 100 << 30) + b"{}", str(100 << 30)),
    "2^64 - 1": (struct.pack("<Q", (1 << 64) - 1) + b"{}", str((1 << 64) - 1)),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "UTF-8"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16")), "UTF-8"),
    "BOM": (raw("\ufeff{}"), "no JSON object"),
    "array": (raw("[]"), "no JSON object"),
    "number": (raw("1"), "no JSON object"),
    "leading space": (raw(" {}"), "no JSON object"),
    "newline as padding": (raw("{}\n"), "no JSON object"),
    "zeros as padding": (raw("{}\0\0"), "no JSON object"),
    "two objects": (raw("{}{}"), "not JSON"),
    "broken": (raw('{"a":}'), "not JSON"),
    "deep": (raw('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deep|not JSON"),
    "deep objects": (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deep|not JSON"),
    "half a surrogate": (raw(header(a=entry()).replace('"a"', r'"\ud800"'), F32), "not JSON"),
    "half a surrogate in metadata": (raw(r'{"__metadata__":{"a":"\udfff"}}'), "not JSON"),
    "control character": (raw('{"a\n": 1}'), "not JSON"),
    "NaN": (raw(header(a=entry(shape=[float("nan")])), F32), "NaN is no number"),
    "huge integer": (raw(header(a=entry()).replace("[2]", f"[{'9' * 5000}]"), F32), "not JSON"),
    "twice": (raw('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), F32), "'a' twice"),
    "field twice": (
        raw(header(a=entry()).replace('"dtype"', '"shape": [2], "dtype"'), F32),
        "twice",
    ),
    "unknown field": (raw(header(a=entry(extra=1)), F32), "tensor a.*unknown field extra"),
    "missing field": (
        raw('{"a":{"dtype":"F32","shape":[2]}}', F32),
        "tensor a.*lacks data_offsets",
    ),
    "array for entry": (raw('{"a":["F32",[2],[0,8]]}', F32), "tensor a.*list"),
    "null for entry": (raw('{"a":null}'), "tensor a.*NoneType"),
    "unknown dtype": (raw(header(a=entry(dtype="F33")), F32), "tensor a.*'F33'"),
    "dtype in small": (raw(header(a=entry(dtype="f32")), F32), "tensor a.*'f32'"),
    "list as dtype": (raw(header(a=entry(dtype=["F32"])), F32), "tensor a.*dtype"),
    "negative axis": (raw(header(a=entry(shape=[-2])), F32), "not JSON: -2 is negative"),
    "minus zero": (
        raw(header(a=entry()).replace("[0,", "[-0,").replace("[0, ", "[-0, "), F32),
        "-0",
    ),
    "fraction": (raw(header(a=entry(shape=[2.0])), F32), "tensor a.*shape"),
    "bool": (raw(header(a=entry(shape=[2, True])), F32), "tensor a.*shape"),
    "text as axis": (raw(header(a=entry(shape=["2"])), F32), "tensor a.*shape"),
    "number as shape": (raw(header(a=entry(shape=2)), F32), "tensor a.*shape"),
    "one offset": (raw(header(a=entry(data_offsets=[8])), F32), "tensor a.*data_offsets"),
    "three offsets": (raw(header(a=entry(data_offsets=[0, 4, 8])), F32), "tensor a.*data_offsets"),
    "descending": (raw(header(a=entry(data_offsets=[8, 0])), F32), "tensor a.*ascend"),
    "overflow": (
        raw(header(a=entry(shape=[1 << 32, 1 << 32, 1 << 32])), F32),
        "tensor a.*overflows",
    ),
    "overflow to 2^64": (raw(header(a=entry(shape=[1 << 62, 4])), F32), "tensor a.*overflows"),
    "overflow around a zero": (
        raw(header(a=entry(shape=[1 << 32, 1 << 32, 0], data_offsets=[0, 0]))),
        "tensor a.*overflows",
    ),
    "too many axes": (raw(header(a=entry(shape=[1] * 65 + [2])), F32), "66 axes"),
    "shape too small": (raw(header(a=entry(shape=[1])), F32), "tensor a.*takes 4 bytes"),
    "half a byte": (raw(header(a=entry(dtype="F4", shape=[3])), F32), "tensor a.*takes 1.5 bytes"),
    "hole before": (
        raw(header(a=entry(data_offsets=[4, 12])), F32 + b"1234"),
        "hole after the header",
    ),
    "hole": (
        raw(header(a=entry(), b=entry(data_offsets=[12, 20])), F32 + b"1234" + F32),
        "tensor b.*hole after tensor a",
    ),
    "overlap": (
        raw(header(a=entry(), b=entry(data_offsets=[4, 12])), F32 + b"1234"),
        "tensor b.*overlaps tensor a",
    ),
    "same place": (raw(header(a=entry(), b=entry()), F32), "tensor b.*overlaps tensor a"),
    "truncated": (raw(header(a=entry()), F32[:-1]), "truncated: tensor a ends at byte 8"),
    "trailing": (raw(header(a=entry()), F32 + b"\0"), "trailing bytes"),
    "trailing without tensors": (raw("{}", b"\0"), "trailing bytes"),
    "metadata null": (raw('{"__metadata__":null}'), "__metadata__"),
    "metadata of numbers": (raw('{"__metadata__":{"a":1}}'), "__metadata__"),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata key twice": (raw('{"__metadata__":{"a":"1","a":"2"}}'), "twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, message = REFUSED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(CorruptCheckpoint, match=message) as error:
        SafetensorsReader(path)
    assert time.process_time() - start < 10
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        raw("{}"),
        raw("{}   "),
        raw('{"__metadata__":{}}'),
        raw(header(a=entry()), F32),
        raw(header(b=entry(data_offsets=[8, 16]), a=entry()), F32 * 2),
        raw(header(a=entry(shape=[1, 2, 1])), F32),
        raw(header(a=entry(shape=[0, 7], data_offsets=[0, 0]), b=entry()), F32),
        raw(header(a=entry(dtype="F4", shape=[16])), F32),
        raw(header(**{"a-b, -1": entry()}), F32),
    ],
)
def test_unusual_headers_are_accepted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(data)
    SafetensorsReader(path)


def test_all_faults_are_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw(header(a=entry(dtype="X"), b=entry(shape=[3]), c=entry(extra=0)), F32))
    with pytest.raises(CorruptCheckpoint, match=r"tensor a: .*tensor b: .*tensor c: "):
        SafetensorsReader(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)  # sparse
    with pytest.raises(ResourceLimit, match="100000001"):
        SafetensorsReader(path)


good_file = save({"a": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.float16)})


@settings(parent=short, max_examples=400)
@given(
    st.integers(0, len(good_file) - 1),
    st.binary(max_size=4),
    st.integers(0, 4),
)
def test_mutated_files_raise_only_our_errors(
    tmp_path: Path, at: int, patch: bytes, cut: int
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(good_file[:at] + patch + good_file[at + cut :])
    try:
        reader = SafetensorsReader(path)
    except CheckpointError:
        return
    library = load_file(path)  # what we accept, the library accepts and reads alike
    assert library.keys() == reader.tensors.keys()
    assert all(same(reader.tensor(name), tensor) for name, tensor in library.items())


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "missing", "loop"])
def test_only_regular_files_are_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda *args, **_: opened.append(args))
    wanted = NotACheckpoint if kind in ("missing", "loop") else UnsafePath
    with pytest.raises(wanted, match=r"a\.safetensors"):
        open_regular(path)
    assert not opened


# --- safetensors, written ------------------------------------------------------------------------


@short
@given(stocks, st.none() | st.just({"format": "pt"}), st.randoms())
def test_files_equal_the_librarys(
    tmp_path: Path,
    stock: dict[str, tuple[tuple[int, ...], str]],
    metadata: dict[str, str] | None,
    order: Random,
) -> None:
    tensors = drawn(stock)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    save_file(tensors, theirs, metadata)
    names = list(tensors)
    order.shuffle(names)
    ours.unlink(missing_ok=True)
    write(ours, {name: tensors[name] for name in names}, metadata)
    assert ours.read_bytes() == theirs.read_bytes()


@short
@given(notes)
def test_metadata_survives_in_its_order(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "a"
    path.unlink(missing_ok=True)
    write(path, {"a": torch.ones(1)}, metadata)
    assert SafetensorsReader(path).metadata == (metadata or {})
    assert list(SafetensorsReader(path).metadata) == list(metadata or {})
    assert load_file(path)["a"].item() == 1


def test_dtypes_are_ordered_as_in_the_library(tmp_path: Path) -> None:
    tensors = {code.lower(): random((2, 2), torch_dtype(code)) for code in codes}
    save_file(tensors, tmp_path / "theirs")
    write(tmp_path / "ours", dict(reversed(tensors.items())))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("shape", [(1, 300, 500), (300, 2, 100), (200, 300)])
def test_strided_tensors_are_written_in_slices(
    tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.writer._TURN", 1 << 12)
    base = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    views = {"t": base.transpose(-1, -2), "s": base[..., ::2], "e": base[:1, :1].expand(shape)}
    if len(shape) == 3:
        views["p"] = base.permute(2, 0, 1)
    write(tmp_path / "ours", views)
    save_file(
        {n: v.clone(memory_format=torch.contiguous_format) for n, v in views.items()},
        tmp_path / "theirs",
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_parameters_and_conjugates_are_written_by_value(tmp_path: Path) -> None:
    z = torch.randn(3, dtype=torch.complex64)
    write(tmp_path / "a", {"z": z.conj(), "p": torch.nn.Parameter(torch.ones(2))})
    assert torch.equal(load_file(tmp_path / "a")["z"], z.conj().resolve_conj())


def test_a_duplicate_name_is_refused_when_writing(tmp_path: Path) -> None:
    info = TensorInfo("a", (2,), "F32")
    for infos in ([info, info], [TensorInfo("__metadata__", (), "F32")]):
        with pytest.raises(DuplicateTensor):
            lay_out(infos, {}, "a file")
    assert header_order([TensorInfo("z", (), "F64"), info])[0].name == "z"


def test_a_written_file_has_the_umasks_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


# --- torch zips ----------------------------------------------------------------------------------


class Payload:
    """Unpickled by anyone who trusts it, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def saved(tmp_path: Path, value: object, zipped: bool = True) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


Edit = Callable[[str, bytes], tuple[str, bytes] | None]


def repacked(
    path: Path, edit: Edit = lambda name, data: (name, data), method: int = zipfile.ZIP_STORED
) -> Path:
    """The records written anew by zipfile; `edit` may change (name, data) or drop a record."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records:
            if (changed := edit(name, data)) is not None:
                archive.writestr(*changed)
    return path


def renamed(root: str) -> Edit:
    return lambda name, data: (f"{root}/{name.partition('/')[2]}", data)


@short
@given(stocks)
def test_reads_what_torch_saves(
    tmp_path: Path, stock: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    tensors = drawn(stock)
    reader = TorchZipReader(saved(tmp_path, OrderedDict(tensors)))
    assert list(reader.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert reader.tensors[name] == TensorInfo(name, tuple(tensor.shape), stock[name][1])
        assert same(reader.tensor(name), tensor)


def test_shared_storages_stay_shared_and_files_unwritten(tmp_path: Path) -> None:
    w = torch.arange(12.0).view(3, 4)
    path = saved(tmp_path, {"a": w, "b": w, "t": w.t(), "row": w[1], "p": torch.nn.Parameter(w)})
    before = path.read_bytes()
    reader = TorchZipReader(path)
    a = reader.tensor("a")
    assert a.data_ptr() == reader.tensor("b").data_ptr() == reader.tensor("p").data_ptr()
    assert torch.equal(reader.tensor("t"), w.t())
    assert reader.tensor("row").data_ptr() == a[1].data_ptr()
    assert not reader.tensor("p").requires_grad
    a.zero_()
    assert path.read_bytes() == before
    assert reader.tensor("t").sum() == 0  # checked once, then ours to change


def test_listing_a_zip_reads_no_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(16 << 20)})
    before = memory("VmRSS")
    reader = TorchZipReader(path)
    assert reader.tensors["a"].shape == (16 << 20,)
    assert memory("VmRSS") - before < 16 << 20
    with pytest.raises(MissingTensors, match="Did you mean a"):
        reader.tensor("aa")


def test_a_repacked_zip_is_read_correctly(tmp_path: Path) -> None:
    w = torch.randn(7)
    for length in range(1, 9):  # the folder's name moves every record
        path = saved(tmp_path, {"a": w, "b": w.double(), "c": w.half()})
        repacked(path, renamed("r" * length))
        reader = TorchZipReader(path)
        assert torch.equal(reader.tensor("a"), w)
        assert torch.equal(reader.tensor("b"), w.double())
        assert reader.tensor("a").data_ptr() % 4 == reader.tensor("b").data_ptr() % 8 == 0


def test_payloads_in_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    events: list[str] = []
    armed = [True]
    sys.addaudithook(lambda event, _: events.append(event) if armed[0] else None)
    try:
        for value in (
            {"a": Payload(tmp_path / "owned")},
            Payload(tmp_path / "owned"),
            {"a": torch.ones(2), "b": [Payload(tmp_path / "owned")]},
        ):
            path = saved(tmp_path, value)
            events.clear()
            with pytest.raises(CorruptCheckpoint, match=r"posix\.mkdir.*Nothing was run"):
                TorchZipReader(path)
            assert not {"os.mkdir", "exec", "compile", "pickle.find_class"} & set(events)
    finally:
        armed[0] = False
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("pickle", "message"),
    [
        (b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R.", "bytearray"),
        (b"\x80\x02ctorch.nn.parameter\nParameter\n.", "Parameter"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system"),
        (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
            "STACK_GLOBAL.*os, system.*Nothing was run",
        ),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", "INST.*Nothing was run"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "no pickle"),
        (b"\x80\x02}", "no pickle"),
        (b"", "no pickle"),
        (b"\x80\x02.", "none that torch.save writes"),
        (b"\x80\x02K\x01.", "holds a int"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "."),
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, pickle: bytes, message: str) -> None:
    path = saved(tmp_path, {"a": torch.ones(2)})
    repacked(path, edit=lambda n, d: (n, pickle if n.endswith(".pkl") else d))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        TorchZipReader(path)
    assert "weights_only" not in str(error.value)  # no advice to read it all the same
    assert time.process_time() - start < 10


@settings(parent=short, max_examples=500)
@given(st.data())
def test_mutated_pickles_are_refused_or_read(data: st.DataObject) -> None:
    """Whatever their checksum: nothing of a pickle is carried out, so nothing else can happen."""
    out = BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": {"c": torch.ones(4).half(), "n": [1, 2.5, None]}}, out)
    with zipfile.ZipFile(out) as archive:
        good = archive.read("archive/data.pkl")
    at = data.draw(st.integers(0, len(good) - 1))
    patch = data.draw(st.binary(max_size=6))
    try:
        torch_pickle.read(Path("x"), good[:at] + patch + good[at + data.draw(st.integers(0, 6)) :])
    except ZooError as error:
        assert str(error).startswith("x: ")


@pytest.mark.parametrize(
    ("pickle", "message"),
    [
        (b"\x80\x02r\xff\xff\xff\x7f.", "list index"),  # nothing there to be remembered
        (b"\x80\x02]q\x00r\xff\xff\xff\x7f.", ""),  # C's unpickler makes room for 2^31 of them
        (b"\x80\x02}" + b")\x85" + b"\x85" * 50_000 + b"K\x01s.", "a key that is a tuple"),
        (b"\x80\x02j\x05\x00\x00\x00.", "5"),
        (b"\x80\x02K\x01K\x02R.", "a call of what is no name"),
        (b"\x80\x02\x85.", "did not push"),
        (b"\x80\x02(cbuiltins\neval\n.", "builtins.eval.*Nothing was run"),
    ],
)
def test_handwritten_pickles_are_read_or_refused(pickle: bytes, message: str) -> None:
    if not message:
        assert torch_pickle.read(Path("x"), pickle) == []
        return
    with pytest.raises(CorruptCheckpoint, match=message):
        torch_pickle.read(Path("x"), pickle)


@pytest.mark.parametrize(
    "repeated",
    [
        b"h\x01h\x00\x85R",  # a dict made of many pairs: never torch's
        b"h\x02h\x00R",  # a tensor of as many arguments
    ],
)
def test_nested_references_in_a_pickle_are_bounded(repeated: bytes) -> None:
    """Each call would cost the length of what the memo holds: 10^11 steps in a megabyte."""
    many = b"(" + b"K\x01K\x01\x86" * 200_000 + b"tq\x00"
    names = b"ccollections\nOrderedDict\nq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02"
    started = time.process_time()
    with pytest.raises(CorruptCheckpoint, match="Nothing was run"):
        torch_pickle.read(Path("x"), b"\x80\x02" + many + names + repeated * 100_000 + b".")
    assert time.process_time() - started < 10


def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(12.0).view(3, 4)})

    def edit(name: str, data: bytes) -> tuple[str, bytes]:
        # the shape (3, 4) and the steps (4, 1), of which the first becomes 5
        return name, data.replace(b"K\x04K\x01\x86", b"K\x05K\x01\x86")

    with pytest.raises(CorruptCheckpoint, match=r"steps of \(5, 1\) .* beyond the 48 bytes"):
        TorchZipReader(repacked(path, edit))


@pytest.mark.parametrize(("offset", "fits"), [(10, True), (11, False), (12, False)])
def test_one_element_past_a_storage_is_refused(tmp_path: Path, offset: int, fits: bool) -> None:
    """Two of twelve numbers: those at 10 and 11 are the last ones."""
    path = saved(tmp_path, {"a": torch.arange(12.0)[4:6]})

    def edit(name: str, data: bytes) -> tuple[str, bytes]:
        # the offset 4, then the shape (2,)
        before, after = b"QK\x04K\x02\x85", b"QK" + bytes([offset]) + b"K\x02\x85"
        assert name != "data.pkl" or data.count(before) == 1
        return name, data.replace(before, after)

    bad = repacked(path, edit)
    if fits:
        assert TorchZipReader(bad).tensor("a").tolist() == [10.0, 11.0]
    else:
        with pytest.raises(CorruptCheckpoint, match=rf"from {offset} on, .* beyond the 48 bytes"):
            TorchZipReader(bad)


def test_depth_and_size_of_a_nested_checkpoint_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many values and levels as the limits say, and not one more."""

    def nested(levels: int) -> dict[object, object]:
        return {"a": nested(levels - 1)} if levels else {}

    monkeypatch.setattr(torch_zip, "MAX_VALUES", 5)
    monkeypatch.setattr(torch_zip, "MAX_DEPTH", 3)
    at_limit: dict[object, object] = {"a": [1, 2, 3], "b": 4}
    assert torch_zip._flattened(tmp_path, at_limit) == ({}, at_limit)
    assert torch_zip._flattened(tmp_path, nested(3)) == ({}, nested(3))
    for value in ({"a": [1, 2, 3, 4], "b": 5}, nested(4)):
        with pytest.raises(ResourceLimit, match="deeper than 3 levels, or over 5 values"):
            torch_zip._flattened(tmp_path, value)


def test_values_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    w = torch.ones(2)
    for value, kind, message in (
        ({"state_dict": {"a": w}, "epoch": 3}, MissingTensors, "nested under 'state_dict'"),
        ({"model": OrderedDict(a=w)}, MissingTensors, "nested under 'model'"),
        ({"a": w, "epoch": 3}, CheckpointError, r"epoch \(int\)"),
        ([w], CheckpointError, "holds a list"),
        (w, CheckpointError, "holds a Tensor"),
        ({1: w}, CheckpointError, "no text: 1"),
        ({"a": w.expand(1 << 20, 2)}, ResourceLimit, "tensor a spreads 8 stored bytes"),
        ({"a": w.to(torch.complex128)}, DtypeMismatch, "tensor a: .*complex128"),
    ):
        with pytest.raises(kind, match=message):
            TorchZipReader(saved(tmp_path, value))


def test_damaged_zips_are_refused(tmp_path: Path) -> None:
    state = {"a": torch.arange(8.0), "b": torch.ones(4)}

    def fails(kind: type[ZooError], message: str, path: Path) -> None:
        with pytest.raises(kind, match=message) as error:
            TorchZipReader(path)
        assert str(path) in str(error.value)

    def edited(edit: Edit) -> Path:
        return repacked(saved(tmp_path, state), edit=edit)

    fails(UnsupportedZip, "compressed", repacked(saved(tmp_path, state), method=8))
    bomb = {"a": torch.zeros(20 << 20)}
    fails(ResourceLimit, "claims to unpack", repacked(saved(tmp_path, bomb), method=8))
    fails(
        UnsupportedZip,
        "code/x.py",
        edited(lambda n, d: ("pytorch_model/code/x.py", d) if n.endswith("/version") else (n, d)),
    )
    fails(
        UnsafePath,
        r"\.\./",
        edited(lambda n, d: ("pytorch_model/../x", d) if n.endswith("/version") else (n, d)),
    )
    fails(
        UnsafePath, "/abs", edited(lambda n, d: ("/abs", d) if n.endswith("/version") else (n, d))
    )
    fails(
        UnsupportedZip,
        "byte order",
        edited(lambda n, d: (n, b"big") if n.endswith("byteorder") else (n, d)),
    )
    fails(
        CorruptCheckpoint,
        "no single data.pkl",
        edited(lambda n, d: None if n.endswith(".pkl") else (n, d)),
    )
    fails(
        CorruptCheckpoint,
        "disagree|refuses",
        edited(lambda n, d: None if n.endswith("data/1") else (n, d)),
    )
    fails(
        CorruptCheckpoint,
        "disagree",
        edited(lambda n, d: (n, d[:-4]) if n.endswith("data/1") else (n, d)),
    )
    fails(
        CorruptCheckpoint,
        "disagree",
        edited(lambda n, d: (n, d + d) if n.endswith("data/0") else (n, d)),
    )

    data = saved(tmp_path, state).read_bytes()
    path = tmp_path / "pytorch_model.bin"
    for change, message in (
        (b"", "0 bytes"),
        (data[:-1], "zip|end record"),
        (data[: len(data) // 2], "zip"),
        (data + b"\0", "zip|trail"),
        (b"<html>" + data, "no zip file"),
    ):
        path.write_bytes(change)
        fails(CorruptCheckpoint, message, path)
    weights = state["a"].numpy().tobytes()
    path.write_bytes(data.replace(weights, bytes(4) + weights[:-4]))
    reader = TorchZipReader(path)
    assert reader.tensor("b").tolist() == [1] * 4
    with pytest.raises(CorruptCheckpoint, match=r"tensor a .*CRC"):
        reader.tensor("a")
    with pytest.raises(CorruptCheckpoint, match=r"tensor a .*CRC"):
        reader.tensor("a")


def test_a_record_that_is_read_whole_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": torch.arange(12.0), "b": torch.arange(6).to(torch.bfloat16)}
    reader = TorchZipReader(saved(tmp_path, state))
    asked, of = [], os.preadv

    def preadv(fd: int, buffers: Any, start: int) -> int:
        asked.append(start)
        return of(fd, buffers, start)

    monkeypatch.setattr(os, "preadv", preadv)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in state.items())
    assert len(asked) == len(set(asked)) == 2


def test_threads_that_read_a_file_open_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(8))
    with path.open("rb") as header:
        file = SourceFile(path, header.fileno(), mapped=False)
    opened, of = [], file._opened

    def slow() -> int:
        time.sleep(0.05)  # the others come to it meanwhile
        opened.append(of())
        return opened[-1]

    monkeypatch.setattr(file, "_opened", slow)
    with ThreadPoolExecutor(4) as pool:
        read = [pool.submit(file.tensor, 0, "F32", (2,)) for _ in range(4)]
    assert all(each.result().tolist() == [0, 0] for each in read)
    assert len(opened) == 1


def test_local_headers_that_differ_from_the_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repacked(saved(tmp_path, {"a": torch.ones(2)}))
    good = path.read_bytes()
    directory = good.index(b"PK\x01\x02")
    assert TorchZipReader(path).tensor("a").tolist() == [1, 1]

    def fails(at: int, patch: bytes, kind: type[ZooError], message: str) -> None:
        path.write_bytes(good[:at] + patch + good[at + len(patch) :])
        with pytest.raises(kind, match=message):
            TorchZipReader(path)

    fails(directory + 8, b"\x01", UnsupportedZip, "encrypted")
    fails(directory + 20, b"\0\0\0\x01" * 2, ResourceLimit, "claim 1677")
    fails(14, b"\0\0\0\0", CorruptCheckpoint, "two headers disagree")
    fails(18, b"\x01\0\0\0", CorruptCheckpoint, "two headers disagree")
    fails(30, b"x", CorruptCheckpoint, "two headers disagree")
    fails(good.index(b"}"), b"{", CorruptCheckpoint, r"data\.pkl: wrong CRC")
    path.write_bytes(good)
    monkeypatch.setattr("converters.formats.torch_zip.MAX_PICKLE", 20)
    with pytest.raises(ResourceLimit, match=r"data\.pkl has"):
        TorchZipReader(path)


def test_a_duplicate_name_in_a_zip_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("pytorch_model/version", "3")
    with pytest.raises(CorruptCheckpoint, match="duplicate records: pytorch_model/version"):
        TorchZipReader(path)


@settings(parent=short, max_examples=300)
@given(st.data())
def test_mutated_zips_raise_only_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    good = tmp_path / "good.bin"
    if not good.exists():
        torch.save({"a": torch.arange(4.0), "b": torch.ones(2)}, good)
    content = good.read_bytes()
    # headers, pickle and directory; the weights' own padding and bytes are another test's
    at = data.draw(st.integers(0, len(content) - 1))
    patch = data.draw(st.binary(max_size=4))
    path = tmp_path / "a.bin"
    path.write_bytes(content[:at] + patch + content[at + data.draw(st.integers(0, 4)) :])
    try:
        reader = TorchZipReader(path)
        actual = {name: reader.tensor(name) for name in reader.tensors}
    except ZooError:
        return
    assert torch.equal(actual["a"], torch.arange(4.0)), "accepted, and wrong"
    assert torch.equal(actual["b"], torch.ones(2)), "accepted, and wrong"


# --- strict JSON ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "holds list"),
        (b"null", "holds NoneType"),
        (b"\xff{}", "UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": 1, "a": 1}', "'a'"),
        (b'{"x": {"a": 1, "a": 2}}', "'a'"),
        (b'{"a": {"b": [1, NaN]}}', r"field a\.b\.1 is NaN"),
        (b'{"a": -Infinity}', "field a is -Infinity"),
        (b'{"a": 1e999}', "field a is too large"),
        (b'{"a": "\\ud800"}', "field a holds half"),
        (b'{"\\ud800": 1}', "half"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64"),
        (b'{"a": NaN, "b": [Infinity]}', r"field a is NaN, field b\.0 is Infinity"),
    ],
)
def test_json_that_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadIndex, match=message) as error:
        parse_json(data, "x.json", BadIndex)
    assert str(error.value).startswith("x.json: ")


def test_json_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    value = {"a": [1, -0.5, None, True, {"ü": "\U0001f600"}], "deep": {"x": {}}}
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    os.truncate(path, 65 << 20)
    with pytest.raises(ResourceLimit, match=r"config\.json.*bytes"):
        read_json(path)
    path.unlink()
    with pytest.raises(NotACheckpoint, match=r"config\.json"):
        read_json(path)
    os.mkfifo(path)
    with pytest.raises(UnsafePath):
        read_json(path)


def test_a_name_with_a_line_break_is_refused(tmp_path: Path) -> None:
    """It could show a line of its own in any message."""
    tensors = {"a\nzoo: all is well": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    for read, name in ((SafetensorsReader, "x.safetensors"), (TorchZipReader, "x.bin")):
        with pytest.raises(CorruptCheckpoint, match=r"line breaks: 'a\\nzoo: all is well'"):
            read(tmp_path / name)
