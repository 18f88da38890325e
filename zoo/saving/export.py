"""Export a model to a dialect of its spec; refuse in advance what the dialect cannot express."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from converters.block_codes import int8_groups, q8_0
from converters.dialects import every_dialect, infer, nested
from converters.formats import TensorInfo, gguf, llama2c, torch_zip
from converters.lazy import Lazy
from converters.output import Item, Shard
from converters.plan import Native, Plan, make_plan, target_names
from converters.spec import Container, Dialect, Spec
from zoo.checkpoints.build import native_of
from zoo.checkpoints.locate import fields_by_tables
from zoo.components.model import Model
from zoo.components.rotary import PLAIN, Llama3
from zoo.errors import ConfigError, LossyExport, SpecError, UsageError, did_you_mean, listing
from zoo.saving.graphs import GRAPHS

# options of a format: minimum and maximum
OPTIONS: dict[str, dict[str, tuple[int, int]]] = {
    "torch": {"shards": (1, 100), "columns": (0, 1)},
    "llama2c": {"version": (0, 1), "group": (1, 1 << 20)},
    "gguf": {"vocabulary": (0, 1)},
}
QUANTIZED = "q8_0"  # a `dtype` besides torch's, for formats that have it
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q8_0": 7,
    "BF16": 32,
}  # llama.cpp's number for the type of most matrices


def dialects() -> list[str]:
    """Return every name that `to` may have: dialects, then graphs for other programs."""
    written = (dialect.name for _, dialect, container in every_dialect() if container.file)
    return list(dict.fromkeys(["hf", "native", *written, *GRAPHS]))


@dataclass(frozen=True)
class Export:
    """What an export writes, once it is proven possible."""

    dialect: Dialect
    container: Container
    plan: Plan  # its inverse makes the tensors; its header has their dtypes
    reference: Mapping[str, Any]  # the config in the dialect's terms
    aliases: Mapping[str, str]  # further name of an array -> its name
    options: Mapping[str, int]
    beside: Mapping[str, Any] = field(default_factory=dict)  # metadata that is not the config
    tables: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # tensors that hold a config field

    def files(
        self,
        items: Iterable[Item],
        *,
        lossy: bool = False,
        quantized: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> tuple[list[Shard], dict[str, bytes]]:
        """Return (files of tensors, other files).

        Args:
            items: The tensors.
            lossy: Whether a narrower dtype was asked for; otherwise it is refused.
            quantized: Whether to quantize matrices to Q8_0.
            values: Metadata for other programs, such as a vocabulary, for files that hold it.
        """
        by_name = {item.name: item for item in items}
        items = [by_name[name] for name in self.plan.header]
        if not lossy and (wide := [item.name for item in items if item.lossy]):
            kinds = listing(sorted({by_name[name].info.dtype for name in wide}))
            raise LossyExport(
                f"{self.dialect.name} stores {kinds}, and {listing(wide, 5)} have more precision"
            )
        if self.container.format == "gguf":
            return [self._gguf(items, quantized, values or {})], {}
        make = {"torch": self._torch, "llama2c": self._llama2c}[self.container.format]
        texts = {}
        if self.container.config.endswith(".json"):
            text = json.dumps(self.reference, indent=2) + "\n"
            texts[self.container.config] = text.encode()
        return make(items), texts

    def _torch(self, items: Sequence[Item]) -> list[Shard]:
        container, shards = self.container, list[Shard]()
        key = container.config
        values = {key: dict(self.reference)} if key and not key.endswith(".json") else {}
        for shard in range(self.options.get("shards", 1)):
            before = f"{shard}/" if container.sharded else ""
            mine = [item for item in items if item.name.startswith(before)]
            names = {item.name: item.name[len(before) :] for item in mine}
            layout = torch_zip.lay_out(
                [item.info for item in mine],
                names,
                within=container.within[0] if values else "",
                values=values,
                aliases={
                    other[len(before) :]: names[name]
                    for other, name in self.aliases.items()
                    if name in names
                },
            )
            shards.append(Shard(container.file.format(shard=shard), tuple(mine), layout))
        return shards

    def _gguf(self, items: Sequence[Item], quantized: bool, values: Mapping[str, Any]) -> Shard:
        tables = [
            Item(TensorInfo(name, tuple(t.shape), "F32"), "of the config", partial(Lazy.of, t))
            for name, t in self.tables.items()
        ]
        items = written = [*tables, *items]
        if quantized:  # matrices whose rows divide into blocks
            coding = q8_0()
            written = [
                _coded(item, item.info, coding)
                if self._narrow(item.info) and item.info.shape[-1] % coding.unit == 0
                else item
                for item in items
            ]
        infos = [
            TensorInfo(i.name, i.info.shape, i.coding.name if i.coding else i.info.dtype)
            for i in written
        ]
        sizes = Counter[str]()
        for info in infos:
            if self._narrow(info):
                sizes[info.dtype] += info.numel
        kind = max(sizes, key=lambda name: (sizes[name], name), default="F32")
        architecture = self.dialect.detect["general.architecture"][0]
        metadata = {"general.architecture": architecture, "general.type": "model"}
        metadata |= {"general.file_type": _FILE_TYPES.get(kind, 0)}
        metadata |= {"general.quantization_version": 2} if quantized else {}
        metadata |= {f"{architecture}.{key}": value for key, value in _flat(self.reference).items()}
        metadata |= {**self.beside, **values}
        layout = gguf.lay_out(infos, metadata, f"to={self.dialect.name!r}")
        return Shard(self.container.file, tuple(written), layout)

    def _narrow(self, info: TensorInfo) -> bool:
        return len(info.shape) > 1 and info.name not in self.container.wide

    def _llama2c(self, items: Sequence[Item]) -> list[Shard]:
        version = self.options.get("version", 0)
        header = llama2c.header_for(self.reference, version, self.options.get("group", 64))
        layout = llama2c.lay_out(
            header, {item.name: item.info for item in items}, self.dialect.name
        )
        by_name = {item.name: item for item in items}
        written: list[Item] = []
        starts: dict[str, int] = {}
        whole, scales = int8_groups(header.group or 1)
        for name, at in layout.starts.items():
            starts[name] = at
            if name not in by_name:
                info = TensorInfo(name, dict(header.arrays())[name], "F32")
                made = partial(_rotary_table, header, name)
                written.append(Item(info, "cosines and sines of every position", made))
            elif header.groups(name):
                item = by_name[name]
                info = TensorInfo(f"{name}.scales", item.info.shape, item.info.dtype)
                written.append(_coded(item, item.info, whole))
                written.append(_coded(item, info, scales))
                starts[info.name] = at + item.info.numel
            else:
                written.append(by_name[name])
        layout = layout._replace(starts=starts)
        return [Shard(self.container.file, tuple(written), layout)]


def with_zeros(model: Model, dialect: Dialect) -> tuple[Model, dict[str, tuple[int, ...]]]:
    """Return (the model that a dialect can express, on meta; shapes of its additional arrays).

    They are biases, which a dialect requires; as zeros they change nothing.
    """
    config = model.config
    grown = {
        name: True
        for name, when in dialect.zero_filled.items()
        if getattr(config, name) is False and (when is True or getattr(config, when))
    }
    if not grown:
        return model, {}
    with torch.device("meta"):
        larger = type(model)(config.replace(**grown))
    larger.architecture, larger.provenance = model.architecture, model.provenance
    before = native_of(model).shapes
    return larger, {n: s for n, s in native_of(larger).shapes.items() if n not in before}


def _coded(item: Item, info: TensorInfo, coding: Any) -> Item:
    stored = item.stored or item.info.dtype
    return replace(item, info=info, span=None, stored=stored, coding=coding, decoded=False)


def _rotary_table(header: llama2c.Header, name: str) -> Lazy:
    return Lazy.of(llama2c.rotary_tables(header)[name])


# --- the proof ----------------------------------------------------------------------


def export(
    spec: Spec,
    to: str,
    config: Any,
    native: Native,
    stored: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
) -> Export:
    """Prove that a dialect can express a model: every array and every config field comes back.

    Args:
        spec: The mapping of the architecture.
        to: The dialect.
        config: The model's config.
        native: The model's arrays.
        stored: Native name -> dtype.
        options: Options of the layout.
        published: The config of the files of this dialect that the model was read from; it is kept
            word for word while it still means this model.

    Raises:
        LossyExport: With everything that the dialect cannot express.
        UsageError: If an option is unknown or out of range.
    """
    dialect = spec.dialects.get(to)
    if dialect is None or dialect.container is None:
        files = [n for n, d in spec.dialects.items() if d.container and d.container.file]
        names_written = listing(["hf", "native", *files])
        raise LossyExport(
            f"to={to!r}: {spec.name} is not written in that dialect; only in {names_written}"
        )
    container, chosen = dialect.container, _checked(dialect, options or {})
    if not container.file:
        raise LossyExport(f"to={to!r}: {container.about} can be read, not written")
    fields = {**config.to_dict(), "shards": chosen.get("shards", 1)}
    tables, said_so = _tables(dialect, config)
    reference, beside = dialect.write_config({**fields, **said_so}), dict[str, Any]()
    if container.format == "gguf":
        reference, beside = _as_values(container, reference)
    try:
        names = target_names(
            spec, to, fields, native, bare=True, alternatives=bool(chosen.get("columns"))
        )
    except SpecError as error:
        raise LossyExport(f"to={to!r}: {error}") from None
    header = dict(names)
    plan = make_plan(spec, to, fields, native, names, "export")
    for step in plan.steps:
        code = stored[native.ties.get(step.targets[0], step.targets[0])]
        for name in (n for group in (step.sources, *step.also) for n in group):
            header[name] = TensorInfo(name, names[name].shape, code)
            header[name] = header[name]._replace(dtype=_stored_dtype(container, header[name]))
    plan = make_plan(spec, to, fields, native, header, "export")
    # in formats where tensors cannot share bytes, the second name is left out
    aliases = _aliases(dialect, header) if native.ties and container.format != "gguf" else {}
    if aliases and fields["shards"] > 1 and chosen.get("columns"):
        raise LossyExport(
            f"to={to!r}: a head that is the embedding is cut by rows, and columns=1 cuts the "
            "embedding by columns: leave columns away"
        )
    back = partial(_come_back, spec, dialect, config, tables)
    if published:
        with suppress(LossyExport):
            back(published, header, aliases, fields["shards"])
            return Export(dialect, container, plan, published, aliases, chosen, beside, tables)
    back(reference, header, aliases, fields["shards"])
    return Export(dialect, container, plan, reference, aliases, chosen, beside, tables)


def _stored_dtype(container: Container, info: TensorInfo) -> str:
    """Return the dtype of an array in a dialect's files."""
    if container.format == "llama2c":
        return "F32"
    vector = len(info.shape) < 2 or info.name in container.wide
    return "F32" if container.format == "gguf" and vector else info.dtype


