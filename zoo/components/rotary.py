"""Rotary embedding: queries and keys are rotated by angles proportional to their positions."""

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
    """Rotates pairs (n, n + width/2) of a head by `position * frequency(n)`; all layers share it.

    What a head has beyond `width` is not rotated.
    """

    def __init__(self, width: int, base: float, scaling: Scaling, limit: int) -> None:
        self.width, self.base, self.scaling, self.limit = width, base, scaling, limit

    def __call__(self, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        cos, sin = mask.keep(self, lambda: self.tables(mask.positions, q.dtype))
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, 1, s, e/2) of cosines and of sines, computed in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        steps = torch.arange(0, self.width, 2, device=positions.device).to(wide) / self.width
        frequencies = self.scaling.frequencies(self, steps, positions)
        angles = (positions[..., None].to(wide) * frequencies)[:, None]
        scale = self.scaling.amplitude(self)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(b, h, s, e): two halves rotated against each other, then the rest as it was."""
    half = cos.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


# --- scaling types: how each changes the frequencies for contexts longer than in training --------


SCHEMA = {"type": ["object", "null"]}


@dataclass(frozen=True)
class Scaling(Parsed):
    """Unscaled frequencies; `type` is the name that configs use."""

    json_schema = SCHEMA
    type: ClassVar[str] = "default"
    unbounded: ClassVar[bool] = False  # adapts to any length

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        """(…, e/2), broadcasting against (b, s, 1) positions."""
        return 1.0 / rotary.base**steps

    def amplitude(self, rotary: Rotary) -> float:
        """The factor of cosines and sines, so that scores are multiplied by its square."""
        return 1.0

    def problems(self) -> list[str]:
        """Every number that is not positive."""
        numbers = {k: v for k, v in asdict(self).items() if type(v) in (int, float)}
        # a temperature factor may be 0, which stands for none
        numbers = {name: n for name, n in numbers.items() if not name.startswith("mscale")}
        return [f"{name}: {n} is not positive" for name, n in numbers.items() if n <= 0]

    def misfits(self, width: int, base: float) -> Iterator[str]:
        """What this type cannot do with heads of this width and base."""
        yield from ()

    @classmethod
    def from_json(cls, value: Any) -> Scaling:
        """From `rope_scaling` or `rope_parameters`; what is not implemented is refused by name."""
        if value is None:
            return PLAIN
        if not isinstance(value, dict):
            raise ConfigError(f"expected an object, found {value!r}")
        fields = {k: v for k, v in value.items() if v is not None}
        if "truncate" in value:
            fields.setdefault("truncate", False)  # null means no, absence means yes
        kinds = [fields.pop(key) for key in ("rope_type", "type") if key in fields]
        name = kinds[0] if kinds else "default"
        if any(kind != name for kind in kinds):
            raise ConfigError(f"rope_type {kinds[0]!r} and type {kinds[1]!r} differ")
        if not isinstance(name, str) or name not in SCALINGS:
            names = ", ".join(SCALINGS)
            near = did_you_mean(str(name), SCALINGS)
            raise ConfigError(f"rope type {name!r} is not implemented (only {names}).{near}")
        if fields.get("partial_rotary_factor") == 1.0:
            fields.pop("partial_rotary_factor")
        kind = SCALINGS[name]
        own = kind.__dataclass_fields__
        if unknown := [k for k in fields if k not in own]:
            near = did_you_mean(unknown[0], own)
            raise ConfigError(f"rope type {name!r} has no {unknown[0]!r}.{near}")
        for key, number in fields.items():
            wanted = bool if key == "truncate" else (int, float)
            if not isinstance(number, wanted) or (wanted is not bool and isinstance(number, bool)):
                raise ConfigError(f"rope {key}: expected a number, found {number!r}")
        try:
            scaling = kind(**fields)
        except TypeError:
            needed = [k for k, f in own.items() if f.default is MISSING]
            lacking = [k for k in needed if k not in fields]
            raise ConfigError(f"rope type {name!r} needs {', '.join(lacking)}") from None
        if problems := scaling.problems():
            raise ConfigError(f"rope {'; '.join(problems)}")
        return scaling

    def to_json(self) -> dict[str, Any]:
        """As `rope_scaling` has it, without the numbers left at null."""
        fields = {k: v for k, v in asdict(self).items() if v is not None}
        return {"rope_type": self.type, **fields}


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Every position divided by the factor."""

    type: ClassVar[str] = "linear"
    factor: float

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        """(e/2,) frequencies, each divided by the factor."""
        return super().frequencies(rotary, steps, positions) / self.factor


@dataclass(frozen=True)
class Dynamic(Scaling):
    """NTK scaling: the base grows once a row is longer than the model's positions."""

    type: ClassVar[str] = "dynamic"
    unbounded: ClassVar[bool] = True
    factor: float

    def misfits(self, width: int, base: float) -> Iterator[str]:
        """Heads so narrow that the base has no exponent."""
        if width == 2:
            yield "head_dim: 2 is too narrow for rope type 'dynamic'"

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        """(b, 1, e/2) frequencies: the base of each row depends on its length."""
        length = (positions.amax(dim=-1, keepdim=True) + 1).clamp(min=rotary.limit)
        growth = self.factor * length.to(steps.dtype) / rotary.limit - (self.factor - 1)
        base = rotary.base * growth ** (rotary.width / (rotary.width - 2))
        return 1.0 / base[..., None] ** steps


