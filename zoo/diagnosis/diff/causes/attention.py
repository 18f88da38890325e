"""Attention: what lies between queries, keys and values that agree, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from zoo.components.masks import Mask
from zoo.diagnosis.diff.causes import parameters
from zoo.diagnosis.diff.causes.attention_trial import FUSED, READ, Bench, Look, Turn, all_of
from zoo.diagnosis.diff.causes.attention_variants import in_order, slips_of, turns_of
from zoo.diagnosis.diff.causes.scene import Idea, Reached, Scene
from zoo.diagnosis.diff.causes.score_variants import LOOKS, places_said
from zoo.diagnosis.edits import PARTS, said_of, stars
from zoo.errors import ConfigError
from zoo.parity.checks import call


def ideas(scene: Scene) -> Iterator[Idea]:
    """What goes into `out` differs, and queries, keys and values do not."""
    name = scene.name.rpartition(".")[0]
    given = _given(scene, name) if scene.name.endswith(".out") else None
    if given is not None and (fitted := list(_fitted(scene, name, given))):
        yield from fitted
        return
    yield from _exchanged(scene, name)
    yield from parameters.exchanged(scene)
    yield from _otherwise_placed(scene, name)
    if given is not None:
        yield from _in_part(scene, name, given)


def _otherwise_placed(scene: Scene, name: str) -> Iterator[Idea]:
    """DeBERTa's queries and keys run once more for each way in which places are looked at."""
    attn: Any = scene.above
    here = [n.rpartition(".")[0] for n in scene.alike()]
    for looks in LOOKS if hasattr(attn, "position_terms") else ():
        if set(looks) != set(attn.position_terms):
            now, then = places_said(attn.position_terms), places_said(looks)
            idea = Idea(
                f"{stars(name)}: here {now}, in the other model {then}",
                f"position_terms is {looks}",
                settings={one: {"position_terms": looks} for one in here},
            )
            if scene.restores(idea):
                yield idea


def _exchanged(scene: Scene, name: str) -> Iterator[Idea]:
    """Queries, keys and values in each other's place, where only running all of it can tell."""
    own = dict(scene.model.named_parameters())
    here = [n.rpartition(".")[0] for n in scene.alike()]
    weights = [own.get(f"{name}.{part}.weight") for part in PARTS]
    if not scene.name.endswith(".out") and not scene.reading.call:
        return
    if any(w is None for w in weights) or len({w.shape for w in weights}) > 1:  # type: ignore[union-attr]
        return
    for roles in permutations(PARTS):
        parameters = {
            f"{one}.{a}.{leaf}": own[f"{one}.{b}.{leaf}"].data
            for one in here
            for a, b in zip(PARTS, roles, strict=True)
            for leaf in ("weight", "bias")
            if a != b and {f"{one}.{a}.{leaf}", f"{one}.{b}.{leaf}"} <= own.keys()
        }
        if not parameters:
            continue
        what, fix = said_of(roles)
        where = tuple(n for n in parameters if n.startswith(f"{name}."))
        idea = Idea(
            f"{stars(name)}: in the other model {what}",
            fix.format(name=stars(name)),
            parameters=parameters,
            where=where,
            moved=True,
        )
        if scene.restores(idea):
            yield idea
            return


@dataclass(frozen=True)
class Given:
    """What the class looks with, a few rows that it looks at, and what both models made of them."""

    own: Look
    bench: Bench
    ours: Tensor
    theirs: Tensor


def _given(scene: Scene, name: str) -> Given | None:
    attn = scene.above
    heard = _heard(scene, name) if hasattr(attn, "attend") else None
    if heard is None:
        return None
    masks, own = heard
    values = [scene.made(f"{name}.{part}") for part in PARTS]
    values += [scene.flow.ours, scene.flow.theirs]
    split = [None if x is None else scene.rows(x) for x in values]
    rows = [some[: len(masks)] for some in split if some is not None]
    if len(rows) != len(split):
        return None
    width: Any = attn.head_dim
    parts = [dict(zip(PARTS, each, strict=True)) for each in zip(*rows[:3], strict=True)]
    return Given(own, Bench(parts, masks, width), torch.cat(rows[3]), torch.cat(rows[4]))


def _fitted(scene: Scene, name: str, given: Given) -> Iterator[Idea]:
    own, bench = given.own, given.bench
    turns = list(turns_of(scene, name, own, bench))
    # of what this model makes with its own parameters, none is read in another order
    own_turns = [turn for turn in turns if turn.kind not in READ]
    ours = bench.fitted(own, [*own_turns, *slips_of(scene, own)], given.ours)
    theirs = bench.fitted(own, turns, given.theirs)
    yield from _told(scene, own, name, ours, theirs)


def _in_part(scene: Scene, name: str, given: Given) -> Iterator[Idea]:
    """Rows of the weights alone, or of the biases alone, in another order."""
    here = [n.rpartition(".")[0] for n in scene.alike()]
    for turn in turns_of(scene, name, given.own, given.bench):
        if turn.kind not in ("roles", *READ):
            continue
        look = turn.change(given.own)
        for leaf in ("weight", "bias"):
            parameters = dict[str, Tensor]()
            for one in here:
                parameters |= _part(scene, one, look, leaf)
            fix = turn.fix.format(name=stars(name)) + f", in its {leaf}"
            rows = scene.matching.matches[f"{name}.{turn.kind}"].rows if turn.kind in PARTS else {}
            if leaf in rows and in_order(rows[leaf].at, look.orders[turn.kind]):
                fix = f"{stars(name)}.{turn.kind}.{leaf} is read as it stands"
            idea = Idea(
                f"{stars(name)}: in the other model {turn.what}, in what is read as {leaf} alone",
                fix,
                parameters=parameters,
                where=tuple(n for n in parameters if n.startswith(f"{name}.")),
                moved=True,
            )
            if parameters and scene.error_with(idea) <= scene.reading.limit:
                yield idea
                return


