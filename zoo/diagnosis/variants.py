"""Other values that a config field or an attention's settings may have been meant to have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from zoo.components.activations import ACTIVATIONS
from zoo.components.decoder import Decoder
from zoo.components.model import Model
from zoo.components.rotary import LLAMA3, PLAIN, SCALINGS, LinearScaling, Llama3, Rotary, Scaling
from zoo.diagnosis.edits import Changes, Hypothesis
from zoo.diagnosis.kinds import attentions
from zoo.errors import ConfigError

# fields that change shapes, or nothing that is computed
NOT_TRIED = {"vocab", "dim", "layers", "decoder_layers", "heads", "kv_heads", "head_dim"}
NOT_TRIED |= {"hidden", "experts", "labels", "init_std", "head", "positions", "types"}
# fields that no likelihood of a text without padding depends on, and those tried by themselves
LEFT = NOT_TRIED | {"pad", "start", "extrapolate", "upcast_attn", "lone_bias", "legacy", "windowed"}
LEFT |= {"rope", "rope_base", "groups", "summary_act", "head_act", "kinds"}
# which parameters there are
LEFT |= {"bias", "qkv_bias", "attn_bias", "attn_out_bias", "mlp_bias"}
ACTS = ("gelu", "gelu_new", "relu", "silu", "quick_gelu", "relu2", "tanh")
WIDTHS = (32, 64, 80, 96, 128, 256)  # of heads, where no shape tells how many there are
USUAL: tuple[Scaling, ...] = (
    Llama3(8.0, *LLAMA3),
    Llama3(32.0, *LLAMA3),
    LinearScaling(2.0),
    LinearScaling(4.0),
    LinearScaling(8.0),
)


def plain(value: Any) -> Any:
    """A config value as JSON has it."""
    return value.to_json() if hasattr(value, "to_json") else value


def config_hypothesis(config: Any, **changes: Any) -> Hypothesis:
    """That some config fields should have other values."""
    values = {name: plain(value) for name, value in changes.items()}
    what = " and ".join(
        f"config field {n} is {plain(getattr(config, n))!r}, not {v!r}" for n, v in values.items()
    )
    fix = " and ".join(f"{n} is {v!r}" for n, v in values.items())
    return Hypothesis(what, fix, config=values)


def config_hypotheses(model: Model) -> Iterator[Hypothesis]:
    """Every field with each usual value; rope and heads, which depend on others, by themselves."""
    config = model.config
    for name in type(config).model_fields:
        if name in LEFT or "dropout" in name or (name == "tied" and isinstance(model, Decoder)):
            continue
        for value in _usual(config, name):
            yield config_hypothesis(config, **{name: value})
    yield from _heads(config)
    for attn in attentions(model):
        if isinstance(attn.first.rotary, Rotary) and hasattr(config, "rope_base"):
            for base in bases(attn.first.rotary.base):
                yield config_hypothesis(config, rope_base=base)
            choices = (*scalings(config.rope), *USUAL) if config.rope is not PLAIN else USUAL
            for scaling in dict.fromkeys(choices):
                if scaling != config.rope:
                    yield config_hypothesis(config, rope=scaling)


def _usual(config: Any, name: str) -> Iterator[Any]:
    """The few values of a field that are worth reading a text for."""
    now = getattr(config, name)
    choices: Any = ()
    if name == "eps":
        choices = (1e-5, 1e-6, 1e-12, 1e-3)
    elif name.endswith("act"):
        choices = [a for a in ACTS if ACTIVATIONS[a] is not ACTIVATIONS.get(now)]
    elif name.endswith("cap"):
        choices = (None, 30.0, 50.0)
    elif name == "query_scale":
        choices = (config.head_dim, config.dim // config.heads, config.dim)
    elif name == "rope_share":
        choices = (0.25, 0.5, 1.0)
    elif isinstance(now, bool | int):
        choices = [v for v in values(config, name) if v is not None]
    yield from (value for value in dict.fromkeys(choices) if value != now)


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
        yield config_hypothesis(config, **changes)


def values(config: Any, name: str, numbers: Sequence[float] = ()) -> Iterator[Any]:
    """Each other value that a field may have been meant to have; `numbers` occur elsewhere."""
    now = getattr(config, name)
    choices: list[Any] = []
    if isinstance(now, bool):
        choices = [not now]
    elif isinstance(now, int):
        near = [now - 1, now + 1, now // 2, 2 * now]
        choices = [*near, *(int(n) for n in numbers if n == int(n) and n > 0), None]
    elif isinstance(now, float):
        usual = [1e-5, 1e-6, 1e-12, 1e-8] if now < 1e-2 else [10000.0, 500000.0, 1000000.0]
        choices = [*numbers, *usual, now / 10, now * 10, now / 2, now * 2, None]
    elif name.endswith("act"):
        choices = list(ACTIVATIONS)
    elif now is None:
        choices = [n for n in numbers if n > 1]
    seen = [now]
    for value in choices:
        if value not in seen:
            seen.append(value)
            yield value


def bases(now: float, numbers: Iterable[float] = ()) -> list[float]:
    """Other bases (theta) that a rotary embedding may have."""
    usual = (10000.0, 1e5, 5e5, 1e6, 1e7, 100.0, 1000.0)
    choices = dict.fromkeys(float(x) for x in (*numbers, *usual) if x >= 50)
    return [base for base in choices if base != now]


def scalings(
    now: Scaling, configs: Iterable[Changes] = (), numbers: Iterable[float] = ()
) -> Iterator[Scaling]:
    """Other scalings of a rotary embedding: those in `configs`, and what is near them and `now`."""
    choices = list[Scaling]()
    for config in configs:
        try:
            choices.append(
                Scaling.from_json({k: v for k, v in config.items() if k != "rope_theta"})
            )
        except ConfigError:
            continue
    choices.append(PLAIN)
    for scaling in (now, *choices):
        fields = {k: v for k, v in scaling.to_json().items() if k != "rope_type"}
        for kind in SCALINGS.values():
            if kind is not Scaling and set(fields) <= set(kind.__dataclass_fields__):
                try:
                    choices.append(kind(**fields))
                except TypeError:
                    continue
        if "truncate" in fields:
            choices.append(replace(scaling, truncate=not fields["truncate"]))  # type: ignore[call-arg]
        if "factor" in fields:
            others = [float(n) for n in (*numbers, 2.0, 4.0, 8.0) if n > 1]
            others += [fields["factor"] / 1.1, fields["factor"] * 1.1]
            choices += [replace(scaling, factor=n) for n in others]  # type: ignore[call-arg]
    seen = [now]
    for each in choices:
        if each not in seen:
            seen.append(each)
            yield each
