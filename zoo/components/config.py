"""Configs: frozen, checked, and wrong only by name; every problem is said at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from itertools import zip_longest
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_type_hints

from zoo.components.activations import unknown
from zoo.errors import SUGGESTED, ConfigError, ResourceLimit, ZooError, did_you_mean

MAX_LAYERS = 512  # four times the deepest there is; as many are built in well under a second
DERIVED: Any = None  # the default of a field that follows from others unless it is given
MAX_SIZE = 2**31 - 1
# whole numbers of which none, or minus one, means something
LEAST = {
    "window_from": 0,
    "experts": 0,
    "types": 0,
    "conv": 0,
    "max_distance": -1,
    "log_buckets": -1,
}
IDS = ("pad", "start")  # of tokens; some configs count them from the vocabulary's end
# what is enumerated before weights are looked at
MOST = {"layers": MAX_LAYERS, "decoder_layers": MAX_LAYERS, "experts": 10_000, "labels": 100_000}


class _Named(type):
    """A call with unknown or missing fields is a ConfigError, as a bad value is."""

    def __call__(cls, **given: Any) -> Any:
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        unknown = [name for name in given if name not in known]
        nears = [did_you_mean(name, known) for name in unknown[:SUGGESTED]]
        problems = [
            f"{name}: no such field.{near}"
            for name, near in zip_longest(unknown, nears, fillvalue="")
        ]
        problems += [
            f"{name}: missing"
            for name, f in known.items()
            if name not in given and f.default is MISSING
        ]
        if problems:
            raise ConfigError("; ".join(problems))
        return super().__call__(**given)


class Labels(tuple[str, ...]):
    """The names of a classifier's classes."""

    @classmethod
    def from_json(cls, value: Any) -> Labels:
        if value is None:
            return TWO_LABELS
        if type(value) is int and value > MOST["labels"]:
            raise ResourceLimit(f"{value} is more than {MOST['labels']}")
        if type(value) is int and value > 0:
            return cls(f"LABEL_{n}" for n in range(value))
        named = isinstance(value, dict) and all(map(_index, value))
        if value and named and all(_short(name) for name in value.values()):
            return cls(str(value[k]) for k in sorted(value, key=int))
        if type(value) is int and abs(value) > MAX_SIZE:
            raise ConfigError("expected a number of labels, found one with too many digits")
        raise ConfigError(
            f"expected a number of labels or their names by index, found {type(value).__name__}"
        )

    def to_json(self) -> dict[str, str]:
        return {str(n): name for n, name in enumerate(self)}


def _index(key: Any) -> bool:
    """A whole number of a size that classes have; JSON's keys are words, YAML's may be numbers."""
    if isinstance(key, str):
        return key.isdecimal() and len(key) < 10
    return type(key) is int and 0 <= key <= MAX_SIZE


def _short(name: Any) -> bool:
    """A word, or a number that Python would write."""
    return not isinstance(name, int) or abs(name) <= MAX_SIZE


TWO_LABELS = Labels.from_json(2)


@dataclass(frozen=True, kw_only=True)
class Config(metaclass=_Named):
    """What every architecture's config has. Fields left at DERIVED are filled by `derived`."""

    head: str = "lm"
    init_std: float = 0.02
    pad: int | None = None
    labels: Labels = TWO_LABELS

    heads_known: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        problems = []
        for f in fields(self):
            name, value = f.name, getattr(self, f.name)
            if value is None and f.default is None:
                continue
            value, problem = _fitted(value, _kinds(type(self))[name])
            object.__setattr__(self, name, value)
            problems += [f"{name}: {problem}"] if problem else []
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        problems = problems or list(_sizes(self, given))
        if not problems:
            derived = {n: v for n, v in self.derived().items() if n not in given}
            for name, value in derived.items():
                object.__setattr__(self, name, value)
            problems += list(_sizes(self, derived))
        if not problems:
            problems += list(self.problems())
        if self.head not in self.heads_known:
            near = did_you_mean(str(self.head), self.heads_known)
            known = ", ".join(self.heads_known)
            problems.append(f"head: {self.head!r} is not one of {known}.{near}")
        if problems:
            raise ConfigError("; ".join(problems), problems)

    def derived(self) -> Mapping[str, Any]:
        """What fields left at DERIVED stand for."""
        return {}

    def problems(self) -> Iterator[str]:
        """What is wrong between fields, each of which is sound on its own."""
        yield from ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: v.to_json() if hasattr(v, "to_json") else v for name, v in values}

    @property
    def limit(self) -> int | None:
        """How many tokens there are positions for; None where there is no end."""
        return getattr(self, "positions", None)

    def windows(self) -> tuple[int | None, ...]:
        """How far back each layer looks, None where to the start."""
        return (None,) * self.layers  # type: ignore[attr-defined]

    @property
    def limit_cached(self) -> int | None:
        """And for how many a cache stays what the whole row would give."""
        return self.limit

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)


