"""What is damaged, a kind of file at a time: small sound ones, and how users have them read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import bundles
import torch
from damage import (
    CODES,
    Chance,
    Damage,
    altered,
    bitten,
    cut,
    flipped,
    mutated,
    renumbered,
    reshaped,
    retold,
    reworded,
)
from plainly import sound_gguf, sound_safetensors

import zoo
from converters.formats import TensorInfo, dtype_code, gguf, safetensors
from converters.formats.sstable import read_table
from converters.formats.tf_bundle import TFBundleReader
from converters.opening import open_checkpoint
from converters.quantized.blocks import KINDS, WRITTEN
from zoo.errors import ZooError
from zoo.tokenizers.llama2c import sentencepiece_model

Files = Mapping[str, bytes]


class Kind:
    """Sound files in a directory; a call damages some of them, and has all of them read."""

    size = 0  # bytes of what was read last

    def __init__(self, place: Path) -> None:
        self.place = place
        self._there: dict[Path, dict[str, bytes]] = {}  # opening files takes longest

    def put(self, files: Files, below: str = "one") -> Path:
        """Their directory, which holds these and no others."""
        place = self.place / below
        place.mkdir(exist_ok=True)
        self.size = sum(map(len, files.values()))
        there = self._there.setdefault(place, {})
        for name in there.keys() - files.keys():
            (place / name).unlink()
            del there[name]
        for name, data in files.items():
            if there.get(name) != data:
                if there.pop(name, None) is not None:  # what is mapped of it stays as it is
                    (place / name).unlink()
                (place / name).write_bytes(data)
                there[name] = data
        return place

    def __call__(self, chance: Chance) -> None:
        """Damaged files, read: a ZooError is an answer, and so is what is in them."""
        raise NotImplementedError


class Sample(NamedTuple):
    """One set of files, and how each of them is damaged."""

    name: str
    files: Files
    damage: Mapping[str, Damage]
    options: Mapping[str, Any] = MappingProxyType({})  # what files of a dialect do not say


class Samples(Kind):
    """Several sets of files that are read in the same way."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.samples = list(self.made(place))
        for sample in self.samples:  # as they are, they can be read
            self.read(self.put(sample.files, sample.name), **sample.options)

    def made(self, place: Path) -> Iterable[Sample]:
        raise NotImplementedError

    def read(self, place: Path, **options: Any) -> None:
        raise NotImplementedError

    def __call__(self, chance: Chance) -> None:
        sample = chance.choice(self.samples)
        files = dict(sample.files)
        few = min(len(sample.damage), chance.choice((1, 1, 1, 2)))
        for name in chance.sample(list(sample.damage), few):
            files[name] = sample.damage[name](files[name], chance)
        self.read(self.put(files, sample.name), **sample.options)


# --- safetensors, and directories of the hub ------------------------------------------------------


class Header(Kind):
    def __init__(self, place: Path) -> None:
        super().__init__(place)
        infos = [
            TensorInfo(f"blocks.{n}.w", (2, n + 1), d)
            for n, d in enumerate(("F32", "F32", "BF16", "I64"))
        ]
        self.layout = safetensors.lay_out(infos, {"format": "pt"}, "here")

    def __call__(self, chance: Chance) -> None:
        head = mutated(self.layout.head[8:], chance)
        length = len(head) if chance.random() < 0.9 else chance.getrandbits(chance.choice((8, 64)))
        data = struct.pack("<Q", length) + head + bytes(self.layout.size)
        path = self.put({"model.safetensors": data}) / "model.safetensors"
        reader = safetensors.SafetensorsReader(path)
        assert sound_safetensors(data), "accepted, and a plain reading refuses it"
        for name in reader.tensors:
            reader.span(name)


INDEX = "model.safetensors.index.json"


class Index(Samples):
    def made(self, place: Path) -> Iterable[Sample]:
        files, weights = dict[str, bytes](), dict[str, str]()
        for n in (1, 2, 3):
            name = f"model-0000{n}-of-00003.safetensors"
            files[name] = packed({f"w{n}": torch.ones(n), f"v{n}": torch.ones(2, n)})
            weights |= {f"w{n}": name, f"v{n}": name}
        index = {"metadata": {"total_size": 72}, "weight_map": weights}
        first = next(iter(files))
        files[INDEX] = json.dumps(index).encode()
        yield Sample("one", files, {INDEX: reworded, first: relaid})

    def read(self, place: Path, **options: Any) -> None:
        checkpoint = open_checkpoint(place)
        for name in checkpoint.tensors:
            checkpoint.tensor(name)


def packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A file of safetensors."""
    infos = [TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)) for n, t in tensors.items()]
    layout = safetensors.lay_out(infos, {"format": "pt"}, "here")
    contents = {n: bytes(t.reshape(-1).view(torch.uint8).tolist()) for n, t in tensors.items()}
    return layout.head + b"".join(contents[name] for name in layout.starts)


@lru_cache(maxsize=32)
def unpacked(data: bytes) -> tuple[list[TensorInfo], dict[TensorInfo, bytes]]:
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header.pop("__metadata__", None)
    contents = {
        TensorInfo(name, tuple(entry["shape"]), entry["dtype"]): data[size + start : size + end]
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }
    return list(contents), contents


def relaid(data: bytes, chance: Chance) -> bytes:
    """A file of safetensors: its bytes, its header, or other tensors under a header that fits."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice((cut, flipped, renumbered))(data, chance)
    size = 8 + int.from_bytes(data[:8], "little")
    if kind == 1:
        head = mutated(data[8:size], chance)
        return struct.pack("<Q", len(head)) + head + data[size:]
    infos, contents = unpacked(data)
    if kind == 2:
        return data[:size] + flipped(data[size:], chance)
    layout = safetensors.lay_out(changed := reshaped(infos, chance, CODES), None, "here")
    named = {info.name: info for info in changed}
    wanted = [(named[name], named[name].nbytes) for name in layout.starts]
    return layout.head + b"".join(
        contents[info] if info in contents else chance.randbytes(count) for info, count in wanted
    )


# --- TensorFlow's bundles -------------------------------------------------------------------------


def rebundled(table: bytes, chance: Chance) -> bytes:
    """An index, damaged before its sums are made, so that they fit; or after."""
    pairs, compressed = list(_pairs(table)), chance.randrange(2)
    match chance.randrange(6):
        case 0:
            return bitten(table, chance)
        case 1 | 2:  # an entry, or several
            for _ in range(chance.choice((1, 1, 5))):
                n = chance.randrange(len(pairs))
                key, value = pairs[n]
                whole = chance.random() < 0.5
                inner: dict[int, Any] = {2: {2: {}}, 7: {1: {}}} if key else {3: {}}
                pairs[n] = key, bitten(value, chance) if whole else retold(value, chance, inner)
            return bundles.index(pairs, compressed, 4)
        case 3:  # names, their order
            n, other = chance.randrange(len(pairs)), chance.randrange(len(pairs))
            pairs[n] = bitten(pairs[n][0], chance), pairs[other][1]
            return bundles.index(sorted(pairs) if chance.random() < 0.5 else pairs, compressed, 4)
    blocks = []  # one of them, before or behind its compression
    for n in range(0, len(pairs), 4):
        block = bundles.block(pairs[n : n + 4], chance.choice((1, 16)))
        if (where := chance.randrange(3)) == 0:
            block = bitten(block, chance)
        block = bundles.snappy(block) if compressed else block
        block = bitten(block, chance) if where == 1 and compressed else block
        blocks.append((pairs[min(n + 3, len(pairs) - 1)][0], block, compressed))
    return bundles.table(blocks, compressed)


_TABLES: dict[bytes, list[tuple[bytes, bytes]]] = {}  # of sound indices


def _pairs(table: bytes) -> list[tuple[bytes, bytes]]:
    return _TABLES[table]


def bundle_files(
    place: Path, prefix: str, tensors: Mapping[str, Any], **how: Any
) -> dict[str, bytes]:
    place.mkdir()
    path = bundles.bundle(place / prefix, tensors, **how)
    _TABLES[path.read_bytes()] = read_table(path)
    return {p.name: p.read_bytes() for p in sorted(place.iterdir())}