def _tables(dialect: Dialect, config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors that hold a config field, the value of the field in the config then)."""
    name = next((n for n, field_ in dialect.field_tensors.items() if field_ == "rope"), None)
    if name is None or not isinstance(config.rope, Llama3):
        return {}, {}
    return {name: config.rope.factors(config.rotary())}, {"rope": PLAIN.to_json()}


def _as_values(
    container: Container, reference: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the config as a GGUF file returns it, metadata that is not the config)."""
    flat = {key: gguf.as_read(value) for key, value in _flat(reference).items()}
    beside = {k: v for k, v in flat.items() if k.partition(".")[0] in container.beside}
    return nested({k: v for k, v in flat.items() if k not in beside}), beside


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested dicts with dotted keys; nulls are left out.

    >>> _flat({"a": {"b": 1, "c": None}})
    {'a.b': 1}
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{above}{key}.")
        elif value is not None:
            out[above + key] = value
    return out


def _checked(dialect: Dialect, options: Mapping[str, Any]) -> dict[str, int]:
    assert dialect.container is not None
    fixed = dialect.container.fixed
    limits_of = OPTIONS.get(dialect.container.format, {})
    limits_of = {name: limits for name, limits in limits_of.items() if name not in fixed}
    if dialect.container.format == "torch" and not dialect.container.sharded:
        limits_of = {}
    for name, value in options.items():
        if name not in limits_of:
            available = listing(limits_of) or "none"
            near = did_you_mean(name, limits_of)
            raise UsageError(f"layout: {dialect.name} has no {name!r}; it has {available}.{near}")
        least, most = limits_of[name]
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"layout: {name}={value!r}: a whole number from {least} to {most}")
    return {**options, **fixed}


