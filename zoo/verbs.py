"""Verbs: methods of `Model` whose functions live on higher floors, such as `model.generate`.

`zoo/__init__.py` has the table of them and registers it; nothing is imported before a verb is used.
"""

from __future__ import annotations

import gc
from importlib import import_module
from types import MethodType

TYPE_CHECKING = False  # typing's own would have to be imported, before Ctrl-C is handled
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TypeVar

    T = TypeVar("T", bound=type)

_TABLE: dict[str, str] = {}


class Verb:
    """A method that is `"module:function"` of a higher floor, looked up whenever it is used.

    On an instance the function is bound, as any method; on the class it is the function itself, so
    that `help` and `inspect.signature` show it. `module:function()` makes an attribute that is
    computed once for an instance, and `@module:function` a class method.
    """

    def __init__(self, target: str) -> None:
        self.is_class_method, self.is_attribute = target.startswith("@"), target.endswith("()")
        self.module, _, self.function = target.strip("@()").partition(":")
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        function = resolve(self.module, self.function)
        if self.is_class_method:
            return MethodType(function, owner)
        if instance is None:
            return function
        if not self.is_attribute:
            return MethodType(function, instance)
        return instance.__dict__.setdefault(self.name, function(instance))


def resolve(module: str, name: str = "") -> Any:
    """Import a module and return what it has under a name; without a name, the module.

    The garbage collector pauses: an import leaves no garbage, and one pass beside torch's objects
    takes longer than most modules.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        value = import_module(module)
    finally:
        if enabled:
            gc.enable()
    return getattr(value, name) if name else value


def register(table: Mapping[str, str]) -> None:
    """Take the names and targets of the verbs that `hang` hangs."""
    _TABLE.update(table)


def hang(owner: T) -> T:
    """Hang all registered verbs on a class."""
    for name, target in _TABLE.items():
        verb = Verb(target)
        verb.__set_name__(owner, name)
        setattr(owner, name, verb)
    return owner
