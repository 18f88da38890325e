"""`zoo diagnose`: what is wrong in a checkpoint, by itself, the most likely first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zoo.checkpoints.sources import Ref
from zoo.diagnosis.checkup import (
    across_layers,
    consistency,
    flips,
    norms,
    rotary_layout,
    value_checks,
)
from zoo.diagnosis.checkup.finding import Finding
from zoo.diagnosis.checkup.likelihood import hidden_as, ids_of, nats
from zoo.diagnosis.checkup.opened import Array, Opened, opened
from zoo.diagnosis.checkup.report import Diagnosis
from zoo.diagnosis.checkup.search import explanations, shown
from zoo.diagnosis.checkup.statistics import Numbers, numbers_of
from zoo.errors import ZooError
from zoo.loading import load_located
from zoo.text.inference import at_rest

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
    """Look for what is wrong in a checkpoint, with no reference to compare it with.

    Every number is looked at, in pieces. Files that do not load are examined as far as they can be
    read. Where the model loads and a tokenizer lies with it, a text is read under the hypotheses of
    the catalogue of faults: what makes the text much likelier is reported.

    Args:
        ref: A name, a directory, or a file of any format.
        text: A text of the kind that the model was trained on (default: one of zoo's own).
        ids: (s,) token ids in place of a text.
        config: Config fields that the file does not have, as in `zoo.load`.
        progress: Called with how much is done, of how much, and the name of what is looked at.
        **where: Where the files lie, as in `zoo.load`: revision, token ...

    Returns:
        A `Diagnosis`: `ok`, and `findings`, the most likely first.

    Raises:
        CheckpointError: The files cannot be read at all.
        UsageError: An option is invalid.

    Example:
        >>> model = zoo.load("tiny-llama")
        >>> model.norm.weight.data[0] = float("nan")
        >>> path = zoo.save(model, "broken", allow_nonfinite=True)
        >>> zoo.diagnose("broken").findings[0].what
        'NaN or infinity in norm.weight'
    """
    contents = opened(ref, config or {}, **where)
    arrays = [array for array in contents.arrays if 0 not in array.shape]
    tell = progress or (lambda done, count, name: None)
    numbers = list[Numbers]()
    for n, array in enumerate(arrays):
        tell(n, len(arrays), array.name)
        numbers.append(numbers_of(array))
    tell(len(arrays), len(arrays), "")
    tied = list(consistency.ties(contents, numbers))
    inside, learnt, right = _of_numbers(contents, numbers)
    findings = [
        *consistency.refused(contents),
        *consistency.holes(contents),
        *consistency.vocabulary(contents),
    ]
    findings += [*tied, *inside]
    notes = list(consistency.notes(contents, numbers))
    if precise := across_layers.precision(numbers):
        notes.append(f"all numbers are {precise}")
    loads = not contents.refused and all(finding.what != consistency.CONFLICT for finding in tied)
    if loads and learnt:
        if text is ids is None and sum(n.count for n in numbers) > _LARGE:
            notes.append("no text was read: of so large a model only one that is given")
        else:
            try:
                explained, note = _by_a_text(contents, right, text, ids, config, tell)
                findings += explained
                notes += [] if explained else [note]
            except ZooError as error:
                notes.append(f"no text was read: {str(error).splitlines()[0]}")
    ranked = sorted(findings, key=lambda finding: -finding.likely)
    return Diagnosis(str(ref), contents, tuple(numbers), tuple(ranked), tuple(notes), loads)


def _of_numbers(
    contents: Opened, numbers: Sequence[Numbers]
) -> tuple[list[Finding], bool, list[Array]]:
    """Return findings, whether the model is trained, and the matrices to transpose.

    Checks after the first see transposed matrices in the right order.
    """
    findings = list(value_checks.spoilt(contents, numbers))
    names = {name for finding in findings for name in finding.where}
    sound = [n for n in numbers if not names & set(n.array.files)]
    findings += value_checks.repeated(sound)
    transposed, sound, stream = flips.put_right(contents, read := sound)
    right = [n.array for n, before in zip(sound, read, strict=True) if n is not before]
    findings += transposed
    fresh, all_of_it = across_layers.untrained(sound, stream)
    findings += fresh
    if all_of_it:  # and layers are alike by chance alone
        return findings, False, right
    names = {name for finding in fresh for name in finding.where}
    layers = {n.array.layer for n in sound if names & set(n.array.files)}
    sound = [n for n in sound if n.array.layer is None or n.array.layer not in layers]
    findings += across_layers.between_layers(sound)
    findings += rotary_layout.rotary(contents, sound)
    findings += norms.between_norms(contents, sound)
    return findings, all(n.finite for n in numbers), right


def _by_a_text(
    contents: Opened,
    right: Sequence[Array],
    text: str | None,
    ids: Tensor | None,
    config: Mapping[str, Any] | None,
    tell: Progress,
) -> tuple[list[Finding], str]:
    """Return what makes a text likelier than the corrected weights do, and a note of perplexity."""
    assert contents.located is not None
    model = load_located(contents.located, config=config)
    for array in right:
        parameter = model.get_parameter(array.name)
        parameter.data = array.made().whole().to(parameter.dtype)
    if ids is None:
        ids = ids_of(model) if text is None else ids_of(model, text)
    findings = explanations(model, ids, progress=lambda n, of: tell(n, of, "hypotheses"))
    tell(1, 1, "")
    with at_rest(model):
        nll = float(nats(model, ids, hidden_as(model))[0].mean())
    those = " with these matrices transposed" if right else ""
    return findings, f"a text of {len(ids)} tokens was read{those}: perplexity {shown(nll)}"
