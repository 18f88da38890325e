"""The proven plan: a model on the meta device, and where each of its arrays comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from converters.checkpoint import Checkpoint
from converters.plan import Native, Plan, identity_plan, make_plan
from zoo.checkpoints.build import names_on_disk, native_of, on_meta
from zoo.checkpoints.handle import Located
from zoo.checkpoints.registry_name import check_count
from zoo.components.model import Model
from zoo.errors import (
    MissingShard,
    MissingTensors,
    ShapeMismatch,
    UsageError,
    did_you_mean,
    listing,
)

if TYPE_CHECKING:
    from converters.dialects import DialectMatch


def prove(
    located: Located, checkpoint: Checkpoint, changes: Mapping[str, Any] | None = None
) -> tuple[Model, Plan]:
    """Return a model on the meta device and the plan that fills all of it.

    Of several heads, the first that the weights fill is built.

    Raises:
        PlanError: no head is filled; everything that does not fit is in the message.
    """
    incomplete: list[MissingTensors] = []
    wanted = set[str]()  # what heads before this one need
    for head in located.heads:
        model = on_meta(located, located.config(head, changes))
        check_count(located, model, changes or {})
        native = native_of(model)
        if incomplete and (wanted - names_on_disk(located, model, native)) & {*checkpoint.tensors}:
            continue  # an earlier head is there in part: the file is damaged, not of this head
        try:
            return model, _plan(located, checkpoint, model, native)
        except MissingTensors as error:
            incomplete.append(error)
            if len(located.heads) > 1:
                wanted |= names_on_disk(located, model, native)
    least = min(incomplete, key=lambda error: len(str(error)))  # of the head that lacks least
    if not checkpoint.unlisted:
        raise least
    unlisted = f"{listing(checkpoint.unlisted)} lie there too, and the index does not name them"
    raise MissingTensors(f"{least}\n  {unlisted}")


def _plan(located: Located, checkpoint: Checkpoint, model: Model, native: Native) -> Plan:
    where, fields = located.where, model.config.to_dict()
    if located.native is not None:
        return identity_plan(native, checkpoint.tensors, where)
    if located.foreign is not None:
        return _foreign_plan(located.foreign, fields, native, where)
    tensors, what = checkpoint.tensors, f"{where} ({located.spec.name})"
    plan = make_plan(located.spec, "hf", fields, native, tensors, what, checkpoint.spare)
    return replace(plan, dropped={**plan.dropped, **checkpoint.outside})


def _foreign_plan(
    foreign: DialectMatch, fields: Mapping[str, Any], native: Native, where: str
) -> Plan:
    checkpoint, name = foreign.checkpoint, foreign.dialect.name
    what = f"{where} ({foreign.spec.name}, {foreign.container.about or name})"
    fields = {**fields, "shards": foreign.shards}
    try:
        plan = make_plan(foreign.spec, name, fields, native, checkpoint.tensors, what)
    except ShapeMismatch as error:
        if foreign.container.sharded and (times := _times_too_small(foreign, native)) > 1:
            wanted = times * foreign.shards
            files = listing(path.name for path in checkpoint.files)
            raise MissingShard(
                f"{where}: {foreign.shards} of {wanted} files are there ({files}): tensors have "
                f"one in {times} of the numbers that {foreign.config_from} makes them have"
            ) from error
        raise
    return replace(plan, dropped={**plan.dropped, **checkpoint.outside})


def _times_too_small(foreign: DialectMatch, native: Native) -> int:
    """How many times as many files a whole model has, where shards are missing; else 1.

    Fields inferred from shapes alone fit the files that are there, so they show nothing.
    """
    times = {1}
    for rule in foreign.dialect.weights:
        if "shard" not in rule.stacked:
            continue
        here = set[int]()
        for name, info in foreign.checkpoint.tensors.items():
            if (binding := rule.source.name.match(name)) is not None and info.numel:
                whole = prod(native.shapes.get(rule.targets[0].name.format(binding), ()))
                here.add(whole // (info.numel * foreign.shards))
        if len(here) > 1:  # only some layers are too small, which missing shards do not cause
            return 1
        times |= here
    return max(times) if len(times) == 2 and 0 not in times else 1


def check_trust(trust: Collection[str], checkpoint: Checkpoint) -> None:
    """Refuse `trust` unless it is a collection of tensors that the checkpoint holds."""
    if isinstance(trust, str) or not isinstance(trust, Collection):
        raise UsageError(f"trust={trust!r}: expected several names")
    for name in trust:
        if name not in checkpoint.tensors:
            near = did_you_mean(str(name), checkpoint.tensors)
            raise UsageError(f"trust: no tensor {name!r} in {checkpoint.root}.{near}")
