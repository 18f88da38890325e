"""The smallest models that tests build without the reference."""

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.formats import TensorInfo, dtype_code
from converters.lazy import Lazy
from converters.output import Item, Output, Shard
from converters.spec import load_spec
from converters.staging.stage import Stage
from converters.writer import WriteOptions
from converters.writer import run as run_output
from zoo import registry


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    """A file of tensors, as every file is written."""
    items = [
        Item(TensorInfo(n, tuple(t.shape), dtype_code(t.dtype)), "", partial(Lazy.of, t))
        for n, t in tensors.items()
    ]
    output = Output((Shard.of(path.name, items, metadata),))
    run_output(output, Stage(path.parent), WriteOptions(sha256=False, allow_nonfinite=True))


def build(name: str, **changes: Any) -> Any:
    """The model of an architecture's first tiny config, freshly initialized."""
    torch.manual_seed(0)
    entry = registry.architectures()[name]
    published = next(iter(entry.variants.values()))["config"]
    fields, problems = load_spec(entry.spec).dialect("hf").read_config(published)
    assert not problems
    model = entry.model(entry.config_class(**{**fields, **changes}))
    model.architecture = name
    return model


def hot(model: Any) -> Any:
    """Redrawn so that what it writes depends on every token before."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


def run(model: Any, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """All its outputs; an encoder-decoder answers with what it was asked."""
    out = model(ids, mask, **answer(model, ids, mask))
    return list(out) if isinstance(out, tuple) else [out]


def answer(model: Any, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    if (
        "decoder_input_ids"
        not in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    ):
        return {}
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}
