"""Architectures, a file each; `zoo.models.llama` is imported when it is first used.

Where a config and its model are more than a page, the config is a file beside: `_t5_config.py`.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"zoo.models has no {name!r}; there is {', '.join(__all__)}")
    return import_module(f"{__name__}.{name}")
