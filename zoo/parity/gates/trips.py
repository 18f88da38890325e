"""Round trips: convert between every two dialects of an architecture and back, and compare."""

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
from zoo.saving.export import QUANTIZED
from zoo.saving.save import save

TOKENS = 33
OWN = ("hf", "native")  # the dialects of every architecture
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
# Eight bits with a scale for each 32 or 64 numbers err by 0.005 of a matrix's maximum; after three
# hot layers that was up to 0.03 of the logits' scale. A wrong scale or sign gives an error of 1.
COARSE = 0.2


class End(NamedTuple):
    """A dialect that a trip starts or ends in, and the dtype of its matrices."""

    dialect: str
    dtype: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dialect, self.dtype)))


@dataclass(frozen=True)
class Trip:
    """The result of converting files to another dialect and back.

    `bytes`: the same files, byte for byte. `weights`: the same weight files, with an equivalent
    config. `values`: the same tensors and logits. `lossy`: `error` is how far the logits were off.
    """

    architecture: str
    source: str
    to: str
    result: Literal["bytes", "weights", "values", "lossy", "refused", "WRONG"]
    why: str = ""  # short, for a table cell
    error: float = 0.0  # of the logits, relative to their root mean square
    detail: str = ""  # the whole message

    @property
    def ok(self) -> bool:
        """Whether the result is not WRONG and the error is within the limit."""
        return self.result != "WRONG" and self.error <= COARSE

    @property
    def shown(self) -> str:
        """The text of the table cell."""
        if self.result == "lossy":
            return f"{self.error:.1e} ({self.why})"
        if self.result == "refused":
            return f"no: {self.why}"
        return f"{self.result}{f', {self.why}' if self.why else ''}"


# --- dialects and pairs --------------------------------------------------------------------------


def foreign(entry: Architecture) -> dict[str, Dialect]:
    """Return the dialects of an architecture that have their own file format."""
    # architectures that share a spec share its files: count them for the first one
    first = next(e for e in registry.architectures().values() if e.spec == entry.spec)
    dialects = load_spec(entry.spec).dialects if first.name == entry.name else {}
    return {name: dialect for name, dialect in dialects.items() if dialect.container is not None}


def targets(entry: Architecture) -> list[End]:
    """Return every dialect that can be written, also quantized where it can be."""
    ends = [End(name) for name in OWN]
    for name, dialect in foreign(entry).items():
        assert dialect.container is not None
        ends += [End(name)] if dialect.container.file else []
        ends += [End(name, QUANTIZED)] if dialect.container.format == "gguf" else []
    return ends


def pairs(entry: Architecture) -> list[tuple[End, End]]:
    """Return all pairs of source and target, first the sources that are only read."""
    ends = targets(entry)
    alone = [End(name) for name in foreign(entry) if End(name) not in ends]
    return list(product([*alone, *ends], ends))


def sources(root: Path) -> dict[tuple[str, str], Path]:
    """Map (architecture, dialect) to the directory under `root` whose files are in it."""
    files = {}
    for place in sorted({path.parent for path in root.rglob("*") if path.is_file()}):
        try:
            match = find(place)
        except ZooError:
            continue
        if match is not None:
            files[match.spec.name, match.dialect.name] = place
    return files


# --- a model that both dialects can represent ----------------------------------------------------


def common_fields(entry: Architecture, *dialects: str, wide: bool = False) -> dict[str, Any]:
    """Return the fields of the first tiny config that all these dialects can represent."""
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
    if wide:  # row lengths that divide into blocks of 32
        fields = {n: v for n, v in fields.items() if n != "head_dim"}
        fields |= {"dim": 32 * fields["heads"], "hidden": 96}
    return fields | granted


def _granted(dialects: Iterable[Dialect]) -> dict[str, Any]:
    """Return the default values; those of a dialect without a field for them take precedence."""
    dialects = list(dialects)
    defaults = {n: v for each in dialects for n, v in each.defaults.items() if n in each.config}
    return defaults | {n: v for d in dialects for n, v in d.defaults.items() if n not in d.config}


def clash(entry: Architecture, *dialects: str) -> list[str]:
    """Return the fields that two dialects fix to different values: no model fits both."""
    own = [dialect for name in dialects if (dialect := foreign(entry).get(name)) is not None]
    fixed = [{n: v for n, v in d.defaults.items() if n not in d.config} for d in own]
    return sorted({n for a, b in product(fixed, fixed) for n in a.keys() & b if a[n] != b[n]})


def model_of(entry: Architecture, *dialects: str, wide: bool = False, **changes: Any) -> Any:
    """Return a small model with random parameters that all these dialects can represent."""
    if "lm" not in entry.model.heads:
        changes = {"head": "none", **changes}  # an encoder's
    model = entry.model(entry.config_class(**common_fields(entry, *dialects, wide=wide) | changes))
    model.architecture = entry.name
    redraw(model, seed=0)
    return model.eval()


def asked(entry: Architecture, dialect: str, model: Any) -> dict[str, Any]:
    """Return the config fields that loading files of a dialect requires from the caller."""
    target = foreign(entry).get(dialect)
    return {name: getattr(model.config, name) for name in target.required} if target else {}


# --- one round trip ------------------------------------------------------------------------------


def travel(
    entry: Architecture, a: End, b: End, place: Path, made: Mapping[tuple[str, str], Path]
) -> Trip:
    """Convert a model that both dialects can represent from `a` to `b` and back."""
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
    """Convert `source` to `b` and back; without the head if a dialect cannot represent it."""
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
    """Return the tensors and config fields in which two models differ."""
    mine, theirs = one.state_dict(), other.state_dict()
    lines = [f"{n}: {'there' if n in mine else 'gone'}" for n in mine.keys() ^ theirs.keys()]
    lines += [n for n in mine.keys() & theirs.keys() if not torch.equal(mine[n], theirs[n])]
    a, b = one.config.to_dict(), other.config.to_dict()
    return lines + [f"{n}: {a[n]} {b[n]}" for n in a if a[n] != b[n]]


def _off(output: Tensor, truth: Tensor) -> float:
    return float(rms(output.double() - truth.double()) / rms(truth))


def _alike(source: Path, back: Path) -> Literal["bytes", "weights", "values"]:
    """Return which files of two directories are equal."""

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
    """Run the model on contiguous weights: a transposed view sums in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    config = model.config
    tokens = min(TOKENS, getattr(config, "positions", None) or TOKENS)
    ids = (torch.arange(tokens).view(1, -1) * 3 + 2) % config.vocab
    asks = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return call(model, Inputs(ids, {}, answer=Inputs(ids, {}) if asks else None))


def _in_short(message: str) -> str:
    """Return the fields and tensors that an error message names."""
    names = re.findall(r"(?m)(?:^  |read back: )([\w.]+): |no rule for ([\w.]+)", message)
    return listing(dict.fromkeys(filter(None, chain(*names))), 4) or message.partition("\n")[0]


# --- all round trips -----------------------------------------------------------------------------


def run(
    architectures: Iterable[Architecture],
    made: Mapping[tuple[str, str], Path],
    seen: Callable[[str], None] = lambda name: None,
) -> Iterator[Trip]:
    """Run every pair of dialects, then every variant as the reference writes it."""
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
    """Convert a variant that the reference wrote to each dialect and back."""
    source, hf = place / "hf", End("hf")
    hot_checkpoint(entry, variant, source)
    for end in targets(entry):
        if end.dtype is None:
            where, label = place / f"to {end}", f"hf: {variant}"
            yield there_and_back(entry, source, hf, end, where, label=label)
