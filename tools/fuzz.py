"""Damaged inputs by the million: `python tools/fuzz.py [--scale X] [--seed N]`.

Headers of safetensors and GGUF, indices, configs, zip directories, torch's pickles and TensorFlow's
bundles are mutated at random. Whatever comes of it is an answer or a ZooError within a second and
in little memory; and no header is accepted that a second, plainer reading refuses. What is found is
printed as a line that reproduces it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bundles  # noqa: E402
import torch  # noqa: E402

from converters.checkpoint import open_checkpoint  # noqa: E402
from converters.containers import kind_of  # noqa: E402
from converters.dialects import find  # noqa: E402
from converters.formats import BITS, TensorInfo, dtype_code, torch_pickle  # noqa: E402
from converters.formats.gguf import GGUFReader, Value, lay_out  # noqa: E402
from converters.formats.llama2c import Header, Llama2cReader  # noqa: E402
from converters.formats.quants import KINDS  # noqa: E402
from converters.formats.safetensors import SafetensorsReader  # noqa: E402
from converters.formats.sstable import read_table  # noqa: E402
from converters.formats.tf_bundle import TFBundleReader  # noqa: E402
from zoo.errors import ZooError  # noqa: E402
from zoo.pretrained import locate  # noqa: E402

COUNTS = {
    "header": 1_000_000,
    "gguf": 100_000,
    "index": 100_000,
    "config": 100_000,
    "zip": 100_000,
    "nested": 100_000,
    "pickle": 100_000,
    "llama2c": 100_000,
    "tf": 100_000,
}
SLOW = 1.0  # seconds
LARGE = 64 << 20  # bytes that a kind of input may add to what this process takes

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


def bitten(data: bytes, chance: random.Random) -> bytes:
    """`mutated` for what is no text: numbers put in, or in the place of bytes."""
    if chance.random() < 0.5:
        return mutated(data, chance)
    at, word = chance.randrange(len(data) + 1), chance.choice(NUMBERS)
    return data[:at] + word + data[at + chance.choice((0, 1, len(word))) :]


def mutated(text: bytes, chance: random.Random) -> bytes:
    """A few random edits: bytes flipped, cut, doubled; words put in the place of values."""
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
    """The next thing between a colon or comma and a comma or bracket."""
    start = min(
        (i + 1 for i in (data.find(b":", near), data.find(b",", near)) if i >= 0), default=0
    )
    ends = [i for i in (data.find(c, start) for c in (b",", b"}", b"]")) if i >= 0]
    return slice(start, min(ends)) if start and ends else None


# what lengths, counts, types and offsets should never be, and what they may be
WHOLE = [0, 1, 2, 7, 8, 9, 13, 31, 32, 63, 255, 1 << 16, 1 << 20]
WHOLE += [1 << n for n in range(28, 64)]
WHOLE += [n - 1 for n in WHOLE[13:]] + [(1 << 64) - n for n in (1, 2, 8, 31, 32)]


def renumbered(data: bytes, chance: random.Random) -> bytes:
    """A few random edits of a binary header: numbers put in the place of others, or any edit."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.3:
            data = mutated(data, chance)
            continue
        width = chance.choice((4, 8))
        number = (chance.choice(WHOLE) % (1 << 8 * width)).to_bytes(width, "little")
        at = chance.randrange(len(data) + 1)
        data = data[:at] + number + data[at + width * chance.choice((1, 1, 1, 0)) :]
    return data


