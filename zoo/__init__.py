"""zoo: published checkpoints in small native code, proven to compute the same function, and back.

The public names load lazily: `import zoo` costs nothing and imports no torch.
"""

from __future__ import annotations

import warnings

from zoo import verbs
from zoo.version import VERSION

__version__ = VERSION

# torch warns when it is imported where NumPy is not installed. Nothing here needs NumPy. A NumPy
# that is there and broken is still warned of.
warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning
)

# name -> where it is defined; zoo/__init__.pyi is made of this (tools/stubs.py)
PUBLIC = {
    "Cache": "zoo.components.cache:Cache",
    "ZooError": "zoo.errors:ZooError",
    "convert": "zoo.saving.convert:convert",
    "convert_optimizer": "zoo.saving.optimizers:convert_optimizer",
    "diagnose": "zoo.diagnosis.checkup.diagnose:diagnose",
    "diff": "zoo.diagnosis.diff.diff:diff",
    "embed": "zoo.text.embed:embed",
    "fill": "zoo.text.fill:fill",
    "generate": "zoo.text.generate:generate_text",
    "info": "zoo.checkpoints.info:info",
    "list": "zoo.checkpoints.info:list_checkpoints",
    "load": "zoo.loading:load",
    "models": "zoo.models",
    "perplexity": "zoo.text.perplexity:perplexity",
    "prepare": "zoo.prepared.prepare:prepare",
    "save": "zoo.saving.save:save",
    "tokenizer": "zoo.tokenizers:tokenizer",
    "train": "zoo.training.start:train",
    "verify": "zoo.parity:verify",
}
# methods of every model; @ marks a class method, () an attribute that is computed when first read
VERBS = {
    "from_pretrained": "@zoo.loading:from_pretrained",
    "save_pretrained": "zoo.saving.save:save",
    "load_adapter": "zoo.lora:load_adapter",
    "add_adapter": "zoo.lora:add_adapter",
    "merge_adapter": "zoo.lora:merge_adapter",
    "remove_adapter": "zoo.lora:remove_adapter",
    "save_adapter": "zoo.saving.adapter:save_adapter",
    "generate": "zoo.text.generate:generate",
    "run_with_cache": "zoo.interpret:run_with_cache",
    "patch": "zoo.interpret:patch",
    "logit_lens": "zoo.interpret:logit_lens",
    "tokenizer": "zoo.tokenizers:tokenizer_of()",
}
verbs.register(VERBS)

__all__ = sorted(PUBLIC)


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    value = globals()[name] = verbs.resolve(module, attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
