"""Round trips: from each dialect of an architecture to each other and back, and what is lost."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from converters import manifest
from converters.dialects import find
from converters.spec import Dialect, load_spec
from zoo import registry
from zoo.errors import LossyExport, ZooError, listing
from zoo.loading import load
from zoo.parity.checks import call, rms
from zoo.parity.fixtures import hot_checkpoint, redraw
from zoo.parity.truth import Inputs
from zoo.registry import Architecture
from zoo.saving.convert import convert
from zoo.saving.export import QUANTISED
from zoo.saving.save import save

TOKENS = 33
OWN = ("hf", "native")  # what every architecture has
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
# Eight bits with a scale for each 32 or 64 numbers: 0.005 of a matrix's largest, which three hot
# layers made up to 0.03 of the logits' scale; a scale or a sign that is wrong makes it 1.
COARSE = 0.2


class End(NamedTuple):
    """A dialect as it is read or written, with the type that its matrices are asked to be in."""

    dialect: str
    dtype: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dialect, self.dtype)))


@dataclass(frozen=True)
class Trip:
    """What came of files that were converted, and converted back.

    `bytes`: the same files to the byte. `weights`: the same files of weights; a config beside them
    says it in other words. `values`: the same tensors and logits. `lossy`: how far logits were off.
    """

    architecture: str
    source: str
    to: str
    result: Literal["bytes", "weights", "values", "lossy", "refused", "WRONG"]
    why: str = ""  # in a few words
    error: float = 0.0  # of logits, in units of their root mean square
    detail: str = ""  # the whole message

    @property
    def ok(self) -> bool:
        return self.result != "WRONG" and self.error <= COARSE

    @property
    def shown(self) -> str:
        if self.result == "lossy":
            return f"{self.error:.1e} ({self.why})"
        if self.result == "refused":
            return f"no: {self.why}"
        return f"{self.result}{f', {self.why}' if self.why else ''}"


# --- which there are -----------------------------------------------------------------------------


def foreign(entry: Architecture) -> dict[str, Dialect]:
    """The dialects of an architecture that have files of their own."""
    # a spec that several architectures share is the first one's in such files
    first = next(e for e in registry.architectures().values() if e.spec == entry.spec)
    dialects = load_spec(entry.spec).dialects if first.name == entry.name else {}
    return {name: dialect for name, dialect in dialects.items() if dialect.container is not None}


def targets(entry: Architecture) -> list[End]:
    """All that is written; beside what is written as it is, what is written coarser."""
    ends = [End(name) for name in OWN]
    for name, dialect in foreign(entry).items():
        assert dialect.container is not None
        ends += [End(name)] if dialect.container.file else []
        ends += [End(name, QUANTISED)] if dialect.container.format == "gguf" else []
    return ends


def pairs(entry: Architecture) -> list[tuple[End, End]]:
    """Every dialect to every other, those that are read alone first."""
    ends = targets(entry)
    alone = [End(name) for name in foreign(entry) if End(name) not in ends]
    return list(product([*alone, *ends], ends))


def sources(root: Path) -> dict[tuple[str, str], Path]:
    """(architecture, dialect) -> files that another program wrote, by their content."""
    files = {}
    for place in sorted({path.parent for path in root.rglob("*") if path.is_file()}):
        try:
            match = find(place)
        except ZooError:
            continue
        if match is not None:
            files[match.spec.name, match.dialect.name] = place
    return files


# --- a model that both ends have words for -------------------------------------------------------


def sayable(entry: Architecture, *dialects: str, wide: bool = False) -> dict[str, Any]:
    """Of the first tiny config what all these dialects have words for, or shapes that tell it."""
    spec = load_spec(entry.spec)
    published = next(iter(entry.variants.values()))["config"]
    fields, problems = spec.dialect("hf").read_config(published)
    assert not problems
    axes = {axis for line in spec.shapes if line.pattern for axis in line.pattern.axes}
    spoken = [dialect for name in dialects if (dialect := foreign(entry).get(name)) is not None]
    granted = _granted(spoken)
    for each in spoken:
        kept = {*each.config, *axes, *each.required, "layers"} - each.value_map.keys()
        fields = {n: v for n, v in fields.items() if n in kept or n in granted}
    if wide:  # rows that divide into blocks, whatever the heads are
        fields = {n: v for n, v in fields.items() if n != "head_dim"}
        fields |= {"dim": 32 * fields["heads"], "hidden": 96}
    return fields | granted


def _granted(dialects: Iterable[Dialect]) -> dict[str, Any]:
    """What is taken for granted, by a dialect that has no word for it before one that has."""
    dialects = list(dialects)
    defaults = {n: v for each in dialects for n, v in each.defaults.items() if n in each.config}
    return defaults | {n: v for d in dialects for n, v in d.defaults.items() if n not in d.config}


def clash(entry: Architecture, *dialects: str) -> list[str]:
    """What two dialects take for granted, each another value: they have no model in common."""
    own = [dialect for name in dialects if (dialect := foreign(entry).get(name)) is not None]
    unsaid = [{n: v for n, v in d.defaults.items() if n not in d.config} for d in own]
    return sorted({n for a, b in product(unsaid, unsaid) for n in a.keys() & b if a[n] != b[n]})


def model_of(entry: Architecture, *dialects: str, wide: bool = False, **changes: Any) -> Any:
    """A small model, every parameter redrawn, of which all these dialects can say everything."""
    if "lm" not in entry.model.heads:
        changes = {"head": "none", **changes}  # an encoder's
    model = entry.model(entry.config_class(**sayable(entry, *dialects, wide=wide) | changes))
    model.architecture = entry.name
    redraw(model, seed=0)
    return model.eval()


def asked(entry: Architecture, dialect: str, model: Any) -> dict[str, Any]:
    """What a dialect has to be told."""
    target = foreign(entry).get(dialect)
    return {name: getattr(model.config, name) for name in target.required} if target else {}


# --- there and back ------------------------------------------------------------------------------


def travel(
    entry: Architecture, a: End, b: End, place: Path, made: Mapping[tuple[str, str], Path]
) -> Trip:
    """A model of both ends' words in one, in the other, and in the first again."""
    if fields := clash(entry, a.dialect, b.dialect):
        why = f"{a} and {b} take other values of {listing(fields)} for granted"
        return Trip(entry.name, str(a), str(b), "refused", listing(fields), detail=why)
    if (there := made.get((entry.name, a.dialect))) is not None:
        return there_and_back(entry, there, a, b, place)
    model = model_of(entry, a.dialect, b.dialect, wide=bool(a.dtype or b.dtype))
    save(model, place / "model", to="native")
    convert(place / "model", place / "source", to=a.dialect, dtype=a.dtype, sha256=False)
    config = asked(entry, a.dialect, model)
    return there_and_back(entry, place / "source", a, b, place, config)


