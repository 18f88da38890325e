"""The mutation gate: bugs planted one at a time, each of which the parity checks must notice."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.language import Placeholder, Rule, Template, parse_rule
from converters.spec import Spec, load_spec
from zoo import registry
from zoo.components.attention import Biased, attend
from zoo.components.masks import Mask
from zoo.components.rotary import Rotary
from zoo.errors import ZooError
from zoo.loading import load_directory
from zoo.parity.checks import NUMERIC, Subject
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.truth import Truth
from zoo.registry import Architecture
from zoo.terminal import DIM, GREEN, RED, has_color, paint, passing


class NotApplicable(Exception):
    """There is nothing here that this bug could be planted in."""


def need(condition: object) -> None:
    if not condition:
        raise NotApplicable


Kind = Literal["mapping", "config", "model"]
# where the numbers of a bug first meet, by what it is in
LOOK = r"in .*blocks\.0\.attn\.(out|[qk], time 2)$"
MLP = r"in .*blocks\.0\.mlp\.down$|out .*blocks\.0\.mlp$"
FIRST = r"in .*blocks\.0\.(norm1|norm_attn|norm_mlp|attn\.[qkv])$"


@dataclass(frozen=True)
class Mutant:
    """A bug: an edited spec, other config fields, or a model tampered with after loading.

    `at` is where numbers first go wrong ("in" or "out" of a module), `cause` what is to be said of
    it: patterns of what a diagnosis has to find.
    """

    name: str
    kind: Kind
    plant: Callable[[Any], Any]
    at: str = ""
    cause: str = ""


MUTANTS: dict[str, Mutant] = {}


def mutant(name: str, kind: Kind, *, at: str, cause: str) -> Callable[[Any], Any]:
    def register(plant: Callable[[Any], Any]) -> Callable[[Any], Any]:
        assert name not in MUTANTS, name
        MUTANTS[name] = Mutant(name, kind, plant, at, cause)
        return plant

    return register


# --- mapping: the spec says something wrong ------------------------------------------------------
# plant(Mapped) -> Spec


@dataclass(frozen=True)
class Mapped:
    """A spec and the config it is read with; edits see each enumeration and layer written out."""

    spec: Spec
    config: Any

    def edited(self, change: Callable[[str, list[str]], tuple[str, list[str]]]) -> Spec:
        """The spec with both sides of every rule through `change`, which must change something."""
        fields = self.config.to_dict()
        dialect = self.spec.dialect("hf").under(fields)
        counts = {axis: fields[name] for axis, name in self.spec.axes.items() if name in fields}
        hit = False
        rules: dict[str, tuple[Rule, ...]] = {}
        for section in ("weights", "heads"):
            out = []
            for rule in getattr(dialect, section):
                for before in written_out(rule, counts):
                    after = change(before[0], list(before[1]))
                    hit = hit or after != before
                    source, targets = after
                    out.append(parse_rule(source, targets[0] if len(targets) == 1 else targets))
            rules[section] = tuple(out)
        need(hit)
        edited = replace(dialect, weights=rules["weights"], heads=rules["heads"])
        return self.spec.with_dialect(edited)


def written_out(rule: Rule, counts: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """The rule's two sides as text, once for each value of its enumerations and each layer."""
    loops = {n: p for n, p in rule.loops.items() if p.values or n in counts}
    ranges = [range(len(p.values) or counts[n]) for n, p in loops.items()]
    for point in product(*ranges):
        chosen = dict(zip(loops, point, strict=True))
        source = _chosen(rule.source.name, chosen, rule.source.pattern)
        yield source, [_chosen(t.name, chosen, t.pattern) for t in rule.targets]


def _chosen(name: Template, chosen: Mapping[str, int], pattern: object) -> str:
    parts = [
        part.spell(chosen[part.name])
        if isinstance(part, Placeholder) and part.name in chosen
        else part
        for part in name.parts
    ]
    return f"{Template(tuple(parts))} {pattern or ''}".strip()


def renamed(mapped: Mapped, names: Mapping[str, str]) -> Spec:
    """Native names exchanged: what went to a key goes to its value. All of them must be there."""
    # whole words of a dotted name, or values of an enumeration in it; .name stands at the start
    words = "|".join(f"(?<!.){k[1:]}" if k[0] == "." else rf"(?<!\w){k}" for k in names)
    word = re.compile(rf"(?:{words})(?!\w)")
    found: set[str] = set()

    def other(match: re.Match[str]) -> str:
        key = match[0] if match[0] in names else f".{match[0]}"
        found.add(key)
        return names[key]

    def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
        return source, [_name_only(t, lambda name: word.sub(other, name)) for t in targets]

    spec = mapped.edited(change)
    need(found == names.keys())
    return spec


def _name_only(ref: str, change: Callable[[str], str]) -> str:
    name, bracket, pattern = ref.partition(" [")
    return change(name) + bracket + pattern


def swapped(mapped: Mapped, a: str, b: str) -> Spec:
    return renamed(mapped, {a: b, b: a})


