"""Interpretability: record activations, patch them, and read the residual stream (logit lens).

A hook point is named by its module: `blocks.3.mlp.down` is the module's output. A suffix after a
colon names another one: `:in` is its input, and attention has `:q`, `:k`, `:v`, `:pattern` and
`:heads`.
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

HookFunction = Callable[[Any], Any]  # takes an activation, and returns the one to go on with
HEADS = ("q", "k", "v", "pattern", "heads")  # of attention, head by head


class HookPoint(NamedTuple):
    """A named activation: a module, and which of its activations."""

    module: str
    what: str  # out, in, or one of HEADS

    def __str__(self) -> str:
        return self.module if self.what == "out" else f"{self.module}:{self.what}"


class Activations(dict[str, Any]):
    """Recorded activations by name, in the order of the run; a second one is `name@2`."""

    def __missing__(self, name: str) -> NoReturn:
        raise UsageError(f"{name!r} was not recorded.{_near(name, self)}")


def run_with_cache(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    names: str | Iterable[str] = "*",
    *,
    grad: bool = False,
    **inputs: Any,
) -> tuple[Any, Activations]:
    """Run a model and record its activations.

    Nothing is copied. Without `grad`, activations are detached from the graph.

    Args:
        model: any model of zoo's, as zoo.load returns it.
        input_ids: (b, s) token ids.
        attention_mask: (b, s), 1 at real tokens.
        names: one or more names of hook points, as shell patterns; `*` matches dots too. A name
            without a colon is a module's output.
        grad: keep the graph; after `backward` each activation has its gradient in `.grad`.
        **inputs: further arguments of the model's forward.

    Returns:
        (output, activations): what the model returns, and a dict of activations by name.

    Raises:
        UsageError: a name matches no hook point, or none that was used in this run.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> out, activations = model.run_with_cache(ids, names=["*.attn:pattern", "blocks.*.mlp"])
        >>> activations["blocks.0.attn:pattern"].shape[-2:]
        torch.Size([3, 3])
    """
    if grad and model.is_prepared:
        raise UsageError("grad: a prepared model has no gradients. Use it as zoo.load returns it")
    requested = match_names(model, [names] if isinstance(names, str) else names, "names")
    activations, moving = Activations(), inputs.get("cache") is not None
    ran: dict[HookPoint, int] = {}

    def recording(point: HookPoint) -> HookFunction:
        def one(x: Any) -> Any:
            if isinstance(x, tuple):
                return _like(x, map(one, x))
            if not isinstance(x, Tensor):
                return x
            if not grad:
                # keys and values are views of the KV cache, which is written to again
                return x.detach().clone() if moving and point.what in ("k", "v") else x.detach()
            if x.is_floating_point():
                x.requires_grad_() if x.is_leaf else x.retain_grad()
            return x

        def hook(x: Any) -> Any:
            if not _REPLAY.active:
                ran[point] = ran.get(point, 0) + 1
                name = str(point) if ran[point] == 1 else f"{point}@{ran[point]}"
                activations[name] = one(x)
            # the kernel does not compute with the pattern; a view makes the heads depend on it
            return x.view_as(x) if grad and point.what == "pattern" else x

        return hook

    every = dict.fromkeys(point for points in requested.values() for point in points)
    hooks = [(point, recording(point)) for point in every]
    with torch.set_grad_enabled(grad or torch.is_grad_enabled()), hooked(model, hooks):
        out = model(input_ids, attention_mask, **inputs)
    idle = [name for name, points in requested.items() if not any(point in ran for point in points)]
    if idle:
        raise UsageError(f"names: {listing(idle)}: hook points that were not used in this run")
    return out, activations


@contextmanager
def patch(model: Model, changes: Mapping[str, Any]) -> Iterator[None]:
    """Patch activations while the context is open (activation patching), in this thread only.

    Args:
        model: any model of zoo's, as zoo.load returns it.
        changes: by name of a hook point (as in `run_with_cache`), a tensor that replaces the
            activation, or a function that takes a copy of it and returns the replacement. Of
            several patches at one point, the later takes what the earlier returned.

    Raises:
        UsageError: a name matches no hook point, a replacement has another shape or dtype, or a
            patch was never applied although the model ran.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> with torch.no_grad(), model.patch({"blocks.0.mlp": torch.zeros_like}):
        ...     patched = model(ids)
        >>> patched.shape == model(ids).shape
        True
    """
    if not isinstance(changes, Mapping):
        raise UsageError(
            f"patch: expected {{name: value or function}}, found {type(changes).__name__}"
        )
    requested = match_names(model, changes, "patch")
    reached, called = set[str](), list[bool]()

    def changing(name: str, point: HookPoint) -> HookFunction:
        value = changes[name]

        def hook(x: Any) -> Any:
            reached.add(name)
            # a copy: the activation may be part of the cache, a parameter, or the residual stream
            new = value(_copy(x)) if callable(value) else value
            if _kind(new) != _kind(x):
                raise UsageError(f"patch: {point}: expected {_kind(x)}, found {_kind(new)}")
            return _like(x, new) if isinstance(x, tuple) else new

        return hook

    def whole(out: Any) -> Any:
        called.append(True)
        return out

    hooks = [
        (point, changing(name, point)) for name, points in requested.items() for point in points
    ]
    with hooked(model, [*hooks, (HookPoint("", "out"), whole)]):
        yield
    if called and (idle := [name for name in requested if name not in reached]):
        raise UsageError(f"patch: {listing(idle)}: not used in this run, so nothing was replaced")


# --- names ---------------------------------------------------------------------------------------


def hook_points(model: nn.Module) -> list[HookPoint]:
    """All hook points of a model."""
    return [
        HookPoint(name, what)
        for name, module in model.named_modules()
        if name and type(module).forward is not nn.Module.forward  # which a list of modules has
        for what in ("out", "in", *(HEADS if isinstance(module, Attention) else ()))
    ]


def match_names(model: nn.Module, names: Iterable[str], what: str) -> dict[str, list[HookPoint]]:
    """The hook points that each shell pattern matches; refuse all patterns that match none.

    A pattern without a colon matches outputs only.
    """
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    if not isinstance(names, Iterable):
        raise UsageError(f"{what}: expected names, found {names!r}")
    names, points = list(names), hook_points(model)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UsageError(f"{what}: expected names, found {listing(map(repr, wrong))}")
    matches = {}
    for name in names:
        module, _, side = name.partition(":")
        matches[name] = [
            point
            for point in points
            if fnmatchcase(point.module, module) and fnmatchcase(point.what, side or "out")
        ]
    if unmatched := [name for name in matches if not matches[name]]:
        problem = "; ".join(f"{name!r} matches nothing.{_near(name, points)}" for name in unmatched)
        if model.is_prepared:
            problem += " A prepared model has other parts: use the model as zoo.load returns it"
        raise UsageError(f"{what}: {problem}")
    return matches


def _near(name: str, points: Iterable[object]) -> str:
    """A hint: names like this one, or all names, with the numbers of layers as `*`."""
    exact = [str(point) for point in points]
    each = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", one) for one in exact))
    all_names = listing((one for one in each if ":" not in one), 12)
    return did_you_mean(name, each if "*" in name else exact) or f" There is {all_names}"


# --- hooks ----------------------------------------------------------------------------------------

_LOCK = Lock()


class _Replay(local):
    active = False  # this thread computes attention again, which is no part of the model's run


_REPLAY = _Replay()


@contextmanager
def hooked(model: nn.Module, hooks: Iterable[tuple[HookPoint, HookFunction]]) -> Iterator[None]:
    """Call hook functions at these points while the context is open, in this thread only."""
    owner = get_ident()

    def before(function: HookFunction) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if get_ident() != owner or not args:
                return None
            _refuse_compiler()
            return None if (new := function(args[0])) is args[0] else (new, *args[1:])

        return hook

    def after(function: HookFunction) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if get_ident() != owner:
                return None
            _refuse_compiler()
            return None if (new := function(out)) is out else new

        return hook

    with ExitStack() as stack:
        stack.enter_context(_without_compiler())
        for point, hook in hooks:
            module = model.get_submodule(point.module)
            if point.what == "out":
                stack.callback(module.register_forward_hook(after(hook)).remove)
            elif point.what == "in":
                stack.callback(module.register_forward_pre_hook(before(hook)).remove)
            else:
                stack.enter_context(_hooked_attention(module, (owner, point.what, hook)))
        yield


class HookedAttend:
    """Wraps an `attend` function and calls hooks per head; several threads may have hooks."""

    def __init__(self, plain: Attend) -> None:
        self.plain = plain
        self.hooks: list[tuple[int, str, HookFunction]] = []  # (thread, point, function)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float
    ) -> Tensor:
        _refuse_compiler()
        thread = get_ident()
        mine = [(what, hook) for owner, what, hook in list(self.hooks) if owner == thread]

        def through(what: str, x: Tensor) -> Tensor:
            for at, hook in mine:
                x = hook(x) if at == what else x
            return x

        q, k, v = through("q", q), through("k", k), through("v", v)
        state = _RandomState(q)
        # first: tensors that are computed once for all layers belong to the model's own run
        heads = self.plain(q, k, v, mask, scale, dropout)
        if any(what == "pattern" for what, _ in mine):
            with state.replay():
                computed = self.pattern(q, k, v, mask, scale)
            pattern = through("pattern", computed)
            if pattern is not computed:
                v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                heads = F.dropout(pattern, dropout) @ v
        return through("heads", heads)

    def pattern(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """(b, h, s, t) attention weights, measured by attending to unit vectors as values.

        This is exact for any `attend` function. Kernels take values of the same width only, so
        that many keys are measured at a time.
        """
        (b, g, t, e), parts = v.shape, []
        keys = torch.arange(t, device=v.device)[:, None]
        _REPLAY.active = True
        try:
            for at in range(0, t, e):
                unit = (keys == torch.arange(at, at + e, device=v.device)).to(v.dtype)
                parts.append(self.plain(q, k, unit.expand(b, g, t, e), mask, scale, 0.0))
        finally:
            _REPLAY.active = False
        return torch.cat(parts, dim=-1)[..., :t]


class _RandomState:
    """The state of the random generators of the CPU and of `x`'s device."""

    def __init__(self, x: Tensor) -> None:
        self.main = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Draw the same numbers again while the context is open; then continue as before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.main)
            set_device_states(self.devices, self.states)
            yield