def there_and_back(
    entry: Architecture,
    source: Path,
    a: End,
    b: End,
    place: Path,
    config: Mapping[str, Any] | None = None,
    label: str = "",
) -> Trip:
    """What came of it; where an end has no word for the model's head, of the model without it."""
    base = Trip(entry.name, label or str(a), str(b), "values")
    trips = []
    for head in (None, "none") if "none" in entry.model.heads else (None,):
        try:
            trips.append(
                _trip(base, entry, source, a, b, place / f"head {head}", head, config or {})
            )
        except LossyExport as error:
            why = _in_short(str(error))
            trips.append(replace(base, result="refused", why=why, detail=str(error)))
        except ZooError as error:
            why = type(error).__name__
            trips.append(replace(base, result="WRONG", why=why, detail=f"{why}: {error}"))
        if trips[-1].result != "refused":
            return trips[-1]
    return trips[0]


def _trip(
    base: Trip,
    entry: Architecture,
    source: Path,
    a: End,
    b: End,
    place: Path,
    head: str | None,
    config: Mapping[str, Any],
) -> Trip:
    spoken = {name: foreign(entry)[name] for name in {a.dialect, b.dialect} - {*OWN}}
    how: dict[str, Any] = {"head": head, "sha256": False}
    convert(source, place / "there", to=b.dialect, dtype=b.dtype, config=config, **how)
    first = load(source, head=head, config=config, modules=False)
    config_there = asked(entry, b.dialect, first)
    models = [first, load(place / "there", head=head, config=config_there, modules=False)]
    written = a.dialect in OWN or bool(getattr(spoken[a.dialect].container, "file", ""))
    if written:
        back = place / "back"
        convert(place / "there", back, to=a.dialect, dtype=a.dtype, config=config_there, **how)
        models.append(load(back, head=head, config=asked(entry, a.dialect, first), modules=False))
    forgets = frozenset().union(*(dialect.lossy_fields for dialect in spoken.values()))
    lines = {line: None for each in models[1:] for line in differences(first, each)}
    left = [name for line in lines if (name := line.partition(": ")[0]) in forgets]
    problems = [line for line in lines if line.partition(": ")[0] not in forgets]
    truth, *outputs = (_outputs(model) for model in models)
    error = max(_off(x, y) for each in outputs for x, y in zip(each, truth, strict=True))
    quantized = [each.provenance.quantized for each in models if each.provenance is not None]
    coarse = {kind for kinds in quantized for kind in kinds.values()}
    if problems or error:
        detail = listing(problems) or "the logits differ"
        if coarse and not any(": " in line for line in problems):  # numbers alone
            kinds = listing(sorted(coarse))
            return replace(base, result="lossy", why=kinds, error=error, detail=detail)
        return replace(base, result="WRONG", why="differs", error=error, detail=detail)
    if head is not None:
        return replace(base, why="without its head")
    result = _alike(source, back) if written else "values"
    why = f"without {listing(left, 3)}" if left and result != "bytes" else ""
    return replace(base, result=result, why=why)


