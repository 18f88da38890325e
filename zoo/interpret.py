"""Looking inside: what flows through a model's parts, other values in its place, and the lens.

A place is a module's name, `blocks.3.mlp.down`, and means what comes out of it. Behind a colon
stands what else there is: `:in`, and of attention `:q`, `:k`, `:v`, `:pattern` and `:heads`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from threading import Lock, get_ident, local
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from zoo.components.attention import Attend, Attention
from zoo.components.masks import Mask
from zoo.components.model import Model
from zoo.errors import UsageError, did_you_mean, listing

Tap = Callable[[Any], Any]  # is given what flows by, and gives what flows on
HEADS = ("q", "k", "v", "pattern", "heads")  # of attention, each head apart


class Place(NamedTuple):
    """Where something flows by."""

    module: str
    what: str  # out, in, or one of HEADS

    def __str__(self) -> str:
        return self.module if self.what == "out" else f"{self.module}:{self.what}"


class Kept(dict[str, Any]):
    """What flowed by, in the order in which it did; a second time is `name@2`."""

    def __missing__(self, name: str) -> NoReturn:
        raise UsageError(f"{name!r} was not kept.{_near(name, self)}")


def run_with_cache(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    names: str | Iterable[str] = "*",
    *,
    grad: bool = False,
    **inputs: Any,
) -> tuple[Any, Kept]:
    """The model's output, and what flowed by at the places that `names` match; a `*` crosses dots.

    Nothing is copied, and nothing keeps a graph; with `grad` all of it is in one, and after a
    backward each value has its own in `.grad`. `inputs` are further ones of the model's forward.
    """
    if grad and model.is_prepared:
        raise UsageError("grad: a prepared model has no gradients. Use it as zoo.load gives it")
    asked = find(model, [names] if isinstance(names, str) else names, "names")
    kept, moving = Kept(), inputs.get("cache") is not None
    ran: dict[Place, int] = {}

    def keeping(place: Place) -> Tap:
        def one(x: Any) -> Any:
            if isinstance(x, tuple):
                return _like(x, map(one, x))
            if not isinstance(x, Tensor):
                return x
            if not grad:
                # keys and values lie in the key-value cache, which is written to again
                return x.detach().clone() if moving and place.what in ("k", "v") else x.detach()
            if x.is_floating_point():
                x.requires_grad_() if x.is_leaf else x.retain_grad()
            return x

        def tap(x: Any) -> Any:
            if not _ASIDE.busy:
                ran[place] = ran.get(place, 0) + 1
                name = str(place) if ran[place] == 1 else f"{place}@{ran[place]}"
                kept[name] = one(x)
            # a pattern is computed beside what its kernel gives; now that comes by way of it
            return x.view_as(x) if grad and place.what == "pattern" else x

        return tap

    every = dict.fromkeys(place for found in asked.values() for place in found)
    taps = [(place, keeping(place)) for place in every]
    with torch.set_grad_enabled(grad or torch.is_grad_enabled()), opened(model, taps):
        out = model(input_ids, attention_mask, **inputs)
    idle = [name for name, found in asked.items() if not any(place in ran for place in found)]
    if idle:
        raise UsageError(f"names: {listing(idle)}: known, and nothing flowed by there in this run")
    return out, kept


@contextmanager
def patch(model: Model, changes: Mapping[str, Any]) -> Iterator[None]:
    """Within it, other values flow on from these places: a tensor, or what a function makes of it.

    A function is given a copy, and may write to it. In this thread alone. Names are those of
    `run_with_cache`; of several patches at one place the later is given what the earlier gave.
    """
    if not isinstance(changes, Mapping):
        raise UsageError(
            f"patch: expected {{name: value or function}}, found {type(changes).__name__}"
        )
    asked = find(model, changes, "patch")
    reached, called = set[str](), list[bool]()

    def changing(name: str, place: Place) -> Tap:
        value = changes[name]

        def tap(x: Any) -> Any:
            reached.add(name)
            # what is there may be a cache's, a parameter, or the stream that others read too
            new = value(_copy(x)) if callable(value) else value
            if _kind(new) != _kind(x):
                raise UsageError(f"patch: {place} is {_kind(x)}, and {_kind(new)} cannot stand in")
            return _like(x, new) if isinstance(x, tuple) else new

        return tap

    def whole(out: Any) -> Any:
        called.append(True)
        return out

    taps = [(place, changing(name, place)) for name, found in asked.items() for place in found]
    with opened(model, [*taps, (Place("", "out"), whole)]):
        yield
    if called and (idle := [name for name in asked if name not in reached]):
        raise UsageError(
            f"patch: {listing(idle)}: nothing flowed by there, so nothing was replaced"
        )


# --- names ---------------------------------------------------------------------------------------


def places(model: nn.Module) -> list[Place]:
    """All that have a name."""
    return [
        Place(name, what)
        for name, module in model.named_modules()
        if name and type(module).forward is not nn.Module.forward  # which a list of modules has
        for what in ("out", "in", *(HEADS if isinstance(module, Attention) else ()))
    ]


def find(model: nn.Module, names: Iterable[str], what: str) -> dict[str, list[Place]]:
    """The places that each shell pattern matches; those that match nothing are named, all of them.

    What stands behind the colon is asked for by name: without one it is what comes out.
    """
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if not isinstance(names, Iterable):
        raise UsageError(f"{what}: expected names, found {names!r}")
    names, known = list(names), places(model)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise UsageError(f"{what}: expected names, found {listing(map(repr, odd))}")
    found = {}
    for name in names:
        module, _, side = name.partition(":")
        found[name] = [
            place
            for place in known
            if fnmatchcase(place.module, module) and fnmatchcase(place.what, side or "out")
        ]
    if unknown := [name for name in found if not found[name]]:
        told = "; ".join(f"{name!r} matches nothing.{_near(name, known)}" for name in unknown)
        if model.is_prepared:
            told += " A prepared model has other parts: look into it as zoo.load gives it"
        raise UsageError(f"{what}: {told}")
    return found


def _near(name: str, known: Iterable[object]) -> str:
    """Names like this one, or all there are; those of several layers as one pattern."""
    exact = [str(place) for place in known]
    each = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", one) for one in exact))
    there = listing((one for one in each if ":" not in one), 12)
    return did_you_mean(name, each if "*" in name else exact) or f" There is {there}"


# --- taps ----------------------------------------------------------------------------------------

_LOCK = Lock()


class _Aside(local):
    busy = False  # what runs now, in this thread, is no part of the model's run


_ASIDE = _Aside()


@contextmanager
def opened(model: nn.Module, taps: Iterable[tuple[Place, Tap]]) -> Iterator[None]:
    """All that flows by at these places in this thread goes through the taps there."""
    owner = get_ident()

    def before(tap: Tap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if get_ident() != owner or not args:
                return None
            _refuse_compiler()
            return None if (new := tap(args[0])) is args[0] else (new, *args[1:])

        return hook

    def after(tap: Tap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if get_ident() != owner:
                return None
            _refuse_compiler()
            return None if (new := tap(out)) is out else new

        return hook

    with ExitStack() as stack:
        stack.enter_context(_uncompiled())
        for place, tap in taps:
            module = model.get_submodule(place.module)
            if place.what == "out":
                stack.callback(module.register_forward_hook(after(tap)).remove)
            elif place.what == "in":
                stack.callback(module.register_forward_pre_hook(before(tap)).remove)
            else:
                stack.enter_context(_attending(module, (owner, place.what, tap)))
        yield


class Watched:
    """Stands in for an `attend` and shows what each head has; many may look at once."""

    def __init__(self, plain: Attend) -> None:
        self.plain = plain
        self.taps: list[tuple[int, str, Tap]] = []  # each of a thread

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        _refuse_compiler()
        thread = get_ident()
        mine = [(what, tap) for owner, what, tap in list(self.taps) if owner == thread]

        def through(what: str, x: Tensor) -> Tensor:
            for at, tap in mine:
                x = tap(x) if at == what else x
            return x

        q, k, v = through("q", q), through("k", k), through("v", v)
        draws = _Draws(q)
        # first: what it makes once for all layers is part of the run, and is seen there
        heads = self.plain(q, k, v, mask, scale, dropout)
        if any(what == "pattern" for what, _ in mine):
            with draws.again():
                seen = self.pattern(q, k, v, mask, scale)
            pattern = through("pattern", seen)
            if pattern is not seen:
                v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                heads = F.dropout(pattern, dropout) @ v
        return through("heads", heads)

    def pattern(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """(b, h, s, t): what each key counts, read off by giving keys unit vectors for values.

        So it is exact whatever this `attend` does. As many at a time as a value is wide: kernels
        know no other widths.
        """
        (b, g, t, e), parts = v.shape, []
        keys = torch.arange(t, device=v.device)[:, None]
        _ASIDE.busy = True
        try:
            for at in range(0, t, e):
                unit = (keys == torch.arange(at, at + e, device=v.device)).to(v.dtype)
                parts.append(self.plain(q, k, unit.expand(b, g, t, e), mask, scale, 0.0))
        finally:
            _ASIDE.busy = False
        return torch.cat(parts, dim=-1)[..., :t]


class _Draws:
    """The random numbers that come next where `x` lies."""

    def __init__(self, x: Tensor) -> None:
        self.main = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within it they come a second time; afterwards it goes on as without it."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.main)
            set_device_states(self.devices, self.states)
            yield


@contextmanager
def _attending(module: Any, tap: tuple[int, str, Tap]) -> Iterator[None]:
    with _LOCK:
        if not isinstance(module.attend, Watched):
            module.attend = Watched(module.attend)
        module.attend.taps.append(tap)
    try:
        yield
    finally:
        with _LOCK:
            watched = module.attend
            watched.taps.remove(tap)
            if not watched.taps:
                module.attend = watched.plain


class _Uncompiled:
    """How many look inside, and what puts the compiler back when none does."""

    count = 0
    stance: Any = None


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled code would not see who looks: within this it runs as it is written."""
    with _LOCK:
        _Uncompiled.count += 1
        # who has compiled nothing need not wait for the compiler to be imported
        if _Uncompiled.stance is None and "torch._dynamo" in sys.modules:
            _Uncompiled.stance = torch.compiler.set_stance("force_eager")
            _Uncompiled.stance.__enter__()
    try:
        yield
    finally:
        with _LOCK:
            _Uncompiled.count -= 1
            if not _Uncompiled.count and _Uncompiled.stance is not None:
                _Uncompiled.stance.__exit__(None, None, None)
                _Uncompiled.stance = None


