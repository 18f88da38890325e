"""zoo: published checkpoints in small native code, proven to compute the same function, and back.

The public names load lazily: `import zoo` costs nothing and imports no torch.
"""

from __future__ import annotations

import warnings

__version__ = "0.1.0"

# torch warns when it is imported where NumPy is not installed. Nothing here needs NumPy. A NumPy
# that is there and broken is still warned of.
warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning
)

TYPE_CHECKING = False  # typing's own would have to be imported, before Ctrl-C is handled
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from zoo import models as models
    from zoo.catalog import info as info
    from zoo.catalog import list_checkpoints as list
    from zoo.components.cache import Cache as Cache
    from zoo.conversion import save as save
    from zoo.converting import convert as convert
    from zoo.embedding import embed as embed
    from zoo.errors import ZooError as ZooError
    from zoo.filling import fill as fill
    from zoo.generation import generate_text as generate
    from zoo.optimizers import convert_optimizer as convert_optimizer
    from zoo.parity import verify as verify
    from zoo.parity.diff import diff as diff
    from zoo.prepared import prepare as prepare
    from zoo.pretrained import load as load
    from zoo.scoring import perplexity as perplexity
    from zoo.tokenizers import tokenizer as tokenizer
    from zoo.wrong.diagnosing import diagnose as diagnose

_HOMES = {
    "load": ("zoo.pretrained", "load"),
    "prepare": ("zoo.prepared", "prepare"),
    "convert": ("zoo.converting", "convert"),
    "convert_optimizer": ("zoo.optimizers", "convert_optimizer"),
    "save": ("zoo.conversion", "save"),
    "generate": ("zoo.generation", "generate_text"),
    "Cache": ("zoo.components.cache", "Cache"),
    "diff": ("zoo.parity.diff", "diff"),
    "diagnose": ("zoo.wrong.diagnosing", "diagnose"),
    "verify": ("zoo.parity", "verify"),
    "tokenizer": ("zoo.tokenizers", "tokenizer"),
    "perplexity": ("zoo.scoring", "perplexity"),
    "fill": ("zoo.filling", "fill"),
    "embed": ("zoo.embedding", "embed"),
    "list": ("zoo.catalog", "list_checkpoints"),
    "info": ("zoo.catalog", "info"),
    "ZooError": ("zoo.errors", "ZooError"),
    "models": ("zoo.models", None),
}

__all__ = [
    "Cache",
    "ZooError",
    "convert",
    "convert_optimizer",
    "diagnose",
    "diff",
    "embed",
    "fill",
    "generate",
    "info",
    "list",
    "load",
    "models",
    "perplexity",
    "prepare",
    "save",
    "tokenizer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    value = import_module(module)
    found = getattr(value, attribute) if attribute else value
    globals()[name] = found
    return found


def __dir__() -> Iterable[str]:
    return sorted({*globals(), *__all__})