def differences(one: Any, other: Any) -> list[str]:
    """Tensors and fields in which two models differ."""
    mine, theirs = one.state_dict(), other.state_dict()
    lines = [f"{n}: {'there' if n in mine else 'gone'}" for n in mine.keys() ^ theirs.keys()]
    lines += [n for n in mine.keys() & theirs.keys() if not torch.equal(mine[n], theirs[n])]
    a, b = one.config.to_dict(), other.config.to_dict()
    return lines + [f"{n}: {a[n]} {b[n]}" for n in a if a[n] != b[n]]


def _off(output: Tensor, truth: Tensor) -> float:
    return float(rms(output.double() - truth.double()) / rms(truth))


def _alike(source: Path, back: Path) -> Literal["bytes", "weights", "values"]:
    """How far two directories hold the same files."""

    def contents(place: Path, weights: bool) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in place.iterdir()
            if path.name != manifest.NAME and (path.suffix in WEIGHTS or not weights)
        }

    if contents(source, False) == contents(back, False):
        return "bytes"
    return "weights" if contents(source, True) == contents(back, True) else "values"


@torch.no_grad()
def _outputs(model: Any) -> list[Tensor]:
    """Of weights as they lie when initialized: of a turned view, sums come in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    config = model.config
    tokens = min(TOKENS, getattr(config, "positions", None) or TOKENS)
    ids = (torch.arange(tokens).view(1, -1) * 3 + 2) % config.vocab
    asks = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return call(model, Inputs(ids, {}, answer=Inputs(ids, {}) if asks else None))


def _in_short(message: str) -> str:
    """The fields and tensors that a refusal names."""
    names = re.findall(r"(?m)(?:^  |read back: )([\w.]+): |no rule for ([\w.]+)", message)
    return listing(dict.fromkeys(filter(None, chain(*names))), 4) or message.partition("\n")[0]


# --- all of them ---------------------------------------------------------------------------------


def run(
    architectures: Iterable[Architecture],
    made: Mapping[tuple[str, str], Path],
    seen: Callable[[str], None] = lambda name: None,
) -> Iterator[Trip]:
    """Pairs of dialects, then every variant that the reference writes to each dialect."""
    for entry in architectures:
        for a, b in pairs(entry):
            seen(f"{entry.name}: {a} to {b}")
            with TemporaryDirectory(prefix="zoo-formats-") as scratch:
                yield travel(entry, a, b, Path(scratch), made)
        for variant in entry.variants:
            seen(f"{entry.name}: {variant}")
            with TemporaryDirectory(prefix="zoo-formats-") as scratch:
                yield from published(entry, variant, Path(scratch))


def published(entry: Architecture, variant: str, place: Path) -> Iterator[Trip]:
    """What the reference wrote, to each dialect and back."""
    source, hf = place / "hf", End("hf")
    hot_checkpoint(entry, variant, source)
    for end in targets(entry):
        if end.dtype is None:
            where, label = place / f"to {end}", f"hf: {variant}"
            yield there_and_back(entry, source, hf, end, where, label=label)