def _refuse_compiler() -> None:
    if torch.compiler.is_compiling():
        raise UsageError("what is being looked into cannot be compiled: compile it before or after")


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype)[6:]} {list(x.shape)} on {x.device}"
    if isinstance(x, tuple):
        return f"({', '.join(map(_kind, x))})"
    return type(x).__name__


def _copy(x: Any) -> Any:
    if isinstance(x, tuple):
        return _like(x, map(_copy, x))
    return x.clone() if isinstance(x, Tensor) else x


def _like(x: Any, values: Iterable[Any]) -> Any:
    """A tuple of the kind that `x` is."""
    return x._make(values) if hasattr(x, "_make") else tuple(values)


# --- the lens ------------------------------------------------------------------------------------


def logit_lens(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    lazy: bool = False,
    **inputs: Any,
) -> Any:
    """(layers + 1, b, s, v): what the model would say of what goes into each block, and at last.

    The last entry is its output. `lazy` gives one entry after the other, to spare memory.
    """
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    head = model.config.head
    if head in (*model.headless, "pooler"):
        raise UsageError(
            f"logit_lens: a model with the head {head!r} says nothing of its states. Load it with "
            "a head that does"
        )
    if inputs.get("cache") is not None:
        raise UsageError("logit_lens: reads a text as a whole. Give it all tokens, and no cache")
    entries = _lens(model, input_ids, attention_mask, inputs)
    if lazy:
        return entries
    said = list(entries)
    if isinstance(said[0], Tensor):
        return torch.stack(said)
    return _like(said[0], map(torch.stack, zip(*said, strict=True)))


