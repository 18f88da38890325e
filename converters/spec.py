"""Specs: what each dialect of an architecture calls its tensors and config fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

from converters.language import Ref, Rule, Template, parse_name, parse_ref, parse_rule
from converters.reference_fields import INNER, ROPE, SHARED, cannot_matter, reference_fields
from converters.spec_files import (
    NATIVE,
    SPECS,
    Container,
    DialectFile,
    NativeFile,
    Rules,
    Texts,
    WhenRules,
    checked,
    common,
    files_of,
    read_file,
    spec_names,
)
from zoo.errors import SpecError, did_you_mean, listing, option

Value = TypeVar("Value")
MOST_UNKNOWN = 200  # fields of one config: each is compared with all names, for suggestions


@dataclass(frozen=True)
class When:
    """Rules that apply if a native field is true, or if it is false (`holds=False`)."""

    field: str
    holds: bool
    weights: tuple[Rule, ...] = ()
    heads: tuple[Rule, ...] = ()

    def of(self, config: Mapping[str, Any]) -> bool:
        """Whether the rules apply under this native config."""
        return bool(config.get(self.field)) == self.holds


@dataclass(frozen=True)
class Dialect:
    """One way to lay out an architecture's weights. `DialectFile` describes each section."""

    name: str
    where: str = ""
    prefix: str = ""
    weights: tuple[Rule, ...] = ()
    heads: tuple[Rule, ...] = ()
    when: tuple[When, ...] = ()
    alternatives: tuple[Rule, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[tuple[Template, Template], ...] = ()
    aliases: tuple[tuple[Template, Template], ...] = ()
    drop: tuple[tuple[Template, str], ...] = ()
    optimizer_slots: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    require: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    exclusive: tuple[tuple[str, ...], ...] = ()
    container: Container | None = None  # None: hf, whose files need no description
    detect: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    null_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    value_map: Mapping[str, tuple[tuple[Any, Any], ...]] = field(default_factory=dict)
    key_map: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    field_tensors: Mapping[str, str] = field(default_factory=dict)
    write: Mapping[str, Any] = field(default_factory=dict)
    zero_filled: Mapping[str, Any] = field(default_factory=dict)
    lossy_fields: frozenset[str] = frozenset()
    reference: str = ""  # its list in reference_fields.yaml, if there is one

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules without a condition."""
        return self.weights + self.heads + self.alternatives

    def under(self, config: Mapping[str, Any]) -> Dialect:
        """The dialect with the rules that apply under a native config, and no conditions."""
        chosen = [when for when in self.when if when.of(config)]
        weights = sum((when.weights for when in chosen), self.weights)
        return replace(
            self, weights=weights, heads=sum((when.heads for when in chosen), self.heads), when=()
        )

    def knows(self, disk: str) -> bool:
        """Whether any section names a tensor of this name."""
        prefix = self.prefix
        rules = self.rules + sum((when.weights + when.heads for when in self.when), ())
        templates = [rule.source.name for rule in rules]
        templates += [name for pair in self.aliases for name in pair[:1]]
        templates += [name for name, _ in (*self.tied, *self.drop)]
        names = {disk, disk[len(prefix) :] if disk.startswith(prefix) else disk}
        if any(template.match(name) is not None for template in templates for name in names):
            return True
        return any(
            disk.endswith(suffix) and self.knows(disk.removesuffix(suffix))
            for suffix in self.optimizer_slots
        )

    def dropped(self, disk: str) -> str | None:
        """The reason to drop a tensor of this name; None if it is wanted or unknown."""
        for template, reason in self.drop:
            if template.match(disk) is not None:
                return reason
        for suffix, reason in self.optimizer_slots.items():
            if disk.endswith(suffix) and self.knows(disk.removesuffix(suffix)):
                return reason
        return None

    def native_names(self, fields: Mapping[str, Any], native: Iterable[str]) -> dict[str, Any]:
        """Rename fields from the dialect's words to native ones; others stay as they are."""
        native, out = set(native), dict[str, Any]()
        for key, value in fields.items():
            named = [n for n, paths in self.config.items() if key in paths]
            for name in [key] if key in native or not named else named:
                out[name] = self._native(name, value)
        return out

    def _native(self, name: str, value: Any) -> Any:
        if name in self.key_map and isinstance(value, dict):
            names = {theirs: mine for mine, theirs in self.key_map[name].items()}
            value = {names.get(key, key): inner for key, inner in value.items()}
        pairs = self.value_map.get(name, ())
        return next((n for r, n in pairs if r == value and type(r) is type(value)), value)

    # --- config, both ways ---

    def read_config(
        self, reference: Mapping[str, Any], ignore: Iterable[str] = ()
    ) -> tuple[dict[str, Any], list[str]]:
        """Read a config of this dialect.

        A part of an object that one field maps is left out for a field that maps the whole object.

        Args:
            reference: The config as the file has it.
            ignore: Fields that the user declares to change nothing.

        Returns:
            The native fields that it sets, and every problem with it.
        """
        if self.null_values:
            nulls = self.null_values
            reference = {k: v for k, v in reference.items() if v not in nulls.get(k, ())}
        ignore = frozenset(ignore)
        fields = dict(self.defaults)
        for name, paths in self.config.items():
            values = (self._value(reference, path, ignore) for path in paths)
            if (value := next((v for v in values if v is not None), None)) is not None:
                fields[name] = self._native(name, value)
            elif any(_is_null(reference, path) for path in paths):
                fields[name] = None  # an explicit null is not the same as an absent field
        return fields, self._audit(reference, ignore)

    def _value(self, reference: Mapping[str, Any], path: str, ignore: frozenset[str]) -> Any:
        value = _look_up(reference, path)
        if not isinstance(value, dict):
            return value
        every = (other for paths in self.config.values() for other in paths)
        apart = {other[len(path) + 1 :] for other in every if other.startswith(f"{path}.")}
        apart |= {key for key in value if f"{path}.{key}" in ignore}
        apart |= {key for key in value if self._is_unread(path, key)}
        return {key: inner for key, inner in value.items() if key not in apart}

    def _is_unread(self, path: str, key: str) -> bool:
        """Whether the reference never looks up this key of a field that is an object."""
        return path in INNER and self._is_listed and key not in reference_fields()[ROPE]

    def _flat(self, reference: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the audit checks, and the parts of fields that are objects."""
        every = {path for paths in self.config.values() for path in paths}
        outer = {path.partition(".")[0] for path in every}
        flat: dict[str, Any] = {}
        for key, value in reference.items():
            inner = value if isinstance(value, dict) and key in outer else {}
            # an object of which only parts are mapped: each part is a field
            if isinstance(value, dict) and key in outer - every:
                flat |= {f"{key}.{part}": each for part, each in inner.items()}
            else:
                unread = (part for part in inner if self._is_unread(key, part))
                flat |= {key: value, **{f"{key}.{part}": inner[part] for part in unread}}
        nested = {key: _look_up(reference, key) for key in self.require.keys() - flat.keys()}
        return flat | {key: value for key, value in nested.items() if value is not None}

    @property
    def _is_listed(self) -> bool:
        """Whether there is a list of the fields that the reference reads."""
        return bool(self.reference) and self.reference in reference_fields()

    @cached_property
    def _mapped(self) -> frozenset[str]:
        """Fields that `config` maps, and objects that hold such fields."""
        every = {path for paths in self.config.values() for path in paths}
        return frozenset(every | {path.partition(".")[0] for path in every})

    def _fields(self) -> frozenset[str]:
        """Every field that may change the function, implemented or not."""
        names = self._mapped | self.require.keys()
        if not self._is_listed:
            return names | self.ignore
        read = reference_fields()
        return names | ((read[SHARED] | read[self.reference]) - self.ignore)

    def unused(self, reference: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
        """Unknown fields that the reference never reads, so that they change nothing."""
        unknown = self._unknown(self._flat(reference), frozenset(ignore))
        return [key for key, value in unknown if self._cannot_matter(key, value, reference)]

    def _unknown(self, flat: Mapping[str, Any], ignore: frozenset[str]) -> list[tuple[str, Any]]:
        declared = self._mapped | self.ignore | ignore | self.require.keys()
        return [(key, value) for key, value in flat.items() if key not in declared]

    def _scope(self, key: str, reference: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
        """A field's own name, and the names of the fields at its level."""
        outer, _, inner = key.rpartition(".")
        if outer in INNER and self._is_listed and key not in reference:
            return inner, reference_fields()[ROPE]
        return key, self._fields()

    def _cannot_matter(self, key: str, value: Any, reference: Mapping[str, Any]) -> bool:
        if not self._is_listed:
            return False
        name, fields = self._scope(key, reference)
        if name != key and isinstance(value, dict):
            return False  # a rotary scaling for some of the layers
        return cannot_matter(name, fields)

    def _audit(self, reference: Mapping[str, Any], ignore: frozenset[str]) -> list[str]:
        problems = []
        for names in self.exclusive:
            values = [v for name in names if (v := _look_up(reference, name)) is not None]
            if any(value != values[0] for value in values):
                problems.append(f"{' and '.join(names)} differ, and only one of them can count")
        flat = self._flat(reference)
        for key, value in flat.items():
            if key not in self.require:
                continue
            allowed = self.require[key]
            # `True == 1`: a flag is compared with its type
            if value is None or any(value == a and type(value) is type(a) for a in allowed):
                continue
            only = " or ".join(map(repr, allowed)) or "absent"
            problems.append(f"{key}: {value!r} is not implemented (only {only})")
        unknown = self._unknown(flat, ignore)
        if len(unknown) > MOST_UNKNOWN:
            some = listing((key for key, _ in unknown), 5)
            return [*problems, f"{len(unknown)} unknown fields, no model's config: {some}"]
        for key, value in unknown:
            if self._cannot_matter(key, value, reference):
                continue
            field_name, fields = self._scope(key, reference)
            if field_name in fields:
                problem = f"{key}: the reference reads this field, and zoo does not implement it."
            else:
                problem = f"{key}: unknown field.{did_you_mean(field_name, fields)}"
            way_out = option("ignore_config", (key,))
            problems.append(f"{problem} If it does not change inference, pass {way_out}")
        return problems

    def reference_field(self, native: str) -> str:
        """The reference's name of a native field, for messages."""
        return self.config[native][0] if native in self.config else native

    def write_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The dialect's config for native fields, each under its first name."""
        out: dict[str, Any] = {}
        for name, paths in self.config.items():
            if name not in fields:
                continue
            *outer, last = paths[0].split(".")
            place = out
            for key in outer:
                place = place.setdefault(key, {})
            value = fields[name]
            if name in self.value_map:
                spellings = [r for r, native in self.value_map[name] if native == value]
                if not spellings and name not in self.key_map:
                    continue  # cannot be spelled; reading back shows whether it matters
                value = spellings[0] if spellings else value
            if name in self.key_map and isinstance(value, dict):
                keys = self.key_map[name]
                value = {keys[key]: inner for key, inner in value.items() if key in keys}
            if isinstance(value, dict) and isinstance(place.get(last), dict):
                place[last] = {**value, **place[last]}
            else:
                place[last] = value
        for key, value in self.write.items():
            if value is None:
                out.pop(key, None)
            elif isinstance(value, str) and value.startswith("{"):
                out[key] = fields[value[1:-1]]
            else:
                out[key] = value
        return out


def _is_null(config: Mapping[str, Any], path: str) -> bool:
    """Whether the field is present and null."""
    outer, _, last = path.rpartition(".")
    place = _look_up(config, outer) if outer else config
    return isinstance(place, Mapping) and last in place and place[last] is None


def _look_up(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


@dataclass(frozen=True)
class Spec:
    """All dialects of one architecture, and which config fields its axes stand for."""

    name: str
    where: str
    axes: Mapping[str, str]
    dialects: Mapping[str, Dialect]
    shapes: tuple[Ref, ...] = ()
    present: Mapping[str, str] = field(default_factory=dict)
    head: tuple[tuple[tuple[str, ...], str], ...] = ()

    def dialect(self, name: str) -> Dialect:
        """The dialect of this name; a SpecError lists those that there are."""
        if name not in self.dialects:
            names = ", ".join(self.dialects)
            raise SpecError(f"{self.where}: no dialect {name!r}; there is {names}")
        return self.dialects[name]

    def with_dialect(self, dialect: Dialect) -> Spec:
        """A copy with a dialect added or replaced."""
        return replace(self, dialects={**self.dialects, dialect.name: dialect})


@cache
def load_spec(name: str) -> Spec:
    """Read the folder `specs/<name>`: `native.yaml` and a file per dialect.

    Args:
        name: The spec's name, which `registry.yaml` gives for each architecture.

    Returns:
        The spec with all its dialects, `hf` first.

    Raises:
        SpecError: There is no such spec, or a file of it is wrong.
    """
    names = files_of(name)
    if NATIVE not in names:
        raise SpecError(f"{SPECS / name}: no such spec.{did_you_mean(name, spec_names())}")
    names.remove(NATIVE)
    names.sort(key="hf".__ne__)  # the published layout is named first
    native = read_file(f"{name}/{NATIVE}")
    dialects = DialectFolder(name, tuple(names))
    if "hf" in dialects:
        dialects["hf"]  # read now, so that its mistakes show here
    return _spec(name, native, dialects, f"converters/specs/{name}", name)


def parse_spec(name: str, read: Mapping[str, Any], where: str = "") -> Spec:
    """Make a spec of plain data: what `native.yaml` and each dialect's file hold.

    Args:
        name: The spec's name.
        read: Plain data by file: `{"native": {"axes": …}, "hf": {"weights": …}}`.
        where: The folder that messages name.

    Returns:
        The spec.

    Raises:
        SpecError: Some of the data is wrong; the message lists every problem of a file.
    """
    dialects = {
        file: _dialect(name, file, data, where) for file, data in read.items() if file != NATIVE
    }
    return _spec(name, read.get(NATIVE, {}), dialects, where)


class DialectFolder(Mapping[str, Dialect]):
    """The dialects in a spec's folder, each read when it is first used: a load needs one."""

    def __init__(self, spec: str, names: tuple[str, ...]) -> None:
        self.spec, self.names = spec, names
        self._read = dict[str, Dialect]()

    def __getitem__(self, name: str) -> Dialect:
        if name not in self._read and name in self.names:
            data = read_file(f"{self.spec}/{name}")
            where = f"converters/specs/{self.spec}"
            self._read[name] = _dialect(self.spec, name, data, where, self.spec)
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _spec(
    name: str, data: Any, dialects: Mapping[str, Dialect], where: str, folder: str = ""
) -> Spec:
    """A spec of what its `native.yaml` holds; lines for messages are found in `folder`."""
    at = f"{where}/{NATIVE}.yaml"
    native = checked(NativeFile, data, at, f"{folder}/{NATIVE}" if folder else "")
    heads = _lines(native.head)
    return Spec(
        name,
        where,
        _lines(native.axes),
        dialects,
        tuple(parse_ref(line, f"{at}: shapes") for line in native.shapes or ()),
        _lines(native.present),
        tuple((_paths(head), array) for head, array in heads.items()),
    )


def _dialect(spec: str, name: str, data: Any, folder_name: str, folder: str = "") -> Dialect:
    """A dialect of what its file holds; lines for messages are found in `folder`."""
    where = f"{folder_name}/{name}.yaml"
    file = checked(DialectFile, data, where, f"{folder}/{name}" if folder else "")
    shared = common(name)

    def rules(lines: Rules | None, section: str) -> tuple[Rule, ...]:
        return tuple(parse_rule(a, b, f"{where}: {section}") for a, b in (lines or {}).items())  # type: ignore[arg-type]

    def names(lines: Texts | None, section: str) -> tuple[tuple[Template, str], ...]:
        at = f"{where}: {section}"
        return tuple((parse_name(name, at), other) for name, other in _lines(lines).items())

    def pairs(lines: Texts | None, section: str) -> tuple[tuple[Template, Template], ...]:
        at = f"{where}: {section}"
        return tuple((name, parse_name(other, at)) for name, other in names(lines, section))

    def when(condition: str, below: WhenRules) -> When:
        section = f"when.{condition}"
        sections = (rules(below.weights, section), rules(below.heads, section))
        field = condition.removeprefix("not ")
        return When(field, field == condition, *sections)

    return Dialect(
        name=name,
        where=where,
        prefix=file.prefix or "",
        weights=rules(file.weights, "weights"),
        heads=rules(file.heads, "heads"),
        alternatives=rules(file.alternatives, "alternatives"),
        when=tuple(when(*item) for item in _lines(file.when).items()),
        optional=_lines(file.optional),
        tied=pairs(file.tied, "tied"),
        aliases=pairs(file.aliases, "aliases"),
        drop=names(file.drop, "drop"),
        optimizer_slots=_lines(file.optimizer_slots),
        config={field: _paths(paths) for field, paths in _lines(file.config).items()},
        defaults=file.defaults or {},
        require=_tuples({**shared.require, **_lines(file.require)}),
        ignore=frozenset([*(file.ignore or ()), *shared.ignore]),
        exclusive=tuple(map(tuple, file.exclusive or ())),
        container=shared.container,
        detect={
            key: tuple(value) if isinstance(value, list) else (value,)
            for key, value in (file.detect or {}).items()
        },
        required=tuple(file.required or ()),
        null_values=_tuples(_lines(file.null_values)),
        value_map=_tuples(_lines(file.value_map)),
        key_map={field: _lines(keys) for field, keys in _lines(file.key_map).items()},
        field_tensors=_lines(file.field_tensors),
        write=file.write or {},
        zero_filled=_lines(file.zero_filled),
        lossy_fields=frozenset([*(file.lossy_fields or ()), *shared.lossy_fields]),
        reference=spec if name == "hf" else "",
    )


def _lines(section: Mapping[str, Value | None] | None) -> dict[str, Value]:
    """A section less what is null."""
    return {key: value for key, value in (section or {}).items() if value is not None}


def _tuples(lists: Mapping[str, Iterable[Any]]) -> dict[str, tuple[Any, ...]]:
    return {key: tuple(values) for key, values in lists.items()}


def _paths(text: str) -> tuple[str, ...]:
    return tuple(path.strip() for path in text.split("|"))
