"""Two models on the same tokens: how they are run, and what flows at each place of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.cache import Cache
from zoo.diagnosis.diff.hooks import SIDES, Call, Record, Side, recorded
from zoo.diagnosis.diff.matching import Match, Matching
from zoo.parity.checks import SYMMETRIC, part, real
from zoo.parity.truth import Inputs

OUTPUT = Match("", ("",), {}, ())

Place = tuple[str, Side, int]  # a native module, a side of it, and which of its calls
Rows = list[list[Tensor]]  # of each row without its padding, every output
# at once, behind a mask, in parts, and with padding tokens that no mask hides
WAYS = ("whole", "padded", "cached", "unmasked")


@dataclass(frozen=True)
class Way:
    """How the tokens are fed to the native model: at once, padded, or in parts with a cache."""

    name: str  # one of WAYS
    inputs: Inputs

    def native(self) -> list[tuple[Inputs, dict[str, Any]]]:
        """What it is given in turn."""
        if self.name != "cached":
            return [(self.inputs, {})]
        tokens = self.inputs.positions.ids.shape[1]
        cut, more = self.cut, {"cache": Cache(tokens)}
        return [(part(self.inputs, *ends), more) for ends in ((0, cut), (cut, tokens))]

    @property
    def cut(self) -> int:
        """How many tokens come first where they come in two parts."""
        return 2 * self.inputs.positions.ids.shape[1] // 3

    def other(self) -> list[Inputs]:
        """What the other model is given in turn: a row at a time, and no padding."""
        return [self.inputs.row(n) for n in range(len(self.inputs.ids))]

    def by_row(self, parts: Rows) -> Rows:
        """The native model's outputs, part by part, as the other's come."""
        # what has no places is read at the last one
        whole = [
            torch.cat(xs, dim=1) if xs[0].dim() > 2 else xs[-1] for xs in zip(*parts, strict=True)
        ]
        if self.name == "padded":
            return [[real(x, self.inputs, n) for x in whole] for n in range(len(self.inputs.ids))]
        return [[x[n : n + 1] for x in whole] for n in range(len(self.inputs.ids))]

    def tokens(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """(tokens, features) of those that are no padding: so many a row; None if unknown."""
        batch, total = len(self.inputs.ids), sum(counts)
        if self.name == "padded":
            for inputs in (self.inputs, self.inputs.answer):
                mask = None if inputs is None else inputs.mask
                if mask is None or mask.sum(1).tolist() != list(counts):
                    continue
                if parts[0].numel() == mask.numel() * parts[0].shape[-1]:
                    return parts[0].reshape(*mask.shape, -1)[mask.bool()]
        elif len(parts) > 1 and sum(len(flat(x)) for x in parts) == total:
            whole = [x.reshape(batch, -1, x.shape[-1]) for x in parts]
            return flat(torch.cat(whole, dim=1))
        elif len(parts) > 1 and sum(len(flat(x)) for x in parts) == counts[0]:
            return torch.cat([flat(x) for x in parts])  # one for all rows
        last = flat(parts[-1])
        return last if len(last) in (total, batch, counts[0]) else None


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Heard:
    """One model run in turns: what flowed through its modules, and its outputs."""

    records: list[Record]
    outputs: Rows
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of parameters


def listen(
    module: nn.Module,
    names: Sequence[str],
    turns: Sequence[Callable[[], list[Tensor]]],
    pull: Callable[[Rows], Tensor] | None = None,
) -> Heard:
    """`pull` makes of all outputs the number whose gradients are taken."""
    records, outputs = list[Record](), Rows()
    with nullcontext() if pull else torch.no_grad():
        for turn in turns:
            with recorded(module, names, backward=pull is not None) as record:
                outputs.append(turn())
            records.append(record)
    if pull is not None:
        pull(outputs).backward()
        named = module.named_parameters(remove_duplicate=False)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
        module.zero_grad(set_to_none=True)
        return Heard(records, outputs, gradients)
    return Heard(records, outputs)


def pulled(rows: Rows) -> Tensor:
    """A number that every output has its part in, the same for equal outputs."""
    random = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=random, dtype=torch.float64)
    parts = [(x * draw(x.shape).to(x.dtype)).sum() for row in rows for x in row]
    return torch.stack(parts).sum()


# --- what flows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """What flows at one place through both: (tokens, features), theirs in the order of ours."""

    at: float  # when, in the native model
    match: Match
    side: Side
    call: int  # of how often the module ran
    ours: Tensor | None = None
    theirs: Tensor | None = None
    floor: Tensor | None = None  # theirs in the narrower dtype
    counts: tuple[int, ...] = ()  # tokens of each row there

    @property
    def place(self) -> Place:
        return self.match.native, self.side, self.call

    @property
    def shared(self) -> bool:
        """Whether it is one for all rows."""
        count = None if self.ours is None else len(self.ours)
        return count is not None and count not in (sum(self.counts), len(self.counts))

    @property
    def comparable(self) -> bool:
        there = self.ours is not None and self.theirs is not None
        return there and self.ours.shape == self.theirs.shape  # type: ignore[union-attr]


def flows(
    matching: Matching,
    way: Way,
    ours: Sequence[Record],
    theirs: Sequence[Record],
    floor: Sequence[Record],
    back: bool,
) -> list[Flow]:
    """All that can be compared, in the order in which the native model ran; or its gradients."""
    result: list[Flow] = []
    ran = dict[Place, int]()  # when, forward
    for match in matching.matches.values():
        parts = [record.get(match.native, []) for record in ours]
        looks, count = {one.looked_up for one in parts[0]}, len(parts[0])
        others = [[_of(match, record, looks) for record in records] for records in (theirs, floor)]
        for k, first in enumerate(parts[0]):
            # of an encoder nothing runs in a later part
            mine = [p[k - count] for p in parts if count - k <= len(p)]
            for side in SIDES:
                if (first.looked_up and side == "in") or not (match.whole or side == "in"):
                    continue
                calls = (mine, _kth(others[0], k), _kth(others[1], k))
                here, there, below = (
                    [None if one is None else one.what(side, back) for one in ones]
                    for ones in calls
                )
                if back and all(x is None for x in (*here, *there)):
                    continue
                flow = Flow(first.when(side, back), match, side, k)
                if all(x is not None for x in (*here, *there, *below)):
                    flow = _flow(flow, way, here, there, below, back)
                    if flow.ours is None or (back and flow.shared and not first.looked_up):
                        continue  # rows of a table, of which each takes what it needs
                elif back and not _alike(flow, way, *calls):
                    continue
                if match.plain or flow.comparable:
                    result.append(flow)
                    ran[flow.place] = first.when(side, back=False)
    return sorted(_dated(result, ran) if back else result, key=lambda flow: flow.at)


def _dated(result: list[Flow], ran: Mapping[Place, int]) -> list[Flow]:
    """A gradient that never came stands where it was due: before those of all that ran sooner."""
    came = [(ran[flow.place], flow.at) for flow in result if flow.at]
    result.sort(key=lambda flow: -ran[flow.place])
    due = (min((at for n, at in came if n < ran[f.place]), default=math.inf) - 0.5 for f in result)
    return [f if f.at else replace(f, at=at) for f, at in zip(result, due, strict=True)]


def _alike(flow: Flow, way: Way, *calls: Sequence[Call | None]) -> bool:
    """Whether values can be compared there, where gradients of one side did not come."""
    here, there, below = (
        [one.values[flow.side] for one in ones if one is not None] for ones in calls
    )
    return not (here and there) or _flow(flow, way, here, there, below, False).ours is not None


def _of(match: Match, record: Record, looks: Collection[bool]) -> list[Call]:
    """The other's calls of the same kind: a tied array may be looked up here and multiply there."""
    calls = [one for name in match.others for one in record[name] if one.looked_up in looks]
    return sorted(calls, key=lambda one: one.begun)


