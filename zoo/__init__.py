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
    from zoo.checkpoints.info import info as info
    from zoo.checkpoints.info import list_checkpoints as list
    from zoo.components.cache import Cache as Cache
    from zoo.diagnosis.checkup.diagnose import diagnose as diagnose
    from zoo.diagnosis.diff.diff import diff as diff
    from zoo.errors import ZooError as ZooError
    from zoo.loading import load as load
    from zoo.parity import verify as verify
    from zoo.prepared.prepare import prepare as prepare
    from zoo.saving.convert import convert as convert
    from zoo.saving.optimizers import convert_optimizer as convert_optimizer
    from zoo.saving.save import save as save
    from zoo.text.embed import embed as embed
    from zoo.text.fill import fill as fill
    from zoo.text.generate import generate_text as generate
    from zoo.text.perplexity import perplexity as perplexity
    from zoo.tokenizers import tokenizer as tokenizer

_HOMES = {
    "load": ("zoo.loading", "load"),
    "prepare": ("zoo.prepared.prepare", "prepare"),
    "convert": ("zoo.saving.convert", "convert"),
    "convert_optimizer": ("zoo.saving.optimizers", "convert_optimizer"),
    "save": ("zoo.saving.save", "save"),
    "generate": ("zoo.text.generate", "generate_text"),
    "Cache": ("zoo.components.cache", "Cache"),
    "diff": ("zoo.diagnosis.diff.diff", "diff"),
    "diagnose": ("zoo.diagnosis.checkup.diagnose", "diagnose"),
    "verify": ("zoo.parity", "verify"),
    "tokenizer": ("zoo.tokenizers", "tokenizer"),
    "perplexity": ("zoo.text.perplexity", "perplexity"),
    "fill": ("zoo.text.fill", "fill"),
    "embed": ("zoo.text.embed", "embed"),
    "list": ("zoo.checkpoints.info", "list_checkpoints"),
    "info": ("zoo.checkpoints.info", "info"),
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
