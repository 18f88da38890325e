"""What may be otherwise in a model: parameters, config fields and settings, changed for a while."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.activations import ACTIVATIONS
from zoo.components.masks import Mask
from zoo.components.model import Model
from zoo.components.rotary import PLAIN, SCALINGS, Scaling
from zoo.errors import ConfigError

Changes = Mapping[str, Any]
PARTS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Of the three at most one is given. Parameters: as they should be."""

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    config: Changes = field(default_factory=dict)
    settings: Mapping[str, Changes] = field(default_factory=dict)  # module -> attributes


@contextmanager
def applied(model: Model, edit: Edit) -> Iterator[Model]:
    """The model so edited; as it was before afterwards. Nothing of it is copied."""
    if edit.config:
        yield rebuilt(model, edit.config)
        return
    held = dict(model.named_parameters(remove_duplicate=False))
    undo = list[Callable[[], None]]()
    try:
        for name, value in edit.parameters.items():
            undo.append(_put(held[name], value))
        for name, attributes in edit.settings.items():
            for attribute, value in attributes.items():
                undo.append(_set(model.get_submodule(name), attribute, value))
        yield model
    finally:
        for each in reversed(undo):
            each()


def _put(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    kept = parameter.data
    parameter.data = value

    def undo() -> None:
        parameter.data = kept

    return undo


def _set(module: nn.Module, attribute: str, value: Any) -> Callable[[], None]:
    kept, own = getattr(module, attribute), attribute in module.__dict__
    module_like = attribute in module._modules
    setattr(module, attribute, value)

    def undo() -> None:
        if own or module_like:
            setattr(module, attribute, kept)
        else:  # the class's own again
            delattr(module, attribute)

    return undo


def rebuilt(
    model: Model, changes: Changes, instead: Callable[[str], Tensor | None] = lambda name: None
) -> Model:
    """With other config fields and the same memory; ConfigError or RuntimeError if they do not fit.

    `instead` gives what the model has not, where somebody else does.
    """
    config = model.config
    with torch.device("meta"):
        made: Model = type(model)(type(config)(**{**config.to_dict(), **changes}))
    held = dict(model.named_parameters(remove_duplicate=False))
    shared = dict[int, nn.Parameter]()  # tied ones are one here too
    for name, p in list(made.named_parameters(remove_duplicate=False)):
        value = held[name] if name in held else instead(name)
        if value is None or value.shape != p.shape:
            raise RuntimeError(f"{name}: nothing to make it of")
        own = shared.get(id(value)) if name in held else None
        if own is None:
            own = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        if name in held:
            shared[id(value)] = own
        owner, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(owner), leaf, own)
    made.architecture, made.provenance = model.architecture, model.provenance
    return made.eval()


# --- names ---------------------------------------------------------------------------------------


def stars(name: str) -> str:
    """`blocks.*.attn.k` of `blocks.3.attn.k`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def block_of(name: str) -> str:
    """`blocks.3` of `blocks.3.attn.k`; what is in no block is one itself."""
    parts = name.split(".")
    number = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])


# --- what a field, an order or a setting may be instead ------------------------------------------

# what changes shapes, or nothing that is computed
NOT_TRIED = {"vocab", "dim", "layers", "decoder_layers", "heads", "kv_heads", "head_dim"}
NOT_TRIED |= {"hidden", "experts", "labels", "init_std", "head", "positions", "types"}


def values(config: Any, name: str, numbers: Sequence[float] = ()) -> Iterator[Any]:
    """Each value that a field of a config may have been meant to have; `numbers` were seen."""
    now = getattr(config, name)
    found: list[Any] = []
    if isinstance(now, bool):
        found = [not now]
    elif isinstance(now, int):
        near = [now - 1, now + 1, now // 2, 2 * now]
        found = [*near, *(int(n) for n in numbers if n == int(n) and n > 0), None]
    elif isinstance(now, float):
        usual = [1e-5, 1e-6, 1e-12, 1e-8] if now < 1e-2 else [10000.0, 500000.0, 1000000.0]
        found = [*numbers, *usual, now / 10, now * 10, now / 2, now * 2, None]
    elif name.endswith("act"):
        found = list(ACTIVATIONS)
    elif isinstance(now, Scaling):
        return  # attention's own ideas
    elif now is None:
        found = [n for n in numbers if n > 1]
    seen = [now]
    for value in found:
        if value not in seen:
            seen.append(value)
            yield value


def order(a: str, b: str, size: int, **lengths: int) -> Tensor:
    """(size,), which row of those that lie as (a) comes at each place of (b)."""
    names = a.split()
    rows = torch.arange(size).reshape([lengths.get(name, -1) for name in names])
    return rows.permute([names.index(name) for name in b.split()]).flatten()


def said_of(roles: Sequence[str]) -> tuple[str, str]:
    """What it is that queries, keys and values have these roles, and what undoes it."""
    moved = [(a, b) for a, b in zip(PARTS, roles, strict=True) if a != b]
    if len(moved) == 2:
        what = f"{moved[0][0]} and {moved[1][0]} are exchanged"
    else:
        what = f"q, k, v are {', '.join(roles)}"
    return what, " and ".join(f"{{name}}.{a} is read from what {b} is read from" for a, b in moved)


def scales(now: float, width: int, dim: int, layer: int) -> dict[float, str]:
    """What attention's scores may be multiplied by, and what that is called."""
    return {
        1.0: "scores are not scaled",
        width**-0.5: "scores are divided by the root of the head's width",
        dim**-0.5: "scores are divided by the root of the whole width",
        1.0 / width: "scores are divided by the head's width",
        now / layer: "scores are divided by the layer's number, too",
        now * layer: "scores are not divided by the layer's number",
    }


def bases(now: float, numbers: Iterable[float] = ()) -> list[float]:
    usual = (10000.0, 1e5, 5e5, 1e6, 1e7, 100.0, 1000.0)
    found = dict.fromkeys(float(x) for x in (*numbers, *usual) if x >= 50)
    return [base for base in found if base != now]


def scalings(
    now: Scaling, said: Iterable[Changes] = (), numbers: Iterable[float] = ()
) -> Iterator[Scaling]:
    """Of a rope: those that were `said` somewhere, and what they and `now` are near to."""
    found = list[Scaling]()
    for words in said:
        try:
            found.append(Scaling.from_json({k: v for k, v in words.items() if k != "rope_theta"}))
        except ConfigError:
            continue
    found.append(PLAIN)
    for scaling in (now, *found):
        given = {k: v for k, v in scaling.to_json().items() if k != "rope_type"}
        for kind in SCALINGS.values():
            if kind is not Scaling and set(given) <= set(kind.__dataclass_fields__):
                try:
                    found.append(kind(**given))
                except TypeError:
                    continue
        if "truncate" in given:
            found.append(replace(scaling, truncate=not given["truncate"]))  # type: ignore[call-arg]
        if "factor" in given:
            for factor in (*numbers, 2.0, 4.0, 8.0):
                if factor > 1:
                    found.append(replace(scaling, factor=float(factor)))  # type: ignore[call-arg]
            found.append(replace(scaling, factor=given["factor"] / 1.1))  # type: ignore[call-arg]
            found.append(replace(scaling, factor=given["factor"] * 1.1))  # type: ignore[call-arg]
    seen = [now]
    for each in found:
        if each not in seen:
            seen.append(each)
            yield each


def backwards(rotary: Any, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """As a rotary turns them, the other way."""
    turned: tuple[Tensor, Tensor] = rotary(q, k, Mask(mask.allowed, -mask.positions, mask.causal))
    return turned
