"""Specs: what each dialect of an architecture calls its tensors and config fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from converters.language import Ref, Rule, Template, parse_name, parse_ref, parse_rule
from converters.reference_fields import INNER, ROPE, SHARED, cannot_matter, reference_fields
from converters.strict_yaml import read_yaml
from zoo.errors import SpecError, did_you_mean, listing, option

SPECS = Path(__file__).parent / "specs"
MOST_UNKNOWN = 200  # fields of one config, each of which is compared with all known ones

_SECTIONS = (
    "prefix",
    "weights",
    "heads",
    "when",
    "alternatives",
    "optional",
    "tied",
    "aliases",
    "drop",
    "optimizer_slots",
)
_CONFIG_SECTIONS = (
    *("config", "defaults", "require", "ignore", "exclusive"),
    *("detect", "required", "null_values", "value_map", "key_map", "field_tensors", "write"),
    *("zero_filled", "lossy_fields"),
)
NATIVE = "native"  # the file of a spec that is about the model, and no dialect's
_NATIVE_SECTIONS = ("axes", "shapes", "present", "head")


@dataclass(frozen=True)
class When:
    """Rules that count where a native field of the config holds something, or where it does not."""

    field: str
    holds: bool
    weights: tuple[Rule, ...] = ()
    heads: tuple[Rule, ...] = ()

    def of(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get(self.field)) == self.holds


@dataclass(frozen=True)
class Container:
    """What the files of a dialect are, whatever the architecture: `common/<dialect>.yaml` says it.

    `{shard}` in the file's name: there may be several, and tensors are called `0/name`, `1/name` …
    """

    format: str
    file: str = ""  # as it is written; none: it is read alone
    within: tuple[str, ...] = ("",)  # the key of a nested file that weights stand under
    # a file beside it, a key of the file's own values, `.` for all of these; `{key}`: of those the
    # ones below the name that stands there
    config: str = ""
    beside: tuple[str, ...] = ()  # names below which no value is about the model
    wide: tuple[str, ...] = ()  # tensors in F32, as vectors are
    about: str = ""  # for people
    fixed: Mapping[str, int] = field(default_factory=dict)  # of what its format leaves to choose
    names: Mapping[str, str] = field(default_factory=dict)  # a file beside it: what others call it

    @property
    def sharded(self) -> bool:
        return "{shard" in self.file


@dataclass(frozen=True)
class Dialect:
    """One way to lay an architecture's weights out."""

    name: str
    where: str = ""
    prefix: str = ""
    weights: tuple[Rule, ...] = ()
    heads: tuple[Rule, ...] = ()
    when: tuple[When, ...] = ()
    alternatives: tuple[Rule, ...] = ()  # where their sources are there, others' place is theirs
    optional: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[tuple[Template, Template], ...] = ()
    aliases: tuple[tuple[Template, Template], ...] = ()
    drop: tuple[tuple[Template, str], ...] = ()
    optimizer_slots: Mapping[str, str] = field(
        default_factory=dict
    )  # behind a known name: why it is dropped
    config: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # native fields a config leaves out
    require: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    exclusive: tuple[tuple[str, ...], ...] = ()  # fields of which one counts: they may not differ
    container: Container | None = None  # None: hf, whose files are what they always were
    detect: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # values that tell it
    required: tuple[str, ...] = ()  # native fields without which nothing can be read
    null_values: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # values that say nothing
    value_map: Mapping[str, tuple[tuple[Any, Any], ...]] = field(default_factory=dict)
    # of a field that is an object: native key -> its own; it has no others
    key_map: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    field_tensors: Mapping[str, str] = field(
        default_factory=dict
    )  # array that says a native field: which
    write: Mapping[str, Any] = field(default_factory=dict)  # `{field}` or a constant; null: not
    # flags of tensors that may not lack here: zeros stand for them, always or if another flag holds
    zero_filled: Mapping[str, Any] = field(default_factory=dict)
    lossy_fields: frozenset[str] = frozenset()  # native fields that may be lost
    reference: str = ""  # its list in reference_fields.yaml, if there is one

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.weights + self.heads + self.alternatives

    def under(self, config: Mapping[str, Any]) -> Dialect:
        """With the rules that count under this config, and no more conditions."""
        chosen = [when for when in self.when if when.of(config)]
        weights = sum((when.weights for when in chosen), self.weights)
        return replace(
            self, weights=weights, heads=sum((when.heads for when in chosen), self.heads), when=()
        )

    def knows(self, disk: str) -> bool:
        """Whether anything is said of a tensor of this name."""
        prefix = self.prefix
        rules = self.rules + sum((when.weights + when.heads for when in self.when), ())
        known = [rule.source.name for rule in rules]
        known += [name for pair in self.aliases for name in pair[:1]]
        known += [name for name, _ in (*self.tied, *self.drop)]
        names = {disk, disk[len(prefix) :] if disk.startswith(prefix) else disk}
        if any(template.match(name) is not None for template in known for name in names):
            return True
        return any(
            disk.endswith(s) and self.knows(disk.removesuffix(s)) for s in self.optimizer_slots
        )

    def dropped(self, disk: str) -> str | None:
        """Why a tensor of this name is not wanted; None if it is, or is not known."""
        for template, reason in self.drop:
            if template.match(disk) is not None:
                return reason
        for suffix, reason in self.optimizer_slots.items():
            if disk.endswith(suffix) and self.knows(disk.removesuffix(suffix)):
                return reason
        return None

    def native_names(self, given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
        """What is given in the dialect's own words, in native ones; what neither has, as it is."""
        known, out = set(known), dict[str, Any]()
        for key, value in given.items():
            named = [n for n, paths in self.config.items() if key in paths]
            for name in [key] if key in known or not named else named:
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
        """Native fields that the reference's config sets, and everything that is wrong with it.

        What one field maps out of an object is no part of it for another that maps the whole.
        """
        if self.null_values:
            kept = reference.items()
            reference = {k: v for k, v in kept if v not in self.null_values.get(k, ())}
        ignore = frozenset(ignore)
        fields = dict(self.defaults)
        for name, paths in self.config.items():
            found = (
                value
                for path in paths
                if (value := self._value(reference, path, ignore)) is not None
            )
            if (value := next(found, None)) is not None:
                fields[name] = self._native(name, value)
            elif any(_is_null(reference, path) for path in paths):
                fields[name] = None  # said, and not the same as left out
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
        """What the audit goes over: fields, and parts of those that are objects."""
        every = {path for paths in self.config.values() for path in paths}
        outer = {path.partition(".")[0] for path in every}
        flat: dict[str, Any] = {}
        for key, value in reference.items():
            inner = value if isinstance(value, dict) and key in outer else {}
            # of an object of which parts are mapped, and never the whole, each part is a field
            if isinstance(value, dict) and key in outer - every:
                flat |= {f"{key}.{part}": each for part, each in inner.items()}
            else:
                unread = (part for part in inner if self._is_unread(key, part))
                flat |= {key: value, **{f"{key}.{part}": inner[part] for part in unread}}
        given = {key: _look_up(reference, key) for key in self.require.keys() - flat.keys()}
        return flat | {key: value for key, value in given.items() if value is not None}

    @property
    def _is_listed(self) -> bool:
        """Whether the fields that the reference reads are known; else each unknown is an error."""
        return bool(self.reference) and self.reference in reference_fields()

    @cached_property
    def _mapped(self) -> frozenset[str]:
        """Fields that native ones are read from, and objects that hold such fields."""
        every = {path for paths in self.config.values() for path in paths}
        return frozenset(every | {path.partition(".")[0] for path in every})

    def _fields(self) -> frozenset[str]:
        """Every field that may change the function, whether zoo implements it or not."""
        names = self._mapped | self.require.keys()
        if not self._is_listed:
            return names | self.ignore
        read = reference_fields()
        return names | ((read[SHARED] | read[self.reference]) - self.ignore)

    def unused(self, reference: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
        """Fields that are neither mapped nor read by the reference: they change nothing."""
        unknown = self._unknown(self._flat(reference), frozenset(ignore))
        return [key for key, value in unknown if self._cannot_matter(key, value, reference)]

    def _unknown(self, flat: Mapping[str, Any], ignore: frozenset[str]) -> list[tuple[str, Any]]:
        known = self._mapped | self.ignore | ignore | self.require.keys()
        return [(key, value) for key, value in flat.items() if key not in known]

    def _scope(self, key: str, reference: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
        """(a field's own name, names of the fields known where it stands)"""
        outer, _, inner = key.rpartition(".")
        if outer in INNER and self._is_listed and key not in reference:
            return inner, reference_fields()[ROPE]
        return key, self._fields()

    def _cannot_matter(self, key: str, value: Any, reference: Mapping[str, Any]) -> bool:
        if not self._is_listed:
            return False
        name, known = self._scope(key, reference)
        if name != key and isinstance(value, dict):
            return False  # beside rotary's own keys, a scaling for some of the layers
        return cannot_matter(name, known)

    def _audit(self, reference: Mapping[str, Any], ignore: frozenset[str]) -> list[str]:
        problems = []
        for names in self.exclusive:
            found = (_look_up(reference, name) for name in names)
            given = [value for value in found if value is not None]
            if any(value != given[0] for value in given):
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
                told = f"{key}: the reference reads this field, and zoo does not implement it."
            else:
                told = f"{key}: unknown field.{did_you_mean(field_name, fields)}"
            way_out = option("ignore_config", (key,))
            problems.append(f"{told} If it does not change inference, pass {way_out}")
        return problems

    def reference_field(self, native: str) -> str:
        """What the reference calls a native field, for messages."""
        return self.config[native][0] if native in self.config else native

    def write_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's config for native fields, each under its first path."""
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
                said = [r for r, native in self.value_map[name] if native == value]
                if not said and name not in self.key_map:
                    continue  # left out; it comes back different if that means something else
                value = said[0] if said else value
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
    """The field is there and holds null."""
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
    shapes: tuple[Ref, ...] = ()  # native arrays whose axes, and numbers, are native fields
    present: Mapping[str, str] = field(default_factory=dict)  # field, or `not` one: a native name
    # (heads, a native name that only they have), of files that name no class; the first counts
    head: tuple[tuple[tuple[str, ...], str], ...] = ()

    def dialect(self, name: str) -> Dialect:
        if name not in self.dialects:
            known = ", ".join(self.dialects)
            raise SpecError(f"{self.where}: no dialect {name!r}; there is {known}")
        return self.dialects[name]

    def with_dialect(self, dialect: Dialect) -> Spec:
        return replace(self, dialects={**self.dialects, dialect.name: dialect})


@cache
def load_spec(name: str) -> Spec:
    """Read the folder `specs/<name>`: `native.yaml` and a file per dialect."""
    folder = SPECS / name
    if not (folder / f"{NATIVE}.yaml").is_file():
        raise SpecError(f"{folder}: no such spec.{did_you_mean(name, spec_names())}")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    names.sort(key="hf".__ne__)  # the published layout is named first
    return parse_spec(
        name, {file: _read(f"{name}/{file}") for file in names}, f"converters/specs/{name}"
    )


def _read(file: str, below: tuple[str, ...] = ()) -> Any:
    """One file of a spec, laid over the file that its `like:` names.

    A null removes what the file below has, a list adds to it.
    """
    path = SPECS / f"{file}.yaml"
    data = _mapping(read_yaml(path, SpecError), f"{file}.yaml")
    if (other := data.pop("like", None)) is None:
        return data
    if file in below:
        raise SpecError(f"{file}.yaml: like: {' -> '.join((*below, file))} is a circle")
    if not isinstance(other, str) or not (SPECS / f"{other}.yaml").is_file():
        files = (path.relative_to(SPECS).with_suffix("") for path in SPECS.glob("*/*.yaml"))
        near = did_you_mean(str(other), map(str, files))
        raise SpecError(f"{file}.yaml: like: no file {other!r}.{near}")
    return _laid_over(_read(other, (*below, file)), data)


def _laid_over(base: Any, more: Any) -> Any:
    if isinstance(base, dict) and isinstance(more, dict):
        both = {
            key: _laid_over(value, more[key]) if key in more else value
            for key, value in base.items()
        }
        both |= {key: value for key, value in more.items() if key not in base}
        return {key: value for key, value in both.items() if value is not None}
    return base + more if isinstance(base, list) and isinstance(more, list) else more


def spec_names() -> list[str]:
    """Every folder of specs that is one architecture's."""
    return sorted(path.parent.name for path in SPECS.glob(f"*/{NATIVE}.yaml"))


def parse_spec(name: str, files: Any, where: str = "") -> Spec:
    """A spec from plain data: what stands in `native.yaml`, and in each dialect's file.

    Every section that does not belong is an error.
    """
    files = _mapping(files, where)
    at = f"{where}/{NATIVE}.yaml"
    native = _mapping(files.get(NATIVE) or {}, at)
    if odd := [key for key in native if key not in _NATIVE_SECTIONS]:
        raise SpecError(f"{at}: no section {odd[0]!r}.{did_you_mean(odd[0], _NATIVE_SECTIONS)}")
    axes = _mapping(native.get("axes") or {}, f"{at}: axes")
    shapes = native.get("shapes") or []
    if not isinstance(shapes, list) or not all(isinstance(line, str) for line in shapes):
        raise SpecError(f"{at}: shapes: expected a list of native tensors with their axes")
    dialects = {
        key: _dialect(key, _mapping(data, f"{where}/{key}.yaml"), f"{where}/{key}.yaml")
        for key, data in files.items()
        if key != NATIVE
    }
    if "hf" in dialects:
        dialects["hf"] = replace(dialects["hf"], reference=name)
    return Spec(
        name,
        where,
        axes,
        dialects,
        tuple(parse_ref(line, f"{at}: shapes") for line in shapes),
        _mapping(native.get("present") or {}, f"{at}: present"),
        tuple(
            (_paths(heads, f"{at}: head"), name)
            for heads, name in _mapping(native.get("head") or {}, f"{at}: head").items()
        ),
    )


def _dialect(name: str, data: dict[str, Any], where: str) -> Dialect:
    if odd := [k for k in data if k not in _SECTIONS + _CONFIG_SECTIONS]:
        known = _SECTIONS + _CONFIG_SECTIONS
        raise SpecError(f"{where}: no section {odd[0]!r}.{did_you_mean(odd[0], known)}")

    def section(key: str) -> dict[str, Any]:
        return _mapping(data.get(key) or {}, f"{where}: {key}")

    def rules(key: str) -> tuple[Rule, ...]:
        return _rules(section(key), f"{where}: {key}")

    def pairs(key: str) -> tuple[tuple[Template, Template], ...]:
        at = f"{where}: {key}"
        return tuple((parse_name(a, at), parse_name(b, at)) for a, b in section(key).items())

    common = _common(name)
    ignored = data.get("ignore") or []
    if not isinstance(ignored, list):
        raise SpecError(f"{where}: ignore: expected a list of field names")
    require = {**common["require"], **section("require")}
    for key, values in require.items():
        if not isinstance(values, list):
            raise SpecError(f"{where}: require.{key}: expected a list of the values implemented")
    dialect = Dialect(
        name=name,
        where=where,
        prefix=data.get("prefix") or "",
        weights=rules("weights"),
        heads=rules("heads"),
        alternatives=rules("alternatives"),
        when=tuple(_when(key, more, f"{where}: when") for key, more in section("when").items()),
        optional=section("optional"),
        tied=pairs("tied"),
        aliases=pairs("aliases"),
        drop=tuple((parse_name(n, f"{where}: drop"), r) for n, r in section("drop").items()),
        optimizer_slots=section("optimizer_slots"),
        config={k: _paths(v, f"{where}: config.{k}") for k, v in section("config").items()},
        defaults=section("defaults"),
        require={k: tuple(v) for k, v in require.items()},
        ignore=frozenset(ignored) | frozenset(common["ignore"]),
        exclusive=tuple(tuple(names) for names in data.get("exclusive") or []),
        container=common["container"],
        detect={k: tuple(v) if type(v) is list else (v,) for k, v in section("detect").items()},
        required=tuple(data.get("required") or ()),
        null_values={k: tuple(v) for k, v in section("null_values").items()},
        value_map={k: tuple((a, b) for a, b in pairs) for k, pairs in section("value_map").items()},
        key_map=section("key_map"),
        field_tensors=section("field_tensors"),
        write=section("write"),
        zero_filled=section("zero_filled"),
        lossy_fields=frozenset([*(data.get("lossy_fields") or ()), *common["lossy_fields"]]),
    )
    for template, _ in dialect.drop + dialect.tied + dialect.aliases:
        if not str(template).strip():
            raise SpecError(f"{where}: an empty name")
    if "" in dialect.optimizer_slots:
        raise SpecError(f"{where}: slots: an empty name")
    return dialect


def _rules(data: dict[str, Any], where: str) -> tuple[Rule, ...]:
    return tuple(parse_rule(source, target, where) for source, target in data.items())


def _when(condition: str, data: Any, where: str) -> When:
    """`field: {weights: …, heads: …}`, or `not field: …`."""
    name = condition.removeprefix("not ")
    where = f"{where}.{condition}"
    data = _mapping(data, where)
    if not name.isidentifier() or data.keys() - {"weights", "heads"}:
        raise SpecError(f"{where}: expected a field, or `not` one, with weights: or heads: below")
    sections = (_mapping(data.get(key) or {}, f"{where}.{key}") for key in ("weights", "heads"))
    weights, heads = (_rules(section, where) for section in sections)
    return When(name, name == condition, weights, heads)


def _paths(text: Any, where: str) -> tuple[str, ...]:
    paths = tuple(p.strip() for p in text.split("|")) if isinstance(text, str) else ()
    if not paths or not all(all(part for part in p.split(".")) for p in paths):
        raise SpecError(f"{where}: expected a field or several joined by |, found {text!r}")
    return paths


@cache
def _common(dialect: str) -> dict[str, Any]:
    """What every config of a dialect may hold, whatever the architecture."""
    path = SPECS / "common" / f"{dialect}.yaml"
    data = _mapping(read_yaml(path, SpecError), path.name) if path.is_file() else {}
    said = data.get("container")
    return {
        "ignore": data.get("ignore") or [],
        "require": data.get("require") or {},
        "lossy_fields": data.get("lossy_fields") or [],
        "container": None if said is None else _container(said, f"common/{path.name}: container"),
    }


def _container(data: Any, where: str) -> Container:
    data = _mapping(data, where)
    known = Container.__dataclass_fields__
    if odd := [key for key in data if key not in known]:
        raise SpecError(f"{where}: no field {odd[0]!r}.{did_you_mean(odd[0], known)}")
    within = data.get("within", "")
    lists = {"within": tuple(within) if isinstance(within, list) else (within,)}
    lists |= {name: tuple(data[name]) for name in ("beside", "wide") if name in data}
    return Container(**{**data, **lists})


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise SpecError(f"{where}: expected `name: …` lines, found {type(data).__name__}")
    return data
