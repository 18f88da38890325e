"""What the files of a spec may hold, as pydantic models, and how a file is laid over another.

`specs/<architecture>/native.yaml` describes the model's side, `specs/<architecture>/<dialect>.yaml`
one layout of its files, `specs/common/<dialect>.yaml` what a dialect has whatever the architecture.
docs/glossary.md explains each section with an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from converters.strict_yaml import read_yaml
from converters.validation import Entry, Field, ValidationError, line_of, problems
from zoo.errors import SpecError, did_you_mean

SPECS = Path(__file__).parent / "specs"
NATIVE, COMMON = "native", "common"  # a file of every spec; the folder that is no architecture's

# A null removes a line of the file that `like` names, so that every value may be null.
Text = Annotated[str, Field(min_length=1)]
Texts = dict[Text, Text | None]
Rules = dict[Text, str | list[str] | None]
_PATH = r"[^.|\s][^.|]*(\.[^.|]+)*"
Paths = Annotated[str, Field(pattern=rf"^\s*{_PATH}(\|\s*{_PATH})*$")]
Pair = Annotated[tuple[Any, Any], Field(strict=False)]
Condition = Annotated[str, Field(pattern=r"^(not )?[A-Za-z_]\w*$")]

LIKE = Field(
    default=None,
    title="another file of specs, as folder/name",
    description="The file that this one is laid over: a null removes one of its lines, a list adds",
)


class NativeFile(Entry):
    """`native.yaml`: what is known of the model's own arrays and fields."""

    like: Text | None = LIKE
    axes: Texts | None = Field(
        default=None,
        title="`axis: field` lines",
        description="The config field, or quotient of two, that gives the size of an axis",
    )
    shapes: list[Text] | None = Field(
        default=None,
        title="a list of native tensors with their axes",
        description="Native arrays whose axes are config fields: a file's shapes give the fields",
    )
    present: dict[Condition, Text | None] | None = Field(
        default=None,
        title="`field: native name` lines",
        description="Flags that are true (`not` flags: false) if a file holds this native array",
    )
    head: dict[Paths, Text | None] | None = Field(
        default=None,
        title="`head: native name` lines",
        description="The head of files that name no class: the first whose native array is there",
    )


class WhenRules(Entry):
    """Rules below a condition."""

    weights: Rules | None = Field(default=None, title="`name: …` lines")
    heads: Rules | None = Field(default=None, title="`name: …` lines")


class DialectFile(Entry):
    """One dialect's file: names and axes of its tensors, and the fields of its config."""

    like: Text | None = LIKE
    prefix: str | None = Field(
        default=None, title="some text", description="Published names come with and without it"
    )
    weights: Rules | None = Field(
        default=None,
        title="`name: …` lines",
        description="Rules, `name in the file: name in the model`, with axes where they differ",
    )
    heads: Rules | None = Field(
        default=None,
        title="`name: …` lines",
        description="Rules of task heads, which never have the prefix",
    )
    when: dict[Condition, WhenRules | None] | None = Field(
        default=None,
        title="a field, or `not` one, with weights: or heads: below",
        description="Rules that apply if a native field is true, or `not`",
    )
    alternatives: Rules | None = Field(
        default=None,
        title="`name: …` lines",
        description="Rules that replace those of the same targets if their sources are there",
    )
    optional: Texts | None = Field(
        default=None,
        title="`module: reason` lines",
        description="Modules that a file may hold and the chosen head does not read: the reason",
    )
    tied: Texts | None = Field(
        default=None, title="`name: name` lines", description="Second names of the same array"
    )
    aliases: Texts | None = Field(
        default=None,
        title="`name: name` lines",
        description="Old names, which are read and not written",
    )
    drop: Texts | None = Field(
        default=None,
        title="`name: reason` lines",
        description="Tensors that are not wanted, each with the reason",
    )
    optimizer_slots: Texts | None = Field(
        default=None,
        title="`suffix: reason` lines",
        description="Suffixes of optimizer state beside a tensor, each with the reason to drop it",
    )
    config: dict[Text, Paths | None] | None = Field(
        default=None,
        title="a field or several joined by |",
        description="Native field: the file's field. Of several, the first that is present counts",
    )
    defaults: dict[Text, Any] | None = Field(
        default=None,
        title="`field: value` lines",
        description="Native fields that configs leave out",
    )
    require: dict[Text, list[Any] | None] | None = Field(
        default=None,
        title="a list of the values implemented",
        description="Values that are implemented; others are refused. []: only null or absent",
    )
    ignore: list[Text] | None = Field(
        default=None,
        title="a list of field names",
        description="Fields that do not change what inference computes",
    )
    exclusive: list[list[Text]] | None = Field(
        default=None,
        title="lists of field names",
        description="Spellings of one field, which may not differ if several are present",
    )
    detect: dict[Text, Any] | None = Field(
        default=None,
        title="`key: value` lines",
        description="Values in the file that tell this dialect from others with the same names",
    )
    required: list[Text] | None = Field(
        default=None,
        title="a list of native fields",
        description="Native fields that the user has to give if the file does not hold them",
    )
    null_values: dict[Text, list[Any] | None] | None = Field(
        default=None,
        title="a list of values",
        description="Values of a field that stand for null",
    )
    value_map: dict[Text, list[Pair] | None] | None = Field(
        default=None,
        title="pairs of a value in the file and the native one",
        description="Pairs of a value in the file and the native value, by native field",
    )
    key_map: dict[Text, Texts | None] | None = Field(
        default=None,
        title="`native key: key in the file` lines",
        description="Names of the keys of a field that is an object, by native field",
    )
    field_tensors: Texts | None = Field(
        default=None,
        title="`tensor: native field` lines",
        description="Tensors whose values give a native field of the config",
    )
    write: dict[Text, Any] | None = Field(
        default=None,
        title="`key: value` lines",
        description='More keys to write: a constant or "{native field}"; null: never write it',
    )
    zero_filled: dict[Text, bool | Text | None] | None = Field(
        default=None,
        title="`flag: true or another flag` lines",
        description="Flags of tensors that files must hold: zeros are written where they lack",
    )
    lossy_fields: list[Text] | None = Field(
        default=None,
        title="a list of native fields",
        description="Native fields that this dialect cannot hold and that may be lost",
    )


