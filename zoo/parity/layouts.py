"""One checkpoint in every layout of its files: each loads equally and is saved unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from converters.opening import open_checkpoint
from converters.spec import Dialect
from zoo import registry
from zoo.errors import counted
from zoo.loading import load
from zoo.parity.checks import Subject, differences
from zoo.parity.result import Row
from zoo.saving.save import save

Tensors = dict[str, Tensor]


def layouts(subject: Subject) -> Iterator[Row]:
    """With and without prefix, legacy names, either or both names of a tie, shards, `.bin`."""
    truth, model = subject.truth, subject.model(None)
    checkpoint = open_checkpoint(truth.directory)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.tensors}
    head = model.config.head
    variants = dict(renamings(tensors, model.provenance.plan, truth.reference_class, head))
    problems = []
    with TemporaryDirectory() as scratch:
        directories = {layout: Path(scratch, layout) for layout in (*variants, "shards", "bin")}
        for layout, directory in directories.items():
            _write(truth.directory, directory, variants.get(layout, tensors), layout == "bin")
            if layout == "shards":
                _shards(directory, tensors)
            try:
                # legacy names are read and never written: these come back under the modern names
                expected = truth.directory if layout == "legacy" else directory
                problems += [f"{layout}: {line}" for line in _check(subject, directory, expected)]
            except Exception as error:
                problems.append(f"{layout}: {type(error).__name__}: {error}")
    shown = counted(len(directories), "layout") if not problems else f"{len(problems)} differ"
    yield Row(subject.name, "layouts", len(problems), 0, shown, "; ".join(problems[:8]))


def _check(subject: Subject, directory: Path, expected: Path) -> list[str]:
    again: Any = load(directory, modules=False, **subject.reading)
    mine = dict(subject.model(None).named_parameters(remove_duplicate=False))
    theirs = dict(again.named_parameters())
    # a layout may lack what the class does not need; it has nothing in addition
    problems = [f"{name}: differs" for name in theirs if not _same(theirs[name], mine.get(name))]
    copy = directory.with_name(f"{directory.name}-copy")
    save(again, copy)
    return problems + differences(expected, copy, again.provenance.dropped)


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def renamings(
    tensors: Tensors, plan: Any, reference_class: str, head: str
) -> Iterator[tuple[str, Tensors]]:
    """(layout, tensors): the same tensors under the other names that the spec allows."""
    dialect: Dialect = plan.dialect
    prefix = dialect.prefix
    if prefix and any(name.startswith(prefix) for name in tensors):
        yield "unprefixed", {name.removeprefix(prefix): x for name, x in tensors.items()}
    elif prefix:
        yield "prefixed", {prefix + name: x for name, x in tensors.items()}
    legacy = {_legacy(name, dialect): x for name, x in tensors.items()}
    if legacy.keys() != tensors.keys():
        yield "legacy", legacy
    disk = {t: step.sources[0] for step in plan.steps if not step.transform for t in step.targets}
    both, other = dict(tensors), dict(tensors)
    for name, owner in plan.native.ties.items():
        second = next((str(r.source) for r in dialect.heads if str(r.targets[0]) == name), None)
        if second is not None and owner in disk and second not in tensors:
            both[second] = tensors[disk[owner]]
            other[second] = other.pop(disk[owner])
    every = registry.architectures().values()
    heads = next(e.heads[reference_class] for e in every if reference_class in e.heads)
    if both.keys() != tensors.keys():
        yield "tied-both", both
        if head == heads[0]:  # if the head may be untied, the other name alone means an untied head
            yield "tied-other", other
    if len(heads) > 1:
        spare = {
            name
            for step in plan.steps
            for name in step.sources
            if any(step.targets[0].startswith(f"{part}.") for part in dialect.optional)
        }
        yield "spare-parts-gone", {n: x for n, x in tensors.items() if n not in spare}


def _legacy(name: str, dialect: Dialect) -> str:
    bare = name.removeprefix(dialect.prefix)
    for old, new in dialect.aliases:
        if (binding := new.match(bare)) is not None:
            return name[: len(name) - len(bare)] + old.format(binding)
    return name


def _write(source: Path, directory: Path, tensors: Mapping[str, Tensor], as_zip: bool) -> None:
    directory.mkdir()
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    if as_zip:
        torch.save(dict(tensors), directory / "pytorch_model.bin")
    else:
        # safetensors stores one array under two names as two arrays
        apart = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(apart, directory / "model.safetensors", metadata={"format": "pt"})


def _shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Split a single file into three and an index; every third tensor goes to the same file."""
    whole = directory / "model.safetensors"
    whole.unlink()
    files = {n: f"model-{k % 3 + 1:05}-of-00003.safetensors" for k, n in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
