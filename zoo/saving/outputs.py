"""Tensors and files of an output, as saving and converting both need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from converters.checkpoint import SHARD_BYTES, shard
from converters.formats import TensorInfo, dtype_code, torch_dtype
from converters.lazy import Lazy
from converters.output import Item, Shard
from converters.plan import Plan
from zoo.checkpoints.file_names import CONFIG
from zoo.checkpoints.sentences import SentenceModel
from zoo.components.model import Model
from zoo.errors import (
    LossyExport,
)
from zoo.saving import graphs
from zoo.saving.origin import origin_of


def item_of(name: str, tensor: Tensor, decoded: bool = False) -> Item:
    """Return a tensor of the model as an item to write."""
    info = TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
    return Item(info, "", partial(Lazy.of, tensor), decoded=decoded)


def in_order(items: Iterable[Item], plan: Plan) -> list[Item]:
    """Sort items into the order of the files that the plan was made from."""
    order = {plan.modern.get(name, name): n for n, name in enumerate(plan.header)}
    return sorted(items, key=lambda item: order[item.name])


def split(
    items: list[Item], where: Mapping[str, str], metadata: Mapping[str, str], most: int | None
) -> list[Shard]:
    """Split tensors over the files that `where` names, or over new ones of `most` bytes."""
    by_name = {item.name: item for item in items}
    infos = [item.info for item in items]
    files = as_before(infos, where) or shard(infos, most or SHARD_BYTES)
    return [Shard.of(name, [by_name[i.name] for i in infos], metadata) for name, infos in files]


def as_before(
    infos: Iterable[TensorInfo], where: Mapping[str, str]
) -> list[tuple[str, list[TensorInfo]]]:
    """Return the source's own split over files, under names of safetensors."""
    files: dict[str, list[TensorInfo]] = {}
    for info in infos:
        if info.name not in where:
            return []
        name = where[info.name]
        if not name.endswith(".safetensors"):
            name = f"{Path(name).stem.replace('pytorch_model', 'model')}.safetensors"
        files.setdefault(name, []).append(info)
    return sorted(files.items())


def graph_files(model: Model, to: str, items: Mapping[str, Item]) -> tuple[Shard, dict[str, bytes]]:
    """Return (weights, the graph and an HF config).

    `items` are all arrays of the model.
    """
    shard, texts = graphs.files(model, to, items)
    inner, prefix = (model.model, "model.") if isinstance(model, SentenceModel) else (model, "")
    blanks = dict[str, Tensor]()
    for name, _ in inner.named_parameters():
        info = items[f"{prefix}{name}"].info
        blanks[name] = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
    with suppress(LossyExport):  # the reference cannot express it
        texts[CONFIG] = origin_of(inner, blanks).config.encode()
    return shard, texts