def regrouped(mapped: Mapped, name: str, axis: int, inside: tuple[str, str], **axes: str) -> Spec:
    """An axis of the tensors called `name` taken for (inside[0]) on disk and (inside[1]) here."""
    wanted = re.compile(rf"\.{name}\.(weight|bias)$")
    count = 0

    def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
        nonlocal count
        head, _, pattern = targets[0].partition(" [")
        if len(targets) > 1 or not wanted.search(head) or "(" in pattern:
            return source, targets
        bias = head.endswith("bias")
        if bias and axis:
            return source, targets
        left, right = _patterns(source, targets[0], bias)
        old = "oi"[axis]
        need(old in right)
        count += 1
        left = [f"({inside[0]})" if word == old else word for word in left]
        right = [f"({inside[1]})" if word == old else word for word in right]
        return f"{source.partition(' [')[0]} [{' '.join(left)}]", [f"{head} [{' '.join(right)}]"]

    spec = mapped.edited(change)
    need(count)
    return replace(spec, axes={**spec.axes, **axes})


def _patterns(source: str, target: str, bias: bool) -> tuple[list[str], list[str]]:
    """Axes of both sides; `[o i]` or `[o]` where the rule says none."""
    sides = []
    for ref in (source, target):
        pattern = ref.partition(" [")[2].rstrip("]")
        sides.append(pattern.split() if pattern else ["o"] if bias else ["o", "i"])
    return sides[0], sides[1]


@mutant("norm1 and norm2 swapped", "mapping", at=FIRST, cause=r"norm1 and .*norm2 are exchanged")
def _(m: Mapped) -> Spec:
    return swapped(m, "norm1", "norm2")


@mutant("gate and up swapped", "mapping", at=MLP, cause=r"gate and .*up are exchanged")
def _(m: Mapped) -> Spec:
    return swapped(m, "gate", "up")


@mutant("q and k swapped", "mapping", at=LOOK, cause=r"\bq and k are exchanged")
def _(m: Mapped) -> Spec:
    need(m.config.heads == getattr(m.config, "kv_heads", m.config.heads))
    return swapped(m, "q", "k")


@mutant(
    "norms before and after a branch swapped",
    "mapping",
    at=FIRST,
    cause=r"norm1 and .*norm1_out are exchanged",
)
def _(m: Mapped) -> Spec:
    return swapped(m, "norm1", "norm1_out")


@mutant(
    "norm after attention taken for that before the MLP",
    "mapping",
    at=r"in .*blocks\.0\.norm1_out$",
    cause=r"norm1_out and .*norm2 are exchanged",
)
def _(m: Mapped) -> Spec:
    return swapped(m, "norm1_out", "norm2")


@mutant("k and v swapped", "mapping", at=LOOK, cause=r"\bk and v are exchanged")
def _(m: Mapped) -> Spec:
    return swapped(m, "k", "v")


@mutant(
    "q, k, v read as v, q, k",
    "mapping",
    at=LOOK,
    cause=r"q is read from what v .*k is read from what q .*v is read from what k",
)
def _(m: Mapped) -> Spec:
    need(m.config.heads == getattr(m.config, "kv_heads", m.config.heads))
    return renamed(m, {"q": "v", "k": "q", "v": "k"})


@mutant(
    "layers shifted by one", "mapping", at=FIRST, cause=r"blocks\.0 is read as (\w+\.)?blocks\.1\b"
)
def _(m: Mapped) -> Spec:
    count = m.config.layers
    need(count > 1)
    return renamed(m, {f"blocks.{i}": f"blocks.{(i + 1) % count}" for i in range(count)})


@mutant(
    "first norm taken for the final one",
    "mapping",
    at=rf"in norm$|{FIRST}",
    cause=r"blocks\.0\.norm1 and norm are exchanged",
)
def _(m: Mapped) -> Spec:
    return renamed(m, {"blocks.0.norm1": "norm", ".norm": "blocks.0.norm1"})


@mutant(
    "embeddings and head swapped",
    "mapping",
    at=r"out embed$",
    cause=r"embed and head are exchanged",
)
def _(m: Mapped) -> Spec:
    need(not m.config.tied and m.config.head == "lm")
    return swapped(m, "embed", "head")


@mutant(
    "biases of attention and MLP swapped",
    "mapping",
    at=r"in .*blocks\.0\.(norm\w+|mlp\.\w+)$",
    cause=r"attn\.out\.bias and .*mlp\.down\.bias are exchanged",
)
def _(m: Mapped) -> Spec:
    return renamed(m, {"attn.out.bias": "mlp.down.bias", "mlp.down.bias": "attn.out.bias"})


@mutant(
    "a square read transposed",
    "mapping",
    at=r"out blocks\.0\.attn\.out$",
    cause=r"blocks\.0\.attn\.out\.weight is transposed",
)
def _(m: Mapped) -> Spec:
    need(_width(m.config) * m.config.heads == m.config.dim)

    def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
        if not targets[0].startswith("blocks.0.attn.out.weight"):
            return source, targets
        left, right = _patterns(source, targets[0], bias=False)
        name = source.partition(" [")[0]
        return f"{name} [{' '.join(reversed(left))}]", [
            f"blocks.0.attn.out.weight [{' '.join(right)}]"
        ]

    return m.edited(change)


