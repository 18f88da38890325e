"""The smallest models that tests build without the reference."""

from typing import Any

import torch

from converters.spec import load_spec
from zoo import registry


def build(name: str, **changes: Any) -> Any:
    """The model of an architecture's first tiny config, freshly initialised."""
    torch.manual_seed(0)
    entry = registry.architectures()[name]
    published = next(iter(entry.variants.values()))["config"]
    fields, problems = load_spec(entry.spec).dialect("hf").read_config(published)
    assert not problems
    model = entry.model(entry.config_class(**{**fields, **changes}))
    model.architecture = name
    return model
