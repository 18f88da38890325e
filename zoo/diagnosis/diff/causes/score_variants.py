"""What may be done otherwise with scores: terms, the softmax, and how heads are merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from zoo.components.alibi import Alibi
from zoo.components.attention import Biased, Explicit, attend
from zoo.components.masks import Mask
from zoo.diagnosis.attention import Form, Variant
from zoo.diagnosis.edits import PARTS

ROUGH = (torch.float32, torch.float16, torch.bfloat16)


def terms(own: Form) -> Iterator[Variant]:
    """What is added to scores, or done to them."""
    kept = own.attend
    if isinstance(kept, Explicit) and kept.bend is not None:
        plain = Explicit(kept.upcast)
        yield Variant("sum", "scores have no soft cap", lambda form: replace(form, attend=plain))
    elif isinstance(kept, Biased):
        yield from _biases(kept, own.scale)
    elif getattr(kept, "__self__", None) is not None:
        yield from _disentangled(kept.__self__)


def _biases(kept: Biased, scale: float) -> Iterator[Variant]:
    yield Variant(
        "sum",
        "no bias by distance is added to the scores",
        lambda form: replace(form, attend=attend),
    )
    term: Any = kept.term

    def backwards(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        out: Tensor = term(q, k, Mask(mask.allowed, -mask.positions, mask.causal, -mask.keys))
        return out

    yield Variant(
        "sum",
        "distances are counted the other way",
        lambda form: replace(form, attend=Biased(backwards)),
    )
    if hasattr(term, "both_ways"):
        other = copy.copy(term)
        other.both_ways = not term.both_ways
        what = (
            "distances ahead and behind are told apart"
            if other.both_ways
            else "distances ahead are not told from those behind"
        )
        yield Variant("sum", what, lambda form: replace(form, attend=Biased(other)))
    if isinstance(term, Alibi):
        yield from _paces(term, scale)


def _paces(term: Alibi, scale: float) -> Iterator[Variant]:
    count = len(term.slopes)
    even = [2 ** (-8 * n / count) for n in range(1, count + 1)]
    whole = 2 ** (count.bit_length() - 1)
    usual = [2 ** (-8 * n / whole) for n in range(1, whole + 1)]
    usual += [2 ** (-4 * n / whole) for n in range(1, 2 * (count - whole), 2)]
    now, powers = Pace(tuple(term.slopes), term.scale, term.dtype), "the next lower power of two"
    kinds = {
        f"slopes are those of {powers}, and such halfway between": replace(
            now, slopes=tuple(usual)
        ),
        "slopes fall evenly whatever the number of heads": replace(now, slopes=tuple(even)),
        "slopes are the other way about": replace(now, slopes=now.slopes[::-1]),
        "the bias by distance is not scaled": replace(now, scale=1.0),
        "the bias by distance is scaled as the scores are": replace(now, scale=scale),
        "the bias by distance is not rounded": replace(now, dtype=None),
        "the bias by distance is rounded to bfloat16": replace(now, dtype=torch.bfloat16),
    }
    kinds = {what: pace for what, pace in kinds.items() if pace != now}
    for what, pace in ({"the bias by distance is as slopes and scale say": now} | kinds).items():
        yield Variant("sum", what, partial(_with_term, pace), lone=True)


@dataclass(frozen=True)
class Pace:
    """Scores that fall with distance, whatever the class makes of it."""

    slopes: tuple[float, ...]
    scale: float
    dtype: torch.dtype | None

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        """(b, h, 1, t), each product rounded once."""
        wide = self.dtype or q.dtype
        pace = torch.tensor(self.slopes, dtype=wide).to(q.dtype)[:, None, None]
        term = pace * mask.keys[:, None, None, :].to(wide).to(q.dtype)
        return term.to(wide).to(q.dtype) * self.scale


def _with_term(term: Any, form: Form) -> Form:
    return replace(form, attend=Biased(term))


# --- slips ---------------------------------------------------------------------------------------


def merges() -> Iterator[Variant]:
    """What comes out of the heads, put together otherwise."""

    def variant(what: str, merge: Callable[[Tensor], Tensor]) -> Variant:
        def changed(kept: Any, *args: Any) -> Tensor:
            y: Tensor = kept(*args)
            return rearrange(merge(y), "b s (h e) -> b h s e", h=y.shape[1])

        return Variant(
            "merge", what, lambda form: replace(form, attend=partial(changed, form.attend))
        )

    yield variant(
        "heads are interleaved where they are put together",
        lambda y: rearrange(y, "b h s e -> b s (e h)"),
    )
    for n, part in enumerate(PARTS):
        what = f"heads of {part} are the other way about"
        yield Variant("merge", what, partial(_flipped, n), lone=True)
    yield variant(
        "heads are put together without being brought behind the tokens first",
        lambda y: y.reshape(y.shape[0], y.shape[2], -1),
    )


def _flipped(part: int, form: Form) -> Form:
    def flipped(kept: Any, *args: Any) -> Tensor:
        out: Tensor = kept(*(x.flip(1) if n == part else x for n, x in enumerate(args)))
        return out

    return replace(form, attend=partial(flipped, form.attend))


def softmaxes(own: Form) -> Iterator[Variant]:
    """Scores and what is made of them, step by step; DeBERTa's are its own."""
    kept = own.attend
    if kept is not attend and not isinstance(kept, Explicit | Biased):
        return
    kinds: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("the softmax is taken over queries, not keys", lambda s: s.softmax(-2)),
        ("a sigmoid is taken of scores, not a softmax", torch.sigmoid),
        ("the softmax has one more in its sum", lambda s: s.exp() / (1 + s.exp().sum(-1, True))),
        ("no softmax is taken of scores", lambda s: s.masked_fill(s == -torch.inf, 0)),
    ]
    for dtype in ROUGH:
        name = str(dtype)[6:]
        kinds += [
            (f"the softmax is computed in {name}", partial(_softmax_in, dtype)),
            (
                f"attention weights are rounded to {name}",
                lambda s, d=dtype: s.softmax(-1).to(d).to(s.dtype),  # type: ignore[misc]
            ),
        ]
    for what, soft in kinds:
        yield Variant("soft", what, partial(_stepwise, soft), lone=True)