@mutant(
    "q un-permuted for rotary",
    "mapping",
    at=LOOK,
    cause=r"rows of q lie as \[\(h \w+ \w+\)\], here as .*attn\.q is read as \[o i\], as it stands",
)
def _(m: Mapped) -> Spec:
    need(_width(m.config) % 2 == 0)
    return regrouped(m, "attn.q", 0, ("h e two", "h two e"), h="heads")


@mutant(
    "k un-permuted for rotary",
    "mapping",
    at=LOOK,
    cause=r"rows of k lie as \[\(g \w+ \w+\)\], here as .*attn\.k is read as \[o i\], as it stands",
)
def _(m: Mapped) -> Spec:
    need(_width(m.config) % 2 == 0)
    return regrouped(m, "attn.k", 0, ("g e two", "g two e"), g=_kv_heads(m.config))


def _width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.dim // config.heads


@mutant(
    "k permuted by the query heads",
    "mapping",
    at=LOOK,
    cause=r"rows of k lie as \[\(h \w+ \w+\)\], here as .*attn\.k is read as \[o i\], as it stands",
)
def _(m: Mapped) -> Spec:
    kv_heads = getattr(m.config, "kv_heads", m.config.heads)
    rows = kv_heads * _width(m.config)
    need(kv_heads != m.config.heads and rows % (2 * m.config.heads) == 0)
    return regrouped(m, "attn.k", 0, ("h e two", "h two e"), h="heads")


@mutant(
    "v heads interleaved",
    "mapping",
    at=LOOK,
    cause=r"rows of v lie as \[\(e g\)\], here as .*as it stands",
)
def _(m: Mapped) -> Spec:
    need(getattr(m.config, "kv_heads", m.config.heads) > 1)
    return regrouped(m, "attn.v", 0, ("e g", "g e"), g=_kv_heads(m.config))


def _kv_heads(config: Any) -> str:
    """The field that counts them."""
    return "kv_heads" if hasattr(config, "kv_heads") else "heads"


@mutant(
    "out reads its heads interleaved",
    "mapping",
    at=LOOK,
    cause=r"heads of what out reads lie as \[\(h e\)\], here as .*as it stands",
)
def _(m: Mapped) -> Spec:
    need(m.config.heads > 1)
    return regrouped(m, "attn.out", 1, ("e h", "h e"), h="heads")


@mutant("two experts exchanged", "mapping", at=MLP, cause=r"mlp\.gate .*0 in the place of 1")
def _(m: Mapped) -> Spec:
    count = getattr(m.config, "experts", 0)
    need(count > 1)
    spec = m.spec
    dialect = spec.dialect("hf")

    def turned(rule: Rule) -> list[Rule]:
        if not rule.stacked or "gate" not in str(rule.targets[0]):
            return [rule]
        axes = rule.source.pattern
        names = str(rule.source.name).replace("{x}", f"{{x={','.join(map(str, order))}}}")
        return [parse_rule(f"{names} {axes}", str(rule.targets[0]))]

    order = [1, 0, *range(2, count)]
    weights = tuple(r for rule in dialect.weights for r in turned(rule))
    return spec.with_dialect(replace(dialect, weights=weights))


@mutant(
    "fused q, k, v read as interleaved",
    "mapping",
    at=LOOK,
    cause=r"q,k,v} are read as \[\(n o\) i\], not",
)
def _(m: Mapped) -> Spec:
    def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
        turned = re.sub(r"\((\w+) (\w+)\)", r"(\2 \1)", source) if "{" in targets[0] else source
        return turned, targets

    return m.edited(change)


# --- config: a field is read wrong ---------------------------------------------------------------
# plant(config) -> native fields that change


def _field(config: Any, name: str) -> Any:
    need(getattr(config, name, None) is not None)
    return getattr(config, name)


@mutant("eps ten times too large", "config", at=r"out .*norm\w*$", cause=r"\beps is")
def _(config: Any) -> dict[str, Any]:
    return {"eps": 10 * _field(config, "eps")}


@mutant("eps of another library", "config", at=r"out .*norm\w*$", cause=r"\beps is")
def _(config: Any) -> dict[str, Any]:
    return {"eps": 1e-6 if _field(config, "eps") != 1e-6 else 1e-5}


@mutant("theta left at its default", "config", at=LOOK, cause=r"rope_base is 10000\.0, not")
def _(config: Any) -> dict[str, Any]:
    need(_field(config, "rope_base") != 10000.0)
    return {"rope_base": 10000.0}


@mutant("rope scaling ignored", "config", at=LOOK, cause=r"rope is .*default.*, not")
def _(config: Any) -> dict[str, Any]:
    rope = _field(config, "rope").to_json()
    need((rope or {}).get("rope_type", "default") != "default")
    return {"rope": {"rope_type": "default"}}


@mutant(
    "rope factor too large by a tenth", "config", at=LOOK, cause=r"rope is .*factor.*, not .*factor"
)
def _(config: Any) -> dict[str, Any]:
    rope = _field(config, "rope").to_json() or {}
    need("factor" in rope)
    return {"rope": {**rope, "factor": 1.1 * rope["factor"]}}