def plainly_sound(data: bytes) -> bool:
    """A second reading of a safetensors file, by the format's own words and nothing else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError
        return dict(pairs)

    def never(word: str) -> None:
        raise ValueError(word)

    if len(data) < 8:
        return False
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8 or length > 100_000_000:
        return False
    try:
        text = data[8 : 8 + length].decode()
        header = json.loads(text, object_pairs_hook=unique, parse_constant=never)
    except (ValueError, RecursionError):
        return False
    if not isinstance(header, dict) or not text.startswith("{"):
        return False
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        return False
    spans = []
    for entry in header.values():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            return False
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        whole = (
            [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [""]
        )
        if any(type(n) is not int or n < 0 for n in whole) or len(offsets) != 2:
            return False
        if not isinstance(dtype, str) or dtype not in BITS:
            return False
        size = BITS[dtype]
        for n in shape:
            size *= n
        if size != (offsets[1] - offsets[0]) * 8:
            return False
        spans.append(tuple(offsets))
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            return False
        reached = end
    return reached == len(data) - 8 - length


def plainly_sound_gguf(data: bytes) -> bool:
    """A second reading of a GGUF file, likewise."""
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        found = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return found[0] if len(found) == 1 else list(found)

    def text() -> str:
        return str(take(f"{take('Q')}s"), "utf-8")

    def value(kind: int, count: int = 1) -> Any:
        if kind == 8:
            return [text() for _ in range(count)][-1]
        return take(f"{count}" + "BbHhIif?..Qqd"[kind])  # a dot is no code of struct's

    try:
        if take("4s") != b"GGUF" or take("I") not in (2, 3):
            return False
        tensors, keys = take("Q"), take("Q")
        said: dict[str, Any] = {}
        for _ in range(keys):
            key, kind = text(), take("I")
            if key in said:
                return False
            if kind == 9:
                kind, count = take("I"), take("Q")
                said[key] = value(kind, count) if count else []
            else:
                said[key] = value(kind)
        spans: dict[str, tuple[int, int]] = {}
        alignment = said.get("general.alignment", 32)
        for _ in range(tensors):
            name, dims = text(), [take("Q") for _ in range(take("I"))]
            kind, offset = KINDS[take("I")], take("Q")
            numbers = 1
            for n in dims:
                numbers *= n
            row = dims[0] if dims else 1
            if name in spans or not numbers or row % kind.block or offset % alignment:
                return False
            spans[name] = offset, offset + numbers // kind.block * kind.size
    except (struct.error, UnicodeDecodeError, LookupError):
        return False
    start = -(-at // alignment) * alignment
    reached = 0
    for first, last in sorted(spans.values()):
        if first != -(-reached // alignment) * alignment:
            return False
        reached = last
    return start + reached <= len(data) or (not spans and at <= len(data))


class Fuzz:
    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        entries: dict[str, Any] = {}
        reached = 0
        for n, dtype in enumerate(("F32", "F32", "BF16", "I64")):
            end = reached + 2 * (n + 1) * BITS[dtype] // 8
            place = [reached, end]
            entries[f"blocks.{n}.w"] = {"dtype": dtype, "shape": [2, n + 1], "data_offsets": place}
            reached = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        self.header, self.data = text + b" " * (-len(text) % 8), bytes(reached)
        weights = {
            "weight_map": {f"w{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
        }
        self.index = json.dumps({"metadata": {"total_size": 12}, **weights}).encode()
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 131}
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
        more = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "id2label": {"0": "a", "1": "b"}}
        self.config = json.dumps({**config, **sizes, **more, "rope_scaling": rope}).encode()
        torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, scratch / "whole.bin")
        self.zip = (scratch / "whole.bin").read_bytes()
        names = ("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.mlp.c_fc.weight")
        state = {f"transformer.{name}": torch.ones(2, 2) for name in names}
        values = {"model_args": {"n_layer": 1, "n_head": 1, "n_embd": 2}, "optimizer": {0: [1.5]}}
        torch.save({"model": state, **values}, scratch / "nested.pt")
        self.nested = (scratch / "nested.pt").read_bytes()
        with zipfile.ZipFile(scratch / "nested.pt") as archive:
            self.pickle = archive.read("nested/data.pkl")
        heads = [
            Header(v, (8, 6, 2, 2, 1, 5, 4), bool(v % 2), 2 if v == 2 else 0) for v in range(3)
        ]
        self.bins = [head.pack().ljust(head.starts()[1], b"\1") for head in heads]
        infos = [TensorInfo("a.weight", (2, 32), "Q8_0"), TensorInfo("b.weight", (2, 3), "F32")]
        infos += [TensorInfo("c.weight", (2, 1, 2, 1), "BF16"), TensorInfo("d", (), "F16")]
        said = {"general.architecture": "llama", "general.alignment": 32, "x": Value("u8", 7)}
        said |= {"llama.block_count": 2, "eps": 1e-5, "y": True, "tokens": ["<s>", "ü", "c"] * 3}
        said |= {"types": Value("[i32]", [3, 1, 1] * 400), "split.no": Value("u16", 0)}
        layout = lay_out(infos, {**said, "split.count": Value("u16", 1)}, "here")
        self.gguf, self.gguf_data = layout.head, bytes(layout.size)
        tensors = {f"m/h{n}/w": torch.arange(4.0 * n).view(2, -1) for n in range(7)}
        tensors |= {"a": torch.ones(3, dtype=torch.int8), "cut": torch.arange(14).view(2, 7)}
        path = bundles.bundle(scratch / "x", tensors, shards=2, cut={"cut": (1, (3, 4))})
        self.table, self.pairs = path.read_bytes(), read_table(path)
        self.placed: dict[str, bytes] = {}  # what lies there already: opening files takes longest
        self.shards = {p.name: p.read_bytes() for p in sorted(scratch.glob("x.data-*"))}

    def file(self, name: str, data: bytes) -> Path:
        place = self.scratch / "one"
        place.mkdir(exist_ok=True)
        path = place / name
        path.write_bytes(data)
        return path

    def one_header(self, chance: random.Random) -> None:
        head = mutated(self.header, chance)
        length = len(head) if chance.random() < 0.9 else chance.getrandbits(chance.choice((8, 64)))
        data = struct.pack("<Q", length) + head + self.data
        path = self.file("model.safetensors", data)
        try:
            reader = SafetensorsReader(path)
        except ZooError:
            return
        self.seen["header accepted"] += 1
        assert plainly_sound(data), "accepted, and a plain reading refuses it"
        for name in reader.tensors:
            reader.span(name)

    def one_gguf(self, chance: random.Random) -> None:
        data = renumbered(self.gguf, chance) + self.gguf_data
        if chance.random() < 0.1:
            data = data[: chance.randrange(len(data))]
        path = self.file("model.gguf", data)
        try:
            reader = GGUFReader(path)
        except ZooError:
            return
        self.seen["gguf accepted"] += 1
        assert plainly_sound_gguf(data), "accepted, and a plain reading refuses it"
        for name, info in reader.tensors.items():
            assert reader.tensor(name).shape == info.shape
        for value in reader.said.values():
            list(value) if isinstance(value, Iterable) else value

    def one_index(self, chance: random.Random) -> None:
        self.file("model.safetensors.index.json", mutated(self.index, chance))
        open_checkpoint(self.scratch / "one")

    def one_config(self, chance: random.Random) -> None:
        self.file("config.json", mutated(self.config, chance))
        locate(self.scratch / "one", weights=False)

    def one_zip(self, chance: random.Random) -> None:
        tail = chance.choice((0, len(self.zip) - 600))  # the directory stands at the end
        data = self.zip[:tail] + mutated(self.zip[tail:], chance)
        self.file("pytorch_model.bin", data)
        open_checkpoint(self.scratch / "one")

    def one_nested(self, chance: random.Random) -> None:
        tail = chance.choice((0, len(self.nested) - 900, 100))
        data = self.nested[:tail] + mutated(self.nested[tail:], chance)
        found = find(self.file("ckpt.pt", data))
        if found is not None:
            found.fields()

    def one_pickle(self, chance: random.Random) -> None:
        """Apart from its zip, whose sums would tell."""
        torch_pickle.read(self.scratch / "data.pkl", mutated(self.pickle, chance))

    def one_llama2c(self, chance: random.Random) -> None:
        """Numbers in the place of the header's, among them those that make the file's own size."""
        whole = bytearray(chance.choice(self.bins))
        for _ in range(chance.choice((1, 1, 2, 4))):
            numbers = (0, 1, 2, -1, 2**31 - 1, -(2**31), 3, 255, chance.getrandbits(31))
            at = 4 * chance.randrange(12)
            whole[at : at + 4] = struct.pack("<i", chance.choice(numbers))
        if chance.random() < 0.3:
            whole = bytearray(mutated(bytes(whole), chance))
        place = self.file("model.bin", bytes(whole))
        if kind_of(place) != "llama2c":
            raise ZooError("nothing that is known")
        reader = Llama2cReader(place)
        self.seen["llama2c accepted"] += 1
        assert reader.header.starts()[1] == len(whole), "accepted, and of another size"
        for name in reader.tensors:
            reader.tensor(name)

    def one_tf(self, chance: random.Random) -> None:
        """Damage before the sums are made, so that they fit; or after."""
        index, pairs, shards = self.table, list(self.pairs), dict(self.shards)
        packed = chance.randrange(2)
        match chance.randrange(6):
            case 0:
                index = bitten(index, chance)
            case 1:
                name = chance.choice(list(shards))
                shards[name] = mutated(shards[name], chance)
            case 2:  # an entry, or several
                for _ in range(chance.choice((1, 1, 5))):
                    n = chance.randrange(len(pairs))
                    pairs[n] = pairs[n][0], bitten(pairs[n][1], chance)
                index = bundles.index(pairs, packed, 4)
            case 3:  # names, their order
                n, other = chance.randrange(len(pairs)), chance.randrange(len(pairs))
                pairs[n] = bitten(pairs[n][0], chance), pairs[other][1]
                index = bundles.index(sorted(pairs) if chance.random() < 0.5 else pairs, packed, 4)
            case _:  # a block, before or behind its compression
                blocks = []
                for n in range(0, len(pairs), 4):
                    block = bundles.block(pairs[n : n + 4], chance.choice((1, 16)))
                    if (where := chance.randrange(3)) == 0:
                        block = bitten(block, chance)
                    block = bundles.snappy(block) if packed else block
                    block = bitten(block, chance) if where == 1 and packed else block
                    blocks.append((pairs[min(n + 3, len(pairs) - 1)][0], block, packed))
                index = bundles.table(blocks, packed)
        for name, data in shards.items():
            if self.placed.get(name) != data:
                self.file(name, data)
        self.placed = shards
        reader = TFBundleReader(self.file("x.index", index))
        self.seen["bundle accepted"] += 1
        held = sum(info.nbytes for info in reader.tensors.values())
        assert held <= sum(map(len, shards.values())), "more tensors than bytes"
        for name, info in reader.tensors.items():
            tensor = reader.tensor(name)
            assert (tuple(tensor.shape), dtype_code(tensor.dtype)) == info[1:], name
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            if name != "cut":
                assert any(bytes(raw.tolist()) in data for data in shards.values()), name
            self.seen["tensors of bundles"] += 1

    def run(self, kind: str, count: int, seed: int) -> None:
        one: Callable[[random.Random], None] = getattr(self, f"one_{kind}")
        for path in (self.scratch / "one").glob("*"):
            path.unlink()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for n in range(count):
            chance = random.Random(f"{kind} {seed} {n}")
            started = time.perf_counter()
            try:
                one(chance)
                self.seen[f"{kind} passed"] += 1
            except ZooError:
                self.seen[f"{kind} refused"] += 1
            except Exception as error:
                self.fault(kind, seed, n, f"{type(error).__name__}: {str(error)[:120]}")
            if (took := time.perf_counter() - started) > SLOW:
                self.fault(kind, seed, n, f"took {took:.1f} s")

        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if grown > LARGE:
            self.fault(kind, seed, count, f"{grown >> 20} MB more at its height than before")

    def fault(self, kind: str, seed: int, n: int, what: str) -> None:
        self.faults.append(f"{kind}, seed {seed}, number {n}: {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers below  [1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COUNTS, help="one kind of input")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoo-fuzz-") as scratch:
        fuzz = Fuzz(Path(scratch))
        for kind, count in COUNTS.items():
            if options.only not in (None, kind):
                continue
            fuzz.run(kind, max(1, int(count * options.scale)), options.seed)
    for name, count in sorted(fuzz.seen.items()):
        print(f"{count:>9,} {name}")
    print("\n".join(fuzz.faults[:50]))
    print(f"{len(fuzz.faults)} faults")
    return 1 if fuzz.faults else 0


if __name__ == "__main__":
    sys.exit(main())
