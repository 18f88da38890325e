"""Hypotheses about a model and the edits that undo them, applied and then taken back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.model import Model

Changes = Mapping[str, Any]
Make = Callable[[], Tensor]
Values = Mapping[str, Tensor | Make]  # what a parameter should be, or what makes that
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Hypothesis:
    """A mistake that may have been made, and the edit of the native model that undoes it.

    `fix` ends the sentences "parity is restored if ..." and "the text is likelier if ...". At most
    one kind of edit is set. Parameters are made when they are needed.
    """

    what: str
    fix: str = ""
    parameters: Values = field(default_factory=dict)
    config: Changes = field(default_factory=dict)
    settings: Mapping[str, Changes] = field(default_factory=dict)  # module -> attributes
    factors: Mapping[str, float] = field(default_factory=dict)  # module -> scale of its output
    across: bool = False  # in all blocks or in none: it is not tried in one block alone
    fault: str = ""  # its name in the catalogue
    # attention: part -> its rows, counted in q, k, v one below the other; `out`: columns
    rows: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    where: tuple[str, ...] = ()  # native parameters whose rules are to be changed
    moved: bool = False  # modules hold other numbers then: their outputs are not compared

    @property
    def undoes(self) -> bool:
        """Whether there is an edit, and not an explanation alone."""
        return bool(self.parameters or self.config or self.settings or self.factors)

    @property
    def touched(self) -> set[str]:
        """The modules whose outputs change when the edit is applied."""
        return {name.rpartition(".")[0] for name in self.parameters if self.moved} | {*self.factors}

    def within(self, block: str) -> Hypothesis | None:
        """The same of one block alone; None where it is about one block or cannot be split."""
        inside = {n: make for n, make in self.parameters.items() if block_of(n) == block}
        if self.across or not inside or len(inside) == len(self.parameters):
            return None
        what, fix = (text.replace(stars(block), block) for text in (self.what, self.fix))
        if what == self.what:
            return None
        return replace(self, what=what, fix=fix, parameters=inside)

    def only(self, leaf: str) -> Hypothesis | None:
        """The same of weights alone, or of biases alone."""
        inside = {n: make for n, make in self.parameters.items() if n.endswith(f".{leaf}")}
        if not inside or len(inside) == len(self.parameters):
            return None
        what, fix = f"{self.what} ({leaf} alone)", f"{self.fix}, in its {leaf}"
        return replace(self, what=what, fix=fix, parameters=inside, across=True)


@contextmanager
def applied(model: Model, edit: Hypothesis) -> Iterator[Model]:
    """The model with an edit applied; it is taken back on leaving. No parameter is copied."""
    if edit.config:
        yield rebuilt(model, edit.config)
        return
    own = dict(model.named_parameters(remove_duplicate=False))
    with ExitStack() as stack:
        made = {n: x if isinstance(x, Tensor) else x() for n, x in edit.parameters.items()}
        for name, value in made.items():
            stack.callback(setattr, own[name], "data", own[name].data)
            own[name].data = value
        for name, attributes in edit.settings.items():
            for attribute, value in attributes.items():
                module = model.get_submodule(name)
                if attribute in module.__dict__ or attribute in module._modules:
                    stack.callback(setattr, module, attribute, getattr(module, attribute))
                else:  # the class's own again
                    stack.callback(delattr, module, attribute)
                setattr(module, attribute, value)
        for name, by in edit.factors.items():
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(lambda _, args, out, by=by: out * by))
        yield model


def rebuilt(
    model: Model, changes: Changes, default: Callable[[str], Tensor | None] = lambda name: None
) -> Model:
    """Build the model with other config fields on the same memory.

    `default` gives parameters that the model lacks. Raises ConfigError or RuntimeError where the
    fields do not fit the parameters.
    """
    config = model.config
    with torch.device("meta"):
        made: Model = type(model)(type(config)(**{**config.to_dict(), **changes}))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = dict[int, nn.Parameter]()  # tied ones are one here too
    for name, p in list(made.named_parameters(remove_duplicate=False)):
        value = parameters[name] if name in parameters else default(name)
        if value is None or value.shape != p.shape:
            raise RuntimeError(f"{name}: no parameter of shape {tuple(p.shape)} to build it from")
        own = shared.get(id(value)) if name in parameters else None
        if own is None:
            own = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        if name in parameters:
            shared[id(value)] = own
        owner, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(owner), leaf, own)
    made.architecture, made.provenance = model.architecture, model.provenance
    return made.eval()


# --- names ---------------------------------------------------------------------------------------


def stars(name: str) -> str:
    """Replace layer numbers: `blocks.*.attn.k` of `blocks.3.attn.k`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def block_of(name: str) -> str:
    """`blocks.3` of `blocks.3.attn.k`; a module outside the blocks is its own block."""
    parts = name.split(".")
    number = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def order(a: str, b: str, size: int, **lengths: int) -> Tensor:
    """(size,) the row that rows laid out as (a) have at each position of layout (b)."""
    names = a.split()
    rows = torch.arange(size).reshape([lengths.get(name, -1) for name in names])
    return rows.permute([names.index(name) for name in b.split()]).flatten()
