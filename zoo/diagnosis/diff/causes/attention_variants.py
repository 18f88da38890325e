"""What may be otherwise in an attention: each turn is tried on what two models made of the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.components.masks import Mask
from zoo.diagnosis.diff.causes.attention_trial import FUSED, Bench, Look, Turn
from zoo.diagnosis.diff.causes.config import NOT_TRIED
from zoo.diagnosis.diff.causes.rotary_variants import rotaries
from zoo.diagnosis.diff.causes.scene import Scene
from zoo.diagnosis.diff.causes.score_variants import merges, softmaxes, terms
from zoo.diagnosis.edits import PARTS, order, said_of, scales


def turns_of(scene: Scene, name: str, own: Look, bench: Bench) -> Iterator[Turn]:
    yield from _roles(bench)
    # where reading q otherwise does the same as reading k so, the one that a rule turns is to blame
    yield from sorted(_orders(scene, name, bench), key=lambda turn: not turn.plain)
    yield from rotaries(scene, own)
    yield from _scales(scene, own, bench)
    yield from _masks(scene)
    yield from _later(scene)
    yield from terms(own, bench)


def slips_of(scene: Scene, own: Look) -> Iterator[Turn]:
    """What no model does, and code that is being written does."""
    yield from merges()
    yield from softmaxes(own)


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
                # of what out reads, columns go where those of its input came from
                plain = (
                    in_order(match.into, rows.argsort())
                    if part == "out"
                    else in_order(match.out, rows)
                )
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

    else:
        yield from _grouped(scene, name, counts["q"] // counts["k"], counts["k"], bench.width)


def _grouped(scene: Scene, name: str, r: int, g: int, e: int) -> Iterator[Turn]:
    """Queries that share keys, fused with them: group by group, or one part below the other."""
    matches = [scene.matching.matches.get(f"{name}.{part}") for part in PARTS]
    rows = [None if match is None else match.rows.get("weight") for match in matches]
    size = (r + 2) * g * e
    if any(each is None or each.length != size for each in rows):
        return
    now = torch.cat([each.at for each in rows if each is not None])
    where = torch.empty(size, dtype=torch.long)
    where[now] = torch.arange(size)
    each = torch.arange(size).reshape(g, r + 2, e)
    layouts = {
        "(q|k|v)": torch.arange(size),
        "(g (r|one|one) e)": torch.cat(
            [each[:, :r].flatten(), each[:, r:].transpose(0, 1).flatten()]
        ),
    }
    for layout, at in layouts.items():
        if not torch.equal(at, now):
            yield Turn(
                FUSED,
                f"rows of the fused q, k, v lie as [{layout}]",
                partial(replace, orders={FUSED: where[at]}),
                f"{{name}}.{{{{q,k,v}}}} are read as [{layout} i]",
            )


def in_order(now: Tensor | None, order: Tensor) -> bool:
    """Whether rows that are read so would be read as they stand on disk."""
    return now is not None and bool((now[order].diff() == 1).all())


def _scales(scene: Scene, own: Look, bench: Bench) -> Iterator[Turn]:
    dim, width = scene.model.config.dim, bench.width
    layer = next((int(part) + 1 for part in scene.name.split(".") if part.isdecimal()), 1)
    said = scales(own.scale, width, dim, layer)
    for n in scene.numbers:
        if n > 1:
            said.setdefault(n**-0.5, f"scores are divided by the root of {n:g}")
    config = scene.model.config
    # the field whose root it is divided by, if it is no width that shapes follow from
    fields = [
        name
        for name, n in vars(config).items()
        if name not in NOT_TRIED and type(n) in (int, float) and n > 0
        if math.isclose(n**-0.5, own.scale, rel_tol=1e-9)
    ]
    for scale, what in said.items():
        if not math.isclose(scale, own.scale, rel_tol=1e-12):
            n = scale**-2
            read = {fields[0]: round(n) if math.isclose(n, round(n)) else n} if fields else {}
            yield Turn("scale", what, partial(replace, scale=scale), config=read)


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
    tokens = scene.comparison.way.inputs.positions.ids.shape[1]
    now = getattr(scene.model.config, "window", None)
    near = [n for n in (now and now + 1, now and now - 1) if n]
    windows = [int(n) for n in (*near, *scene.numbers, 1, 2) if 0 < n < tokens and n == int(n)]
    for window in dict.fromkeys(windows):
        config = {"window": window} if now else {}
        yield turn(
            f"tokens look back {window} places",
            partial(_back, window=window),
            **config,
        )
    yield turn("tokens look back without a window", _back)


def _later(scene: Scene) -> Iterator[Turn]:
    """What may be otherwise for tokens that come behind others, which a cache keeps."""
    way = scene.comparison.way
    if way.name != "cached":
        return
    cut = way.cut

    def turned(what: str, places: Callable[[Tensor], Tensor]) -> Turn:
        def rotary(kept: Any, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
            at = mask.positions
            moved = torch.where(torch.arange(at.shape[-1]) < cut, at, places(at))
            out: tuple[Tensor, Tensor] = kept(q, k, Mask(mask.allowed, moved, mask.causal))
            return out

        return Turn("rotary", what, lambda look: replace(look, rotary=partial(rotary, look.rotary)))

    def seen(what: str, change: Callable[[Tensor], Tensor]) -> Turn:
        def changed(mask: Tensor) -> Tensor:
            late = torch.arange(mask.shape[-2])[:, None] >= cut
            return torch.where(late, change(mask), mask)

        return Turn(
            "mask",
            what,
            lambda look: replace(look, attend=partial(_masked, look.attend, changed)),
            lone=True,
        )

    behind = "of what comes behind others in a cache"
    yield turned(f"positions {behind} are off by +1", lambda at: at + 1)
    yield turned(f"positions {behind} are off by -1", lambda at: at - 1)
    yield turned(f"positions {behind} begin at 0 again", lambda at: at - cut)
    yield seen(f"the future is visible to queries {behind}", torch.ones_like)
    yield seen(f"queries {behind} look back without a window", lambda mask: _back(mask))
    yield seen(f"queries {behind} see nothing of what was before", _alone(cut))


def _alone(cut: int) -> Callable[[Tensor], Tensor]:
    return lambda mask: mask & (torch.arange(mask.shape[-1]) >= cut)


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
