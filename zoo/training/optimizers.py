"""Optimizers: which parameters decay, AdamW, Muon beside it, and both as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from converters.plan import PlanError, make_plan, target_names
from converters.spec import SpecError, load_spec
from zoo.checkpoints.build import native_of
from zoo.components.model import Model
from zoo.saving.origin import entry_of
from zoo.training.recipe import Recipe

NAMES = "param_names"  # torch's key for the names of a group's parameters


def axes_of(model: Model) -> dict[str, int]:
    """Native name -> how many axes one array has by its rule; stacked ones are counted apart.

    The experts of a layer are matrices (x f d): three axes, one of which stacks.
    """
    shapes = native_of(model).shapes
    axes = {name: len(shape) for name, shape in shapes.items()}
    spec, fields, native = load_spec(entry_of(model).spec), model.config.to_dict(), native_of(model)
    try:
        header = target_names(spec, "hf", fields, native, bare=True)
        plan = make_plan(spec, "hf", fields, native, header, "the optimizer")
    except (PlanError, SpecError):  # an array that no file has
        return axes
    for step in plan.steps:
        for name in step.targets:
            axes[name] = len(shapes[name]) - len(step.rule.stacked)
    return axes


def decaying(model: Model) -> set[str]:
    """Native names of what decays: matrices and tables, not vectors such as norms and biases."""
    return {name for name, count in axes_of(model).items() if count >= 2}


def groups(model: nn.Module, decays: set[str], decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters that are trained: what decays, and what does not.

    Parameters beside the model's own, such as an adapter's factors, decay where they are matrices.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = {name for name, _ in native_names(model)}
    rows: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, parameter in trained:
        rows[name in decays if name in own else parameter.dim() >= 2].append((name, parameter))
    return [
        {"params": [p for _, p in some], NAMES: [n for n, _ in some], "weight_decay": rate}
        for some, rate in ((rows[True], decay), (rows[False], 0.0))
        if some
    ]


def native_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and arrays of a model without what an adapter added."""
    from zoo.lora.layers import Lora

    beside = {id(p) for m in model.modules() if isinstance(m, Lora) for p in m.parameters()}
    return ((n, p) for n, p in model.named_parameters() if id(p) not in beside)


def adamw(model: nn.Module, decays: set[str], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over all that is trained, fused where torch has a kernel for it."""
    rows = groups(model, decays, recipe.weight_decay)
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(rows, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=_fused(rows))


def _fused(rows: list[dict[str, Any]]) -> bool:
    kinds = {(p.device.type, p.is_floating_point()) for row in rows for p in row["params"]}
    return all(device in ("cpu", "cuda", "mps") for device, _ in kinds)


def optimizers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe, over different parameters.

    Muon takes the matrices of the layers; tables, heads and vectors stay with AdamW.
    """
    decays = decaying(model)
    if recipe.optimizer == "adamw":
        return [adamw(model, decays, recipe)]
    inner = [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and name in decays and p.dim() == 2 and _is_inner(name)
    ]
    matrices = [p for _, p in inner]
    for p in matrices:
        p.requires_grad_(False)  # so that AdamW leaves them out
    try:
        rest = adamw(model, decays, recipe)
    finally:
        for p in matrices:
            p.requires_grad_(True)
    row = {"params": matrices, NAMES: [name for name, _ in inner]}
    muon = torch.optim.Muon(
        [row], lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, rest]


def _is_inner(name: str) -> bool:
    """Whether a parameter belongs to a layer, and not to an embedding or a head."""
    return "blocks." in name and "distances" not in name


def parameters_of(some: list[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """Everything that is trained."""
    return [p for each in some for group in each.param_groups for p in group["params"]]


# --- the learning rate ---------------------------------------------------------------------------


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: it rises through the warmup, and falls by the schedule."""
    from math import cos, pi

    if step < recipe.warmup:
        return recipe.lr * (step + 1) / (recipe.warmup + 1)
    lowest, after = recipe.lowest_lr, max(recipe.steps - recipe.warmup, 1)
    done = min((step - recipe.warmup) / after, 1.0)
    falls: Mapping[str, float] = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": (1 + cos(pi * done)) / 2,
        "wsd": min(1.0, (1.0 - done) / 0.2),
    }
    if recipe.schedule == "constant":
        return recipe.lr
    return lowest + (recipe.lr - lowest) * falls[recipe.schedule]


def set_learning_rate(some: list[torch.optim.Optimizer], rate: float) -> None:
    """Give every group of every optimizer its learning rate."""
    for each in some:
        for group in each.param_groups:
            group["lr"] = rate