def _softmax_in(dtype: torch.dtype, scores: Tensor) -> Tensor:
    return scores.to(dtype).softmax(-1).to(scores.dtype)


def _stepwise(soft: Callable[[Tensor], Tensor], form: Form) -> Form:
    kept = form.attend

    def steps(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float) -> Tensor:
        k, v = (repeat(x, "b g t e -> b (g r) t e", r=q.shape[1] // x.shape[1]) for x in (k, v))
        scores = (q @ k.mT) * scale
        if isinstance(kept, Biased):
            scores = scores + kept.term(q, k, mask)
        elif isinstance(kept, Explicit) and kept.bend is not None:
            scores = kept.bend(scores)
        if (allowed := mask.dense(q.shape[2])) is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return soft(scores) @ v

    return replace(form, attend=steps)


# --- DeBERTa -------------------------------------------------------------------------------------


ATTENDED: tuple[tuple[str, ...], ...] = ((), ("c2p",), ("p2c",), ("c2p", "p2c"))


def spelled(terms: Sequence[str]) -> str:
    names = {"c2p": "content attends to positions", "p2c": "positions attend to content"}
    return " and ".join(names[term] for term in terms) or "positions are not attended to"


def _disentangled(attn: nn.Module) -> Iterator[Variant]:
    """DeBERTa's, whose contents and places look at each other."""

    def variant(what: str, **changed: Any) -> Variant:
        other: Any = copy.copy(attn)
        for name, value in changed.items():
            setattr(other, name, value)
        return Variant("sum", what, lambda form: replace(form, attend=other.look))

    module: Any = attn
    if not module.position_terms or module.distances is None:
        return
    for looks in ATTENDED:
        if set(looks) != set(module.position_terms):
            yield variant(f"{spelled(looks)}, not as the config says", position_terms=looks)
    distances: Any = module.distances.__self__
    other = copy.copy(distances)
    other._modules = dict(distances._modules)
    other.norm = None
    if distances.norm is not None:
        yield variant("vectors of distances are not normed", distances=other.once)
    back = copy.copy(distances)
    back._modules = dict(distances._modules)
    back.rows = lambda positions: distances.rows(-positions)
    yield variant("distances are counted the other way", distances=back.once)
