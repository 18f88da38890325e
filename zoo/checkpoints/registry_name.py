"""Check that files loaded under a registry name are the checkpoint that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converters.spec import load_spec
from zoo import registry
from zoo.checkpoints.handle import Located
from zoo.components.model import Model
from zoo.errors import ConfigError
from zoo.registry import CheckpointEntry

NO_SIZES = ("pad", "positions", "window")  # learned positions show in the number of parameters


def check_name(located: Located, head: str | None) -> None:
    """Refuse a checkpoint under a registry name whose config the registry's entry contradicts."""
    named = located.source.checkpoint
    if named is not None and (problems := list(name_problems(located, named, head))):
        raise _not_the_named(located, named, problems)


def name_problems(
    located: Located, named: CheckpointEntry, head: str | None = None
) -> Iterator[str]:
    """Yield each size that differs from the registry's: expected and found."""
    entry = registry.architectures()[named.architecture]
    if located.entry.name != entry.name:
        yield f"architecture: expected {entry.name}, found {located.entry.name}"
        return
    heads = entry.heads[named.reference_class]
    if head is None and located.reference_class is not None and not {*heads} & {*located.heads}:
        yield f"architectures: expected {named.reference_class}, found {located.reference_class}"
    try:
        actual = located.config(located.heads[0])
    except ConfigError:
        return  # the files leave fields open, and `config=` gives them
    dialect = load_spec(entry.spec).dialect("hf")
    published, _ = dialect.read_config(named.config)
    expected = entry.config_class(**published, head=located.heads[0])
    for name, paths in dialect.config.items():
        if not any(path.partition(".")[0] in named.config for path in paths):
            continue
        wanted, value = getattr(expected, name), getattr(actual, name)
        if name == "labels":  # the registry has their number
            wanted, value = len(wanted), len(value)
        if type(wanted) is not int or name in NO_SIZES:
            continue  # not eps or theta, which may have more digits in the files
        if wanted != value:
            yield f"{dialect.reference_field(name)}: expected {wanted!r}, found {value!r}"


def check_count(located: Located, model: Model, changes: Mapping[str, Any]) -> None:
    """Refuse a named checkpoint with another number of parameters than the registry has."""
    named = located.source.checkpoint
    if named is None or changes:
        return
    heads = registry.architectures()[named.architecture].heads[named.reference_class]
    count = sum(parameter.numel() for parameter in model.parameters())
    if model.config.head == heads[0] and count != named.parameters:
        problem = f"parameters: expected {named.parameters:,}, found {count:,}"
        raise _not_the_named(located, named, [problem])


def _not_the_named(
    located: Located, named: CheckpointEntry, problems: Sequence[str]
) -> ConfigError:
    ref = f"hf:{named.repo}{f'/{named.file}' if named.file else ''}"
    lines = [
        f"{located.where}: not the checkpoint that is called {named.name}:",
        *problems,
        f"To load what is there nonetheless: {ref}, or its directory",
    ]
    return ConfigError("\n  ".join(lines), problems)
