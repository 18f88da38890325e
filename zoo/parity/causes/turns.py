"""What may be otherwise in an attention: each turn is tried on what two models made of the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.components.attention import Biased, Explicit, attend
from zoo.components.masks import Mask
from zoo.components.rotary import UNTURNED, Rotary
from zoo.otherwise import PARTS, backwards, bases, order, said_of, scales, scalings
from zoo.parity.causes.scene import FITS, Scene, error

FUSED = "qkv"
READ = (FUSED, *PARTS, "out")  # kinds of turns that are an order in which rows are read


@dataclass(frozen=True)
class Look:
    """One way to look: how rows of the parts are read, and what is done with them."""

    rotary: Any
    attend: Any
    scale: float
    roles: tuple[str, ...] = PARTS
    # part -> which of its rows; FUSED: of all three, one below the other
    orders: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, rows: Mapping[str, Tensor], mask: Mask, width: int) -> Tensor:
        """(s, h e) of one row's (s, h e) of queries and (t, g e) of keys and values."""
        given = dict(zip(PARTS, self.ordered([rows[name] for name in PARTS], 1), strict=True))
        q, k, v = (rearrange(given[name], "s (h e) -> 1 h s e", e=width) for name in self.roles)
        mask = Mask(mask.allowed, mask.positions, mask.causal, mask.keys)
        q, k = self.rotary(q, k, mask)
        y = rearrange(self.attend(q, k, v, mask, self.scale, 0.0), "1 h s e -> s (h e)")
        return y[:, self.orders["out"]] if "out" in self.orders else y

    def ordered(self, parts: Sequence[Tensor], axis: int) -> list[Tensor]:
        """Queries, keys and values, or what makes them."""
        if (order := self.orders.get(FUSED)) is not None:
            parts = torch.cat(list(parts), axis).index_select(axis, order).chunk(len(PARTS), axis)
        return [
            x if (order := self.orders.get(name)) is None else x.index_select(axis, order)
            for name, x in zip(PARTS, parts, strict=True)
        ]


@dataclass(frozen=True)
class Turn:
    """Something that may be otherwise: of one kind there is one at a time."""

    kind: str
    what: str  # of the attention in which it is so
    change: Callable[[Look], Look]
    fix: str = ""  # where it is rows that are read in another order
    config: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False  # they stand so on disk


