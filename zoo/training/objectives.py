"""What is learned: an objective makes batches and says what a model's outputs cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.training.data import Windows, generator

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


# --- masked words --------------------------------------------------------------------------------

HIDDEN = 0.15  # of all tokens are to be foreseen, by masked words and by spans
MASKED, REPLACED = 0.8, 0.1  # of those; the rest stays as it is


class MaskedLM:
    """Some tokens of a window: most are hidden, some are replaced by others, some stay."""

    def __init__(self, train: Windows, val: Windows, mask: int, vocab: int) -> None:
        self._train, self._val, self._mask, self._vocab = train, val, mask, vocab

    def batch(self, step: int) -> LabeledBatch:
        """The batch of a step."""
        return self._hidden(self._train(step), self._train.seed, step)

    def held_back(self, number: int) -> LabeledBatch:
        """A batch of the data that is held back; the same tokens are hidden each time."""
        return self._hidden(self._val(number), self._val.seed, number)

    def _hidden(self, ids: Tensor, seed: int, step: int) -> LabeledBatch:
        random = generator(seed, step, 1)
        chosen = torch.rand(ids.shape, generator=random) < HIDDEN
        chosen[:, 0] |= ~chosen.any(1)  # a row without any would teach nothing
        how = torch.rand(ids.shape, generator=random)
        others = torch.randint(self._vocab, ids.shape, generator=random)
        inputs = torch.where(chosen & (how < MASKED), self._mask, ids)
        is_replaced = chosen & (how >= MASKED) & (how < MASKED + REPLACED)
        inputs = torch.where(is_replaced, others, inputs)
        labels = torch.where(chosen, ids, IGNORED)
        return LabeledBatch({"input_ids": inputs}, {"logits": labels}, tokens=ids.numel())


# --- spans ---------------------------------------------------------------------------------------

SPAN = 3  # tokens of a span, on average


class Spans:
    """Spans of a window: the encoder reads a sentinel for each, the decoder writes what they were.

    The first sentinel is the last id of the vocabulary, the next one the id before it, as in T5.
    """

    def __init__(self, train: Windows, val: Windows, start: int, vocab: int) -> None:
        self._train, self._val, self._start, self._vocab = train, val, start, vocab

    def batch(self, step: int) -> LabeledBatch:
        """The batch of a step."""
        return self._corrupted(self._train(step), self._train.seed, step)

    def held_back(self, number: int) -> LabeledBatch:
        """A batch of the data that is held back; the same spans are left out each time."""
        return self._corrupted(self._val(number), self._val.seed, number)

    def _corrupted(self, windows: Tensor, seed: int, step: int) -> LabeledBatch:
        random, length = generator(seed, step, 2), windows.shape[1]
        hidden, spans = hidden_spans(length)
        questions, answers = [], []
        for row in windows:
            question, answer, at = list[Tensor](), list[Tensor](), 0
            kept, gone = (_lengths(n, spans, random) for n in (length - hidden, hidden))
            for number, (seen, left) in enumerate(zip(kept, gone, strict=True)):
                sentinel = row.new_tensor([self._vocab - 1 - number])
                question += [row[at : at + seen], sentinel]
                answer += [sentinel, row[at + seen : at + seen + left]]
                at += seen + left
            questions.append(torch.cat(question))
            answers.append(torch.cat(answer))
        labels = torch.stack(answers)
        begun = torch.full_like(labels[:, :1], self._start)
        inputs = {
            "input_ids": torch.stack(questions),
            "decoder_input_ids": torch.cat((begun, labels[:, :-1]), 1),
        }
        return LabeledBatch(inputs, {"logits": labels}, tokens=windows.numel())


def hidden_spans(length: int) -> tuple[int, int]:
    """How many tokens of a window are left out, in how many spans."""
    hidden = max(1, round(length * HIDDEN))
    return hidden, max(1, round(hidden / SPAN))


def _lengths(count: int, parts: int, random: torch.Generator) -> list[int]:
    """Random lengths, one at least each, that add up."""
    cuts = torch.randperm(count - 1, generator=random)[: parts - 1].sort().values + 1
    edges = torch.tensor([0, *cuts.tolist(), count])
    lengths: list[int] = edges.diff().tolist()
    return lengths
