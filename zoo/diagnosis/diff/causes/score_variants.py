"""Variants of attention scores: added terms, the softmax, and how heads are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from zoo.components.alibi import Alibi
from zoo.components.attention import Biased, Explicit, attend
from zoo.components.masks import Mask
from zoo.diagnosis.attention import Form, Variant, changed, variants
from zoo.diagnosis.edits import PARTS

ROUGH = (torch.float32, torch.float16, torch.bfloat16)


def terms(own: Form) -> Iterator[Variant]:
    """What is added to scores, or done to them."""
    kept, term = own.attend, getattr(own.attend, "term", None)
    others, paces = dict[str, Any](), dict[str, Any]()
    if isinstance(kept, Explicit) and kept.bend is not None:
        others["scores have no soft cap"] = Explicit(kept.upcast)
    elif isinstance(kept, Biased):
        others["no bias by distance is added to the scores"] = attend
        others["distances are counted the other way"] = Biased(partial(_backwards, term))
        if (both_ways := getattr(term, "both_ways", None)) is not None:
            ahead = "are not told from those behind" if both_ways else "and behind are told apart"
            others[f"distances ahead {ahead}"] = Biased(changed(term, both_ways=not both_ways))
        if isinstance(term, Alibi):
            paces = {what: Biased(pace) for what, pace in _paces(term, own.scale).items()}
    elif (attn := getattr(kept, "__self__", None)) is not None:
        others = _disentangled(attn)
    for lone, table in ((False, others), (True, paces)):
        changes = {what: partial(replace, attend=other) for what, other in table.items()}
        yield from variants("sum", changes, lone)


def _backwards(term: Any, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    out: Tensor = term(q, k, Mask(mask.allowed, -mask.positions, mask.causal, -mask.keys))
    return out


def _paces(term: Alibi, scale: float) -> dict[str, Pace]:
    # slopes are written out: those of the class may be what is wrong
    count = len(term.slopes)
    even = [2 ** (-8 * n / count) for n in range(1, count + 1)]
    whole = 2 ** (count.bit_length() - 1)
    usual = [2 ** (-8 * n / whole) for n in range(1, whole + 1)]
    usual += [2 ** (-4 * n / whole) for n in range(1, 2 * (count - whole), 2)]
    now, bias = Pace(tuple(term.slopes), term.scale, term.dtype), "the bias by distance is"
    powers = "the next lower power of two"
    others = {
        f"slopes are those of {powers}, and such halfway between": {"slopes": tuple(usual)},
        "slopes fall evenly whatever the number of heads": {"slopes": tuple(even)},
        "slopes are the other way about": {"slopes": now.slopes[::-1]},
        f"{bias} not scaled": {"scale": 1.0},
        f"{bias} scaled as the scores are": {"scale": scale},
        f"{bias} not rounded": {"dtype": None},
        f"{bias} rounded to bfloat16": {"dtype": torch.bfloat16},
    }
    made = {what: replace(now, **fields) for what, fields in others.items()}  # type: ignore[arg-type]
    made = {what: pace for what, pace in made.items() if pace != now}
    return {f"{bias} as slopes and scale say": now} | made


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


# --- slips ---------------------------------------------------------------------------------------


def merges() -> list[Variant]:
    """Other ways to merge the heads."""

    def merged(merge: Callable[[Tensor], Tensor]) -> Callable[[Form], Form]:
        def attend(own: Any, *args: Any) -> Tensor:
            y: Tensor = own(*args)
            return rearrange(merge(y), "b s (h e) -> b h s e", h=y.shape[1])

        return lambda form: form.attending(attend)

    def flipped(part: int) -> Callable[[Form], Form]:
        def attend(own: Any, *args: Any) -> Tensor:
            out: Tensor = own(*(x.flip(1) if n == part else x for n, x in enumerate(args)))
            return out

        return lambda form: form.attending(attend)

    interleaved = merged(lambda y: rearrange(y, "b h s e -> b s (e h)"))
    not_behind = merged(lambda y: y.reshape(y.shape[0], y.shape[2], -1))
    together = "put together without being brought behind the tokens first"
    flips = {f"heads of {x} are the other way about": flipped(n) for n, x in enumerate(PARTS)}
    return [
        *variants("merge", {"heads are interleaved where they are put together": interleaved}),
        *variants("merge", flips, lone=True),
        *variants("merge", {f"heads are {together}": not_behind}),
    ]


def softmaxes(own: Form) -> list[Variant]:
    """Scores and what is made of them, step by step; DeBERTa's are its own."""
    kept = own.attend
    if kept is not attend and not isinstance(kept, Explicit | Biased):
        return []
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "the softmax is taken over queries, not keys": lambda s: s.softmax(-2),
        "a sigmoid is taken of scores, not a softmax": torch.sigmoid,
        "the softmax has one more in its sum": lambda s: s.exp() / (1 + s.exp().sum(-1, True)),
        "no softmax is taken of scores": lambda s: s.masked_fill(s == -torch.inf, 0),
    }
    for dtype in ROUGH:
        name = str(dtype)[6:]
        kinds[f"the softmax is computed in {name}"] = partial(_softmax_in, dtype)
        kinds[f"attention weights are rounded to {name}"] = partial(_softmax_to, dtype)
    table = {what: partial(_stepwise, soft) for what, soft in kinds.items()}
    return variants("soft", table, lone=True)


def _softmax_in(dtype: torch.dtype, scores: Tensor) -> Tensor:
    return scores.to(dtype).softmax(-1).to(scores.dtype)


def _softmax_to(dtype: torch.dtype, scores: Tensor) -> Tensor:
    return scores.softmax(-1).to(dtype).to(scores.dtype)


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
    """Terms of disentangled attention, as text."""
    names = {"c2p": "content attends to positions", "p2c": "positions attend to content"}
    return " and ".join(names[term] for term in terms) or "positions are not attended to"


def _disentangled(attn: Any) -> dict[str, Any]:
    """DeBERTa's, whose contents and places look at each other."""
    if not attn.position_terms or attn.distances is None:
        return {}
    others = {
        f"{spelled(some)}, not as the config says": changed(attn, position_terms=some)
        for some in ATTENDED
        if set(some) != set(attn.position_terms)
    }
    distances: Any = attn.distances.__self__
    back = changed(distances, rows=lambda positions: distances.rows(-positions))
    tables = {"distances are counted the other way": back}
    if distances.norm is not None:
        tables["vectors of distances are not normed"] = changed(distances, norm=None)
    others |= {what: changed(attn, distances=table.once) for what, table in tables.items()}
    return {what: other.look for what, other in others.items()}