def _kth(rows: Sequence[Sequence[Call]], k: int) -> list[Call | None]:
    return [calls[k] if k < len(calls) else None for calls in rows]


def _flow(
    flow: Flow, way: Way, here: list[Any], there: list[Any], below: list[Any], back: bool
) -> Flow:
    order = flow.match.into if flow.side == "in" else flow.match.out
    counts = [len(flat(x)) for x in there]
    ours = way.tokens(here, counts)
    theirs, floor = [flat(x) for x in there], [flat(x) for x in below]
    if len({x.shape[-1] for x in theirs}) > 1:  # tokens are no rows of it
        return flow
    if ours is not None and len(ours) < sum(counts) and way.name == "unmasked":
        return flow  # some token of each row, and which is to be seen by what comes of it
    if ours is not None and len(ours) == len(counts) < sum(counts):  # it reads the last token alone
        theirs, floor = [x[-1:] for x in theirs], [x[-1:] for x in floor]
    elif ours is not None and len(ours) == counts[0] < sum(counts):  # it is the same for all rows
        if back and len(set(counts)) > 1:
            return flow  # of a table each row takes what it needs
        theirs, floor = (
            [torch.stack(xs).sum(0)] if back and xs else xs[:1] for xs in (theirs, floor)
        )
    ordered = [
        torch.cat(xs if order is None else [x[:, order] for x in xs]) if xs else None
        for xs in (theirs, floor)
    ]
    return replace(flow, ours=ours, theirs=ordered[0], floor=ordered[1], counts=tuple(counts))


def outputs_of(ours: Rows, theirs: Rows, floor: Rows) -> list[Flow]:
    """The models' own."""
    result = []
    for k in range(max(len(ours[0]), len(theirs[0]))):
        flow = Flow(math.inf, OUTPUT, "out", k)
        if k < len(ours[0]) and k < len(theirs[0]):
            here, there, below = (
                torch.cat([row[k].flatten() for row in rows])[None] if rows else None
                for rows in (ours, theirs, floor)
            )
            flow = replace(flow, ours=here, theirs=there, floor=below)
        result.append(flow)
    return result


def learnt(
    matching: Matching,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    floor: Mapping[str, Tensor],
) -> list[Flow]:
    """The gradients of parameters, each once."""
    result, owners = [], {n: match.parameters for n, match in matching.matches.items()}
    for name, _ in matching.model.named_parameters():
        expected = matching.expected(name, theirs.__getitem__)
        below = matching.expected(name, floor.__getitem__) if floor else None
        if expected is None or expected.shape != ours[name].shape:
            continue
        others = tuple(owners.get(name.rpartition(".")[0], {}).get(name, ()))
        match = Match(name, others, {name: others}, ())
        mine, there, narrow = (
            None if x is None else x.reshape(-1, x.shape[-1]) for x in (ours[name], expected, below)
        )
        result.append(Flow(math.inf, match, "out", 0, mine, there, narrow))
    # what is zero by symmetry holds rounding alone
    sizes = [0.0 if f.theirs is None else float(f.theirs.abs().max()) for f in result]
    least = SYMMETRIC * max(sizes, default=0)
    return [f for f, size in zip(result, sizes, strict=True) if size > least]