def _part(scene: Scene, name: str, look: Look, leaf: str) -> dict[str, Tensor]:
    """Weights or biases of the projections as a look would have them, where they are there."""
    known = scene.held
    parts = {part: known.get(f"{name}.{part}.{leaf}") for part in PARTS}
    moved = {a: parts[b] for a, b in zip(PARTS, look.roles, strict=True) if a != b}
    if FUSED in look.orders and None not in parts.values():
        ordered = look.ordered([x for x in parts.values() if x is not None], 0)
        moved = dict(zip(PARTS, ordered, strict=True))
    for part, order in look.orders.items():
        if (x := parts.get(part)) is not None:
            moved[part] = x.index_select(0, order)
    found = {f"{name}.{part}.{leaf}": x for part, x in moved.items() if x is not None}
    fits = len(found) == len(moved) and all(known[n].shape == x.shape for n, x in found.items())
    return found if fits else {}


def _told(
    scene: Scene,
    own: Look,
    name: str,
    ours: Sequence[Turn] | None,
    theirs: Sequence[Turn] | None,
) -> Iterator[Idea]:
    here = [n.rpartition(".")[0] for n in scene.alike()]
    if theirs:
        yield from _otherwise(scene, own, name, here, theirs)
    if ours:
        what = f"{stars(name)}: here {' and '.join(turn.what for turn in ours)}"
        there = " and ".join(turn.what for turn in theirs or ())
        yield Idea(
            what + ("; the other model does what the class does" if theirs == () else f"; {there}"),
            f"{stars(name)} does what its class does",
            settings=_settings(scene, here, lambda look: look),
        )


def _otherwise(
    scene: Scene, own: Look, name: str, here: list[str], theirs: Sequence[Turn]
) -> Iterator[Idea]:
    """The other model looks in another way than the class here."""
    look = own
    for turn in theirs:
        look = turn.change(look)
    what = f"{stars(name)}: in the other model {' and '.join(turn.what for turn in theirs)}"
    fixes = [turn.fix.format(name=stars(name)) for turn in theirs if turn.fix]
    if look.roles != PARTS or look.orders:
        stacks = [one.rpartition(".")[0] for one in scene.in_stacks()]
        for each in (here, stacks) if len(stacks) > len(here) else (here,):
            parameters = dict[str, Tensor]()
            for one in each:
                parameters |= _reordered(scene, one, look)
            where = tuple(n for n in parameters if n.startswith(f"{name}."))
            both = ", in both stacks" if each is stacks else ""
            fix = " and ".join(fixes) + both
            if all(turn.kind in ("roles", *READ) for turn in theirs):
                yield Idea(what + both, fix, parameters=parameters, where=where, moved=True)
        return
    config = {key: value for turn in theirs for key, value in turn.config.items()}
    if config and scene.steady:
        fix = ", ".join(f"{key} is {value}" for key, value in config.items())
        yield Idea(what, fix, config=config)
    else:
        settings = _settings(scene, here, lambda own: all_of(theirs, own))
        yield Idea(what, f"{stars(name)} does likewise", settings=settings)


def _settings(
    scene: Scene, names: Sequence[str], change: Callable[[Look], Look]
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        attn: Any = scene.fresh.get_submodule(name)
        look = change(Look(attn.rotary, attn.attend, attn.scale))
        found[name] = {"rotary": look.rotary, "attend": look.attend, "scale": look.scale}
    return found


def _reordered(scene: Scene, name: str, look: Look) -> dict[str, Tensor]:
    """Parameters of the projections, so that they give what the other's do."""
    parameters = dict(scene.model.named_parameters(remove_duplicate=False))
    found = dict[str, Tensor]()
    for leaf in ("weight", "bias"):
        parts = [parameters.get(f"{name}.{part}.{leaf}") for part in PARTS]
        if any(part is None for part in parts):
            continue
        ordered = dict(zip(PARTS, look.ordered([p.data for p in parts], 0), strict=True))  # type: ignore[union-attr]
        for role, part in zip(PARTS, look.roles, strict=True):
            if role != part or {part, FUSED} & look.orders.keys():
                found[f"{name}.{role}.{leaf}"] = ordered[part]
    if (order := look.orders.get("out")) is not None:
        weight = parameters[f"{name}.out.weight"].data
        turned = torch.empty_like(weight)
        turned[:, order] = weight
        found[f"{name}.out.weight"] = turned
    return found


def _heard(scene: Scene, name: str) -> tuple[list[Mask], Look] | None:
    """What the class gives this attention beside queries, keys and values, row by row."""
    try:
        attn: Any = scene.fresh.get_submodule(name)
    except (RuntimeError, ConfigError, AttributeError):
        return None
    own, found, left = Look(attn.rotary, attn.attend, attn.scale), list[Mask](), 0

    def hear(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            found.extend([x for x in (*args, *kwargs.values()) if isinstance(x, Mask)][:1])
            raise Reached

    handle = attn.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        for inputs in scene.comparison.way.other()[:3]:
            left = scene.reading.call
            try:
                with torch.no_grad():
                    call(scene.fresh, inputs)
            except Reached:
                continue
            return None
    finally:
        handle.remove()
    return found, own
