"""`zoo.load`: a reference becomes a model.

The steps lie in `zoo/checkpoints`, a file each, and `load` puts them together:

1. `locate`: find the directory of the reference, and read its config into native fields.
2. `plan`: build the model on the meta device (`build`), and prove that the files fill it.
3. `fill_weights`: read the weights into it, cast and checked, with their `provenance`.

`load` locates, `load_located` plans and fills.

What only some loads need is imported when it is needed.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from converters.memory import enough
from converters.spec import Spec
from zoo.checkpoints.build import build_random, dtype_of
from zoo.checkpoints.file_names import MODULES
from zoo.checkpoints.fill_weights import fill, memory_advice
from zoo.checkpoints.handle import Located
from zoo.checkpoints.locate import locate, read
from zoo.checkpoints.path_reference import expanded
from zoo.checkpoints.plan import check_trust, prove
from zoo.checkpoints.sources import Ref, resolve
from zoo.components.model import Model
from zoo.errors import ChecksumMismatch, NotACheckpoint, UsageError, did_you_mean
from zoo.registry import Architecture

if TYPE_CHECKING:
    from zoo.lora.files import Files

CHECKS = ("finite",)  # what load can be asked to look for in all weights
M = TypeVar("M", bound=Model)


def load(
    ref: Ref,
    *,
    head: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    weights: Literal["checkpoint", "random"] = "checkpoint",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Ref | None = None,
    local_files_only: bool = False,
    config: Mapping[str, Any] | None = None,
    ignore_config: Sequence[str] = (),
    trust: Collection[str] = (),
    expect: type[Model] | None = None,
    modules: bool = True,
    verify: bool = False,
    check: Literal["finite"] | None = None,
    prepare: bool = False,
    adapter: Ref | bool | None = None,
    merge: bool = False,
    mmap: bool | None = None,
) -> Model:
    """Load a checkpoint as a native model, ready for inference.

    Args:
        ref: a registry name (`zoo list`), `hf:org/repo@revision`, a directory, or a
            self-describing file such as GGUF.
        head: the head to build instead of the one that the checkpoint names; "none" gives hidden
            states.
        dtype: the dtype to cast weights to, such as "bfloat16"; None keeps each as it is stored.
        device: where the weights go.
        weights: "random" initializes the weights as the original does, and reads none.
        revision: a branch, tag or commit of the hub's repository.
        token: the hub's access token; None uses the one of `hf auth login`.
        cache_dir: the hub's cache, if it is not the usual one.
        local_files_only: use the cache alone, never the network.
        config: native config fields to change, such as `{"eps": 1e-6}`.
        ignore_config: unknown fields of config.json that may be ignored.
        trust: tensors on disk that win where tied ones differ.
        expect: the model class that the checkpoint must be of.
        modules: follow modules.json, where there is one, and give sentence embeddings; with False
            or a `head`, the model alone.
        verify: read every byte first and compare it with its recorded digest; also checks for NaN
            and infinity.
        check: "finite" refuses NaN and infinity among the weights, naming file and tensor.
        prepare: pack the weights for fast inference, as `zoo.prepare` does; such a model can no
            longer be trained or saved.
        adapter: a LoRA directory in peft's format, attached beside the weights and trainable. Where
            the checkpoint's own directory holds an adapter, one of these is required: True applies
            it, False states that the weights already include it.
        merge: add the adapter to the weights.
        mmap: True leaves weights as views of their file, which must not be written to then; False
            reads them into memory. None maps safetensors and GGUF only.

    Returns:
        The model, in eval mode; `model.provenance` says where each weight came from.

    Raises:
        UsageError: an argument is invalid, or contradicts another.
        SourceError: the reference could not be turned into files.
        ConfigError: the config is not understood; every problem is in the message.
        PlanError: the files do not fill the model; every missing, unexpected or misshapen tensor
            is in the message.

    Example:
        >>> import zoo
        >>> model = zoo.load("gpt2", weights="random", config={"layers": 1})
        >>> len(model.blocks)
        1
    """
    _check_arguments(head, device, config, ignore_config, trust, mmap)
    _check_choices(weights, check, adapter, merge, prepare)
    finite, changes = verify or check == "finite", dict(config or {})
    how: dict[str, Any] = {"dtype": dtype_of(dtype), "device": device}
    with _uncollected(), enough(str(ref), memory_advice()):
        located = locate(
            ref,
            head=head,
            weights=weights == "checkpoint",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            ignore_config=ignore_config,
            expect=expect,
            adapter=adapter,
            mmap=mmap,
        )
        directory, files = located.source.directory, adapter_files(located, adapter)
        if weights == "random":
            model = _adapted(build_random(located, changes, **how), files, merge)
        else:
            if files is not None:
                from zoo.lora.bases import based

                located, changes = based(located, files, changes, asked=head is not None)
            if verify:
                _verify(directory)
            has_steps = modules and head is expect is None and (directory / MODULES).is_file()
            if has_steps:
                from zoo.checkpoints.sentences import headless, with_steps

                located = located._replace(heads=headless(located.heads, located.entry.model))
            model = load_located(located, config=changes, trust=trust, finite=finite, **how)
            model = _adapted(model, files, merge)
            if has_steps:
                model = with_steps(model, directory, finite=finite)
    if prepare:
        from zoo.prepared.prepare import prepare as prepare_model

        return prepare_model(model)
    return model


def load_located(
    located: Located,
    *,
    config: Mapping[str, Any] | None = None,
    trust: Collection[str] = (),
    **how: Any,
) -> Model:
    """Plan the weights of a located checkpoint, prove the plan complete, and fill the model.

    Args:
        located: the checkpoint, from `locate`.
        config: native config fields to change.
        trust: tensors on disk that win where tied ones differ.
        how: `dtype`, `device` and `finite`, as `fill` takes them.
    """
    checkpoint = located.checkpoint()
    check_trust(trust, checkpoint)
    model, plan = prove(located, checkpoint, config)
    return fill(model, plan, located, checkpoint, trust=trust, **how)


def from_pretrained(cls: type[M], ref: str | PathLike[str], **options: Any) -> M:
    """Load a checkpoint of this architecture; `zoo.load` loads one of any.

    Args:
        ref: a registry name, `hf:org/repo@revision`, or a path.
        options: those of `zoo.load`.

    Raises:
        UnsupportedArchitecture: the checkpoint is of another architecture.

    Example:
        >>> from zoo.models import gpt2
        >>> model = gpt2.Model.from_pretrained("gpt2", weights="random", config={"layers": 1})
    """
    model = load(ref, expect=cls, **options)
    assert isinstance(model, cls)
    return model


def load_directory(
    directory: Ref, entry: Architecture, *, spec: Spec | None = None, **changes: Any
) -> Model:
    """Load a local HF directory of a known architecture, through the caller's own spec if given."""
    located = read(resolve(Path(directory)))
    return load_located(located._replace(entry=entry, spec=spec or located.spec), **changes)