@dataclass(frozen=True)
class Llama3(Scaling):
    """Low frequencies are divided by the factor, high ones kept, with a smooth step between."""

    type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int | None = None

    def problems(self) -> list[str]:
        """Also bounds that do not enclose a range."""
        fits = 0 < self.low_freq_factor < self.high_freq_factor
        wrong = [] if fits else ["low_freq_factor must be positive and below high_freq_factor"]
        return super().problems() + wrong

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        """(e/2,) frequencies, divided the more the fewer rotations fit the original length."""
        plain = super().frequencies(rotary, steps, positions)
        rotations = (self.original_max_position_embeddings or rotary.limit) * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = ((rotations - self.low_freq_factor) / span).clamp(0, 1)
        return plain * (keep + (1 - keep) / self.factor)

    @classmethod
    def from_factors(cls, factors: Tensor, base: float) -> Llama3:
        """From (e/2,) divisors of the frequencies, if they are those that Llama 3 published."""
        scaling = cls(float(factors.max()), *LLAMA3)
        rotary = Rotary(2 * len(factors), base, scaling, LLAMA3[2])
        if not torch.allclose(scaling.factors(rotary), factors.float(), rtol=1e-5, atol=0):
            bends = " and ".join(map(str, LLAMA3[:2]))
            raise ConfigError(
                f"factors of frequencies that are not those of type 'llama3' with a factor of "
                f"{scaling.factor}, between {bends}, from {LLAMA3[2]} on"
            )
        return scaling

    def factors(self, rotary: Rotary) -> Tensor:
        """(e/2,) divisors of the frequencies."""
        steps = torch.arange(0, rotary.width, 2, dtype=torch.float64) / rotary.width
        plain = PLAIN.frequencies(rotary, steps, steps)
        return (plain / self.frequencies(rotary, steps, steps)).float()


LLAMA3 = (1.0, 4.0, 8192)  # low_freq_factor, high_freq_factor and the length, as published


@dataclass(frozen=True)
class Yarn(Scaling):
    """High frequencies are kept, low ones divided, with a ramp between; scores are scaled up."""

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
        """A base with which all frequencies are equal."""
        if base == 1:
            yield "rope_base: 1 rotates every pair alike, and rope type 'yarn' tells them apart"

    def _original(self, rotary: Rotary) -> int:
        return self.original_max_position_embeddings or rotary.limit

    def _stretch(self, rotary: Rotary) -> float:
        return self.factor or rotary.limit / self._original(rotary)

    def frequencies(self, rotary: Rotary, steps: Tensor, positions: Tensor) -> Tensor:
        """(e/2,) frequencies, from kept to divided along a ramp over the pairs."""
        plain = super().frequencies(rotary, steps, positions)
        half = rotary.width // 2

        def pair_rotating(times: float) -> float:
            wavelength = self._original(rotary) / (times * 2 * math.pi)
            return rotary.width * math.log(wavelength) / (2 * math.log(rotary.base))

        first = pair_rotating(self.beta_fast or 32)
        last = pair_rotating(self.beta_slow or 1)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary.width - 1)
        last = first + 0.001 if first == last else last
        index = torch.arange(half, device=steps.device, dtype=steps.dtype)
        divided = ((index - first) / (last - first)).clamp(0, 1)
        return plain * (1 - divided) + plain / self._stretch(rotary) * divided

    def amplitude(self, rotary: Rotary) -> float:
        """The `attention_factor` if there is one, else the temperature for the factor."""
        stretch = self._stretch(rotary)

        def temperature(weight: float) -> float:
            return 0.1 * weight * math.log(stretch) + 1.0 if stretch > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


SCALINGS: dict[str, type[Scaling]] = {
    kind.type: kind for kind in (Scaling, LinearScaling, Dynamic, Llama3, Yarn)
}
PLAIN = Scaling()


class Rotated(Config):
    """A config of rotary embedding."""

    positions: Size = 2048
    extrapolate: bool = False  # accept more tokens than positions
    rope_base: Positive = 10000.0
    rope: Scaling = PLAIN

    @property
    def rotary_dim(self) -> int:
        """How much of each head is rotated."""
        return self.head_dim  # type: ignore[attr-defined]

    @property
    def limit(self) -> int | None:
        """How many tokens have positions; None where more are accepted."""
        return None if self.extrapolate or self.rope.unbounded else self.positions

    @property
    def limit_cached(self) -> int | None:
        """Beyond it, a type that adapts to the length would rotate cached keys differently."""
        return self.positions if self.rope.unbounded else self.limit

    def rotary(self) -> Rotary:
        """The rotary embedding that all layers share."""
        return Rotary(self.rotary_dim, self.rope_base, self.rope, self.positions)

    def problems(self) -> Iterator[str]:
        """A rotated width that is odd, or that the type of scaling cannot serve."""
        yield from super().problems()
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            yield f"head_dim: {self.rotary_dim} of it are rotated, and rotary rotates pairs"
        else:
            yield from self.rope.misfits(self.rotary_dim, self.rope_base)
