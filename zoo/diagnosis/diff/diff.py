"""`zoo.diff`: find the first module where two models differ, and the likely cause."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zoo.checkpoints.build import dtype_of
from zoo.checkpoints.provenance import check_sources
from zoo.checkpoints.sources import Ref
from zoo.components.model import Model
from zoo.diagnosis.diff import sides
from zoo.diagnosis.diff.comparison import Comparison
from zoo.diagnosis.diff.difference import Cause, Difference
from zoo.diagnosis.diff.explain import diagnosed
from zoo.diagnosis.diff.flows import WAYS, Way
from zoo.diagnosis.diff.matching import Matching
from zoo.errors import UsageError, did_you_mean, listing
from zoo.loading import load
from zoo.parity.truth import Draw, Inputs

ROWS, FEW = 4, 2
LARGE = 10**7  # parameters, from which on a row takes seconds


def diff(
    ours: Ref | Model,
    theirs: Ref | nn.Module | None = None,
    *,
    dtype: str | torch.dtype = "float64",
    way: str = "whole",
    backward: bool = False,
    text: str | None = None,
    seed: int = 0,
    diagnose: bool = True,
    **reading: Any,
) -> Difference:
    """Find the first module where two models differ, and the likely cause.

    Both models run on the same tokens. What goes into and comes out of each module is compared, by
    the rules that map one model's weights to the other's.

    Args:
        ours: A native model, or what `zoo.load` reads one from.
        theirs: What it is compared with: a directory in the reference's own format, another native
            model, or any module whose parameters have a dialect's names. By default the reference's
            model of the directory that `ours` was loaded from.
        dtype: What both models compute in. Causes are always looked for in float64.
        way: How tokens are fed: "whole", "padded", "cached" (in parts), or "unmasked" (with padding
            tokens that no mask hides).
        backward: Compare gradients, too, where all values agree.
        text: The tokens of this text, by the model's tokenizer, in place of random ones.
        seed: Of the random tokens, from 0 on.
        diagnose: Look for the causes of a difference.
        **reading: How `ours` is loaded, as in `zoo.load`: head, config, revision ...; an adapter is
            merged.

    Returns:
        A `Difference`: `ok`, the `first` module that differs, and `causes`, the most likely first.

    Raises:
        UsageError: An option is invalid, or the models' modules cannot be matched.

    Example:
        >>> model = zoo.load("tiny-gpt2")
        >>> model.blocks[0].norm1.weight.data *= 2
        >>> zoo.diff("tiny-gpt2", model).ok
        False
    """
    if way not in WAYS:
        raise UsageError(f"way={way!r}: no such way.{did_you_mean(way, WAYS)}")
    if backward and way == "cached":
        raise UsageError("backward and way='cached': no gradient goes through a cache")
    if type(seed) is not int or not 0 <= seed < 1 << 62:
        raise UsageError(f"seed={seed!r}: expected a whole number from 0 to {(1 << 62) - 1}")
    kind = dtype_of(dtype) or torch.float64
    for each in (ours, theirs):
        if isinstance(each, Model):
            check_sources(each)
    model = _native(ours, kind, **reading)
    if way == "cached" and not _remembers(model):
        reason = f"a {model.architecture} with head {model.config.head!r} keeps no cache"
        raise UsageError(f"way='cached': {reason}. Leave the way out, or ask for 'padded'")
    other = _other(model, theirs, kind)
    matching = Matching(model, other.module, other.planned, other.fold)
    fed = Way(way, inputs_of(model, way, text, seed, pad_of(other)))
    comparison = Comparison(matching, other, fed, kind)
    difference = comparison.run(backward)
    if diagnose and not difference.ok:
        difference.causes = _causes(comparison, difference)
    return difference


def _causes(comparison: Comparison, difference: Difference) -> list[Cause]:
    if comparison.dtype is torch.float64:
        return diagnosed(comparison, difference)
    wide = _native(comparison.matching.model, torch.float64)
    comparison = Comparison(
        comparison.matching.of(wide),
        replace(comparison.other, narrow=None),
        comparison.way,
        torch.float64,
    )
    in_full = comparison.run()
    if in_full.ok:
        return [Cause("in float64 they agree: something is computed in less than it should be")]
    return diagnosed(comparison, in_full)


def _native(ref: Ref | Model, dtype: torch.dtype, **reading: Any) -> Model:
    if not isinstance(ref, nn.Module):
        merge = reading.get("adapter") not in (None, False)
        return load(ref, dtype=dtype, modules=False, **{"merge": merge, **reading})
    if reading:
        raise UsageError(f"{listing(reading)}: the first model is loaded already")
    if not isinstance(ref, Model):
        raise UsageError(
            f"{type(ref).__name__}: the first model is native; hold it against this one"
        )
    if all(p.dtype == dtype for p in ref.parameters()):
        return ref
    wide = copy.deepcopy(ref, {id(ref.provenance): ref.provenance})
    return wide.to(dtype)


def _remembers(model: Model) -> bool:
    """Whether tokens may come in parts: what reads a row as a whole keeps nothing of it."""
    takes = "cache" in inspect.signature(model.forward).parameters
    return takes and model.config.head not in ("sequence_classification", "encoder")


def _other(model: Model, theirs: Ref | nn.Module | None, dtype: torch.dtype) -> sides.Other:
    if isinstance(theirs, Model):
        _check_comparable(model, theirs)
        return sides.native(model, theirs, dtype, theirs.architecture)
    if isinstance(theirs, nn.Module):
        return sides.module(model, theirs, dtype)
    other = model if theirs is None else load(theirs, modules=False)
    _check_comparable(model, other)
    if (provenance := other.provenance) is None:
        raise UsageError("a model of no checkpoint: say what to hold it against")
    directory, reference_class = provenance.directory, provenance.origin.reference_class
    plain = (directory / "config.json").is_file() and not provenance.lossy
    if reference_class is not None and plain:
        return sides.reference(model, directory, reference_class, dtype)
    if theirs is None:
        why = (
            f"quantized ({provenance.lossy})" if provenance.lossy else "not as the reference has it"
        )
        raise UsageError(f"{directory}: {why}. Say what to hold it against: zoo diff A B")
    return sides.native(model, other, dtype, str(theirs))


def _rank(field: str) -> int:
    """Order fields of a config so that a head and sizes, which shape arrays, come first."""
    first = ("head", "layers", "dim", "heads", "kv_heads", "vocab", "hidden", "tied")
    return first.index(field) if field in first else len(first)


def _check_comparable(model: Model, other: Model) -> None:
    """Refuse models whose arrays differ in names or shapes, and those with an adapter."""
    for each, which in ((model, "first"), (other, "second")):
        if each.adapter is not None:
            raise UsageError(
                f"the {which} model has a LoRA adapter beside its weights: merge_adapter() adds it "
                "to them, remove_adapter() takes it off"
            )
    if type(other) is not type(model):
        both = f"a {model.architecture} and a {other.architecture}"
        raise UsageError(f"{both}: modules are matched within one architecture")
    if sides.native_side(model) == sides.native_side(other):
        return
    ours, theirs = model.config.to_dict(), other.config.to_dict()
    fields = sorted((name for name in ours if ours[name] != theirs[name]), key=_rank)
    if fields:
        differences = listing((f"{name} {ours[name]!r} and {theirs[name]!r}" for name in fields), 6)
        fix = " Load both with the same head." if "head" in fields else ""
        raise UsageError(
            f"the models have different arrays, and cannot be matched: {differences}.{fix}"
        )


def pad_of(other: sides.Other) -> int | None:
    """The padding token, by the other model."""
    config = getattr(other.module, "config", None)
    pad = getattr(config, "pad_token_id", getattr(config, "pad", None))
    return pad if isinstance(pad, int) and pad >= 0 else None


def inputs_of(
    model: Model, way: str, text: str | None = None, seed: int = 0, pad: int | None = None
) -> Inputs:
    """The tokens that both models are given."""
    config = model.config
    if text is not None:
        ids = torch.tensor([model.tokenizer.encode(text)])
        answer = Inputs(ids.clone(), {}) if hasattr(config, "start") else None
        return Inputs(ids, {}, torch.ones_like(ids) if way == "padded" else None, answer)
    draw = Draw(
        config.vocab,
        seed,
        pad=config.pad if pad is None else pad,
        types=getattr(config, "types", 0),
        limit=getattr(config, "limit_cached", config.limit) if way == "cached" else config.limit,
        answers=hasattr(config, "start") and config.head != "encoder",
    )
    rows = ROWS if sum(p.numel() for p in model.parameters()) < LARGE else FEW
    if way == "unmasked" and (unmasked := draw.unmasked()) is not None:
        return unmasked
    return draw.padded("mixed") if way == "padded" else draw.full(rows)
