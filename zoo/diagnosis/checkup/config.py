"""Fields of a config, and what an attention does beside its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any

from zoo.components.activations import ACTIVATIONS
from zoo.components.decoder import Decoder
from zoo.components.model import Model
from zoo.components.rotary import LLAMA3, NO_ROTARY, PLAIN, Linear, Llama3, Rotary, Scaling
from zoo.diagnosis.checkup.parts import Hypothesis, attentions
from zoo.diagnosis.edits import NOT_TRIED, backwards, bases, scales, scalings, values

# what no likelihood of a text without padding depends on, and what is asked for by itself
LEFT = NOT_TRIED | {"pad", "start", "extrapolate", "upcast_attn", "lone_bias", "legacy", "windowed"}
LEFT |= {"rope", "rope_base", "groups", "summary_act", "head_act", "kinds"}
# which parameters there are
LEFT |= {"bias", "qkv_bias", "attn_bias", "attn_out_bias", "mlp_bias"}
ACTS = ("gelu", "gelu_new", "relu", "silu", "quick_gelu", "relu2", "tanh")
EPS = (1e-5, 1e-6, 1e-12, 1e-3)
CAPS = (None, 30.0, 50.0)
WIDTHS = (32, 64, 80, 96, 128, 256)  # of heads, where no shape tells how many there are
USUAL: tuple[Scaling, ...] = (
    Llama3(8.0, *LLAMA3),
    Llama3(32.0, *LLAMA3),
    Linear(2.0),
    Linear(4.0),
    Linear(8.0),
)


def of_config(model: Model) -> Iterator[Hypothesis]:
    config = model.config
    for field in fields(config):
        name = field.name
        if name in LEFT or "dropout" in name or (name == "tied" and isinstance(model, Decoder)):
            continue
        for value in _values(config, name):
            yield _field(config, **{name: value})
    yield from _heads(config)


def _field(config: Any, **changes: Any) -> Hypothesis:
    def plain(value: Any) -> Any:
        return value.to_json() if hasattr(value, "to_json") else value

    what = " and ".join(
        f"config field {n} is {plain(getattr(config, n))!r}, and should be {plain(v)!r}"
        for n, v in changes.items()
    )
    fix = " and ".join(f"{n} is {plain(v)!r}" for n, v in changes.items())
    return Hypothesis(what, fix, config={n: plain(v) for n, v in changes.items()})


def _values(config: Any, name: str) -> Iterator[Any]:
    now = getattr(config, name)
    found: Any = ()
    if name == "eps":
        found = EPS
    elif name.endswith("act"):
        found = [a for a in ACTS if ACTIVATIONS[a] is not ACTIVATIONS.get(now)]
    elif name.endswith("cap"):
        found = CAPS
    elif name == "query_scale":
        found = (config.head_dim, config.dim // config.heads, config.dim)
    elif name == "rope_share":
        found = (0.25, 0.5, 1.0)
    elif isinstance(now, bool | int):
        found = [v for v in values(config, name) if v is not None]
    yield from (value for value in dict.fromkeys(found) if value != now)


def _heads(config: Any) -> Iterator[Hypothesis]:
    """Other numbers of heads that the same shapes may have."""
    heads = config.heads
    kv_heads, width = getattr(config, "kv_heads", None), getattr(config, "head_dim", None)
    whole = heads * width if width else config.dim
    near = [2 * heads, heads // 2, 4 * heads, heads // 4]
    for other in dict.fromkeys((*near, *(whole // n for n in WIDTHS if whole % n == 0))):
        if other in (0, heads) or whole % other or whole // other < 4:
            continue
        changes = {"heads": other}
        if width is not None:
            changes["head_dim"] = whole // other
        if width is not None and kv_heads is not None:
            if kv_heads * width % changes["head_dim"]:
                continue
            changes["kv_heads"] = kv_heads * width // changes["head_dim"]
        yield _field(config, **changes)


def of_attention(model: Model) -> Iterator[Hypothesis]:
    config = model.config
    for attn in attentions(model):
        rotary, name = attn.first.rotary, attn.name

        def all_do(what: str, **attributes: Any) -> Hypothesis:
            settings = dict.fromkeys(attn.modules, attributes)  # noqa: B023
            return Hypothesis(f"{name}: {what}", f"in {name} {what}", settings=settings)  # noqa: B023

        if isinstance(rotary, Rotary):
            if hasattr(config, "rope_base"):
                for base in bases(rotary.base):
                    yield _field(config, rope_base=base)
                found = dict.fromkeys((*scalings(config.rope), *USUAL))
                for scaling in found if config.rope is not PLAIN else USUAL:
                    if scaling != config.rope:
                        yield _field(config, rope=scaling)
            yield all_do("queries and keys are not turned", rotary=NO_ROTARY)
            yield all_do("queries and keys are turned backwards", rotary=partial(backwards, rotary))
        said = scales(attn.first.scale, attn.first.head_dim, config.dim, 1)
        for scale, what in said.items():
            if scale != attn.first.scale:
                yield all_do(what, scale=scale)
        by_layer = {
            one: {"scale": module.scale / (n + 1)}
            for n, (one, module) in enumerate(attn.modules.items())
        }
        if not hasattr(config, "scale_attn_by_layer"):
            what = "scores are divided by the layer's number, too"
            yield Hypothesis(f"{name}: {what}", f"in {name} {what}", settings=by_layer)
