"""`zoo.convert`: convert files to files, tensor by tensor, within a memory budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from converters import manifest
from converters.carry_out import agreed
from converters.formats import TensorInfo, dtype_code
from converters.memory import enough
from converters.output import Item, Output, digest, hash_file, identity, index_of
from converters.plan import Plan, PlanStep
from converters.staging.parts import SharedStage, shared
from converters.staging.stage import resumable
from converters.writer import MEMORY, Tell, WriteOptions, WriteReport, damages, run
from zoo.checkpoints.build import dtype_of, native_of, on_meta
from zoo.checkpoints.destination import Replacing
from zoo.checkpoints.file_names import CONFIG, MODULES, NATIVE_FILE
from zoo.checkpoints.handle import Located
from zoo.checkpoints.locate import locate
from zoo.checkpoints.plan import check_trust, prove
from zoo.checkpoints.provenance import Origin, provenance_of
from zoo.checkpoints.publish import checked_destination, finished
from zoo.checkpoints.sentences import SentenceModel, headless, read_steps
from zoo.checkpoints.sources import Ref
from zoo.components.model import Model
from zoo.errors import CorruptCheckpoint, UsageError, ZooError, did_you_mean, listing, option
from zoo.loading import adapter_files, check_adapter
from zoo.lora.bases import based
from zoo.lora.files import Files
from zoo.lora.merging import changes, untied
from zoo.saving.arrays import ADAPTED, Arrays, span_of
from zoo.saving.checks import OWN_FILES, check_dialect, check_graph, check_no_layout, check_whole
from zoo.saving.companions import companions_of, exported_files, is_of_a_step, unpacked
from zoo.saving.export import QUANTIZED, export, with_zeros
from zoo.saving.graphs import GRAPHS
from zoo.saving.origin import export_plan, lossy_of, native_record, origin_of, said_of
from zoo.saving.outputs import graph_files, in_order, item_of, split

MOST_PARTS = 10_000
READING = (  # options of zoo.load that select what is read
    "head",
    "config",
    "ignore_config",
    "trust",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
)


def convert(
    src: Ref,
    dst: Ref,
    *,
    to: str = "hf",
    force: bool = False,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | None = None,
    memory: int = MEMORY,
    threads: int = 0,
    restart: bool = False,
    part: str | tuple[int, int] | None = None,
    layout: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    sha256: bool = True,
    tell: Tell = lambda event: None,
    adapter: Ref | bool | None = None,
    **options: Any,
) -> Path:
    """Convert a checkpoint to another dialect, within a memory budget.

    If it is killed, the same call resumes where it stopped. `part` lets any number of processes, on
    machines that share the disk, write a share of the files each; the last one publishes.

    Args:
        src: A name, a repository, a directory or a file, as for `zoo.load`.
        dst: The directory to write. Files in it that are no checkpoint's are kept.
        to: "hf", "native", another dialect of the architecture, or a graph, "onnx" or "pt2", which
            is traced without weights.
        force: Whether to replace any checkpoint at `dst`.
        dtype: Dtype of the output; GGUF also has "q8_0". A value that overflows is an error.
        max_shard_size: Bytes of a file of weights; by default the source's split, or 5 GB.
        memory: Bytes of buffers, whatever the size of the checkpoint.
        threads: Threads that write; by default as many as the machine has, up to four.
        restart: Whether to discard an unfinished conversion to `dst` and start again.
        part: Number of this part and of all parts, such as "3/16".
        layout: Options of the dialect, such as {"shards": 2}.
        allow_nonfinite: Whether to write NaN and infinity instead of refusing them.
        sha256: Whether to hash sources and files; each tensor's own digest is always recorded.
        tell: Called with an event (a dict) as work proceeds.
        adapter: A LoRA directory of peft's to merge; True and False as for `zoo.load`.
        **options: Those of `zoo.load` that select what is read: head, config, ignore_config, trust,
            revision, token, cache_dir, local_files_only.

    Returns:
        The directory.

    Raises:
        UsageError: If an argument does not fit.
        PlanError: If the source does not match its config and spec, with everything wrong.
        LossyExport: If the dialect cannot express the model.
        OutputExists: If something else is at `dst` or another process is writing it.
        NonFinite: If a value is NaN or infinite.

    Example:
        >>> import tempfile, zoo
        >>> from zoo.models.gpt2 import Config, Model
        >>> model = Model(Config(vocab=11, dim=8, layers=1, heads=2, positions=16)).eval()
        >>> place = tempfile.mkdtemp()
        >>> directory = zoo.convert(zoo.save(model, place + "/hf"), place + "/native", to="native")
        >>> sorted(path.name for path in directory.iterdir())
        ['model.safetensors', 'zoo-manifest.json', 'zoo.json']
    """
    check_dialect(to)
    _check_sizes(memory, threads, max_shard_size)
    share = None if part is None else _part(part)
    located, chosen = _located(src, to, adapter, options)
    dst = checked_destination(dst, located.source.directory, force)
    if to in GRAPHS:
        check_graph(to, dst, layout, max_shard_size)
    chosen |= {"dtype": dtype, "max_shard_size": max_shard_size, "layout": layout}
    output = plan_output(located, to, **chosen)
    engine = WriteOptions(memory, threads, sha256, allow_nonfinite, tell)
    job, seen = digest([output.job(), sha256]), digest(output.identity())
    replaces = Replacing(output, force)
    way_out = f"{option('memory', 1 << 24)} and fewer threads need less; the same call resumes"
    if share is None:
        with (
            enough(f"{dst}: not written", way_out),
            resumable(dst, job, replaces, sources=seen, restart=restart, size=output.size) as stage,
        ):
            if stage.discarded:
                tell({"event": "restart"})
            if not stage.published:
                report = run(output, stage, engine)
                tell(finished(output, stage.path, report))
        return Path(dst)
    number, parts = share
    job = digest([job, seen])  # other parts see the same sources and nothing else of each other
    mine, same = output.part(number, parts), partial(_is, output, force)
    how: dict[str, Any] = {"restart": restart, "size": mine.size, "same": same}
    with (
        enough(f"{dst}: not written", way_out),
        shared(dst, job, number, parts, replaces, **how) as place,
    ):
        if place.discarded:
            tell({"event": "restart"})
        if not place.published:
            report = run(mine, place, engine)
            place.record({"finished": report.to_json()})
            verify = partial(_still_there, output, place)
            with place.publishing(job, replaces, verify) as records:
                if records:
                    whole = WriteReport.joined((r[-1]["finished"] for r in records), output)
                    tell(finished(output, place.path, whole))
    return Path(dst)


def dry_run(
    src: Ref,
    *,
    to: str = "native",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | None = None,
    part: str | tuple[int, int] | None = None,
    layout: Mapping[str, Any] | None = None,
    adapter: Ref | bool | None = None,
    **options: Any,
) -> str:
    """Return the plan of a conversion as text, without reading weights.

    The arguments are those of `convert`.
    """
    check_dialect(to)
    _check_sizes(MEMORY, 0, max_shard_size)
    share = None if part is None else _part(part)
    located, chosen = _located(src, to, adapter, options)
    checkpoint = located.checkpoint()
    model, plan = prove(located, checkpoint, chosen.get("config") or {})
    if located.native is not None and to == "hf" and located.native["origin"]["dialect"] == "hf":
        text = export_plan(model, Origin.from_json(located.native["origin"])).describe(inverse=True)
    else:
        text = plan.describe()
    if to in GRAPHS:
        check_graph(to, Path(), layout, max_shard_size)
    chosen |= {"dtype": dtype, "max_shard_size": max_shard_size, "layout": layout}
    output = plan_output(located, to, **chosen)
    output = output if share is None else output.part(*share)
    items = [item for shard in output.shards for item in shard.items]
    casts = Counter(
        (item.stored, item.coding.name if item.coding else item.info.dtype)
        for item in items
        if item.stored
    )
    lines = [f"{name}: {size:,} bytes" for name, size in output.sizes().items()]
    lines += [f"cast: {n} tensors from {a} to {b}" for (a, b), n in casts.items()]
    if merged := sum(item.rule.endswith(ADAPTED) for item in items):
        lines.append(f"changed by the adapter: {merged} tensors")
    if quantized := provenance_of(located, checkpoint, model, plan).lossy:
        decoded = [f"decoded: {name}: {listing(of)}" for name, of in checkpoint.made_of.items()]
        text = "\n".join([text, f"lossy: {quantized}", *decoded])
    return "\n".join([text, "", f"to be written ({to}):", *(f"  {line}" for line in lines)])


def _located(
    src: Ref, to: str, adapter: Ref | bool | None, options: Mapping[str, Any]
) -> tuple[Located, dict[str, Any]]:
    """Return (what to read, options for `plan_output`)."""
    for name in options:
        if name not in READING:
            raise UsageError(f"{name}: not an option of convert.{did_you_mean(name, READING)}")
    chosen = {name: options[name] for name in ("config", "trust") if name in options}
    check_adapter(adapter)
    how = {k: v for k, v in options.items() if k not in chosen}
    # read, not mapped: a source that is truncated then gives an error instead of a signal
    located = locate(src, adapter=adapter, mmap=False, **how)
    if (files := adapter_files(located, adapter)) is not None:
        asked = options.get("head") is not None
        located, chosen["config"] = based(located, files, chosen.get("config") or {}, asked)
        chosen["adapter"] = files
    whole = to in GRAPHS and options.get("head") is None
    if whole and (located.source.directory / MODULES).is_file():
        located = located._replace(heads=headless(located.heads, located.entry.model))
        chosen["steps"] = True
    return located, chosen


def _is(output: Output, force: bool, place: Path) -> bool:
    """Return whether a directory is what this conversion makes, from sources unchanged since.

    With `force`, a damaged one is not: it is replaced.
    """
    path = place / manifest.NAME
    try:
        same = json.loads(path.read_bytes())["job"] == output.job()
        written = path.stat().st_ctime_ns
        same = same and all(p.stat().st_ctime_ns < written for p in output.sources)
        return same and not (force and any(manifest.check(place)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ZooError):
        return False


def _still_there(
    output: Output, place: SharedStage, part: int, records: list[dict[str, Any]]
) -> None:
    """Raise CorruptCheckpoint if another part's files differ from its journal."""
    again = f"run it again: --part {part}/{place.parts}"
    try:
        finished = records[-1]["finished"]
        damaged = list(damages(output.part(part, place.parts), place.path, finished))
        WriteReport.joined([records[-1]["finished"]], output.part(part, place.parts))
    except (KeyError, TypeError, AttributeError):
        damaged = ["its journal is not what it wrote"]
    if damaged:
        raise CorruptCheckpoint(
            f"{place.path}: part {part} of {place.parts}: {listing(damaged)}; {again}"
        )


