"""What an attention computes of queries, keys and values, and the variants that code may have."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.components.masks import Mask
from zoo.components.rotary import NO_ROTARY, Rotary
from zoo.diagnosis.edits import PARTS


@dataclass(frozen=True)
class Form:
    """One attention function: rotary embedding, attend function, scale, and the order of rows."""

    rotary: Any
    attend: Any
    scale: float
    # part -> its rows, counted in q, k, v one below the other; `out`: columns
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any) -> Form:
        """The form of an attention module."""
        return cls(module.rotary, module.attend, module.scale)

    def __call__(self, parts: Mapping[str, Tensor], mask: Mask, width: int) -> Tensor:
        """(s, h e) from one row's (s, h e) of queries and (t, g e) of keys and values."""
        values = [parts[name] for name in PARTS]
        if self.rows.keys() & set(PARTS):
            every = torch.cat(values, 1)
            pairs = zip(PARTS, values, strict=True)
            values = [every[:, self.rows[n]] if n in self.rows else x for n, x in pairs]
        q, k, v = (rearrange(x, "s (h e) -> 1 h s e", e=width) for x in values)
        mask = Mask(mask.allowed, mask.positions, mask.causal, mask.keys)
        q, k = self.rotary(q, k, mask)
        y = rearrange(self.attend(q, k, v, mask, self.scale, 0.0), "1 h s e -> s (h e)")
        return y[:, self.rows["out"].argsort()] if "out" in self.rows else y

    def settings(self, than: Form) -> dict[str, Any]:
        """The attributes of an attention module that differ from another form's."""
        other = {"rotary": self.rotary, "attend": self.attend, "scale": self.scale}
        if math.isclose(self.scale, than.scale, rel_tol=1e-12):
            del other["scale"]
        return {n: value for n, value in other.items() if value is not getattr(than, n)}

    def masked(self, change: Callable[[Tensor], Tensor]) -> Form:
        """With another (..., s, t) mask, True where a query may attend."""
        return self.attending(partial(_masked, change))

    def attending(self, attend: Callable[..., Tensor]) -> Form:
        """With `attend(own, q, k, v, ...)` in place of its own attend function."""
        return replace(self, attend=partial(attend, self.attend))


@dataclass(frozen=True)
class Sizes:
    """What a variant may depend on beside the attention itself."""

    config: Any
    width: int  # of a head
    heads: Mapping[str, int]
    layer: int  # counted from 1

    @classmethod
    def of(cls, config: Any, module: Any, layer: int) -> Sizes:
        """Those of an attention module in a layer, counted from 1."""
        heads = config.heads
        kv_heads = getattr(config, "kv_heads", None) or heads
        return cls(config, module.head_dim, {"q": heads, "k": kv_heads, "v": kv_heads}, layer)


Change = Callable[[Form, Sizes], Form | None]


@dataclass(frozen=True)
class Variant:
    """One difference between two attention functions; at most one of each kind is tried at once."""

    kind: str
    what: str
    change: Callable[[Form], Form]
    config: Mapping[str, Any] = field(default_factory=dict)
    lone: bool = False  # rare: it is tried by itself alone
    hypotheses: tuple[Any, ...] = ()  # where it is an order of rows: what undoes it
    fault: str = ""


def variants(
    kind: str, table: Mapping[str, Callable[[Form], Form]], lone: bool = False
) -> list[Variant]:
    """A variant for each row of a table: what it is, and the change."""
    return [Variant(kind, what, change, lone=lone) for what, change in table.items()]


def changed(own: Any, **attributes: Any) -> Any:
    """A copy with other attributes; of a module, on the same memory."""
    other = copy.copy(own)
    if isinstance(own, nn.Module):
        other._modules = dict(own._modules)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def all_of(variants: Sequence[Variant], form: Form) -> Form:
    """A form with several changes, one after the other."""
    for variant in variants:
        form = variant.change(form)
    return form


def scaled(to: Callable[[Form, Sizes], float]) -> Change:
    """Scores multiplied by another factor."""
    return lambda form, sizes: replace(form, scale=to(form, sizes))


def scaled_by_layer(form: Form, sizes: Sizes) -> Form | None:
    """Scores divided by the layer's number, where no config field does that."""
    has_field = hasattr(sizes.config, "scale_attn_by_layer")
    return None if has_field else replace(form, scale=form.scale / sizes.layer)


def masked(change: Callable[[Tensor], Tensor]) -> Change:
    """Another mask, made of the right one."""
    return lambda form, sizes: form.masked(change)


# --- masks ---------------------------------------------------------------------------------------


def _masked(
    change: Callable[[Tensor], Tensor],
    attend: Any,
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


def one_ahead(mask: Tensor) -> Tensor:
    """Queries see what the query before them should: one position into the future."""
    return mask | F.pad(mask, (1, 0))[..., :-1] if mask.shape[-1] > 1 else mask


def without_itself(mask: Tensor) -> Tensor:
    """Queries do not see their own position, unless it is all that they see."""
    own = torch.eye(*mask.shape[-2:], dtype=torch.bool)
    return mask & (~own | ((mask & ~own).sum(-1, keepdim=True) == 0))


def both_ways(mask: Tensor) -> Tensor:
    """Queries see the future as far as the future sees them."""
    return mask | mask.mT if mask.shape[-1] == mask.shape[-2] else mask


def tiled(form: Form, sizes: Sizes) -> Form | None:
    """Key and value heads repeated as a whole (a b a b), not each by itself (a a b b)."""
    if not 1 < sizes.heads["k"] < sizes.heads["q"]:
        return None
    times = (1, sizes.heads["q"] // sizes.heads["k"], 1, 1)
    return form.attending(
        lambda own, q, k, v, *rest: own(q, k.repeat(times), v.repeat(times), *rest)
    )


# --- rotary embeddings ---------------------------------------------------------------------------

Rotate = Callable[[Any, Tensor, Tensor, Mask], tuple[Tensor, Tensor]]


def rotates(rotate: Rotate) -> Change:
    """`rotate(rotary, q, k, mask)` in place of the rotary embedding, where there is one."""

    def change(form: Form, sizes: Sizes) -> Form | None:
        if not isinstance(form.rotary, Rotary):
            return None
        return replace(form, rotary=partial(rotate, form.rotary))

    return change


def unrotated(form: Form, sizes: Sizes) -> Form | None:
    """No rotary embedding, where there is one."""
    return replace(form, rotary=NO_ROTARY) if isinstance(form.rotary, Rotary) else None


def queries_moved(by: int) -> Rotate:
    """Queries rotated as if they stood `by` positions further on."""

    def rotate(rotary: Any, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        return rotary(q, k, at(mask, mask.positions + by))[0], rotary(q, k, mask)[1]

    return rotate


def at(mask: Mask, positions: Tensor) -> Mask:
    """The same mask, with other positions."""
    return Mask(mask.allowed, positions, mask.causal)


def pairs_of_neighbors(
    rotary: Any, q: Tensor, k: Tensor, mask: Mask, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate neighbors as pairs, not halves; `whole`: neighbors anywhere in a head."""
    width = q.shape[-1] if whole else rotary.width

    def as_halves(x: Tensor) -> Tensor:
        x, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((rearrange(x, "b h s (e two) -> b h s (two e)", two=2), rest), -1)

    def as_pairs(x: Tensor) -> Tensor:
        x, rest = x.split((width, x.shape[-1] - width), dim=-1)
        return torch.cat((rearrange(x, "b h s (two e) -> b h s (e two)", two=2), rest), -1)

    q, k = rotary(as_halves(q), as_halves(k), mask)
    return as_pairs(q), as_pairs(k)
