"""What a file may hold otherwise than it is read: everything that is tried, the usual first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from zoo.components.attention import Attention
from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Model
from zoo.components.moe import Experts
from zoo.diagnosis.checkup import attention_rows, config, matrices, order
from zoo.diagnosis.checkup.parts import Hypothesis, attentions, blocks, kinds
from zoo.diagnosis.edits import block_of


def hypotheses(model: Model) -> Iterator[Hypothesis]:
    """Those of the whole model, the usual ones first."""
    for attn in attentions(model):
        yield from attention_rows.turned(attn, model)
        yield from attention_rows.roles(attn)
        yield from attention_rows.fused(attn)
        yield from attention_rows.by_head(attn)
    yield from matrices.exchanged(model)
    yield from matrices.transposed(model)
    yield from matrices.offset(model)
    yield from config.of_config(model)
    yield from config.of_attention(model)
    yield from order.tables(model)
    yield from order.layers(model)
    yield from order.experts(model)


def without(model: Model) -> Iterator[tuple[str, Hypothesis]]:
    """Each branch of each block left out: (the branch, what that is)."""
    for kind in kinds(model, Attention, MLP, GatedMLP, Experts):
        for name in kind.modules:
            yield (
                name,
                Hypothesis(
                    f"{name} does harm",
                    f"{name} is left out",
                    settings={name: {"forward": _silent}},
                ),
            )


def _silent(x: Tensor, *rest: Any) -> Tensor:
    return x * 0


def narrowed(model: Model, some: Iterable[Hypothesis]) -> Iterator[Hypothesis]:
    """The same of each block alone."""
    every = [name for stack in blocks(model) for name in stack.modules]
    for hypothesis in some:
        found = (hypothesis.within(block) for block in every)
        yield from (each for each in found if each is not None)


def inside(model: Model, branch: str) -> Iterator[Hypothesis]:
    """Those that touch one branch of a block, or a norm beside it, in this block alone."""
    block = block_of(branch)
    for each in hypotheses(model):
        narrow = each.within(block)
        if narrow is None:
            continue
        parts = {name.rpartition(".")[0] for name in narrow.parameters}
        if any(part.startswith(branch) or "norm" in part for part in parts):
            yield narrow
