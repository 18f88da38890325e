"""Rotary positions: queries and keys turned by angles that grow with their place, in halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.components.config import Config, Parsed, Positive, Size
from zoo.components.masks import Mask
from zoo.errors import ConfigError, did_you_mean

Rotation = Callable[[Tensor, Tensor, Mask], tuple[Tensor, Tensor]]  # of queries and keys


class NoRotary:
    """Leaves queries and keys alone: positions come from elsewhere."""

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        return q, k


NO_ROTARY = NoRotary()


class Rotary:
    """Turns pairs (n, n + width/2) of a head by `position * frequency(n)`; all layers share it.

    What a head has beyond `width` stays as it is.
    """

    def __init__(self, width: int, base: float, scaling: Scaling, limit: int) -> None:
        self.width, self.base, self.scaling, self.limit = width, base, scaling, limit

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        cos, sin = mask.keep(self, lambda: self.tables(mask.positions, q.dtype))
        return turn(q, cos, sin), turn(k, cos, sin)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, 1, s, e/2) each, computed in fp32 at least whatever the model's dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        steps = torch.arange(0, self.width, 2, device=positions.device).to(wide) / self.width
        frequencies = self.scaling.frequencies(self, steps, positions)
        angles = (positions[..., None].to(wide) * frequencies)[:, None]
        scale = self.scaling.amplitude(self)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(b, h, s, e), two halves of it rotated against each other, and the rest behind them."""
    half = cos.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


# --- scaling types: how each bends the frequencies for contexts longer than it was trained on ----


SCHEMA = {"type": ["object", "null"]}


@dataclass(frozen=True)
class Scaling(Parsed):
    """The plain frequencies; `type` is the name that configs use."""

    json_schema = SCHEMA
    type: ClassVar[str] = "default"
    unbounded: ClassVar[bool] = False  # adapts to any length

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        """(…, e/2), broadcasting against (b, s, 1) positions."""
        return 1.0 / rotary.base**steps

    def amplitude(self, rotary: Rotary) -> float:
        return 1.0

    def problems(self) -> list[str]:
        given = {k: v for k, v in asdict(self).items() if type(v) in (int, float)}
        # a factor of temperature may be 0, which stands for none
        given = {name: value for name, value in given.items() if not name.startswith("mscale")}
        return [f"{name}: {value} is not positive" for name, value in given.items() if value <= 0]

    def misfits(self, width: int, base: float) -> Iterator[str]:
        """What this type cannot do with such heads."""
        yield from ()

    @classmethod
    def from_json(cls, value: Any) -> Scaling:
        """From `rope_scaling` or `rope_parameters`; what is not implemented is refused by name."""
        if value is None:
            return PLAIN
        if not isinstance(value, dict):
            raise ConfigError(f"expected an object, found {value!r}")
        given = {k: v for k, v in value.items() if v is not None}
        if "truncate" in value:
            given.setdefault("truncate", False)  # a null is no, its absence yes
        kinds = [given.pop(key) for key in ("rope_type", "type") if key in given]
        name = kinds[0] if kinds else "default"
        if any(kind != name for kind in kinds):
            raise ConfigError(f"rope_type {kinds[0]!r} and type {kinds[1]!r} differ")
        if not isinstance(name, str) or name not in SCALINGS:
            known = ", ".join(SCALINGS)
            near = did_you_mean(str(name), SCALINGS)
            raise ConfigError(f"rope type {name!r} is not implemented (only {known}).{near}")
        if given.get("partial_rotary_factor") == 1.0:
            given.pop("partial_rotary_factor")
        kind = SCALINGS[name]
        known_fields = kind.__dataclass_fields__
        if odd := [k for k in given if k not in known_fields]:
            near = did_you_mean(odd[0], known_fields)
            raise ConfigError(f"rope type {name!r} has no {odd[0]!r}.{near}")
        for key, number in given.items():
            wanted = bool if key == "truncate" else (int, float)
            if not isinstance(number, wanted) or (wanted is not bool and isinstance(number, bool)):
                raise ConfigError(f"rope {key}: expected a number, found {number!r}")
        try:
            made = kind(**given)
        except TypeError:
            needed = [k for k, f in known_fields.items() if f.default is MISSING]
            lacking = [k for k in needed if k not in given]
            raise ConfigError(f"rope type {name!r} needs {', '.join(lacking)}") from None
        if problems := made.problems():
            raise ConfigError(f"rope {'; '.join(problems)}")
        return made

    def to_json(self) -> dict[str, Any]:
        given = {k: v for k, v in asdict(self).items() if v is not None}
        return {"rope_type": self.type, **given}


@dataclass(frozen=True)
class Linear(Scaling):
    """Every position divided by the factor."""

    type: ClassVar[str] = "linear"
    factor: float

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        return super().frequencies(rotary, steps, positions) / self.factor