@mutant(
    "ends of the rope's ramp rounded, or not",
    "config",
    at=LOOK,
    cause=r"rope is .*, not .*truncate",
)
def _(config: Any) -> dict[str, Any]:
    rope = _field(config, "rope").to_json() or {}
    need(rope.get("rope_type") == "yarn")
    return {"rope": {**rope, "truncate": not rope.get("truncate", True)}}


@mutant("the other gelu", "config", at=MLP, cause=r"(act|mlp) is .*gelu")
def _(config: Any) -> dict[str, Any]:
    other = {"gelu": "gelu_new", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
    need(_field(config, "act") in other)
    return {"act": other[config.act]}


@mutant("silu for gelu, or gelu for silu", "config", at=MLP, cause=r"(act|mlp) is .*(silu|gelu)")
def _(config: Any) -> dict[str, Any]:
    now = _field(config, "act")
    return {"act": "gelu" if now in ("silu", "swish") else "silu"}


@mutant("window off by one", "config", at=r"in blocks\.[01]\.attn\.out$", cause=r"window is")
def _(config: Any) -> dict[str, Any]:
    need(hasattr(config, "windows") and any(config.windows()))
    return {"window": config.window + 1}


@mutant("window ignored", "config", at=r"in blocks\.[01]\.attn\.out$", cause=r"window is")
def _(config: Any) -> dict[str, Any]:
    need(hasattr(config, "windows") and any(config.windows()))
    return {"window": 10**6}


@mutant("one expert fewer for each token", "config", at=MLP, cause=r"experts_per_token is")
def _(config: Any) -> dict[str, Any]:
    need(_field(config, "experts") and config.experts_per_token > 1)
    return {"experts_per_token": config.experts_per_token - 1}


@mutant(
    "parallel branches run in turn, or the other way about",
    "config",
    at=r"in blocks\.0\.(norm2|mlp\.up)$|out blocks\.0\.norm2$",
    cause=r"parallel is",
)
def _(config: Any) -> dict[str, Any]:
    return {"parallel": not _field(config, "parallel")}


@mutant(
    "shared layers run once, or others twice",
    "config",
    at=r"in blocks\.[01]\.norm1(, time 2)?$",
    cause=r"repeat is",
)
def _(config: Any) -> dict[str, Any]:
    return {"repeat": not _field(config, "repeat")}


@mutant("soft cap left out", "config", at=LOOK, cause=r"score_cap is")
def _(config: Any) -> dict[str, Any]:
    _field(config, "score_cap")
    return {"score_cap": None}


@mutant("reach of distances doubled", "config", at=LOOK, cause=r"max_distance is")
def _(config: Any) -> dict[str, Any]:
    if getattr(config, "log_buckets", 0) > 0:
        return {"max_distance": 2 * config.longest}
    need(not hasattr(config, "log_buckets"))  # its table has a row a distance
    return {"max_distance": 2 * _field(config, "max_distance")}


@mutant("padding token unknown", "config", at=r"out (embed\.weight|the model)$", cause=r"\bpad is")
def _(config: Any) -> dict[str, Any]:
    _field(config, "pad")
    need(not hasattr(config, "start"))  # only what is generated depends on either
    return {"pad": None}


# --- model: the code is wrong --------------------------------------------------------------------
# plant(model) -> None


def attention(model: Any, change: Callable[[Look], Look]) -> None:
    """Every attention looks as `change` would have it."""
    found = [module for module in model.modules() if hasattr(module, "attend")]
    need(found)
    for module in found:
        module.attend = functools.partial(_changed, module.attend, change)


@dataclass(frozen=True)
class Look:
    """What an attention is given: (b, h, s, e) of queries, (b, g, t, e) of keys and values."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float

    def allowing(self, change: Callable[[Tensor], Tensor]) -> Look:
        """With another (…, s, t) of who may look at whom."""
        allowed = self.mask.dense(self.q.shape[2])
        if allowed is None:
            allowed = torch.ones(self.q.shape[2], self.k.shape[2], dtype=torch.bool)
        return replace(self, mask=Mask(change(allowed), self.mask.positions))


def _changed(
    attend: Any,
    change: Callable[[Look], Look],
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scale: Any,
    *rest: Any,
) -> Tensor:
    look = change(Look(q, k, v, mask, scale))
    out: Tensor = attend(look.q, look.k, look.v, look.mask, look.scale, *rest)
    return out


@mutant("mask off by one", "model", at=LOOK, cause=r"here tokens see one place ahead")
def _(model: Any) -> None:
    need(causal(model))
    attention(model, lambda look: look.allowing(lambda mask: mask | _ahead(mask)))


def _ahead(mask: Tensor) -> Tensor:
    """Where the one before may look, and so one step into the future."""
    return F.pad(mask, (1, 0))[..., :-1] if mask.shape[-1] > 1 else mask


@mutant(
    "a token may not look at itself",
    "model",
    at=LOOK,
    cause=r"here a token does not look at itself",
)
def _(model: Any) -> None:
    def change(mask: Tensor) -> Tensor:
        own = torch.eye(*mask.shape[-2:], dtype=torch.bool)
        alone = (mask & ~own).sum(-1, keepdim=True) == 0
        return mask & (~own | alone)

    attention(model, lambda look: look.allowing(change))


@mutant("the future is visible", "model", at=LOOK, cause=r"here the future is visible")
def _(model: Any) -> None:
    need(causal(model))
    attention(model, lambda look: look.allowing(_both_ways))


def _both_ways(mask: Tensor) -> Tensor:
    return mask | mask.mT if mask.shape[-1] == mask.shape[-2] else mask


@mutant("attention not scaled", "model", at=LOOK, cause=r"here scores are not scaled")
def _(model: Any) -> None:
    _rescale(model, 1.0)


@mutant(
    "attention scaled by the whole width",
    "model",
    at=LOOK,
    cause=r"here scores are divided by the root of the whole width",
)
def _(model: Any) -> None:
    _rescale(model, model.config.dim**-0.5)


def _rescale(model: Any, scale: float) -> None:
    need(any(getattr(module, "scale", scale) != scale for module in model.modules()))
    attention(model, lambda look: replace(look, scale=scale))


@mutant(
    "kv heads tiled, not repeated", "model", at=LOOK, cause=r"here key and value heads are tiled"
)
def _(model: Any) -> None:
    heads, kv_heads = model.config.heads, getattr(model.config, "kv_heads", model.config.heads)
    need(1 < kv_heads < heads)
    times = (1, heads // kv_heads, 1, 1)
    attention(model, lambda look: replace(look, k=look.k.repeat(times), v=look.v.repeat(times)))


@mutant(
    "padding is looked at",
    "model",
    at=r"out positions$|in norm$|in .*blocks\.0\.(norm1|attn\.out)$",
    cause=r"padding is looked at",
)
def _(model: Any) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def run(ids: Tensor, attention_mask: Tensor | None = None, **extra: Any) -> Any:
        return forward(ids, **extra)

    model.forward = run


@mutant("token types ignored", "model", at=r"out types$", cause=r"types.* ignored")
def _(model: Any) -> None:
    forward = model.forward
    need(getattr(model.config, "types", 1) > 1)

    @functools.wraps(forward)
    def run(ids: Tensor, token_type_ids: Tensor | None = None, **extra: Any) -> Any:
        return forward(ids, **extra)

    model.forward = run


@mutant("two outputs exchanged", "model", at=r"out the model$", cause=r"outputs are exchanged")
def _(model: Any) -> None:
    forward = model.forward
    need("decoder_input_ids" not in inspect.signature(forward).parameters)
    out = forward(torch.zeros(1, 1, dtype=torch.long))
    need(isinstance(out, tuple) and out[0].shape == out[-1].shape)

    @functools.wraps(forward)
    def run(*args: Any, **extra: Any) -> Any:
        return tuple(reversed(forward(*args, **extra)))

    model.forward = run


@mutant("pooler reads the last token", "model", at=r"in pooler\.dense$", cause=r"the last token")
def _(model: Any) -> None:
    need(hasattr(model, "pooler"))
    model.pooler.register_forward_pre_hook(lambda _, args: (args[0].flip(1), *args[1:]))


@mutant(
    "norm outside the blocks missing",
    "model",
    at=r"out (decoder\.)?norm$",
    cause=r"norm is missing",
)
def _(model: Any) -> None:
    stack = stacks(model)[-1]
    part(stack, "norm")
    stack.norm = nn.Identity()


@mutant("positions off by one", "model", at=r"out positions$", cause=r"off by \+1")
def _(model: Any) -> None:
    part(model, "positions")
    last = len(model.positions.weight) - 1
    model.positions.register_forward_pre_hook(lambda _, args: ((args[0] + 1).clamp(max=last),))


# RoBERTa's are counted from 2 on, which is ignored with the padding
@mutant(
    "positions count the padding",
    "model",
    at=r"out positions$",
    cause=r"count the padding|off by -2",
)
def _(model: Any) -> None:
    part(model, "positions")
    model.positions.register_forward_pre_hook(
        lambda _, args: (torch.arange(args[0].shape[1]).expand_as(args[0]),)
    )


@mutant(
    "distances ahead taken for those behind, or told apart",
    "model",
    at=LOOK,
    cause=r"distances ahead",
)
def _(model: Any) -> None:
    found = [module for module in model.modules() if hasattr(module, "both_ways")]
    need(found)
    for module in found:
        module.both_ways = not module.both_ways


@mutant(
    "distances counted the other way",
    "model",
    at=LOOK,
    cause=r"distances are counted the other way",
)
def _(model: Any) -> None:
    distances = part(model, "distances")
    rows = distances.rows
    distances.rows = lambda positions: rows(-positions)


@mutant(
    "contents look at places as places at contents",
    "model",
    at=LOOK,
    cause=r"here (contents look at places|places look at contents)",
)
def _(model: Any) -> None:
    for block in blocks(model):
        terms = set(getattr(block.attn, "position_terms", ()))
        need(len(terms) == 1)
        block.attn.position_terms = tuple({"c2p", "p2c"} - terms)


@mutant(
    "vectors of distances not normed",
    "model",
    at=LOOK,
    cause=r"distances(\.norm does not run here| are not normed)",
)
def _(model: Any) -> None:
    part(part(model, "distances"), "norm")
    model.distances.norm = None


@mutant("a convolution reads the padding", "model", at=r"in conv\.norm$", cause=r"padding is read")
def _(model: Any) -> None:
    noise = torch.randn(model.config.dim, dtype=model.embed.weight.dtype)

    def heard(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        silent = (args[0] == 0).all(-1, keepdim=True)
        return torch.where(silent, noise, args[0]), args[1]

    part(model, "conv").register_forward_pre_hook(heard)


@mutant(
    "a convolution after its layer, not beside it",
    "model",
    at=r"in conv\.conv$",
    cause=r"norm2 is in it",
)
def _(model: Any) -> None:
    part(model, "conv").register_forward_pre_hook(lambda _, args: (args[1], args[1]))


@mutant(
    "a bias by distance in the first layer alone",
    "model",
    at=r"in .*blocks\.1\.attn\.out$",
    cause=r"no bias by distance",
)
def _(model: Any) -> None:
    need(isinstance(blocks(model)[-1].attn.attend, Biased) and len(blocks(model)) > 1)
    for stack in stacks(model):
        for block in list(stack.blocks)[1:]:
            block.attn.attend = attend


@mutant(
    "the decoder reads itself, not the encoder",
    "model",
    at=r"in decoder\.blocks\.0\.cross\.[kv]$",
    cause=r"norm_cross is in it once here",
)
def _(model: Any) -> None:
    crossing(model, lambda read, x, mask, source: read(x, Mask(None, mask.positions)))


@mutant(
    "the decoder reads the encoder's padding",
    "model",
    at=r"in decoder\.blocks\.0\.cross\.out$",
    cause=r"question's padding is looked at",
)
def _(model: Any) -> None:
    crossing(model, lambda read, x, mask, source: read(x, Mask(None, mask.positions), source))


def crossing(model: Any, change: Callable[..., Any]) -> None:
    """`change(forward, x, mask, source)` in the place of each attention to another sequence."""
    for block in stacks(model)[-1].blocks:
        cross = part(block, "cross")
        cross.forward = functools.partial(change, cross.forward)


@mutant(
    "the head reads states scaled by the root of their width",
    "model",
    at=r"in head$",
    cause=r"head is [\d.]+ times",
)
def _(model: Any) -> None:
    need(model.config.head in ("lm", "shared_lm"))
    root = model.config.dim**0.5
    model.head.register_forward_pre_hook(lambda _, args: (args[0] * root,))


def blocks(model: Any) -> list[Any]:
    """All of them; an encoder-decoder has two stacks."""
    return [block for stack in stacks(model) for block in stack.blocks]


def part(module: Any, name: str) -> Any:
    """A module of it that not all of its kind have."""
    need(getattr(module, name, None) is not None)
    return getattr(module, name)


def stacks(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "blocks")]


def turning(model: Any, change: Callable[..., Any]) -> None:
    """`change(rotary, q, k, mask)` in the place of each attention's rotary."""
    for block in blocks(model):
        rotary = block.attn.rotary
        need(isinstance(rotary, Rotary))
        block.attn.rotary = functools.partial(change, rotary)


@mutant(
    "queries one position ahead",
    "model",
    at=LOOK,
    cause=r"here queries are turned as if one place ahead",
)
def _(model: Any) -> None:
    def ahead(rotary: Any, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        later = Mask(mask.allowed, mask.positions + 1, mask.causal)
        return rotary(q, k, later)[0], rotary(q, k, mask)[1]

    turning(model, ahead)


@mutant("rotary left out", "model", at=LOOK, cause=r"here queries and keys are not turned")
def _(model: Any) -> None:
    turning(model, lambda rotary, q, k, mask: (q, k))


@mutant("keys not turned", "model", at=LOOK, cause=r"here keys are not turned")
def _(model: Any) -> None:
    turning(model, lambda rotary, q, k, mask: (rotary(q, k, mask)[0], k))


@mutant("turned backwards", "model", at=LOOK, cause=r"here queries and keys are turned backwards")
def _(model: Any) -> None:
    def back(rotary: Any, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        return rotary(q, k, Mask(mask.allowed, -mask.positions, mask.causal))

    turning(model, back)


@mutant("neighbors turned, not halves", "model", at=LOOK, cause=r"here neighbors are turned")
def _(model: Any) -> None:
    def apart(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).mT.flatten(-2)

    def together(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).mT.flatten(-2)

    def neighbors(rotary: Any, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        q, k = rotary(apart(q), apart(k), mask)
        return together(q), together(k)

    turning(model, neighbors)


@mutant(
    "a norm centres its input",
    "model",
    at=r"(in|out) .*blocks\.0\.norm1$",
    cause=r"norm1.* centred",
)
def _(model: Any) -> None:
    norm = part(blocks(model)[0], "norm1")
    x = torch.randn(3, model.config.dim, dtype=model.embed.weight.dtype)
    need((norm(x) - norm(x - x.mean(-1, keepdim=True))).abs().max() > 1e-3)
    norm.register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(-1, keepdim=True),))


@mutant(
    "a norm does not centre its input",
    "model",
    at=r"out blocks\.0\.norm2$",
    cause=r"norm2.* not centred here",
)
def _(model: Any) -> None:
    norm = part(blocks(model)[0], "norm2")
    x = torch.randn(3, model.config.dim, dtype=model.embed.weight.dtype) + 1
    need((norm(x) - norm(x - x.mean(-1, keepdim=True))).abs().max() < 1e-3)
    scale, shift = norm.weight, norm.bias
    norm.forward = lambda x: F.rms_norm(x, x.shape[-1:], scale, model.config.eps) + shift


@mutant(
    "norm moved from input to output of its branch, or back",
    "model",
    at=r"(in|out) .*blocks\.0\.norm1$|in .*blocks\.0\.attn\.[qkv]$",
    cause=r"norm is moved",
)
def _(model: Any) -> None:
    for block in blocks(model):
        norm, block.norm1 = part(block, "norm1"), nn.Identity()
        block.attn.register_forward_hook(lambda _, args, out, norm=norm: norm(out))


@mutant(
    "attention left out of the residual stream once",
    "model",
    at=r"in (decoder\.blocks\.1\.norm_cross|blocks\.2\.(norm\w+|mlp\.\w+)|norm)$",
    cause=r"attn\.out is in it not at all here",
)
def _(model: Any) -> None:
    blocks(model)[-1].attn.register_forward_hook(lambda _, args, out: out * 0)


@mutant(
    "last layer skipped",
    "model",
    at=r"in (decoder\.)?norm$|in head(\.dense)?$",
    cause=r"blocks\.[12] does not run here",
)
def _(model: Any) -> None:
    stack = stacks(model)[-1]
    need(len(stack.blocks) > 1)
    stack.blocks = stack.blocks[:-1]


@mutant(
    "first two layers exchanged",
    "model",
    at=r"(in|out) (encoder\.)?blocks\.0\.(norm1|norm_attn|norm_mlp|attn\.[qkv])$",
    cause=r"blocks\.0 holds what .*blocks\.1 should",
)
def _(model: Any) -> None:
    stack = stacks(model)[0]
    need(len(stack.blocks) > 1)
    first, second, *rest = stack.blocks
    stack.blocks = nn.ModuleList([second, first, *rest])


@mutant(
    "one tensor through fp16",
    "model",
    at=r"out .*blocks\.0\.mlp(\.down)?$",
    cause=r"mlp\.down.* float16",
)
def _(model: Any) -> None:
    mlp = dict(blocks(model)[0].mlp.named_parameters())
    weight = next(p for name, p in mlp.items() if name.startswith("down"))
    _overwrite(weight, weight.half().to(weight.dtype))


@mutant(
    "a bias dropped", "model", at=r"out blocks\.0\.attn\.out$", cause=r"attn\.out\.bias is zero"
)
def _(model: Any) -> None:
    bias = blocks(model)[0].attn.out.bias
    need(bias is not None)
    _overwrite(bias, torch.zeros_like(bias))


@mutant(
    "norms read as an offset from one",
    "model",
    at=r"out .*blocks\.0\.norm1$",
    cause=r"norm1\.weight is off by \+1",
)
def _(model: Any) -> None:
    for block in blocks(model):
        norm = part(block, "norm1")
        _overwrite(norm.weight, norm.weight + 1)


@mutant(
    "vocabulary off by one", "model", at=r"out embed$", cause=r"embed\.weight is off by \+1 row"
)
def _(model: Any) -> None:
    _overwrite(model.embed.weight, model.embed.weight.roll(1, 0))


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    # not in place: the memory may be the file's
    parameter.data = value.detach().clone()


@mutant("tie broken", "model", at=r"tie .*embed\.weight", cause=r"tie is broken")
def _(model: Any) -> None:
    tied = [
        module
        for module in model.modules()
        if module is not model.embed and getattr(module, "weight", None) is model.embed.weight
    ]
    need(tied)
    for module in tied:
        module.weight = nn.Parameter(model.embed.weight.detach().clone())


@mutant(
    "dropout active in evaluation",
    "model",
    at=r"in (encoder\.)?blocks\.0\.(norm1|attn\.q)$",
    cause=r"dropout is active",
)
def _(model: Any) -> None:
    need(any(isinstance(m, nn.Dropout) and m.p for m in model.modules()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def causal(model: Any) -> bool:
    """Whether the last token changes nothing at the first."""
    ids = torch.arange(8)[None] + 4
    other = ids.clone()
    other[0, -1] += 1
    answering = "decoder_input_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        a, b = (model(ids, decoder_input_ids=x) if answering else model(x) for x in (ids, other))
    need(isinstance(a, Tensor) and a.shape[:2] == ids.shape)
    return torch.equal(a[0, 0], b[0, 0])


# --- the gate ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The variants of one architecture, with the truth about each, to plant bugs in."""

    entry: Architecture
    scratch: Path
    _truths: dict[str, Truth] = field(default_factory=dict)
    _failing: dict[str, set[str]] = field(default_factory=dict)

    def truth(self, variant: str) -> Truth:
        if variant not in self._truths:
            directory = self.scratch / self.entry.name / variant
            named = hot_checkpoint(self.entry, variant, directory)
            self._truths[variant] = Truth(directory, named)
        return self._truths[variant]

    def failing(self, variant: str) -> set[str]:
        """Checks that fail without any bug planted, and so can kill none."""
        if variant not in self._failing:
            healthy = self.subject(variant)
            rows = (row for check in NUMERIC for row in check(healthy))
            self._failing[variant] = {row.check for row in rows if not row.ok}
        return self._failing[variant]

    def subject(self, variant: str, bug: Mutant | None = None) -> Subject:
        """A variant's native model with a bug in it, or healthy."""
        truth = self.truth(variant)
        load = functools.partial(load_directory, truth.directory, self.entry)
        return Subject(variant, truth, functools.partial(planted, load, bug, self.entry))


def planted(load: Callable[..., Any], bug: Mutant | None, entry: Architecture, dtype: Any) -> Any:
    if bug is None:
        return load(dtype=dtype)
    if bug.kind == "model":
        model = load(dtype=dtype)
        bug.plant(model)
        return model
    config = load().config
    if bug.kind == "config":
        changes = bug.plant(config)
        need(any(getattr(config, name) != value for name, value in changes.items()))
        return load(dtype=dtype, config=changes)
    healthy = load(dtype=dtype)
    model = load(dtype=dtype, spec=bug.plant(Mapped(load_spec(entry.spec), config)))
    # some mix-ups are none at some sizes
    need(
        any(not torch.equal(p, q) for p, q in zip(*map(_parameters, (healthy, model)), strict=True))
    )
    return model


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach() for _, p in sorted(model.named_parameters())]


@dataclass(frozen=True)
class Verdict:
    architecture: str
    mutant: str
    kind: str
    status: Literal["killed", "n.a.", "SURVIVED"]
    by: str = ""  # variant: check (value)


def hunt(bench: Bench, bug: Mutant, variants: Iterable[str] = ()) -> Verdict:
    """The first variant and check that notice the bug; numbers rather than a refusal to load it."""
    found = functools.partial(Verdict, bench.entry.name, bug.name, bug.kind)
    planted, refused = False, ""
    for variant in variants or bench.entry.variants:
        subject = bench.subject(variant, bug)
        try:
            subject.model(torch.float64)
            planted = True
            rows = (row for check in NUMERIC for row in check(subject) if not row.ok)
            row = next((r for r in rows if r.check not in bench.failing(variant)), None)
        except NotApplicable:
            continue
        except ZooError as error:
            refused = refused or f"{variant}: {type(error).__name__}"
            continue
        if row is not None:
            return found("killed", f"{variant}: {row.check} {row.shown}")
    if planted:
        return found("SURVIVED")
    return found("killed", refused) if refused else found("n.a.")


def run(
    architectures: Iterable[Architecture] | None = None, seen: Callable[[Verdict], None] = print
) -> list[Verdict]:
    torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring
    verdicts = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="zoo-mutants-")))
        for entry in architectures or registry.architectures().values():
            bench = Bench(entry, scratch)
            for bug in MUTANTS.values():
                verdicts.append(hunt(bench, bug))
                seen(verdicts[-1])
    return verdicts


