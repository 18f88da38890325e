"""Parameters that are not what the other model's make of them, and what they are instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from zoo.diagnosis.diff.causes.scene import FITS, Scene, error
from zoo.diagnosis.edits import Hypothesis, block_of, order, stars

MOVED = 4  # slices that are named
SLICES = 256  # of an axis, as far as they are looked through
NARROW = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = {"int8": 127, "int4": 7}  # the largest number of each
GROUPS = (32, 64, 128)  # numbers that share a scale
CLOSE = 0.2  # what whole numbers may be off by, in units of the root mean square


def ideas(scene: Scene) -> Iterator[Hypothesis]:
    yield from _wrong(scene, scene.measurement.match.parameters)
    yield from _apart(scene)


def unseen(scene: Scene) -> Iterator[Hypothesis]:
    """Of modules whose outputs were not compared: of the same block, or of none."""
    shapes = scene.matching.plan.native.shapes
    yield from _wrong(scene, (n for n in shapes if n.rpartition(".")[0] in scene.unseen))


def exchanged(scene: Scene) -> Iterator[Hypothesis]:
    """Two such modules, or two beside the place, that hold what is the other's by the rules too."""
    beside = scene.name.rpartition(".")[0]
    near = [n for n in scene.matching.matches if n.rpartition(".")[0] == beside and n != scene.name]
    modules = dict.fromkeys([*scene.unseen, *near])
    own = scene.parameters
    leaves = {
        m: {n.rpartition(".")[2]: x.shape for n, x in own.items() if n.rpartition(".")[0] == m}
        for m in modules
    }
    for a, b in combinations(modules, 2):
        both = leaves[a].keys() & leaves[b].keys()
        if not both or any(leaves[a][leaf] != leaves[b][leaf] for leaf in both):
            continue
        pairs = [(a, b)]
        if block_of(a) != a and block_of(a) == block_of(b):
            inner = b[len(block_of(b)) :]
            pairs = [(n, block_of(n) + inner) for n in scene.alike(a)]
        for kinds in (both, *({leaf} for leaf in both if len(both) > 1)):
            parameters = {
                f"{one}.{leaf}": own[f"{other}.{leaf}"]
                for pair in pairs
                for one, other in (pair, pair[::-1])
                for leaf in kinds
            }
            leaf = "" if kinds == both else f".{next(iter(kinds))}"
            names = f"{stars(a)}{leaf} and {stars(b)}{leaf}"
            where = tuple(f"{n}.{leaf}" for n in (a, b) for leaf in kinds)
            idea = Hypothesis(
                f"{names} are in each other's place",
                f"{names} are exchanged",
                parameters=parameters,
                where=where,
                moved=True,
            )
            if scene.error_with(idea) <= scene.measurement.limit:
                yield idea
                return


def _wrong(scene: Scene, names: Iterable[str]) -> Iterator[Hypothesis]:
    own = scene.parameters
    wrong = dict[str, str]()  # name: how
    for name in names:
        expected = scene.matching.expected(name)
        if expected is not None and name in own and not _same(own[name], expected):
            wrong[name] = _how(scene, name, own[name], expected)
    for name in wrong:
        if (layer := _layer(scene, name, own)) is not None:
            yield layer
            return
    for name in wrong:
        twin = _other(scene, name, own[name])
        if twin in own and _other(scene, twin, own[twin]) == name:
            yield _exchange(scene, name, twin, own)
            return
    for name, how in wrong.items():
        alike = [f"{n}.{name.rpartition('.')[2]}" for n in scene.alike(name.rpartition(".")[0])]
        fix = _put_right(scene, alike)
        lone = len(fix) == 1
        called = name if lone else stars(name)
        match = scene.matching.matches.get(name.rpartition(".")[0])
        sources = ", ".join(match.parameters.get(name, ())) if match else ""
        where = () if lone or "another order" not in how else (name,)
        should = f"{called} is what {sources} makes of it"
        yield Hypothesis(f"{called} {how}", should, parameters=fix, where=where)
        every = {n: x for n, x in _put_right(scene, own).items() if _kind(scene, n) == _bare(how)}
        if len(every) > len(fix):
            kinds = ", ".join(dict.fromkeys(map(stars, every)))
            what = f"{called} {how}, and so it is with {len(every)} parameters in all: {kinds}"
            yield Hypothesis(what, "each is what the other model's makes of it", parameters=every)