@contextmanager
def _hooked_attention(module: Any, hook: tuple[int, str, HookFunction]) -> Iterator[None]:
    with _LOCK:
        if not isinstance(module.attend, HookedAttend):
            module.attend = HookedAttend(module.attend)
        module.attend.hooks.append(hook)
    try:
        yield
    finally:
        with _LOCK:
            watched = module.attend
            watched.hooks.remove(hook)
            if not watched.hooks:
                module.attend = watched.plain


class _Compiler:
    """The number of open hook contexts, and the compiler's stance to restore after the last."""

    count = 0
    stance: Any = None


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Run compiled models eagerly: compiled code would not call the hooks."""
    with _LOCK:
        _Compiler.count += 1
        # if nothing was compiled, do not import the compiler, which takes seconds
        if _Compiler.stance is None and "torch._dynamo" in sys.modules:
            _Compiler.stance = torch.compiler.set_stance("force_eager")
            _Compiler.stance.__enter__()
    try:
        yield
    finally:
        with _LOCK:
            _Compiler.count -= 1
            if not _Compiler.count and _Compiler.stance is not None:
                _Compiler.stance.__exit__(None, None, None)
                _Compiler.stance = None


def _refuse_compiler() -> None:
    if torch.compiler.is_compiling():
        raise UsageError("a model with hooks cannot be compiled: compile it before or after")


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
    """A tuple of the same type as `x`."""
    return x._make(values) if hasattr(x, "_make") else tuple(values)


# --- the logit lens ------------------------------------------------------------------------------


def logit_lens(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    lazy: bool = False,
    **inputs: Any,
) -> Any:
    """Apply the model's head to the residual stream before each block and after the last.

    Args:
        model: any model with a head, as zoo.load returns it.
        input_ids: (b, s) token ids.
        attention_mask: (b, s), 1 at real tokens.
        lazy: return an iterator over the entries, to save memory.
        **inputs: further arguments of the model's forward, except a cache.

    Returns:
        (layers + 1, b, s, v) logits. The last entry is the model's own output.

    Raises:
        UsageError: the model has no head, or a cache is passed.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> logits = model.logit_lens(ids)
        >>> len(logits) == model.config.layers + 1
        True
        >>> torch.equal(logits[-1], model(ids))
        True
    """
    if not isinstance(model, Model):
        raise UsageError(f"expected a model of zoo's, found {type(model).__name__}")
    head = model.config.head
    if head in (*model.headless, "pooler"):
        raise UsageError(
            f"logit_lens: a model with the head {head!r} has no logits. Load it with a head that "
            "has"
        )
    if inputs.get("cache") is not None:
        raise UsageError("logit_lens: expected all tokens of a text and no cache, found a cache")
    entries = _lens_entries(model, input_ids, attention_mask, inputs)
    if lazy:
        return entries
    results = list(entries)
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return _like(results[0], map(torch.stack, zip(*results, strict=True)))


@torch.no_grad()
def _lens_entries(
    model: Model, ids: Tensor, mask: Tensor | None, inputs: dict[str, Any]
) -> Iterator[Any]:
    stack = "decoder." if hasattr(model, "decoder") else ""
    count = len(model.get_submodule(f"{stack}blocks"))  # type: ignore[arg-type]
    states, last = list[Tensor](), list[Tensor]()

    def entering(x: Tensor) -> Tensor:
        states.append(x)
        return x

    def leaving(x: Tensor) -> Tensor:
        last[:] = [x]
        return x

    hooks = [(HookPoint(f"{stack}blocks.{n}", "in"), entering) for n in range(count)]
    with hooked(model, [*hooks, (HookPoint(f"{stack}blocks.{count - 1}", "out"), leaving)]):
        model(ids, mask, **inputs)
    for state in [*states, *last]:
        yield _from_state(model, state, count)(ids, mask, **inputs)


class _Constant(nn.Module):
    """A module that always returns the same state."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def forward(self, *args: Any) -> Tensor:
        return self.state


def _from_state(model: Model, state: Tensor, count: int) -> Any:
    """The model with its blocks replaced by one state: what is left is its final norm and head."""
    blocks = nn.ModuleList(_Constant(state) for _ in range(count))
    if not hasattr(model, "decoder"):
        return _replaced(model, blocks=blocks)
    return _replaced(
        model, encoder=_Constant(state), decoder=_replaced(model.decoder, blocks=blocks)
    )


def _replaced(module: Any, **others: nn.Module) -> Any:
    """A second module with the same parts, except these; nothing is copied."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _modules={**module._modules, **others})
    twin.__dict__.pop("_compiled_call_impl", None)
    return twin
