"""Damaged inputs by the million: `python tools/fuzz.py [--scale X] [--seed N]`.

Headers of safetensors, indices, configs and zip directories are mutated at random. Whatever comes
of it is an answer or a ZooError within a second; and no header is accepted that a second, plainer
reading refuses. What is found is printed as a line that reproduces it.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from converters.checkpoint import open_checkpoint  # noqa: E402
from converters.containers import kind_of  # noqa: E402
from converters.dialects import find  # noqa: E402
from converters.formats import BITS  # noqa: E402
from converters.formats.llama2c import Header, Llama2cReader  # noqa: E402
from converters.formats.safetensors import SafetensorsReader  # noqa: E402
from zoo.errors import ZooError  # noqa: E402
from zoo.pretrained import locate  # noqa: E402

COUNTS = {
    "header": 1_000_000,
    "index": 100_000,
    "config": 100_000,
    "zip": 100_000,
    "nested": 100_000,
    "llama2c": 100_000,
}
SLOW = 1.0  # seconds

# what stands in real headers and configs, and what should never
WORDS = [
    *("null", "true", "false", "0", "-1", "1e400", "NaN", "Infinity", "1.5", '""', '"\\ud800"'),
    *("18446744073709551616", "-9223372036854775809", "9" * 5000, "[]", "{}", "[[]]", '"F32"'),
    *('"BF16"', '"../x"', '"/etc/passwd"', "[0,0]", "[1,0]", "[4,2]", '{"a":1,"a":2}', '"\\u0000"'),
]


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
        heads = [
            Header(v, (8, 6, 2, 2, 1, 5, 4), bool(v % 2), 2 if v == 2 else 0) for v in range(3)
        ]
        self.bins = [head.pack().ljust(head.starts()[1], b"\1") for head in heads]

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

    def run(self, kind: str, count: int, seed: int) -> None:
        one: Callable[[random.Random], None] = getattr(self, f"one_{kind}")
        for path in (self.scratch / "one").glob("*"):
            path.unlink()
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

    def fault(self, kind: str, seed: int, n: int, what: str) -> None:
        self.faults.append(f"{kind}, seed {seed}, number {n}: {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers below  [1]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoo-fuzz-") as scratch:
        fuzz = Fuzz(Path(scratch))
        for kind, count in COUNTS.items():
            fuzz.run(kind, max(1, int(count * options.scale)), options.seed)
    for name, count in sorted(fuzz.seen.items()):
        print(f"{count:>9,} {name}")
    print("\n".join(fuzz.faults[:50]))
    print(f"{len(fuzz.faults)} faults")
    return 1 if fuzz.faults else 0


if __name__ == "__main__":
    sys.exit(main())