@torch.no_grad()
def _lens(model: Model, ids: Tensor, mask: Tensor | None, inputs: dict[str, Any]) -> Iterator[Any]:
    stack = "decoder." if hasattr(model, "decoder") else ""
    count = len(model.get_submodule(f"{stack}blocks"))  # type: ignore[arg-type]
    states, last = list[Tensor](), list[Tensor]()

    def entering(x: Tensor) -> Tensor:
        states.append(x)
        return x

    def leaving(x: Tensor) -> Tensor:
        last[:] = [x]
        return x

    taps = [(Place(f"{stack}blocks.{n}", "in"), entering) for n in range(count)]
    with opened(model, [*taps, (Place(f"{stack}blocks.{count - 1}", "out"), leaving)]):
        model(ids, mask, **inputs)
    for state in [*states, *last]:
        yield _reader(model, state, count)(ids, mask, **inputs)


class _Given(nn.Module):
    """Says the same whatever it is given."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def forward(self, *args: Any) -> Tensor:
        return self.state


def _reader(model: Model, state: Tensor, count: int) -> Any:
    """The same model with this in the place of all that its blocks make: its end, as it is."""
    blocks = nn.ModuleList(_Given(state) for _ in range(count))
    if not hasattr(model, "decoder"):
        return _with(model, blocks=blocks)
    return _with(model, encoder=_Given(state), decoder=_with(model.decoder, blocks=blocks))


def _with(module: Any, **others: nn.Module) -> Any:
    """A second module of the same parts, but for these; nothing is copied."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _modules={**module._modules, **others})
    twin.__dict__.pop("_compiled_call_impl", None)
    return twin