@cache
def _kinds(config: type[Config]) -> dict[str, tuple[type, ...]]:
    hints = get_type_hints(config)
    return {f.name: get_args(hints[f.name]) or (hints[f.name],) for f in fields(config)}


def _fitted(value: Any, kinds: tuple[type, ...]) -> tuple[Any, str]:
    """The value as its field holds it, or why it cannot."""
    if type(value) in kinds:
        return value, ""
    if type(value) is int and float in kinds:
        try:
            return float(value), ""
        except OverflowError:
            return value, "larger than any float"
    for kind in kinds:
        if hasattr(kind, "from_json"):
            try:
                return kind.from_json(value), ""
            except ResourceLimit:
                raise
            except ZooError as error:
                return value, str(error)
    names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
    return value, f"expected {names}, found {value!r}"


def _sizes(config: Config, names: Iterable[str]) -> Iterator[str]:
    """Sizes are positive, rates are rates, and nothing asks for more than a machine could hold."""
    for name in names:
        value = getattr(config, name)
        if name.endswith("act") and value is not None:
            yield from unknown(name, value)
        elif name in IDS and value is not None:
            yield from _id_fits(name, value, getattr(config, "vocab", MAX_SIZE))
        if type(value) is int and name not in IDS:
            most = MOST.get(name, MAX_SIZE)
            if value < (least := LEAST.get(name, 1)):
                yield f"{name}: {value} is {'not positive' if least == 1 else f'below {least}'}"
            elif value > most:
                raise ResourceLimit(f"{name}: {value} is more than {most}")
        elif type(value) is float:
            if value != value or value in (float("inf"), float("-inf")):
                yield f"{name}: {value} is not finite"
            elif name.endswith("dropout") and not 0 <= value < 1:
                yield f"{name}: {value} is not in [0, 1)"
            elif (name in ("eps", "rope_base") or name.endswith("cap")) and value <= 0:
                yield f"{name}: {value} is not positive"
            elif value < 0:
                yield f"{name}: {value} is negative"


def divides(part_name: str, part: int, whole_name: str, whole: int) -> Iterator[str]:
    if whole % part:
        yield f"{part_name}: {part} does not divide {whole_name} {whole}"


def _id_fits(name: str, id: int, vocab: int) -> Iterator[str]:
    if not -vocab <= id < vocab:
        yield f"{name}: {id} is outside the vocabulary of {vocab}"


FULL, SLIDING = "full_attention", "sliding_attention"


class LayerKinds(tuple[str, ...]):
    """What each layer's queries see: everything they may, or a window of it."""

    @classmethod
    def from_json(cls, value: Any) -> LayerKinds:
        if isinstance(value, list) and all(kind in (FULL, SLIDING) for kind in value):
            return cls(value)
        raise ConfigError(f"expected a list of {FULL} and {SLIDING}, found {value!r}")

    def to_json(self) -> list[str]:
        return list(self)


@dataclass(frozen=True, kw_only=True)
class Windowed(Config):
    """A config of which some layers see a window of the last tokens."""

    layers: int = 1
    window: int | None = None
    windowed: bool = True  # else the window is a number and nothing more
    window_from: int = 0  # the first layer that has it, where kinds do not say
    kinds: LayerKinds | None = None

    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window, None where it sees everything."""
        if not self.windowed or self.window is None:
            return (None,) * self.layers
        if self.kinds is not None:
            return tuple(self.window if kind == SLIDING else None for kind in self.kinds)
        return tuple(self.window if n >= self.window_from else None for n in range(self.layers))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.kinds is None:
            return
        if len(self.kinds) != self.layers:
            yield f"kinds: {len(self.kinds)} of them, and {self.layers} layers"
        if SLIDING in self.kinds and (self.window is None or not self.windowed):
            yield f"kinds: {SLIDING} without a window"
