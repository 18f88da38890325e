"""What flows through a model's modules while it runs, and back through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from torch import Tensor, nn

Side = Literal["in", "out"]
SIDES: tuple[Side, ...] = ("in", "out")


@dataclass
class Call:
    """One time a module ran: what went in and came out, and when."""

    begun: int
    values: dict[Side, Tensor]
    ended: int = 0
    looked_up: bool = False  # what went in are numbers of rows
    gradients: dict[Side, Tensor] = field(default_factory=dict)
    reached: dict[Side, int] = field(default_factory=dict)  # when its gradient came

    def what(self, side: Side, back: bool) -> Tensor | None:
        return self.gradients.get(side) if back else self.values[side]

    def when(self, side: Side, back: bool) -> int:
        if back:
            return self.reached.get(side, 0)
        return self.begun if side == "in" else self.ended


Record = dict[str, list[Call]]  # module -> its calls


@contextmanager
def recorded(module: nn.Module, names: Sequence[str], backward: bool = False) -> Iterator[Record]:
    """What flows through the modules called so, and their gradients if there is a backward."""
    record: Record = {name: [] for name in names}
    clock, running, handles = count(1).__next__, dict[str, list[Call]](), list[Any]()
    places = dict[int, tuple[Tensor, list[tuple[Call, Side]]]]()  # at which each tensor lies

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            assert tensor is not None, name
            one = Call(clock(), {}, looked_up=not tensor.is_floating_point())
            keep(one, "in", tensor)
            running.setdefault(name, []).append(one)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            one = running[name].pop()
            one.ended = clock()
            keep(one, "out", out if isinstance(out, Tensor) else next(iter(out)))
            record[name].append(one)

        return hook

    def keep(one: Call, side: Side, x: Tensor) -> None:
        one.values[side] = x.detach().clone()
        if backward and x.requires_grad:
            if id(x) not in places:
                places[id(x)] = x, []
                x.register_hook(lambda gradient: came(places[id(x)][1], gradient))
            places[id(x)][1].append((one, side))

    def came(calls: list[tuple[Call, Side]], gradient: Tensor) -> None:
        # of what one module alone is given, that module's gradient is the first
        if sum(side == "in" for _, side in calls) == 1:
            calls = sorted(calls, key=lambda place: place[1])
        for one, side in calls:
            one.gradients[side], one.reached[side] = gradient.detach().clone(), clock()

    modules = dict(module.named_modules())
    for name in names:
        handles.append(modules[name].register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(modules[name].register_forward_hook(after(name), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