def _check_sizes(memory: Any, threads: Any, max_shard_size: Any) -> None:
    for name, value, least in (
        ("memory", memory, 1),
        ("threads", threads, 0),
        ("max_shard_size", 1 if max_shard_size is None else max_shard_size, 1),
    ):
        if type(value) is not int or value < least:
            raise UsageError(f"{name}={value!r}: expected a whole number, {least} at least")


def _part(part: str | tuple[int, int]) -> tuple[int, int]:
    """Parse "3/16" as (3, 16)."""
    if not isinstance(part, str | tuple | list):
        raise UsageError(f"part={part!r}: expected a number of how many, such as 3/16")
    words = part.split("/") if isinstance(part, str) else [str(n) for n in part]
    if len(words) == 2 and all(w.isascii() and w.isdigit() for w in words):
        number, parts = int(words[0]), int(words[1])
        if 1 <= number <= parts <= MOST_PARTS:
            return number, parts
    raise UsageError(f"part={part!r}: expected a number of how many, such as 3/16")


# --- the output -----------------------------------------------------------------------


def plan_output(
    located: Located,
    to: str,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    trust: Collection[str] = (),
    layout: Mapping[str, Any] | None = None,
    steps: bool = False,
    adapter: Files | None = None,
) -> Output:
    """Return the files, headers and sources of a conversion, proven complete.

    No weights are read.

    Args:
        located: The checkpoint.
        to: The dialect or graph to write.
        dtype: Dtype of the output.
        max_shard_size: Bytes of a file of weights.
        config: Native config fields that replace those of the checkpoint.
        trust: Names on disk that win where tied names hold different values.
        layout: Options of the dialect.
        adapter: LoRA factors to merge.
        steps: Whether a graph includes the layers of the checkpoint's modules.json.
    """
    checkpoint = located.checkpoint()
    check_trust(trust, checkpoint)
    model, plan = prove(located, checkpoint, config or {})
    provenance = model.provenance = provenance_of(located, checkpoint, model, plan)
    arrays = Arrays(checkpoint, plan, trust, provenance.quantized)
    if adapter is not None:
        arrays.changes = changes(model, plan.native, adapter, arrays.own)
        arrays.adapter = adapter.where
        if arrays.changes.apart:
            model = on_meta(located, untied(model, plan.native.ties))
            model.provenance = provenance
    quantized = isinstance(dtype, str) and dtype.lower() == QUANTIZED
    kind = None if quantized else dtype_of(dtype)
    state = dict(arrays.state(native_of(model), kind))
    notes = {
        **said_of(located.entry.name, to, located.spec),
        "dropped": dict(sorted(plan.dropped.items())),
        **lossy_of(provenance),
    }
    sources = checkpoint.files
    if adapter is not None:
        sources += adapter.paths
        notes["adapter"] = {path.name: hash_file(path) for path in adapter.paths}
    zeros: dict[str, tuple[int, ...]] = {}
    if to != "native" and to in located.spec.dialects:
        model, zeros = with_zeros(model, located.spec.dialect(to))
        like = next(iter(state.values()))
        state |= {name: like.new_empty(shape) for name, shape in zeros.items()}
        arrays.zeros = zeros
    container = None if located.foreign is None else located.foreign.container
    carried = companions_of(located.source.directory, located.source.file, container)
    inside = located.foreign.reader if located.foreign and located.dialect == "gguf" else None
    seen = {path: identity(path.stat()) for path in sources}
    if to not in (*OWN_FILES, *GRAPHS):
        check_whole(to, max_shard_size)
        dtypes = {name: dtype_code(tensor.dtype) for name, tensor in state.items()}
        origin = provenance.origin
        before = json.loads(origin.config) if origin.dialect == to else None
        made = export(located.spec, to, model.config, native_of(model), dtypes, layout, before)
        if quantized and made.container.format != "gguf":
            raise UsageError(f"dtype={dtype!r}: {to} has no such type; gguf has")
        dtypes_there = {info.dtype for info in made.plan.header.values()}
        if kind is not None and dtype_code(kind) not in dtypes_there:
            raise UsageError(f"dtype={dtype!r}: {to} has {listing(sorted(dtypes_there))} only")
        items = list(arrays.backward(made.plan))
        how = {"lossy": kind is not None or quantized, "quantized": quantized}
        vocab = model.config.vocab
        shards, texts, carried = exported_files(made, items, carried, inside, notes, vocab, **how)
        notes["layout"] = dict(made.options)
        return Output(tuple(shards), texts, carried, sources, notes=notes, seen=seen)
    check_no_layout(to, layout)
    if quantized:
        raise UsageError(f"dtype={dtype!r}: {to} has no such type; gguf has")
    texts, metadata, where = dict[str, bytes](), {"format": "pt"}, dict[str, str]()
    if to == "hf":
        origin = origin_of(model, state)
        texts[CONFIG] = origin.config.encode()
        items = list(_to_hf(located, arrays, model, origin))
        metadata, where = dict(origin.metadata), dict(origin.where)
    else:
        items = list(arrays.forward(native_of(model)))
    if kind is not None:
        items = [item.cast(dtype_code(kind)) for item in items]
    if to in GRAPHS:
        of_steps = {name: path for name, path in carried.items() if is_of_a_step(name)}
        carried = {name: path for name, path in carried.items() if name not in of_steps}
        if steps:
            notes["steps"] = {name: hash_file(path) for name, path in sorted(of_steps.items())}
            model, items = _with_steps(model, items, located.source.directory)
        weights, texts = graph_files(model, to, {item.name: item for item in items})
        shards = [weights]
    else:
        if to == "native":
            texts[NATIVE_FILE] = native_record(model, state)
        shards = split(items, where if max_shard_size is None else {}, metadata, max_shard_size)
        texts |= index_of(shards)
    if inside is not None:
        carried, more = unpacked(inside, carried, notes)
        texts |= more
    return Output(tuple(shards), texts, carried, sources, notes=notes, seen=seen)