def _put_right(scene: Scene, names: Iterable[str]) -> dict[str, Tensor]:
    """Of these parameters, those that are wrong, as they should be."""
    own, fix = scene.parameters, dict[str, Tensor]()
    for name in names:
        value = scene.matching.expected(name)
        if name in own and value is not None and not _same(own[name], value):
            fix[name] = value.to(own[name].dtype)
    return fix


def _kind(scene: Scene, name: str) -> str:
    expected = scene.matching.expected(name)
    return "" if expected is None else _bare(_how(scene, name, scene.parameters[name], expected))


def _bare(how: str) -> str:
    """What is wrong, without numbers."""
    return re.sub(r"[\d.+-]+", "", how.partition(":")[0])


def _exchange(scene: Scene, name: str, twin: str, own: Mapping[str, Tensor]) -> Hypothesis:
    """Two parameters, in every layer where it is so."""
    kinds = {stars(each.rpartition(".")[0]) for each in (name, twin)}
    fix = _put_right(scene, [n for n in own if stars(n.rpartition(".")[0]) in kinds])
    lone = len({block_of(each) for each in fix}) == 1 or stars(name) == stars(twin)
    names = f"{name} and {twin}" if lone else f"{stars(name)} and {stars(twin)}"
    what = f"{names} are in each other's place"
    where = () if lone else (name, twin)
    return Hypothesis(what, f"{names} are exchanged", parameters=fix, where=where)


def _layer(scene: Scene, name: str, own: Mapping[str, Tensor]) -> Hypothesis | None:
    """A layer that holds what is another's, in all of its parameters."""
    other = _other(scene, name, own[name])
    if other is None or stars(other) != stars(name):
        return None
    ours, theirs = block_of(name), block_of(other)
    inside = [n for n in own if n.startswith(f"{ours}.")]
    for each in inside:
        expected = scene.matching.expected(theirs + each[len(ours) :])
        if expected is None or not _same(own[each], expected):
            return None
    fix = _put_right(scene, [n for n in own if stars(block_of(n)) == stars(ours)])
    what = f"{ours} holds what {theirs} should: layers are in each other's place"
    return Hypothesis(what, "each layer holds its own", parameters=fix)


def _apart(scene: Scene) -> Iterator[Hypothesis]:
    """A weight and its bias whose rules take other features of what lies on disk."""
    match = scene.measurement.match
    if not match.apart:
        return
    name = scene.name
    block = [n for n, m in scene.matching.matches.items() if m.apart]
    for leaf, other in (("weight", "bias"), ("bias", "weight")):
        fix = dict[str, Tensor]()
        for each in block:
            value = _read_as(scene, each, leaf, other)
            if value is None:
                return
            fix[f"{each}.{leaf}"] = value
        yield Hypothesis(
            f"the rule of {stars(name)}.{leaf} takes other rows than that of its {other}",
            f"{', '.join(dict.fromkeys(f'{stars(n)}.{leaf}' for n in block))} are read as the "
            f"{other} is",
            parameters=fix,
            where=(f"{name}.{leaf}",),
            moved=True,
        )


def _read_as(scene: Scene, name: str, leaf: str, other: str) -> Tensor | None:
    """A weight with the features that its bias is read with, or a bias likewise."""
    matches, own = scene.matching.matches, scene.parameters
    sources, features = matches[name].rows[leaf].sources, dict[int, Tensor]()
    for each, match in matches.items():
        if leaf in match.rows and match.rows[leaf].sources == sources:
            features |= zip(match.rows[leaf].at.tolist(), own[f"{each}.{leaf}"], strict=True)
    wanted = matches[name].rows[other].at.tolist()
    return torch.stack([features[at] for at in wanted]) if set(wanted) <= set(features) else None


# --- what one is instead -------------------------------------------------------------------------


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.double(), theirs.double())