# --- adapters ------------------------------------------------------------------------------------


def check_adapter(adapter: Any) -> None:
    """Refuse an `adapter` that is neither a path, True, False nor None."""
    if not isinstance(adapter, str | PathLike | bool | None):
        raise UsageError(f"adapter={adapter!r}: expected a directory, True or False")


def adapter_files(located: Located, adapter: Ref | bool | None) -> Files | None:
    """Read the requested adapter: of its own directory, or beside the weights (`True`)."""
    if adapter is None or adapter is False:
        return None
    from zoo.lora.files import read as read_adapter

    return read_adapter(located.source.directory if adapter is True else expanded(adapter))


def _adapted(model: Model, files: Files | None, merge: bool) -> Model:
    if files is None:
        return model
    from zoo.lora import attach, merge_adapter

    attach(model, files)
    return merge_adapter(model) if merge else model


# --- checks --------------------------------------------------------------------------------------


def _check_arguments(
    head: Any, device: Any, config: Any, ignore: Any, trust: Any, mmap: Any
) -> None:
    """Refuse arguments of the wrong type, naming the argument."""
    if not isinstance(head, str | None):
        raise UsageError(f"head={head!r}: expected a name")
    if not isinstance(config, Mapping | None):
        raise UsageError(f"config={config!r}: expected native fields by name")
    for name, value in (("ignore_config", ignore), ("trust", trust)):
        if isinstance(value, str) or not isinstance(value, Collection):
            raise UsageError(f"{name}={value!r}: expected several names")
    if mmap not in (None, True, False):
        raise UsageError(f"mmap={mmap!r}: True, False or None")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device={device!r}: {reason}") from None


def _check_choices(weights: Any, check: Any, adapter: Any, merge: bool, prepare: bool) -> None:
    """Refuse unknown words, and options that contradict each other."""
    check_adapter(adapter)
    if weights not in ("checkpoint", "random"):
        raise UsageError(f"weights={weights!r}: either 'checkpoint' or 'random'")
    if check not in (None, *CHECKS):
        near = did_you_mean(str(check), CHECKS)
        raise UsageError(f"check={check!r}: None or one of {', '.join(CHECKS)}.{near}")
    if merge and adapter in (None, False):
        raise UsageError("merge=True: there is no adapter to merge")
    if adapter is True and weights == "random":
        raise UsageError("adapter=True: random weights lie nowhere; give the adapter's directory")
    if prepare and adapter not in (None, False) and not merge:
        raise UsageError("prepare=True: an adapter beside the weights is not prepared. merge=True")


def _verify(directory: Path) -> None:
    """Check all files against convert's manifest, or the digests in names of a hub's cache."""
    from converters import manifest

    if (directory / manifest.NAME).exists():
        damages = [str(damage) for damage in manifest.check(directory)]
    elif (by_digest := manifest.named_by_digest(directory)) is not None:
        damages = [str(damage) for damage in by_digest]
    else:
        raise NotACheckpoint(
            f"{directory}: neither {manifest.NAME} nor files that a hub's cache names by their "
            "digests, so there is nothing to verify against"
        )
    if damages:
        raise ChecksumMismatch("\n  ".join([f"{directory}:", *damages]))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector, which would visit all of torch's objects four times a load.

    A load leaves no cycles behind.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
