"""An adapter and the checkpoint that it is for: its head, and what of it the adapter brings."""

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
from zoo.checkpoints.located import Located
from zoo.checkpoints.plan import prove
from zoo.errors import PlanError, SpecError, UsageError, listing
from zoo.lora.files import WEIGHTS, Files
from zoo.lora.places import Places

if TYPE_CHECKING:
    from converters.lazy import Read

# peft's word for what a model is trained to do -> the head that does it
TASKS = {
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
}


def based(
    found: Located, files: Files, config: Mapping[str, Any], asked: bool
) -> tuple[Located, dict[str, Any]]:
    """(the checkpoint with the adapter's head and the tensors it brings, the config for it).

    A classifier is trained beside the factors of a base that has none, or one of other labels.
    `asked`: the head was.
    """
    head = TASKS.get(files.settings.task, "")
    heads = found.heads
    if head in found.entry.model.heads and head not in heads and not asked:
        heads = (head,)
    found, changes = found._replace(heads=heads), dict(config)
    if not files.whole:
        return found, changes
    model = on_meta(found, found.config(heads[0], config))
    places, count = Places(model, native_of(model)), len(model.config.labels)
    checkpoint, brought = found.checkpoint(), dict[str, Tensor]()
    complete = _is_complete(found, checkpoint, config)
    for name, tensor in files.whole.items():
        try:
            info, step, n = places.find(name)
        except PlanError:
            continue  # said with all else that does not fit
        if step.transform is not None or str(step.rule) not in map(str, places.dialect.heads):
            continue
        relabelled = info.shape[0] == count != tensor.shape[0]
        if relabelled and "labels" not in config and info.shape[1:] == tuple(tensor.shape[1:]):
            changes["labels"] = tensor.shape[0]
        own = step.targets[n] if found.native is not None else name
        if (own not in checkpoint.tensors and not complete) or ("labels" in changes and relabelled):
            brought[own] = tensor
    if found.dialect != "hf" and (lacking := [n for n in brought if n not in checkpoint.tensors]):
        raise UsageError(
            f"{files.where}: brings {listing(lacking)}, and a base of {found.dialect} takes no "
            "further head. Convert it with --to hf first"
        )
    return found._replace(extend=partial(extended, brought=brought)), changes


def _is_complete(found: Located, checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether a base has all of the model without what an adapter brings."""
    try:
        prove(found, checkpoint, config)
    except (PlanError, SpecError):
        return False
    return True


def extended(checkpoint: Checkpoint, brought: Mapping[str, Tensor]) -> Checkpoint:
    """With tensors of an adapter's, in the dtype of the others."""
    (kind, *_) = [i.dtype for i in checkpoint.tensors.values() if i.dtype in FLOATS] or ["F32"]
    held = {name: tensor.to(torch_dtype(kind)) for name, tensor in brought.items()}
    infos = {n: TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)) for n, t in held.items()}
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **infos},
        where={**checkpoint.where, **dict.fromkeys(held, WEIGHTS[0])},
        readers={**checkpoint.readers, WEIGHTS[0]: _Held(infos, held)},
    )


class _Held:
    """A reader of what is in memory."""

    def __init__(self, tensors: dict[str, TensorInfo], held: Mapping[str, Tensor]) -> None:
        self.tensors, self.metadata, self._held = tensors, dict[str, str](), held

    def tensor(self, name: str) -> torch.Tensor:
        return self._held[name]

    def decoder(self, name: str) -> Read | None:
        return None
