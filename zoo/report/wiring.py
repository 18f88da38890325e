"""A model's wiring, recorded while it runs: what each part reads and which outputs are added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

MANY = 12  # a part with more parameters shows their number and not their shapes
ADDS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


@dataclass(frozen=True)
class Node:
    """A part that ran, a sum, or the input; `reads` are indices of other nodes."""

    label: str
    about: str
    reads: tuple[int, ...]

    @property
    def is_round(self) -> bool:
        """Whether it is drawn as a circle: a sum or the input."""
        return self.label in ("+", "in")


class WiringTracer(TorchDispatchMode):
    """Tracks tensors between the parts of one module, and nothing inside a part."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.parts, self.depth = parts, 0
        self._from: dict[int, tuple[int, ...]] = {}  # address of a tensor -> nodes that made it
        self._kept: list[Tensor] = []  # keeps addresses from being reused

    def made(self, x: Any, by: tuple[int, ...]) -> None:
        """Record which nodes made the tensors in `x`."""
        for tensor in _tensors(x):
            self._from[tensor.data_ptr()] = by
            self._kept.append(tensor)

    def makers(self, *values: Any) -> tuple[int, ...]:
        """The nodes that made these values."""
        makers_of = (self._from.get(x.data_ptr(), ()) for value in values for x in _tensors(value))
        return tuple(dict.fromkeys(n for each in makers_of for n in each))

    def add(self, label: str, about: str, reads: tuple[int, ...]) -> tuple[int, ...]:
        """Append a node; returns its index as a tuple of makers."""
        self.nodes.append(Node(label, about, reads))
        return (len(self.nodes) - 1,)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth == 0 and (makers := self.makers(*args)):
            if func in ADDS and len(makers) > 1 and args[0].is_floating_point():
                makers = self.add("+", "", makers)
            self.made(out, makers)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record all that runs inside, without gradients."""
        handles = []
        for name, part in self.parts.items():
            handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(part.register_forward_hook(self._leave(name, part), with_kwargs=True))
        try:
            with self, torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, name: str, part: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                reads = self.makers(*args, *kwargs.values())
                self.made(out, self.add(name, about(part), reads))

        return hook


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for each in x for t in _tensors(each)] if isinstance(x, list | tuple) else []


def about(part: nn.Module) -> str:
    """The class of a part and the shapes of its parameters; their number if there are many."""
    if len([*part.parameters()]) > MANY:
        return f"{type(part).__name__}, {sum(p.numel() for p in part.parameters()):,} parameters"
    shapes = [
        f"{name.removesuffix('weight').rstrip('.')} {'×'.join(map(str, p.shape))}".strip()
        for name, p in part.named_parameters()
        if not name.endswith("bias")
    ]
    return ", ".join([type(part).__name__, *shapes])


def wiring(model: nn.Module, module: nn.Module, run: Callable[[], object]) -> list[Node]:
    """The nodes between the children of `module`, which is `model` or a part of it."""
    parts = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            parts.update({f"{name}.{n}": each for n, each in enumerate(child)})
        elif not isinstance(child, nn.Dropout):
            parts[name] = child
    tracer = WiringTracer(parts)

    def begin(_: nn.Module, args: Any) -> None:
        if not tracer.nodes and args:
            tracer.made(args[0], tracer.add("in", "", ()))

    handle = module.register_forward_pre_hook(begin)
    try:
        with tracer.watching():
            run()
    finally:
        handle.remove()
    return tracer.nodes


def layers_joined(nodes: list[Node]) -> list[Node]:
    """The same nodes with all layers merged into one."""
    count = sum(node.label.startswith("blocks.") for node in nodes)
    kept, moved = list[Node](), dict[int, int]()
    for n, node in enumerate(nodes):
        layer = node.label.startswith("blocks.")
        if layer and any(each.label.startswith("blocks") for each in kept):
            moved[n] = next(k for k, each in enumerate(kept) if each.label.startswith("blocks"))
            continue
        moved[n] = len(kept)
        reads = tuple(dict.fromkeys(moved[r] for r in node.reads))
        about = type_of(node) if layer else node.about
        kept.append(Node(f"blocks × {count}" if layer else node.label, about, reads))
    return kept


def type_of(node: Node) -> str:
    """The class name of the part that a node stands for."""
    return node.about.partition(",")[0]


# --- drawing -------------------------------------------------------------------------------------

_BOX, _STEP, _LEFT, _WIDE = 34, 54, 44, 250


def svg(nodes: list[Node], title: str) -> str:
    """The nodes from top to bottom; a wire that skips a part passes it on the left."""
    tall = _STEP * len(nodes) + 10
    lines = [
        f'<svg viewBox="0 0 {_LEFT + _WIDE + 6} {tall}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{_LEFT + _WIDE + 6}px">'
    ]
    middle = _LEFT + _WIDE // 2
    for n, node in enumerate(nodes):
        top = 6 + n * _STEP
        for read in node.reads:
            other = nodes[read]
            below = 6 + read * _STEP + _high(other)
            if read == n - 1:
                lines.append(f'<path class="wire" d="M{middle} {below}V{top}"/>')
                continue
            begin, end = (middle - 12 if each.is_round else _LEFT for each in (other, node))
            start, into = below - _high(other) / 2, top + _high(node) / 2
            aside = max(6, _LEFT - 9 * (n - read))
            lines.append(f'<path class="wire" d="M{begin} {start}H{aside}V{into}H{end}"/>')
        lines += _shape(node, middle, top)
    return "".join([*lines, "</svg>"])


def _shape(node: Node, x: int, top: int) -> Iterator[str]:
    if node.is_round:
        sign = "+" if node.label == "+" else "x"
        yield f'<circle class="node" cx="{x}" cy="{top + 12}" r="12"/>'
        yield f'<text x="{x}" y="{top + 16}" text-anchor="middle">{sign}</text>'
        return
    size = f'width="{_WIDE}" height="{_BOX}" rx="6"'
    yield f'<rect class="node" x="{_LEFT}" y="{top}" {size}/>'
    yield f'<text x="{x}" y="{top + 15}" text-anchor="middle">{escape(node.label)}</text>'
    about = node.about if len(node.about) <= 46 else f"{node.about[:45]}…"
    yield f'<text class="small" x="{x}" y="{top + 28}" text-anchor="middle">{escape(about)}</text>'


def _high(node: Node) -> int:
    return 24 if node.is_round else _BOX
