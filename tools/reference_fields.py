"""Derive which config fields the reference declares or reads, for converters/reference_fields.yaml.

A field of config.json that is in none of these lists cannot change what the reference computes.

    python tools/reference_fields.py           # rewrite the file
    python tools/reference_fields.py --check   # exit with 1 if it is out of date
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from converters.reference_fields import PATH, ROPE, SHARED
from zoo import registry

# what every model of the reference goes through
_SHARED = (
    *("activations", "cache_utils", "configuration_utils", "masking_utils", "modeling_layers"),
    *("modeling_rope_utils", "modeling_utils", "pytorch_utils", "modeling_flash_attention_utils"),
    *("generation/utils", "loss/loss_utils", "integrations/flash_attention", "integrations/moe"),
    *("integrations/sdpa_attention", "integrations/heterogeneity/*"),
)
_CONFIGS = {"config", "text_config", "decoder_config", "encoder_config", "model_config"}
_READERS = {"getattr", "hasattr", "setattr"}


def derive() -> dict[str, list[str]]:
    """Every list of the file, sorted."""
    import transformers

    root = Path(transformers.__file__).parent
    shared = _declared(transformers.PreTrainedConfig)
    for name in _SHARED:
        for path in sorted(root.glob(f"{name}.py")):
            shared |= _read_by(path)
    by_spec: dict[str, set[str]] = {}
    for entry in registry.architectures().values():
        if not entry.oracle:  # elsewhere the reference is code that the repository brings along
            by_spec.setdefault(entry.spec, set()).update(_of_model(entry.model_type))
    lists = {SHARED: shared, ROPE: _rope_keys()}
    lists |= {name: fields - shared for name, fields in sorted(by_spec.items())}
    return {name: sorted(fields) for name, fields in lists.items()}


def _of_model(model_type: str) -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    directory = Path(inspect.getfile(kind)).parent
    paths = [*directory.glob("configuration_*.py"), *directory.glob("modeling_*.py")]
    return set().union(_declared(kind), *map(_read_by, paths))


def _declared(kind: type) -> set[str]:
    """Fields of the class, and both names of each alias."""
    aliases: dict[str, str] = getattr(kind, "attribute_map", {})
    return {field.name for field in dataclasses.fields(kind)} | {*aliases, *aliases.values()}


def _read_by(path: Path) -> set[str]:
    """Names read on objects called config; in a config's own file on `self` and `kwargs` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = path.name.startswith("configuration_")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        name
        for node in ast.walk(tree)
        if id(node) not in called  # a method is no field
        for name in _names(node, own)
        if name.isidentifier() and not name.startswith("_")  # the library's own, and no field
    }


def _names(node: ast.AST, own: bool) -> Iterator[str]:
    match node:
        case ast.Attribute(value=place, attr=name) if _is_config(place, own):
            yield name
        case ast.Call(func=ast.Name(id=reader), args=[place, ast.Constant(value=str(name)), *_]):
            if reader in _READERS and _is_config(place, own):
                yield name
        case ast.Call(
            func=ast.Attribute(value=place, attr="get" | "pop" | "setdefault"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            if _is_config(place, own, "kwargs"):
                yield name
        case ast.Subscript(value=place, slice=ast.Constant(value=str(name))):
            if _is_config(place, own, "kwargs"):
                yield name
        case ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In() | ast.NotIn()]):
            if _is_config(node.comparators[0], own, "kwargs"):
                yield name


def _is_config(node: ast.AST, own: bool, *more: str) -> bool:
    names = _CONFIGS | ({"self", *more} if own else set())
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in names
        case ast.Call(func=ast.Attribute(attr="get_text_config")):
            return True
    return False


def _rope_keys() -> set[str]:
    """Keys of `rope_scaling` and `rope_parameters`: whatever text the rotary code looks up."""
    from transformers import modeling_rope_utils

    tree = ast.parse(inspect.getsource(modeling_rope_utils))
    keys: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                keys.add(key)
            case ast.Call(
                func=ast.Attribute(attr="get" | "pop" | "setdefault"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                keys.add(key)
            case ast.Set(elts=items):
                keys |= {i.value for i in items if isinstance(i, ast.Constant)}  # type: ignore[misc]
            case ast.Compare(left=ast.Constant(value=str(key)), ops=[ast.In() | ast.NotIn()]):
                keys.add(key)
    return {key for key in keys if key.isidentifier()}


def text(lists: dict[str, list[str]]) -> str:
    """The file, a list in lines of at most 110 columns."""
    lines = [
        "# Config fields that the reference's config classes declare, or that its code reads.",
        "# Written by tools/reference_fields.py; a test compares it with the installed reference.",
    ]
    for name, fields in lists.items():
        body = textwrap.fill(", ".join(fields), 106, break_long_words=False, break_on_hyphens=False)
        lines += [f"{name}: [", textwrap.indent(body, "  "), "]"]
    return "\n".join(lines) + "\n"


def main() -> int:
    derived = text(derive())
    if "--check" in sys.argv[1:]:
        return int(PATH.read_text(encoding="utf-8") != derived)
    PATH.write_text(derived, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