class Bundle(Samples):
    def made(self, place: Path) -> Iterable[Sample]:
        tensors = {f"m/h{n}/w": torch.arange(4.0 * n).view(2, -1) for n in range(7)}
        tensors |= {"a": torch.ones(3, dtype=torch.int8), "cut": torch.arange(14).view(2, 7)}
        files = bundle_files(place / "b", "x", tensors, shards=2, cut={"cut": (1, (3, 4))})
        damage = {name: mutated if ".data" in name else rebundled for name in files}
        # an index is where nearly everything stands
        yield from (
            Sample(n, files, {k: d for k, d in damage.items() if ".index" in k}) for n in "ab"
        )
        yield Sample("c", files, damage)

    def read(self, place: Path, **options: Any) -> None:
        reader = TFBundleReader(place / "x.index")
        shards = [path.read_bytes() for path in sorted(place.glob("*.data-*"))]
        size = sum(info.nbytes for info in reader.tensors.values())
        assert size <= sum(map(len, shards)), "more tensors than bytes"
        for name, info in reader.tensors.items():
            tensor = reader.tensor(name)
            assert (tuple(tensor.shape), dtype_code(tensor.dtype)) == info[1:], name
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            if name != "cut":
                assert any(bytes(raw.tolist()) in data for data in shards), name


# --- GGUF -----------------------------------------------------------------------------------------