@dataclass(frozen=True)
class Bench:
    """A few rows of one attention's parts."""

    rows: list[dict[str, Tensor]]
    masks: list[Mask]
    width: int

    @property
    def heads(self) -> dict[str, int]:
        first = self.rows[0]
        return {part: first[part].shape[-1] // self.width for part in PARTS}

    def error(self, look: Look, wanted: Tensor) -> float:
        try:
            out = self.made(look)
        except (RuntimeError, ValueError):
            return math.inf
        return error(out, wanted) if out.shape == wanted.shape else math.inf

    def made(self, look: Look) -> Tensor:
        with torch.no_grad():
            pairs = zip(self.rows, self.masks, strict=True)
            return torch.cat([look(row, mask, self.width) for row, mask in pairs])

    def fitted(self, own: Look, turns: Sequence[Turn], wanted: Tensor) -> tuple[Turn, ...] | None:
        """The fewest turns that make what is wanted; None where none do."""
        if self.error(own, wanted) <= FITS:
            return ()
        few = [(turn,) for turn in turns]
        pairs = ((a, b) for a, b in combinations(turns, 2) if a.kind != b.kind)
        for some in (*few, *pairs):
            if self.error(all_of(some, own), wanted) <= FITS:
                return some
        return self.solved(own, wanted)

    def solved(self, own: Look, wanted: Tensor) -> tuple[Turn, ...] | None:
        """A scale or a theta that nobody would think of, by Newton's method."""

        def scaled(by: float) -> Look:
            return replace(own, scale=own.scale * by)

        def based(by: float) -> Look:
            rotary = own.rotary
            base = rotary.base * by
            return replace(own, rotary=Rotary(rotary.width, base, rotary.scaling, rotary.limit))

        for kind, look in (("scale", scaled), ("rotary", based)):
            if kind == "rotary" and not isinstance(own.rotary, Rotary):
                continue
            if (by := self.newton(look, wanted)) is not None:
                found = look(by)
                what = f"scores are scaled by {found.scale:.6g}, {by:.6g} times what is usual"
                config = dict[str, Any]()
                if kind == "rotary":
                    what = f"theta is {found.rotary.base:.6g}"
                    config = {"rope_base": found.rotary.base}
                changed = partial(replace, rotary=found.rotary, scale=found.scale)
                return (Turn(kind, what, changed, "", config),)
        return None

    def newton(self, look: Callable[[float], Look], wanted: Tensor) -> float | None:
        """The factor with which a look makes what is wanted."""
        at, step = 0.0, 1e-6  # of its logarithm
        for _ in range(20):
            made = self.made(look(math.exp(at)))
            slope = (self.made(look(math.exp(at + step))) - made) / step
            off = wanted - made
            if error(made, wanted) <= FITS:
                return math.exp(at)
            change = float((slope * off).sum() / slope.square().sum().clamp(min=1e-300))
            at += max(-0.5, min(0.5, change))
            if abs(at) > 10:
                return None
        return None


def all_of(turns: Sequence[Turn], look: Look) -> Look:
    for turn in turns:
        look = turn.change(look)
    return look


def turns_of(scene: Scene, name: str, own: Look, bench: Bench) -> Iterator[Turn]:
    yield from _roles(bench)
    # where reading q otherwise does the same as reading k so, the one that a rule turns is to blame
    yield from sorted(_orders(scene, name, bench), key=lambda turn: not turn.plain)
    yield from _rotaries(scene, own)
    yield from _scales(scene, own, bench)
    yield from _masks(scene)
    yield from _sums(own, bench)


def _roles(bench: Bench) -> Iterator[Turn]:
    rows = bench.rows[0]
    for roles in permutations(PARTS):
        if roles == PARTS or any(
            rows[a].shape != rows[b].shape for a, b in zip(PARTS, roles, strict=True)
        ):
            continue
        what, fix = said_of(roles)
        yield Turn("roles", what, partial(replace, roles=roles), fix)


def _orders(scene: Scene, name: str, bench: Bench) -> Iterator[Turn]:
    letters = {"q": "h", "k": "g", "v": "g", "out": "h"}
    counts = {**bench.heads, "out": bench.heads["q"]}
    for part, heads in counts.items():
        size = heads * bench.width
        axis = letters[part]
        layouts = [(axis, heads, "e two"), (axis, heads, "")]
        if part == "k" and counts["q"] != heads:
            layouts.insert(1, ("h", counts["q"], "e two"))
        for letter, count, inner in layouts:
            if size % (2 * count if inner else count) or (count == 1 and not inner):
                continue
            one, other = (
                (f"{letter} e two", f"{letter} two e") if inner else (f"{letter} e", f"e {letter}")
            )
            if part in ("v", "out") and inner:
                continue
            for a, b in ((one, other), (other, one)):
                rows = order(a, b, size, **{letter: count, "two": 2})

                def change(look: Look, part: str = part, rows: Tensor = rows) -> Look:
                    return replace(look, orders={**look.orders, part: rows})

                match = scene.matching.matches[f"{name}.{part}"]
                plain = _in_order(match.into if part == "out" else match.out, rows)
                if part == "out":
                    what = f"heads of what out reads lie as [({b})], here as [({a})]"
                    fix = f"[o ({a})] (in its rule, [o ({b})]: [o ({a})])"
                else:
                    what = f"rows of {part} lie as [({b})], here as [({a})]"
                    fix = f"[({b}) i] (in its rule, [({a}) i]: [({b}) i])"
                fix = "[o i], as it stands" if plain else fix
                yield Turn(part, what, change, f"{{name}}.{part} is read as {fix}", plain=plain)

    if counts["q"] == counts["k"]:
        size = counts["q"] * bench.width
        for a, b in (("n o", "o n"), ("o n", "n o"), ("n h e", "h n e"), ("h n e", "n h e")):
            given = {"n": len(PARTS)} | ({"h": counts["q"]} if "h" in a else {})
            rows = order(a, b, 3 * size, **given)
            yield Turn(
                FUSED,
                f"rows of the fused q, k, v lie as [({b})], here as [({a})]",
                partial(replace, orders={FUSED: rows}),
                f"{{name}}.{{{{q,k,v}}}} are read as [({a}) i], not [({b}) i]",
            )


def _in_order(now: Tensor | None, order: Tensor) -> bool:
    """Whether rows that are read so would be read as they stand on disk."""
    return now is not None and bool((now[order].diff() == 1).all())


def _rotaries(scene: Scene, own: Look) -> Iterator[Turn]:
    config = scene.model.config

    def turn(what: str, rotary: Any, **fields: Any) -> Turn:
        return Turn("rotary", what, lambda look: replace(look, rotary=rotary), "", fields)

    standard = own.rotary
    if not isinstance(standard, Rotary):
        # the class turns nothing: the other may
        standard = None
    else:
        yield turn("queries and keys are not turned", UNTURNED)
        yield turn("keys are not turned", lambda q, k, m: (standard(q, k, m)[0], k))
        yield turn("queries are not turned", lambda q, k, m: (q, standard(q, k, m)[1]))
        for ahead in (1, -1):
            way = "ahead" if ahead > 0 else "behind"
            yield turn(
                f"queries are turned as if one place {way}",
                lambda q, k, m, n=ahead: (standard(q, k, _moved(m, n))[0], standard(q, k, m)[1]),
            )
        yield turn("queries and keys are turned backwards", partial(backwards, standard))
        yield turn(
            "neighbours are turned against each other, not halves", partial(_neighbours, standard)
        )
        yield turn(
            "neighbours are turned against each other in all of a head, not halves of its part",
            partial(_neighbours, standard, whole=True),
        )
    if standard is None:
        return
    for base in bases(standard.base, scene.numbers):
        rotary = Rotary(standard.width, base, standard.scaling, standard.limit)
        yield turn(f"theta is {base:g}", rotary, rope_base=base)
    for scaling in scalings(standard.scaling, scene.scalings, scene.numbers):
        rotary = Rotary(standard.width, standard.base, scaling, standard.limit)
        said = ", ".join(f"{k} {v}" for k, v in scaling.to_json().items())
        yield turn(f"the rope's scaling is {said}", rotary, rope=scaling.to_json())
    for width in {config.head_dim if hasattr(config, "head_dim") else 0, standard.width // 2} - {
        0,
        standard.width,
    }:
        if width % 2 == 0:
            rotary = Rotary(width, standard.base, standard.scaling, standard.limit)
            yield turn(f"{width} of a head are turned", rotary)


def _moved(mask: Mask, by: int) -> Mask:
    return Mask(mask.allowed, mask.positions + by, mask.causal)


def _neighbours(
    rotary: Rotary, q: Tensor, k: Tensor, mask: Mask, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Those in the part of a head that is turned; or brought there from all of it."""

    def apart(x: Tensor) -> Tensor:
        x, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((rearrange(x, "b h s (e two) -> b h s (two e)", two=2), rest), -1)

    def together(x: Tensor) -> Tensor:
        x, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((rearrange(x, "b h s (two e) -> b h s (e two)", two=2), rest), -1)

    width = q.shape[-1] if whole else rotary.width
    q, k = rotary(apart(q), apart(k), mask)
    return together(q), together(k)


def _scales(scene: Scene, own: Look, bench: Bench) -> Iterator[Turn]:
    dim, width = scene.model.config.dim, bench.width
    layer = next((int(part) + 1 for part in scene.name.split(".") if part.isdecimal()), 1)
    said = scales(own.scale, width, dim, layer)
    for n in scene.numbers:
        if n > 1:
            said.setdefault(n**-0.5, f"scores are divided by the root of {n:g}")
    for scale, what in said.items():
        if not math.isclose(scale, own.scale, rel_tol=1e-12):
            yield Turn("scale", what, partial(replace, scale=scale))


def _masks(scene: Scene) -> Iterator[Turn]:
    def turn(what: str, change: Callable[[Tensor], Tensor], **config: Any) -> Turn:
        def changed(look: Look) -> Look:
            return replace(look, attend=partial(_masked, look.attend, change))

        return Turn("mask", what, changed, "", config)

    yield turn("tokens see one place ahead", _ahead)
    yield turn("a token does not look at itself", _not_itself)
    yield turn("the future is visible", torch.ones_like)
    yield turn("the future is visible", lambda mask: mask | mask.mT)
    yield turn("the future is hidden", lambda mask: mask.tril())
    yield turn("the past is hidden", lambda mask: torch.ones_like(mask).triu())
    tokens = scene.comparison.way.inputs.places.ids.shape[1]
    now = getattr(scene.model.config, "window", None)
    near = [n for n in (now and now + 1, now and now - 1) if n]
    windows = [int(n) for n in (*near, *scene.numbers) if 0 < n < tokens and n == int(n)]
    for window in dict.fromkeys(windows):
        config = {"window": window} if now else {}
        yield turn(
            f"tokens look back {window} places",
            partial(_back, window=window),
            **config,
        )
    yield turn("tokens look back without a window", _back)


def _back(mask: Tensor, window: int | None = None) -> Tensor:
    back = torch.ones_like(mask).tril()
    return back if window is None else back.triu(1 - window)


def _masked(
    attend: Any,
    change: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *rest: Any,
) -> Tensor:
    allowed = mask.dense(q.shape[2])
    if allowed is None:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    changed = Mask(change(allowed), mask.positions, keys=mask.keys)
    out: Tensor = attend(q, k, v, changed, *rest)
    return out


def _ahead(mask: Tensor) -> Tensor:
    return mask | F.pad(mask, (1, 0))[..., :-1] if mask.shape[-1] > 1 else mask


def _not_itself(mask: Tensor) -> Tensor:
    own = torch.eye(*mask.shape[-2:], dtype=torch.bool)
    return mask & (~own | ((mask & ~own).sum(-1, keepdim=True) == 0))


def _sums(own: Look, bench: Bench) -> Iterator[Turn]:
    """What is done to scores, and which keys a query meets."""
    heads = bench.heads
    if 1 < heads["k"] < heads["q"]:
        times = (1, heads["q"] // heads["k"], 1, 1)

        def tiled(attend: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            out: Tensor = attend(q, k.repeat(times), v.repeat(times), *rest)
            return out

        yield Turn(
            "kv",
            "key and value heads are tiled over the queries', not repeated",
            lambda look: replace(look, attend=partial(tiled, look.attend)),
        )
    kept = own.attend
    if isinstance(kept, Explicit) and kept.bend is not None:
        plain = Explicit(kept.upcast)
        yield Turn("sum", "scores have no soft cap", lambda look: replace(look, attend=plain))
    elif isinstance(kept, Biased):
        yield from _biases(kept)
    elif getattr(kept, "__self__", None) is not None:
        yield from _disentangled(kept.__self__)


def _biases(kept: Biased) -> Iterator[Turn]:
    yield Turn(
        "sum",
        "no bias by distance is added to the scores",
        lambda look: replace(look, attend=attend),
    )
    term: Any = kept.term

    def backwards(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        out: Tensor = term(q, k, Mask(mask.allowed, -mask.positions, mask.causal, -mask.keys))
        return out

    yield Turn(
        "sum",
        "distances are counted the other way",
        lambda look: replace(look, attend=Biased(backwards)),
    )
    if hasattr(term, "both_ways"):
        other = copy.copy(term)
        other.both_ways = not term.both_ways
        what = (
            "distances ahead and behind are told apart"
            if other.both_ways
            else "distances ahead are not told from those behind"
        )
        yield Turn("sum", what, lambda look: replace(look, attend=Biased(other)))


LOOKS: tuple[tuple[str, ...], ...] = ((), ("c2p",), ("p2c",), ("c2p", "p2c"))


def places_said(looks: Sequence[str]) -> str:
    names = {"c2p": "contents look at places", "p2c": "places look at contents"}
    return " and ".join(names[look] for look in looks) or "places are not looked at"


def _disentangled(attn: nn.Module) -> Iterator[Turn]:
    """DeBERTa's, whose contents and places look at each other."""

    def turn(what: str, **changed: Any) -> Turn:
        other: Any = copy.copy(attn)
        for name, value in changed.items():
            setattr(other, name, value)
        return Turn("sum", what, lambda look: replace(look, attend=other.look))

    given: Any = attn
    if not given.looks or given.distances is None:
        return
    for looks in LOOKS:
        if set(looks) != set(given.looks):
            yield turn(f"{places_said(looks)}, not as the config says", looks=looks)
    distances: Any = given.distances.__self__
    other = copy.copy(distances)
    other._modules = dict(distances._modules)
    other.norm = None
    if distances.norm is not None:
        yield turn("vectors of distances are not normed", distances=other.once)
    back = copy.copy(distances)
    back._modules = dict(distances._modules)
    back.rows = lambda positions: distances.rows(-positions)
    yield turn("distances are counted the other way", distances=back.once)