def _aliases(dialect: Dialect, header: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the second names of tied arrays that the dialect's programs look for."""
    aliases: dict[str, str] = {}
    for other, main in dialect.tied:
        for name in header:
            if (binding := main.match(name)) is not None and other.format(binding) not in header:
                aliases[other.format(binding)] = name
    return aliases


def _come_back(
    spec: Spec,
    dialect: Dialect,
    config: Any,
    tables: Mapping[str, torch.Tensor],
    reference: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    aliases: Mapping[str, str],
    shards: int,
) -> None:
    """Read what would be written; refuse fields that would come back different, by name."""
    fields, problems = dialect.read_config(reference)
    everything = {**header, **{o: TensorInfo(o, *header[n][1:]) for o, n in aliases.items()}}
    inferred = infer(spec, dialect, fields, everything, shards, aliases)
    try:
        inferred |= fields_by_tables(dialect, fields, tables.__getitem__, tables)
    except ConfigError as error:
        raise LossyExport(f"to={dialect.name!r}: it would not be read back: {error}") from None
    asked = {name: getattr(config, name) for name in dialect.required if fields.get(name) is None}
    head = "lm" if "lm" in type(config).heads_known else config.head
    same_config(dialect, config, {**fields, **inferred, **asked, "head": head}, problems)


def same_config(
    dialect: Dialect, config: Any, again: Mapping[str, Any], problems: Iterable[str] = ()
) -> None:
    """Refuse a config that would come back different.

    Raises:
        LossyExport: With every field that would.
    """
    fields, lost = config.to_dict(), list(problems)
    try:
        read = type(config)(**again).to_dict()
    except ConfigError as error:
        raise LossyExport(f"to={dialect.name!r}: it would not be read back: {error}") from None
    lost += [
        f"{name}: {fields[name]!r} cannot be said there, and would be read as {read[name]!r}"
        for name in fields
        if read[name] != fields[name] and name not in dialect.lossy_fields
    ]
    if lost:
        raise LossyExport("\n  ".join([f"to={dialect.name!r}: not written:", *lost]))
