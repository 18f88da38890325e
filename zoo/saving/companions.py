"""Files that travel with weights: tokenizer, generation config, licenses, embedding modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from converters.dialects import every_dialect
from converters.formats.gguf import GGUFReader, Value
from converters.output import Item, Shard
from converters.paths import confined
from converters.spec import Container
from converters.weight_files import MANIFEST
from zoo.checkpoints.file_names import (
    CONFIG,
    MODULE_WEIGHTS,
    MODULES,
    MORE_TEMPLATES,
    NATIVE_FILE,
    module_folders,
)
from zoo.checkpoints.sources import ADAPTER
from zoo.errors import (
    BadTokenizer,
)
from zoo.saving.export import Export

# files beside config and weights that are copied unchanged
COMPANIONS = (
    *("*.json", "*.txt", "*.bpe", "*.model", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*"),
)


LICENSES = ("LICENSE*", "NOTICE*")


# metadata of a GGUF file about itself rather than its content
OWN_VALUES = ("architecture", "alignment", "file_type", "quantization_version", "type")


NOT_CARRIED = (
    *("config.json", NATIVE_FILE, "*.index.json", MANIFEST),
    "training.json",  # of a run: it belongs to the optimizer's state
    *(
        "quantize_config.json",
        "quant_config.json",
    ),  # of weights packed in a way that is not written
    ADAPTER,  # already merged: it would be applied twice
)


WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # under any other name


def companions(source: Path) -> dict[str, Path]:
    """Return the files of a checkpoint beside its weights, with its modules' folders."""
    names = [
        path.name
        for path in sorted(source.iterdir())
        if any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
        and not any(fnmatch(path.name, pattern) for pattern in (*NOT_CARRIED, *WEIGHTS))
        and not path.is_dir()
    ]
    for _, folder in module_folders(source) if (source / MODULES).is_file() else ():
        files = (f"{folder}/{name}" for name in (CONFIG, *MODULE_WEIGHTS))
        names += [name for name in files if (source / name).exists()]
    names += [
        f"{MORE_TEMPLATES}/{p.name}" for p in sorted(source.glob(f"{MORE_TEMPLATES}/*.jinja"))
    ]
    return {name: confined(source, name) for name in names}


def companions_of(
    directory: Path, file: Path | None, container: Container | None
) -> dict[str, Path]:
    """Return the companions of a checkpoint in any dialect, under their usual names.

    Those of a file that was given alone are its tokenizer.
    """
    from zoo.tokenizers.load import beside

    if file is None:
        files = companions(directory)
        configs = {c.config for _, _, c in every_dialect()} - {""}
        files = {name: path for name, path in files.items() if name not in configs}
    else:
        files = beside(file)
    others = container.names if container is not None else {}
    if any(other in files for other in others.values()):
        return files
    return {others.get(name, name): path for name, path in files.items()}


def licenses(carried: Mapping[str, Path]) -> dict[str, Path]:
    """Return the licenses among the files."""
    return {n: p for n, p in carried.items() if any(fnmatch(n, each) for each in LICENSES)}


def is_of_a_step(name: str) -> bool:
    """Return whether a file is of a sentence model's further layers, which a graph includes."""
    return name == MODULES or ("/" in name and not name.startswith(f"{MORE_TEMPLATES}/"))


def unpacked(
    inside: GGUFReader, carried: Mapping[str, Path], notes: dict[str, Any]
) -> tuple[dict[str, Path], dict[str, bytes]]:
    """Return (files to carry along, files made from the vocabulary in a GGUF file).

    If no other file can hold the vocabulary, `notes` gets the reason.
    """
    from zoo.tokenizers import gguf

    if not gguf.has_vocabulary(inside.values):
        return dict(carried), {}
    try:
        made = gguf.files(inside.values, Path(inside.path.name))
    except BadTokenizer as error:
        notes["left"], made = {"tokenizer": str(error)}, {}
    return licenses(carried), made


def exported_files(
    made: Export,
    items: Iterable[Item],
    carried: Mapping[str, Path],
    inside: GGUFReader | None,
    notes: dict[str, Any],
    vocab: int,
    **how: Any,
) -> tuple[list[Shard], dict[str, bytes], dict[str, Path]]:
    """Return (files of tensors, other files, files to carry along) of an export.

    Each dialect gets the vocabulary that its programs expect.
    """
    from zoo.tokenizers import gguf, gguf_values, llama2c

    if made.container.format == "gguf":
        if MODULES in carried:
            reason = "GGUF holds the model only, without layers after its output"
            notes["left"] = {MODULES: reason}
        values: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"}
        own = inside is not None and gguf.has_vocabulary(inside.values)
        if inside is not None:
            skipped = {f"general.{name}" for name in OWN_VALUES}
            values |= {
                key: Value(inside.kinds[key], value)
                for key, value in inside.values.items()
                if key.partition(".")[0] in ("general", "tokenizer") and key not in skipped
            }
        if not made.options.get("vocabulary", 1):
            values = {k: v for k, v in values.items() if not k.startswith("tokenizer.")}
            values["tokenizer.ggml.model"] = "no_vocab"
        elif not own:
            values |= gguf_values.values_of(carried, vocab)
        shards, texts = made.files(items, values=values, **how)
        return shards, texts, licenses(carried)
    shards, texts = made.files(items, **how)
    kept = dict(carried)
    if inside is not None:
        kept, more = unpacked(inside, carried, notes)
        texts |= more
    if made.container.format == "llama2c" and llama2c.FILE not in kept:
        text = llama2c.from_sentencepiece(kept)
        texts |= {} if text is None else {llama2c.FILE: text}
    return shards, texts, kept
