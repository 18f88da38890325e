"""The base checkpoint of an adapter: its head, and tensors that the adapter adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.formats import TensorInfo, dtype_code, torch_dtype
from converters.plan import FLOATS
from zoo.checkpoints.build import native_of, on_meta
from zoo.checkpoints.handle import Located
from zoo.checkpoints.plan import prove
from zoo.errors import PlanError, SpecError, UsageError, listing
from zoo.lora.files import WEIGHTS, Files
from zoo.lora.targets import TargetIndex

if TYPE_CHECKING:
    from converters.lazy import Read

# peft's task_type -> the head for it
TASKS = {
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
}


def based(
    location: Located, files: Files, config: Mapping[str, Any], asked: bool
) -> tuple[Located, dict[str, Any]]:
    """(the checkpoint with the adapter's head and tensors, the config for it).

    An adapter for classification contains the whole classifier, since its base has none, or one of
    other labels. `asked`: the caller chose the head.
    """
    head = TASKS.get(files.settings.task, "")
    heads = location.heads
    if head in location.entry.model.heads and head not in heads and not asked:
        heads = (head,)
    location, changes = location._replace(heads=heads), dict(config)
    if not files.whole:
        return location, changes
    model = on_meta(location, location.config(heads[0], config))
    index, count = TargetIndex(model, native_of(model)), len(model.config.labels)
    checkpoint, brought = location.checkpoint(), dict[str, Tensor]()
    complete = _is_complete(location, checkpoint, config)
    for name, tensor in files.whole.items():
        try:
            info, step, n = index.find(name)
        except PlanError:
            continue  # reported later, with everything else that does not fit
        if step.transform is not None or str(step.rule) not in map(str, index.dialect.heads):
            continue
        relabelled = info.shape[0] == count != tensor.shape[0]
        if relabelled and "labels" not in config and info.shape[1:] == tuple(tensor.shape[1:]):
            changes["labels"] = tensor.shape[0]
        own = step.targets[n] if location.native is not None else name
        if (own not in checkpoint.tensors and not complete) or ("labels" in changes and relabelled):
            brought[own] = tensor
    if location.dialect != "hf" and (
        lacking := [n for n in brought if n not in checkpoint.tensors]
    ):
        raise UsageError(
            f"{files.where}: brings {listing(lacking)}, and a base of {location.dialect} takes no "
            "further head. Convert it with --to hf first"
        )
    return location._replace(extend=partial(extended, brought=brought)), changes


def _is_complete(location: Located, checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the base contains the whole model without the adapter's tensors."""
    try:
        prove(location, checkpoint, config)
    except (PlanError, SpecError):
        return False
    return True


def extended(checkpoint: Checkpoint, brought: Mapping[str, Tensor]) -> Checkpoint:
    """Add an adapter's tensors to a checkpoint, in the dtype of its others."""
    (kind, *_) = [i.dtype for i in checkpoint.tensors.values() if i.dtype in FLOATS] or ["F32"]
    tensors = {name: tensor.to(torch_dtype(kind)) for name, tensor in brought.items()}
    infos = {n: TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)) for n, t in tensors.items()}
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **infos},
        where={**checkpoint.where, **dict.fromkeys(tensors, WEIGHTS[0])},
        readers={**checkpoint.readers, WEIGHTS[0]: _MemoryReader(infos, tensors)},
    )


class _MemoryReader:
    """A checkpoint reader of tensors in memory."""

    def __init__(self, tensors: dict[str, TensorInfo], values: Mapping[str, Tensor]) -> None:
        self.tensors, self.metadata, self._tensors = tensors, dict[str, str](), values

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name."""
        return self._tensors[name]

    def decoder(self, name: str) -> Read | None:
        """None: these tensors are not quantized."""
        return None