def _with_steps(
    model: Model, items: Sequence[Item], directory: Path
) -> tuple[SentenceModel, list[Item]]:
    """Return the model that computes a text's vector, and all arrays in one dtype."""
    layers, folders = read_steps(directory, model.config.dim)
    whole, kind = SentenceModel(model, layers, folders), items[0].info.dtype
    arrays = [replace(item, info=item.info._replace(name=f"model.{item.name}")) for item in items]
    for name, parameter in whole.steps.named_parameters():
        arrays.append(item_of(f"steps.{name}", parameter.detach()).cast(kind))
    return whole, arrays


def _to_hf(located: Located, arrays: Arrays, model: Any, origin: Origin) -> Iterator[Item]:
    """Yield the tensors of a directory for the reference."""
    inverse, checkpoint, plan = export_plan(model, origin), arrays.checkpoint, arrays.plan
    plain = located.native is None and located.foreign is None and arrays.changes is None
    if plain and not arrays.trust:
        disk = {plan.modern.get(name, name): name for name in checkpoint.tensors}
        written = {name for step in inverse.steps for name in _names(step)}
        if written <= disk.keys():
            for step in plan.steps:
                if step.also:
                    agreed(step, checkpoint.lazy, arrays.trust)  # before anything is written
            yield from _as_they_are(arrays, inverse, disk)
            return
    yield from in_order(arrays.backward(inverse), inverse)


def _names(step: PlanStep) -> list[str]:
    return [*step.sources, *(name for names in step.also for name in names)]


def _as_they_are(arrays: Arrays, inverse: Plan, disk: Mapping[str, str]) -> Iterator[Item]:
    """Yield tensors that keep their layout: names on disk to names on disk."""
    checkpoint = arrays.checkpoint
    rules = {name: str(step.rule) for step in inverse.steps for name in _names(step)}
    decoded = {n for s in inverse.steps if arrays.coarse(s.targets) for n in _names(s)}
    for name in inverse.header:
        if name not in rules:
            continue
        info = checkpoint.tensors[disk[name]]
        made, span = partial(checkpoint.lazy, disk[name]), span_of(checkpoint, info.name)
        of = TensorInfo(name, info.shape, info.dtype)
        source = f"{checkpoint.where[info.name]}: {info.name}"
        item = Item(of, rules[name], made, span, decoded=name in decoded, source=source)
        yield item.cast(inverse.header[name].dtype)
