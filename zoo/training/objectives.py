"""What is learned: an objective makes batches and says what a model's outputs cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.training.data import Windows

IGNORED = -100  # a label that asks for nothing


@dataclass(frozen=True)
class LabeledBatch:
    """Keywords of a model's `forward`, and a label for each number that is to be foreseen.

    Labels stand under the name of the output that they are of; a lone output is `logits`.
    """

    inputs: Mapping[str, Tensor]  # (b, …) each
    labels: Mapping[str, Tensor]  # (b, …) each, IGNORED where nothing is asked
    tokens: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many labels of each output ask for something."""
        return {name: int((x != IGNORED).sum()) for name, x in self.labels.items()}

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def rows(self, part: slice) -> LabeledBatch:
        """Some of the sequences."""
        inputs = {name: x[part] for name, x in self.inputs.items()}
        labels = {name: x[part] for name, x in self.labels.items()}
        return replace(self, inputs=inputs, labels=labels)

    def to(self, device: torch.device) -> LabeledBatch:
        """The same on another device."""
        inputs = {name: x.to(device, non_blocking=True) for name, x in self.inputs.items()}
        labels = {name: x.to(device, non_blocking=True) for name, x in self.labels.items()}
        return replace(self, inputs=inputs, labels=labels)


class Objective(Protocol):
    """What `loop.train` needs: batches by step, to train on and to evaluate with."""

    def batch(self, step: int) -> LabeledBatch:
        """The batch of a step, which depends on the seed and the step alone."""

    def held_back(self, number: int) -> LabeledBatch:
        """A batch of the data that is held back."""


def outputs_of(out: Any) -> dict[str, Tensor]:
    """A model's outputs by name; a lone one is `logits`."""
    if isinstance(out, Tensor):
        return {"logits": out}
    return dict(out._asdict())


def cost(out: Any, batch: LabeledBatch, counts: Mapping[str, int]) -> Tensor:
    """What a part of a batch adds to the mean over all of its labels, in nats.

    Outputs with labels are added up; `counts` are those of the whole batch, so that parts of
    different lengths weigh as much as in one piece.
    """
    named, total = outputs_of(out), None
    for name, labels in batch.labels.items():
        logits = named[name]
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        nats = F.cross_entropy(
            wide.reshape(-1, wide.shape[-1]),
            labels.reshape(-1),
            ignore_index=IGNORED,
            reduction="sum",
        )
        share = nats / max(counts[name], 1)
        total = share if total is None else total + share
    assert total is not None
    return total


class CausalLM:
    """The next token, at every position of a window."""

    def __init__(self, train: Windows, val: Windows) -> None:
        self._train, self._val = train, val

    def batch(self, step: int) -> LabeledBatch:
        """The batch of a step."""
        return _shifted(self._train(step))

    def held_back(self, number: int) -> LabeledBatch:
        """A batch of the data that is held back."""
        return _shifted(self._val(number))


def _shifted(windows: Tensor) -> LabeledBatch:
    inputs = windows[:, :-1]
    return LabeledBatch({"input_ids": inputs}, {"logits": windows[:, 1:]}, tokens=inputs.numel())