@dataclass(frozen=True)
class Dynamic(Scaling):
    """The base grows once a row is longer than the model's positions; each row for itself."""

    type: ClassVar[str] = "dynamic"
    unbounded: ClassVar[bool] = True
    factor: float

    def misfits(self, width: int, base: float) -> Iterator[str]:
        if width == 2:
            yield "head_dim: 2 is too narrow for rope type 'dynamic'"

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        length = (positions.amax(dim=-1, keepdim=True) + 1).clamp(min=rotary.limit)
        grown = self.factor * length.to(steps.dtype) / rotary.limit - (self.factor - 1)
        base = rotary.base * grown ** (rotary.width / (rotary.width - 2))
        return 1.0 / base[..., None] ** steps


@dataclass(frozen=True)
class Llama3(Scaling):
    """Long wavelengths divided by the factor, short ones kept, a smooth step between."""

    type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int | None = None

    def problems(self) -> list[str]:
        fits = 0 < self.low_freq_factor < self.high_freq_factor
        wrong = [] if fits else ["low_freq_factor must be positive and below high_freq_factor"]
        return super().problems() + wrong

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        plain = super().frequencies(rotary, steps, positions)
        turns = (self.original_max_position_embeddings or rotary.limit) * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return plain * (keep + (1 - keep) / self.factor)

    @classmethod
    def from_factors(cls, factors: Tensor, base: float) -> Llama3:
        """Of what divides each pair's frequency, where it is as Llama 3 was published."""
        made = cls(float(factors.max()), *LLAMA3)
        rotary = Rotary(2 * len(factors), base, made, LLAMA3[2])
        if not torch.allclose(made.factors(rotary), factors.float(), rtol=1e-5, atol=0):
            bends = " and ".join(map(str, LLAMA3[:2]))
            raise ConfigError(
                f"factors of frequencies that are not those of type 'llama3' with a factor of "
                f"{made.factor}, between {bends}, from {LLAMA3[2]} on"
            )
        return made

    def factors(self, rotary: Rotary) -> Tensor:
        """(e/2,) what divides each pair's frequency."""
        steps = torch.arange(0, rotary.width, 2, dtype=torch.float64) / rotary.width
        plain = PLAIN.frequencies(rotary, steps, steps)
        return (plain / self.frequencies(rotary, steps, steps)).float()


LLAMA3 = (1.0, 4.0, 8192)  # low_freq_factor, high_freq_factor and the length, as published


@dataclass(frozen=True)
class Yarn(Scaling):
    """A ramp between kept and divided frequencies by how often each turns, and hotter attention."""

    type: ClassVar[str] = "yarn"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def misfits(self, width: int, base: float) -> Iterator[str]:
        if base == 1:
            yield "rope_base: 1 turns every pair alike, and rope type 'yarn' tells them apart"

    def _original(self, rotary: Rotary) -> int:
        return self.original_max_position_embeddings or rotary.limit

    def _stretch(self, rotary: Rotary) -> float:
        return self.factor or rotary.limit / self._original(rotary)

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        plain = super().frequencies(rotary, steps, positions)
        half = rotary.width // 2

        def pair_that_turns(times: float) -> float:
            wavelength = self._original(rotary) / (times * 2 * math.pi)
            return rotary.width * math.log(wavelength) / (2 * math.log(rotary.base))

        first = pair_that_turns(self.beta_fast or 32)
        last = pair_that_turns(self.beta_slow or 1)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary.width - 1)
        last = first + 0.001 if first == last else last
        index = torch.arange(half, device=steps.device, dtype=steps.dtype)
        divided = ((index - first) / (last - first)).clamp(0, 1)
        return plain * (1 - divided) + plain / self._stretch(rotary) * divided

    def amplitude(self, rotary: Rotary) -> float:
        stretch = self._stretch(rotary)

        def heat(weight: float) -> float:
            return 0.1 * weight * math.log(stretch) + 1.0 if stretch > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return heat(self.mscale) / heat(self.mscale_all_dim)
        return heat(1.0)


SCALINGS: dict[str, type[Scaling]] = {
    kind.type: kind for kind in (Scaling, Linear, Dynamic, Llama3, Yarn)
}
PLAIN = Scaling()


class Rotated(Config):
    """A config whose heads are turned by their positions."""

    positions: Size = 2048
    extrapolate: bool = False  # accept more tokens than positions
    rope_base: Positive = 10000.0
    rope: Scaling = PLAIN

    @property
    def rotary_dim(self) -> int:
        """How much of each head is turned."""
        return self.head_dim  # type: ignore[attr-defined]

    @property
    def limit(self) -> int | None:
        return None if self.extrapolate or self.rope.unbounded else self.positions

    @property
    def limit_cached(self) -> int | None:
        """Beyond its positions a type that adapts turns all keys anew at every token."""
        return self.positions if self.rope.unbounded else self.limit

    def rotary(self) -> Rotary:
        return Rotary(self.rotary_dim, self.rope_base, self.rope, self.positions)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            yield f"head_dim: {self.rotary_dim} of it are turned, and rotary turns pairs"
        else:
            yield from self.rope.misfits(self.rotary_dim, self.rope_base)