def _grain(x: Tensor) -> float:
    """How finely it is written down."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(x.to(dtype).to(x.dtype), x):
            return torch.finfo(dtype).eps
    return 0.0


def _how(scene: Scene, name: str, ours: Tensor, theirs: Tensor) -> str:
    """What a parameter is instead."""
    if ours.shape != theirs.shape:
        return f"is {tuple(ours.shape)} and should be {tuple(theirs.shape)}"
    near = max(FITS, 4 * max(_grain(ours), _grain(theirs)))

    def alike(other: Tensor) -> bool:
        return ours.shape == other.shape and error(ours, other) <= near

    for dtype in NARROW:
        if torch.equal(theirs.to(dtype).to(ours.dtype), ours):
            return f"lost precision: it went through {str(dtype)[6:]}"
        if torch.equal(ours.to(dtype).to(theirs.dtype), theirs):
            return f"is more precise than there: that went through {str(dtype)[6:]}"
    if not ours.any():
        return "is zero: it was dropped"
    if not theirs.any():
        return "is zero in the other model: it was dropped there"
    for by in (1, -1):
        if alike(theirs + by):
            return f"is off by {by:+d}: what norms store is an offset from one, or is not"
        if alike(theirs.roll(by, 0)):
            return f"is off by {by:+d} row{'s' if abs(by) > 1 else ''}"
    if ours.dim() == 2 and ours.shape[0] == ours.shape[1] and alike(theirs.T):
        return "is transposed"
    if (other := _other(scene, name, ours)) is not None:
        return f"holds what {other} should"
    other = _other(scene, name, theirs)
    if other is not None and scene.parameters[other].data_ptr() != ours.data_ptr():
        return f"is an array of its own here, and there the one of {other}"
    if alike(theirs.flip(0)):
        return "has its first axis in another order: the last row first"
    if (kind := _whole(ours, theirs)) is not None:
        return f"lost precision: it went through {kind}"
    if (kind := _whole(theirs, ours)) is not None:
        return f"is more precise than there: that went through {kind}"
    if ours.shape[0] <= SLICES and (moved := _moved(scene, ours, theirs)):
        return f"has its first axis in another order: {moved}"
    ratio = float((ours.double() * theirs.double()).sum() / theirs.double().square().sum())
    if abs(ratio - 1) > 2 * near and alike(theirs * ratio):
        return f"is {ratio:.6g} times what it should be"
    different = ours.double() != theirs.double()
    rows = different.flatten(1).any(1).nonzero().flatten().tolist() if ours.dim() > 1 else []
    if 0 < len(rows) <= MOVED:
        zero = ", zero there" if not ours[rows].any() else ""
        return f"differs in row{'s'[: len(rows) - 1]} {', '.join(map(str, rows))} alone{zero}"
    if different.float().mean() < 0.5:
        return f"differs in {int(different.sum())} of {ours.numel()} numbers"
    return f"differs: by {error(ours, theirs):.1e} at most"


def _whole(ours: Tensor, theirs: Tensor) -> str | None:
    """Whether it holds whole numbers and a scale, for each row or each few of its numbers."""
    if ours.dim() < 2 or error(ours, theirs) > CLOSE:
        return None
    for size in (ours.shape[-1], *GROUPS, ours.numel()):
        if ours.numel() % size:
            continue
        rows = ours.double().reshape(-1, size)
        for kind, most in WHOLE.items():
            steps = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300) * most
            if (steps - steps.round()).abs().max() < 1e-3:
                return kind
    return None


def _moved(scene: Scene, ours: Tensor, theirs: Tensor) -> str:
    """Which slices of the first axis stand where others should; empty where they are no others."""
    sources = list[int]()
    for x in ours:
        at = next((m for m, y in enumerate(theirs) if torch.equal(x, y)), None)
        if at is None:
            return ""
        sources.append(at)
    config, size = scene.model.config, len(sources)
    for heads in dict.fromkeys((getattr(config, "kv_heads", 0), getattr(config, "heads", 0))):
        for a, b in (
            ("h e two", "h two e"),
            ("h two e", "h e two"),
            ("h e", "e h"),
            ("e h", "h e"),
        ):
            fits = heads and size % (heads * (2 if "two" in a else 1)) == 0
            if fits and order(a, b, size, h=heads, two=2).tolist() == sources:
                return f"as [({b})] where it should be [({a})], with {heads} heads"
    moved = [(n, at) for n, at in enumerate(sources) if at != n]
    for by in (1, -1):
        run = [n for n, at in moved if n - at == by]
        if len(run) >= max(2, len(moved) - 1):
            return f"rows {run[0]} to {run[-1]} are off by {by:+d}"
    more = f", and {len(moved) - MOVED} more" if len(moved) > MOVED else ""
    return ", ".join(f"{at} in the place of {n}" for n, at in moved[:MOVED]) + more


def _other(scene: Scene, name: str, value: Tensor) -> str | None:
    for other in scene.matching.plan.native.shapes:
        if other != name and scene.matching.plan.native.shapes[other] == tuple(value.shape):
            expected = scene.matching.expected(other)
            if expected is not None and _same(value, expected):
                return other
    return None