_STYLES = {"killed": GREEN, "SURVIVED": RED, "n.a.": DIM}


def table(verdicts: Iterable[Verdict], color: bool = False) -> str:
    """Mutants down, architectures across."""
    verdicts = list(verdicts)
    names = list(dict.fromkeys(v.architecture for v in verdicts))
    cells = {(v.mutant, v.architecture): v for v in verdicts}
    width = max(len(bug) for bug in MUTANTS)
    lines = [f"{'kind':8} {'mutant':{width}}  " + "  ".join(f"{name:34}" for name in names)]
    for bug in MUTANTS.values():
        line = f"{bug.kind:8} {bug.name:{width}}  "
        for name in names:
            found = cells[bug.name, name]
            text = f"{found.status} {found.by}".strip()[:34].ljust(34)
            line += paint(text, _STYLES[found.status], color) + "  "
        lines.append(line.rstrip())
    counts = {s: sum(v.status == s for v in verdicts) for s in ("killed", "n.a.", "SURVIVED")}
    lines.append(
        f"{len(MUTANTS)} mutants in {len(names)} architectures: {counts['killed']} killed, "
        f"{counts['n.a.']} not applicable, {counts['SURVIVED']} survived"
    )
    return "\n".join(lines)


def main() -> int:
    verdicts = run(seen=lambda v: passing(f"{v.architecture}: {v.mutant}", sys.stderr))
    passing("", sys.stderr)
    print(table(verdicts, color=has_color(sys.stdout)))
    return 1 if any(v.status == "SURVIVED" for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