def gguf_of(values: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> bytes:
    """A header with tensors of any kind, (shape, number of the kind), aligned to single bytes."""
    head = bytearray(gguf.lay_out([], {**values, "general.alignment": 1}, "here").head)
    struct.pack_into("<Q", head, 8, len(tensors))
    at = 0
    for name, (shape, kind) in tensors.items():
        text, dims = name.encode(), shape[::-1]
        head += struct.pack("<Q", len(text)) + text
        head += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
        at += KINDS[kind].nbytes(dims)
    return bytes(head)


class Gguf(Kind):
    """Headers and tensors of all kinds."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        infos = [TensorInfo("a.weight", (2, 32), "Q8_0"), TensorInfo("b.weight", (2, 3), "F32")]
        infos += [TensorInfo("c.weight", (2, 1, 2, 1), "BF16"), TensorInfo("d", (), "F16")]
        values = {
            "general.architecture": "llama",
            "general.alignment": 32,
            "x": gguf.Value("u8", 7),
        }
        values |= {"llama.block_count": 2, "eps": 1e-5, "y": True, "tokens": ["<s>", "ü", "c"] * 3}
        values |= {"types": gguf.Value("[i32]", [3, 1, 1] * 400), "split.no": gguf.Value("u16", 0)}
        layout = gguf.lay_out(infos, {**values, "split.count": gguf.Value("u16", 1)}, "here")
        every = {kind.name: ((2, kind.block), number) for number, kind in KINDS.items()}
        numbers = gguf_of({"x": "y"}, every)
        size = sum(KINDS[number].nbytes(shape) for shape, number in every.values())
        self.sound = [(layout.head, layout.size), (numbers, size)]

    def __call__(self, chance: Chance) -> None:
        head, size = chance.choice(self.sound)
        data = renumbered(head, chance) + chance.randbytes(size)
        if chance.random() < 0.1:
            data = data[: chance.randrange(len(data))]
        reader = gguf.GGUFReader(self.put({"model.gguf": data}) / "model.gguf")
        assert sound_gguf(data), "accepted, and a plain reading refuses it"
        for name, info in reader.tensors.items():
            assert reader.tensor(name).shape == info.shape
        for value in reader.values.values():
            list(value) if isinstance(value, Iterable) else value


@lru_cache(maxsize=32)
def gguf_parts(data: bytes, place: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """(key/values with their types, tensors) of a sound file."""
    path = place / "sound.gguf"
    path.write_bytes(data)
    reader = gguf.GGUFReader(path)
    return {k: gguf.Value(reader.kinds[k], v) for k, v in reader.values.items()}, list(
        reader.tensors.values()
    )


def regguf(data: bytes, chance: Chance, place: Path) -> bytes:
    """A GGUF file: its header's numbers, or other key/values and tensors under one that fits."""
    values, infos = gguf_parts(data, place)
    kind = chance.randrange(6)
    size = sum(info.nbytes for info in infos)
    if kind == 0:
        return renumbered(data[: len(data) - size], chance) + data[len(data) - size :]
    if kind == 1:
        return cut(data, chance) if chance.random() < 0.3 else flipped(data, chance)
    if kind > 2:
        plain = altered({key: value.value for key, value in values.items()}, chance)
        values = {key: _sayable(key, values.get(key), value) for key, value in plain.items()}
    if kind < 4:
        infos = reshaped(infos, chance, list(WRITTEN))
    try:
        layout = gguf.lay_out(infos, values, "here")
    except ZooError:
        return renumbered(data, chance)
    return layout.head + chance.randbytes(layout.size)


def _sayable(key: str, before: gguf.Value | None, value: Any) -> Any:
    """The value as the key's own type, as its usual one, or a word."""
    if before is not None and before.value == value:
        return before
    for way in (gguf.Value(before.kind, value) if before is not None else value, value):
        try:
            gguf.lay_out([], {key: way}, "here")
        except ZooError:
            continue
        return way
    return "x"


# --- vocabularies ---------------------------------------------------------------------------------


class Vocabularies(Samples):
    """Read, and put to work on a little text."""

    def read(self, place: Path, **options: Any) -> None:
        tokenizer = zoo.tokenizer(place)
        ids = tokenizer.encode("ab <s> é\n", special=True)
        tokenizer.decode(ids)
        tokenizer.decode(range(min(64, tokenizer.vocab_size)))


def pieces(kind: int) -> list[tuple[str, float, int]]:
    """A small vocabulary of SentencePiece's, of (text, score, type)."""
    marks = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    falls = [(f"<0x{n:02X}>", 0.0, 6) for n in range(256)] if kind == 2 else []
    words = ["\u2581", "a", "b", "é", "ab", "\u2581a", "\u2581ab", "\n", "c"]
    return [*marks, *falls, *((w, -float(n), 1) for n, w in enumerate(words))]


def spm(kind: int, table: bytes = b"") -> bytes:
    """A model's file, with a table by which characters are replaced."""
    data = sentencepiece_model(pieces(kind), falls_back=kind == 2)
    if kind == 1:
        data += bundles.part(2, bundles.number(3, kind))
    return data + bundles.part(3, bundles.part(2, table)) if table else data


def retold_spm(data: bytes, chance: Chance) -> bytes:
    if chance.random() < 0.1:
        return chance.choice((bitten, cut))(data, chance)
    return retold(data, chance, {1: {}, 2: {}, 3: {}})


class SentencePiece(Vocabularies):
    """tokenizer.model and what else such models are called."""

    def made(self, place: Path) -> Iterable[Sample]:
        nothing = struct.pack("<I", 1024) + bytes(1024) + b"a\0"
        for name, data in (
            ("tokenizer.model", spm(2)),
            ("spiece.model", spm(1)),
            ("sentencepiece.bpe.model", spm(1, nothing)),
        ):
            yield Sample(name.partition(".")[0], {name: data}, {name: retold_spm})


class TokenizerBin(Vocabularies):
    """llama2.c's tokenizer.bin."""

    def made(self, place: Path) -> Iterable[Sample]:
        marks = {"<s>": "\n<s>\n", "</s>": "\n</s>\n"}
        words = [(marks.get(t, t.replace("\u2581", " ")).encode(), s) for t, s, _ in pieces(2)]
        data = struct.pack("<I", max(len(text) for text, _ in words))
        data += b"".join(struct.pack("<fI", score, len(text)) + text for text, score in words)
        yield Sample("bin", {"tokenizer.bin": data}, {"tokenizer.bin": renumbered})


class GgufVocabularies(Vocabularies):
    """SentencePiece's, byte-level merges and WordPiece, as GGUF files hold them."""

    def made(self, place: Path) -> Iterable[Sample]:
        vocabularies: dict[str, dict[str, Any]] = {}
        texts, scores, types = zip(*pieces(2), strict=True)
        vocabularies["llama"] = {"tokens": list(texts), "scores": list(scores)}
        vocabularies["llama"] |= {"token_type": gguf.Value("[i32]", list(types)), "bos_token_id": 1}
        words = ["a", "b", "Ġ", "ab", "Ġab", "<|end|>", "[PAD6]"]
        vocabularies["gpt2"] = {"tokens": words, "merges": ["a b", "Ġ ab"], "pre": "qwen2"}
        vocabularies["gpt2"] |= {
            "token_type": gguf.Value("[i32]", [1] * 5 + [3, 5]),
            "eos_token_id": 5,
        }
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581ab", "a", "b", "\u2581a"]
        vocabularies["bert"] = {"tokens": words, "unknown_token_id": 1, "cls_token_id": 2}
        vocabularies["bert"] |= {"token_type": gguf.Value("[i32]", [3] * 5 + [1] * 4)}
        for name, mine in vocabularies.items():
            keys = {f"tokenizer.ggml.{key}": value for key, value in mine.items()}
            keys |= {"general.architecture": name, "tokenizer.ggml.model": name}
            data = gguf.lay_out([], keys, "here").head
            yield Sample(name, {"v.gguf": data}, {"v.gguf": partial(regguf, place=place)})

    def read(self, place: Path, **options: Any) -> None:
        super().read(place / "v.gguf", **options)
