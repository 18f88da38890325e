"""Configs: frozen pydantic models whose constraints stand on the fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError
from types import NoneType
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function

from zoo.components.activations import ACTIVATIONS
from zoo.errors import SUGGESTED, ConfigError, ResourceLimit, ZooError, did_you_mean

MAX_LAYERS = 512  # four times the deepest published model; building as many takes under a second
MAX_LABELS = 100_000
MAX_SIZE = 2**31 - 1
DERIVED: Any = None  # the default of a field that `Config.derived` fills

# --- types of fields: what they hold, and within which bounds ------------------------------------


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        near = did_you_mean(name, ACTIVATIONS)
        raise _problem(f"{name!r} is not one of {', '.join(ACTIVATIONS)}.{near}")
    return name


Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]  # at least one
Count = Annotated[int, Field(ge=0, le=MAX_SIZE)]  # 0: none
Limit = Annotated[int, Field(ge=-1, le=MAX_SIZE)]  # -1: none is set
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
Experts = Annotated[int, Field(ge=0, le=10_000)]  # 0: a dense MLP
TokenId = int  # negative: from the vocabulary's end; `vocabulary_problems` checks it
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
ActivationName = Annotated[
    str,
    AfterValidator(_activation),
    WithJsonSchema({"type": "string", "enum": list(ACTIVATIONS)}),
]


class Parsed:
    """A field's type that `from_json` makes of plain JSON and `to_json` turns back."""

    json_schema: ClassVar[Mapping[str, Any]]

    @classmethod
    def from_json(cls, value: Any) -> Any:
        """Parse plain JSON; a ConfigError says what is wrong with it."""
        raise NotImplementedError

    def to_json(self) -> Any:
        """The value as plain JSON."""
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def parse(value: Any) -> Any:
            if isinstance(value, cls):
                return value
            try:
                return cls.from_json(value)
            except ResourceLimit:
                raise
            except ZooError as error:
                raise _problem(str(error)) from None

        return no_info_plain_validator_function(parse)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(cls.json_schema)


class Labels(Parsed, tuple[str, ...]):
    """The names of a classifier's classes."""

    json_schema: ClassVar = {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": MAX_LABELS},
            {"type": "object", "additionalProperties": {"type": ["string", "integer"]}},
        ]
    }

    @classmethod
    def from_json(cls, value: Any) -> Labels:
        """From a number of classes, or from their names by index; null is two classes."""
        if value is None:
            return TWO_LABELS
        if type(value) is int and value > MAX_LABELS:
            raise ResourceLimit(f"{value} is more than {MAX_LABELS}")
        if type(value) is int and value > 0:
            return cls(f"LABEL_{n}" for n in range(value))
        named = isinstance(value, dict) and all(map(_is_index, value))
        if value and named and all(_is_short(name) for name in value.values()):
            return cls(str(value[k]) for k in sorted(value, key=int))
        if type(value) is int and abs(value) > MAX_SIZE:
            raise ConfigError("expected a number of labels, found one with too many digits")
        raise ConfigError(
            f"expected a number of labels or their names by index, found {type(value).__name__}"
        )

    def to_json(self) -> dict[str, str]:
        """The names by index, as `id2label` has them."""
        return {str(n): name for n, name in enumerate(self)}


def _is_index(key: Any) -> bool:
    """A class number of plausible size: a string in JSON, perhaps a number in YAML."""
    if isinstance(key, str):
        return key.isdecimal() and len(key) < 10
    return type(key) is int and 0 <= key <= MAX_SIZE


def _is_short(name: Any) -> bool:
    """A word, or a number that Python can write out."""
    return not isinstance(name, int) or abs(name) <= MAX_SIZE


TWO_LABELS = Labels.from_json(2)
FULL, SLIDING = "full_attention", "sliding_attention"


class LayerKinds(Parsed, tuple[str, ...]):
    """The attention of each layer: full, or within a sliding window."""

    json_schema: ClassVar = {"type": "array", "items": {"enum": [FULL, SLIDING]}}

    @classmethod
    def from_json(cls, value: Any) -> LayerKinds:
        """From a list with one word per layer."""
        if isinstance(value, list) and all(kind in (FULL, SLIDING) for kind in value):
            return cls(value)
        raise ConfigError(f"expected a list of {FULL} and {SLIDING}, found {value!r}")

    def to_json(self) -> list[str]:
        """The words as a list."""
        return list(self)


# --- configs -------------------------------------------------------------------------------------


