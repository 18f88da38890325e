"""A LoRA adapter written back, alone, as the directory that peft loads."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from converters.output import Output
from zoo.components.model import Model
from zoo.lora import adapter_of, own_parameters
from zoo.lora.files import Factors
from zoo.lora.files import output as output_of
from zoo.lora.targets import on_disk
from zoo.saving.save import checked_destination, write


def save_adapter(model: Model, directory: str | PathLike[str], *, force: bool = False) -> Path:
    """Save the adapter of a model as a directory that peft loads.

    An adapter that was loaded and not trained is saved with the same bytes.

    Args:
        model: a model with an adapter.
        directory: where to write; the earlier output of `save_adapter` may be there.
        force: replace any checkpoint that is there; see `zoo.save`.

    Returns:
        The directory.

    Raises:
        UsageError: the model has no adapter.
        OutputExists: the directory holds other files.

    Example:
        >>> path = zoo.load("tiny-llama").add_adapter(["q_proj"]).save_adapter("saved")
        >>> sorted(file.name for file in path.glob("adapter*"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    output = adapter_output(model)
    return write(output, checked_destination(directory, None, force), force)


def adapter_output(model: Model) -> Output:
    """Return the files of a model's adapter."""
    adapter = adapter_of(model)
    factors, whole = dict[str, Factors](), dict[str, Tensor]()
    own = {n: p.detach() for n, p in own_parameters(model)}
    for module, was in adapter.files.factors.items():
        now = adapter.factors(module)
        factors[module] = now._replace(a=_as_it_was(now.a, was.a), b=_as_it_was(now.b, was.b))
    for name, before in adapter.files.whole.items():
        _, step, n = adapter.changes.index.find(name)
        whole[name] = _as_it_was(on_disk(step, own)[step.sources[n]], before)
    return output_of(replace(adapter.files, factors=factors, whole=whole))


def _as_it_was(now: Tensor, before: Tensor) -> Tensor:
    """In the file's own dtype, where that holds the same numbers."""
    narrow = now.to(before.dtype)
    return narrow if narrow.to(now.dtype).equal(now) else now
