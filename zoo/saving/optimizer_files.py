"""Convert files of optimizers' states to the other dialect of their checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from converters.checkpoint import Checkpoint
from converters.formats import TensorInfo, open_regular, torch_dtype
from converters.formats.torch_zip import TorchZipReader
from converters.plan import Plan, target_names
from converters.staging.stage import staged_file
from zoo.checkpoints.build import native_of
from zoo.checkpoints.handle import Located
from zoo.checkpoints.locate import locate
from zoo.checkpoints.path_reference import expanded, is_path
from zoo.checkpoints.plan import prove
from zoo.checkpoints.sources import Ref
from zoo.errors import (
    MissingDependency,
    NotACheckpoint,
    OutputExists,
    UsageError,
    ZooError,
    listing,
    option,
)
from zoo.saving.optimizers import NAMES, check_names, check_state, convert_optimizer
from zoo.saving.origin import origin_of

SHARDED = (
    "of one process among several (DeepSpeed, FSDP). Gather them first: all parameters' states "
    "in one state_dict"
)


def convert_file(
    src: Ref,
    file: Ref,
    out: Ref,
    *,
    to: str = "native",
    names: Sequence[str] | None = None,
    force: bool = False,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Convert the optimizer's state in a file for the weights in another dialect.

    One of the two dialects is native. The order of parameters in the other comes from `names`, from
    names in the state, from torch's own file of the weights, or from the reference's module.

    Args:
        src: The checkpoint, as for `zoo.load`.
        file: What torch.save wrote: the state alone, or a checkpoint that contains it.
        out: The file to write.
        to: The dialect to convert to.
        names: The parameters in the order that the optimizer was given.
        force: Whether to replace an optimizer's state at `out`; no other file is replaced.
        config: As for `zoo.load`.
        **options: As for `zoo.load`.

    Returns:
        The file written.

    Raises:
        UsageError: If the order of parameters is not known, or an argument does not fit.
        OutputExists: If something else is at `out`.
    """
    file, place = _path(file, "file"), _path(out, "out")
    if names is not None:
        check_names(names)
    if not file.is_file():
        read(file)  # reports what it is instead
    with staged_file(place, partial(_replaced, file, force), size=file.stat().st_size) as stream:
        _save(_converted(src, file, to, names, config, options), stream)
    return place


def _path(value: Any, what: str) -> Path:
    if not is_path(value):
        raise UsageError(f"{what}: expected a path, found {value!r}")
    return expanded(value)


def _replaced(file: Path, force: bool, place: Path) -> tuple[str, ...]:
    """Refuse a destination that is not an optimizer's state, or is the file to read."""
    if os.path.abspath(place) == os.path.abspath(file):
        raise OutputExists(f"{place}: is the file to be read. Write elsewhere")
    if not force:
        raise OutputExists(f"{place}: exists already. Use {option('force')} to replace it.")
    if place.is_symlink():
        return ()  # the link is replaced, not its target
    if place.samefile(file):
        raise OutputExists(f"{place}: is the file to be read. Write elsewhere")
    if place.is_file() and not place.stat().st_size:
        return ()
    with suppress(ZooError):
        if TorchZipReader(place, nested=True).keys == {"state", "param_groups"}:
            return ()
    fault = "not a whole optimizer's state alone, and nothing else is replaced"
    raise OutputExists(f"{place}: {fault}. Write elsewhere, or move it away")