class Config(BaseModel):
    """What every architecture's config has. `derived` fills the fields left at DERIVED."""

    # a schema is built when its architecture is used first
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    head: str = "lm"
    init_std: Amount = 0.02
    pad: TokenId | None = None
    labels: Labels = TWO_LABELS

    heads_known: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **values: Any) -> None:
        """Check and derive fields; a ConfigError lists every problem."""
        fields = type(self).model_fields
        # null asks for the derived value
        values = {
            name: value
            for name, value in values.items()
            if value is not None or name not in fields or fields[name].default is not None
        }
        self._validate(values)
        derived = {n: v for n, v in self.derived().items() if getattr(self, n) is None}
        if derived:
            self._validate({**values, **derived})
        if problems := [*self.problems(), *self._head_problems(self.head)]:
            raise ConfigError("; ".join(problems), problems)

    def _validate(self, values: Mapping[str, Any]) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = list(_problems(type(self), error))
            if type(head := values.get("head", "")) is str and head:
                problems += self._head_problems(head)
            if all(each["type"] == "less_than_equal" for each in error.errors()):
                raise ResourceLimit("; ".join(problems)) from None
            raise ConfigError("; ".join(problems), problems) from None

    @classmethod
    def _head_problems(cls, head: str) -> list[str]:
        if head in cls.heads_known:
            return []
        near = did_you_mean(head, cls.heads_known)
        return [f"head: {head!r} is not one of {', '.join(cls.heads_known)}.{near}"]

    def derived(self) -> Mapping[str, Any]:
        """The values of fields left at DERIVED."""
        return {}

    def problems(self) -> Iterator[str]:
        """Contradictions between fields, each of which is valid on its own."""
        yield from self.vocabulary_problems("pad")

    def vocabulary_problems(self, name: str) -> Iterator[str]:
        """The problem with a token id that is outside the vocabulary."""
        token, vocab = getattr(self, name), getattr(self, "vocab", MAX_SIZE)
        if token is not None and not -vocab <= token < vocab:
            yield f"{name}: {token} is outside the vocabulary of {vocab}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: v.to_json() if isinstance(v, Parsed) else v for name, v in values}

    @property
    def limit(self) -> int | None:
        """How many tokens have positions; None for any number."""
        return getattr(self, "positions", None)

    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, None for full attention."""
        return (None,) * self.layers  # type: ignore[attr-defined]

    @property
    def limit_cached(self) -> int | None:
        """How many tokens a KV cache can hold and still give what a full forward would."""
        return self.limit

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"{name}: a config is frozen. Use config.replace({name}=…)")

    def replace(self, **changes: Any) -> Self:
        """A copy with other values of some fields, checked as a new config is."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**values, **changes})


class Windowed(Config):
    """A config whose layers may use sliding-window attention."""

    layers: Layers = 1
    window: Size | None = None
    windowed: bool = True  # False: the window is declared and not used
    window_from: Count = 0  # the first layer with a window, where `kinds` is null
    kinds: LayerKinds | None = None

    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, None for full attention."""
        if not self.windowed or self.window is None:
            return (None,) * self.layers
        if self.kinds is not None:
            return tuple(self.window if kind == SLIDING else None for kind in self.kinds)
        return tuple(self.window if n >= self.window_from else None for n in range(self.layers))

    def problems(self) -> Iterator[str]:
        """Layer kinds that do not fit the number of layers or the window."""
        yield from super().problems()
        if self.kinds is None:
            return
        if len(self.kinds) != self.layers:
            yield f"kinds: {len(self.kinds)} of them, and {self.layers} layers"
        if SLIDING in self.kinds and (self.window is None or not self.windowed):
            yield f"kinds: {SLIDING} without a window"


def divides(part_name: str, part: int, whole_name: str, whole: int) -> Iterator[str]:
    """The problem with a part of which the whole is no multiple."""
    if whole % part:
        yield f"{part_name}: {part} does not divide {whole_name} {whole}"


# --- pydantic's errors in our words --------------------------------------------------------------


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("problem", "{text}", {"text": text})


def _problems(config: type[Config], error: ValidationError) -> Iterator[str]:
    """Every problem, each beginning with its field; unknown and missing fields come first."""
    order = {"extra_forbidden": 0, "missing": 1}
    suggestions = SUGGESTED
    for each in sorted(error.errors(), key=lambda each: order.get(each["type"], 2)):
        name = str(each["loc"][0])
        if each["type"] == "extra_forbidden":
            near = did_you_mean(name, config.model_fields) if suggestions > 0 else ""
            suggestions -= 1
            yield f"{name}: no such field.{near}"
        elif each["type"] == "missing":
            yield f"{name}: missing"
        else:
            yield f"{name}: {_explained(config, name, each)}"


def _explained(config: type[Config], name: str, error: Any) -> str:
    value, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "problem":
            return str(context["text"])
        case "finite_number":
            return f"{value} is not finite"
        case "greater_than":
            return f"{value} is not positive"
        case "less_than":
            return f"{value} is not in [0, 1)"
        case "less_than_equal":
            return f"{value} is more than {context['le']}"
        case "greater_than_equal" if _is_fraction(config, name):
            return f"{value} is not in [0, 1)"
        case "greater_than_equal" if type(context["ge"]) is float:
            return f"{value} is negative"
        case "greater_than_equal":
            return f"{value} is below {context['ge']}"
    names = _type_names(config, name)
    if type(value) is int and "float" in names:
        return "larger than any float"
    return f"expected {' or '.join(names)}, found {value!r}"


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and everything that it is made of."""
    yield annotation
    for each in get_args(annotation):
        yield from _parts(each)


def _is_fraction(config: type[Config], name: str) -> bool:
    field = config.model_fields[name]
    annotations = [field, *_parts(field.annotation)]
    metadata = [each for part in annotations for each in getattr(part, "metadata", ())]
    metadata += [each for part in metadata for each in getattr(part, "metadata", ())]
    return any(hasattr(each, "lt") for each in metadata)


def _type_names(config: type[Config], name: str) -> list[str]:
    kinds = (
        part for part in _parts(config.model_fields[name].annotation) if isinstance(part, type)
    )
    plain = (kind for kind in kinds if get_origin(kind) is None)
    return ["null" if kind is NoneType else kind.__name__ for kind in dict.fromkeys(plain)]
