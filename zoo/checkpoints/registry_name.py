"""A checkpoint under a registry's name: whether its files are what the name stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converters.spec import load_spec
from zoo import registry
from zoo.checkpoints.handle import Located
from zoo.components.model import Model
from zoo.errors import ConfigError
from zoo.registry import CheckpointEntry

NO_SIZES = ("pad", "positions", "window")  # where positions are learned, the count shows them


def check_name(located: Located, head: str | None) -> None:
    """Refuse a checkpoint under a registry name whose config the registry's entry contradicts."""
    named = located.source.checkpoint
    if named is not None and (problems := list(name_problems(located, named, head))):
        raise _not_the_named(located, named, problems)


def name_problems(
    located: Located, named: CheckpointEntry, head: str | None = None
) -> Iterator[str]:
    """Each size that differs, of those that the registry has: expected and found."""
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
        return  # the files do not say all of it; config= does, and may say what it likes
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
            continue  # an eps or a theta may be said more exactly there than here
        if wanted != value:
            yield f"{dialect.reference_field(name)}: expected {wanted!r}, found {value!r}"


def check_count(located: Located, model: Model, changes: Mapping[str, Any]) -> None:
    """Refuse a named checkpoint whose model has not the parameters that its name stands for."""
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