def _converted(
    src: Ref,
    file: Path,
    to: str,
    names: Sequence[str] | None,
    config: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    # an adapter changes neither names nor shapes of weights
    located = locate(src, **{"adapter": False, **options})
    if to not in ("native", *located.spec.dialects):
        raise UsageError(f"to={to!r}: {located.spec.name} has {listing(located.spec.dialects)}")
    if (located.dialect == "native") == (to == "native"):
        raise UsageError(f"to={to!r}: {src} is {located.dialect}, and one of the two is native")
    state = read(file)
    checkpoint = located.checkpoint()
    model, plan = prove(located, checkpoint, config or {})
    recorded = [name for group in state["param_groups"] for name in group.get(NAMES, ())]
    if to == "native":
        other = _theirs(located, checkpoint, plan, names or recorded, file)
        return convert_optimizer(state, other, model, names=names)
    return convert_optimizer(state, model, _targets(located, model, to, names))


class _Stream:
    """A file that remembers an error that torch replaces with its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    stream = _Stream(file)
    try:
        torch.save(state, stream)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise stream.error or error from None


def read_names(file: Path) -> list[str]:
    """Return the names of parameters in a text file, one a line."""
    try:
        with open(open_regular(file), encoding="utf-8") as text:
            return text.read().split()
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not UTF-8; expected names of parameters, one a line") from None


def read(file: Path) -> dict[str, Any]:
    """Return a torch optimizer's state_dict from wherever in the file it is.

    Raises:
        NotACheckpoint: If there is none.
        UsageError: If there are several, or one is sharded.
    """
    if file.is_dir():
        raise NotACheckpoint(f"{file}: a directory, as states have it that are {SHARDED}")
    tree = TorchZipReader(file, nested=True).tree()
    states = dict(_states(tree, ""))
    if len(states) == 1:
        ((name, state),) = states.items()
        check_state(state, f"{file}: {f'{name}: ' if name else ''}")
        return state
    if states:
        raise UsageError(f"{file}: holds several optimizers' states: {listing(states)}. Save one")
    if _is_sharded(tree):
        raise UsageError(f"{file}: {SHARDED}")
    keys = listing(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
    raise NotACheckpoint(f"{file}: no torch optimizer's state in it; found {keys}")


def _states(tree: Any, name: str, depth: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path of keys, state) of each state."""
    if isinstance(tree, Mapping) and {"state", "param_groups"} <= tree.keys():
        groups = tree["param_groups"]
        if isinstance(groups, list) and all(isinstance(g, Mapping) for g in groups):
            yield name, dict(tree)
    elif depth and isinstance(tree, Mapping | list):
        parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in parts:
            yield from _states(value, f"{name}.{key}".strip("."), depth - 1)


def _is_sharded(tree: Any, depth: int = 2) -> bool:
    if not isinstance(tree, Mapping):
        return False
    if tree.keys() & {"zero_stage", "base_optimizer_state", "single_partition_of_fp32_groups"}:
        return True
    return depth > 0 and any(_is_sharded(value, depth - 1) for value in tree.values())


# --- the side that is not native -----------------------------------------------------------------


def _theirs(
    located: Located, checkpoint: Checkpoint, plan: Plan, recorded: Sequence[str], file: Path
) -> nn.Module | dict[str, Tensor]:
    in_order = (
        {*recorded} <= checkpoint.tensors.keys() if recorded else checkpoint.format == "torch"
    )
    if in_order:  # torch's own files hold a state_dict in the order of the module
        tensors = _empty(checkpoint.tensors)
        for step in plan.steps:
            for names in step.also:
                tensors |= {
                    name: tensors[own] for name, own in zip(names, step.sources, strict=True)
                }
        if not recorded:
            return tensors
        rest = (name for name in tensors if name not in {*recorded})
        return {name: tensors[name] for name in (*recorded, *rest)}
    if located.foreign is not None:
        raise _no_order(located.where)
    return _reference(located.reference_class, json.loads(located.config_text), str(file))


def _targets(
    located: Located, model: Any, to: str, names: Sequence[str] | None
) -> nn.Module | dict[str, Tensor]:
    native = native_of(model)
    state = {name: torch.empty(shape, device="meta") for name, shape in native.shapes.items()}
    if names is not None:
        bare = model.config.head in ("none", "pooler")
        header = target_names(located.spec, to, model.config.to_dict(), native, bare=bare)
        if unknown := [name for name in names if name not in header]:
            raise UsageError(f"names: {listing(unknown)}: no parameter of the checkpoint in {to}")
        rest = [name for name in header if name not in {*names}]
        return _empty({name: header[name] for name in (*names, *rest)})
    if to != "hf":
        raise _no_order(f"the dialect {to}")
    origin = origin_of(model, state)
    return _reference(origin.reference_class, json.loads(origin.config), "a checkpoint")


def _empty(header: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    return {
        name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
        for name, info in header.items()
    }


def _no_order(what: str, more: str = "") -> UsageError:
    return UsageError(
        "an optimizer numbers parameters in the order in which it was given them, and "
        f"{what} does not say it. Give their names in that order: {option('names', ...)}{more}"
    )


def _reference(named: str | None, config: Mapping[str, Any], what: str) -> nn.Module:
    from zoo.checkpoints.oracle import reference_on_meta

    if named is None:
        raise _no_order(what)
    try:
        return reference_on_meta(named, config)
    except MissingDependency:
        more = ", or install transformers, whose module has it"
        raise _no_order(what, more) from None
