"""`zoo diagnose`: what is wrong in a checkpoint, by itself, the most likely first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from zoo.errors import ZooError
from zoo.pretrained import Ref, load
from zoo.wrong import axes, beside, layers, norms, turns, values
from zoo.wrong.finding import Finding
from zoo.wrong.numbers import Numbers, numbers_of
from zoo.wrong.opening import Opened, opened
from zoo.wrong.report import Diagnosis

_LARGE = 500_000_000  # numbers of a model that reads a text unasked
Progress = Callable[[int, int, str], None]


def diagnose(
    ref: Ref,
    *,
    text: str | None = None,
    ids: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **where: Any,
) -> Diagnosis:
    """What looks wrong in a name, a directory or a file of any format, with nothing to compare to.

    Every number is looked at, in pieces; files that do not load are told of as far as they can be
    read. A text, or (s,) its `ids`, says more where the model loads: without either, a text of
    zoo's own where there is a tokenizer. `config` and `where` are as `zoo.load` has them.
    """
    found = opened(ref, config or {}, **where)
    arrays = [array for array in found.arrays if 0 not in array.shape]
    numbers = list[Numbers]()
    for n, array in enumerate(arrays):
        if progress is not None:
            progress(n, len(arrays), array.name)
        numbers.append(numbers_of(array))
    if progress is not None:
        progress(len(arrays), len(arrays), "")
    findings = [*beside.refused(found), *beside.holes(found), *_of_numbers(found, numbers)]
    notes = list(beside.notes(found, numbers))
    if found.refused and found.unknown:
        known = found.located is not None
        nobody = "nothing says what it is: its arrays are looked at under their own names"
        notes.insert(0, found.refused if known else nobody)
    if precise := layers.precision(numbers):
        notes.append(f"all numbers are {precise}")
    asked = text is not None or ids is not None
    if not found.refused and all(n.finite for n in numbers):
        if asked or sum(n.count for n in numbers) < _LARGE:
            findings += _by_a_text(found, text, ids, config)
        else:
            notes.append("no text was read, since that would take long: --text FILE reads one")
    ranked = sorted(findings, key=lambda finding: -finding.likely)
    return Diagnosis(str(ref), found, tuple(numbers), tuple(ranked), tuple(notes))


def _of_numbers(found: Opened, numbers: Sequence[Numbers]) -> Iterator[Finding]:
    spoilt = list(values.spoilt(found, numbers))
    yield from spoilt
    yield from beside.ties(found, numbers)
    yield from beside.vocabulary(found)
    odd = {name for finding in spoilt for name in finding.where}
    sound = [n for n in numbers if not odd & set(n.array.files)]
    yield from values.repeated(sound)
    stream = axes.Stream(found, sound)
    turned = list(axes.transposed(stream))
    fresh, all_of_it = layers.untrained(sound, stream)
    if all_of_it:  # and layers are alike by chance alone
        yield from fresh
        return
    yield from turned
    if not turned:  # which nothing resembles either
        yield from fresh
        odd = {name for finding in fresh for name in finding.where}
        anew = {n.array.layer for n in sound if odd & set(n.array.files)}
        sound = [n for n in sound if n.array.layer is None or n.array.layer not in anew]
    yield from layers.between_layers(sound)
    yield from turns.rotary(found, sound)
    yield from norms.between_norms(found, sound)


def _by_a_text(
    found: Opened, text: str | None, ids: Tensor | None, config: Mapping[str, Any] | None
) -> list[Finding]:
    """How likely a text is, under other readings of the weights too."""
    if find_spec("zoo.wrong.readings") is None:
        return []
    try:
        model = load(found.ref, config=config)
        if ids is None:
            of = import_module("zoo.wrong.likelihood").ids_of
            ids = of(model) if text is None else of(model, text)
    except ZooError:
        if text is not None:
            raise
        return []  # no tokenizer
    found_: list[Finding] = import_module("zoo.wrong.readings").readings(model, ids)
    return found_