class Container(Entry):
    """What the files of a dialect are, whatever the architecture."""

    format: Text = Field(title="the name of a format", description="A format of converters.formats")
    file: str = Field(
        default="",
        title="some text",
        description="The file's name when written; `{shard}` numbers files; empty: read alone",
    )
    within: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=("",),
        title="a list of keys",
        description="The key of a nested file under which the weights are: the first that is there",
    )
    config: str = Field(
        default="",
        title="some text",
        description="A file beside it, a key of the file's values, `.` for all of them, or `{key}`:"
        " those whose names begin with the value of `key`",
    )
    beside: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        title="a list of names",
        description="Top-level names whose values are not about the model",
    )
    wide: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        title="a list of tensors",
        description="Tensors that are kept in F32, as vectors are",
    )
    about: str = Field(default="", title="some text", description="What messages call such files")
    fixed: dict[str, int] = Field(
        default_factory=dict,
        title="`setting: number` lines",
        description="Settings of the format that this dialect fixes",
    )
    names: dict[str, str] = Field(
        default_factory=dict,
        title="`name: name` lines",
        description="Files beside it, and what other dialects call them",
    )

    @property
    def sharded(self) -> bool:
        """Whether there may be several files; tensors are then called `0/name`, `1/name` …"""
        return "{shard" in self.file


class CommonFile(Entry):
    """`common/<dialect>.yaml`: what a dialect has whatever the architecture."""

    container: Container | None = Field(default=None, title="the fields of a container")
    ignore: list[Text] = Field(default_factory=list, title="a list of field names")
    require: dict[Text, list[Any]] = Field(
        default_factory=dict, title="a list of the values implemented"
    )
    lossy_fields: list[Text] = Field(default_factory=list, title="a list of native fields")


File = TypeVar("File", bound=Entry)


def checked(model: type[File], data: Any, where: str, file: str = "") -> File:
    """Validate plain data; a SpecError lists every problem, with lines where `file` is read."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        places = (
            f"{_place(file, each.path) or where}: {each}"
            for each in problems(model, error, "section")
        )
        raise SpecError("; ".join(places)) from None


def _place(file: str, path: tuple[str, ...]) -> str:
    """`converters/specs/x/hf.yaml: line 12`, of the topmost file that has this path."""
    for name, text in chain(file) if file and path else ():
        if (line := line_of(text, path)) is not None:
            return f"converters/specs/{name}.yaml: line {line}"
    return ""


def chain(file: str) -> Iterator[tuple[str, str]]:
    """A file (`folder/name`) and those that it is laid over: names and texts."""
    while file and (path := SPECS / f"{file}.yaml").is_file():
        yield file, path.read_text(encoding="utf-8")
        data = read_yaml(path, SpecError)
        file = data.get("like", "") if isinstance(data, dict) else ""


def read_file(file: str, below: tuple[str, ...] = ()) -> Any:
    """One file's plain data (`folder/name`), laid over the file that its `like` names."""
    path = SPECS / f"{file}.yaml"
    data = read_yaml(path, SpecError)
    if not isinstance(data, dict) or (other := data.pop("like", None)) is None:
        return data
    if file in below:
        raise SpecError(f"{file}.yaml: like: {' -> '.join((*below, file))} is a circle")
    if not isinstance(other, str) or not (SPECS / f"{other}.yaml").is_file():
        near = did_you_mean(str(other), files())
        raise SpecError(f"{file}.yaml: like: no file {other!r}.{near}")
    return laid_over(read_file(other, (*below, file)), data)


def files() -> list[str]:
    """Every file of specs, as `folder/name`."""
    paths = (path.relative_to(SPECS).with_suffix("") for path in SPECS.glob("*/*.yaml"))
    return sorted(path.as_posix() for path in paths)


def files_of(folder: str) -> list[str]:
    """The names of the files in one folder of specs."""
    return sorted(path.stem for path in (SPECS / folder).glob("*.yaml"))


def spec_names() -> list[str]:
    """The folders of specs that are an architecture's."""
    return [file.partition("/")[0] for file in files() if file.endswith(f"/{NATIVE}")]


def laid_over(base: Any, more: Any) -> Any:
    """Merge two files: mappings key by key, lists one behind the other; a null removes a key."""
    if isinstance(base, dict) and isinstance(more, dict):
        both = {
            key: laid_over(value, more[key]) if key in more else value
            for key, value in base.items()
        }
        both |= {key: value for key, value in more.items() if key not in base}
        return {key: value for key, value in both.items() if value is not None}
    return base + more if isinstance(base, list) and isinstance(more, list) else more


def common(dialect: str) -> CommonFile:
    """What every file of a dialect has, whatever the architecture."""
    file = f"{COMMON}/{dialect}"
    if not (SPECS / f"{file}.yaml").is_file():
        return CommonFile()
    return checked(CommonFile, read_file(file), f"converters/specs/{file}.yaml", file)
