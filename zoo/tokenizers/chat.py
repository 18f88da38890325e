"""Chat templates: jinja from a stranger, in a sandbox that bounds its work too.

A template may do what the reference lets it do, less the filters in `_WITHOUT`. A few lines of it
could run or grow forever, so turns of loops, calls and characters are counted.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from zoo.errors import TemplateError

MOST_SOURCE = 1 << 18  # characters of a template; published ones have some 20 thousand
MOST_STEPS = 1 << 18  # turns of loops, calls and pieces of text
MOST_TEXT = 1 << 24  # characters or items of anything that it makes
MOST_TEXTS = 1 << 28  # characters of all that it makes
MOST_NUMBER = 1 << 20  # as an argument, where it is a width or a count
# they pad, wrap or list at any length, and no published template has been seen to use them
_WITHOUT = ("center", "filesizeformat", "format", "pprint", "truncate", "urlize", "wordwrap")


def render(template: str, given: Mapping[str, Any], where: str) -> str:
    """The text that a template makes of what it is given, or why it makes none."""
    try:
        if len(template) > MOST_SOURCE:
            raise TemplateError(f"has {len(template)} characters, of at most {MOST_SOURCE}")
        sandbox = _Sandbox()
        tree = _Counting(sandbox).visit(sandbox.parse(template))
        return sandbox.from_string(tree).render(_plain(given))
    except TemplateError as error:
        raise TemplateError(f"{where}: {error}") from None
    except JinjaError as error:
        line = getattr(error, "lineno", None)
        at = f"line {line}: " if line else ""
        raise TemplateError(f"{where}: {at}{error.message or type(error).__name__}") from None
    except RecursionError:
        raise TemplateError(f"{where}: nests or calls itself too deeply") from None
    except Exception as error:  # what its expressions raise: a text and a number added, say
        raise TemplateError(f"{where}: {type(error).__name__}: {error}") from None


def _plain(value: Any) -> Any:
    """Without methods of the caller's own, which the sandbox would not know to be harmful."""
    match value:
        case bool() | None:
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    kind = type(value).__name__
    raise TemplateError(f"is given a {kind}, and takes texts, numbers, lists and mappings")


# --- bounds --------------------------------------------------------------------------------------


class _Sandbox(ImmutableSandboxedEnvironment):
    """For one rendering: what it has left is its own."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.steps, self.texts = MOST_STEPS, MOST_TEXTS
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Names}
        self.filters["tojson"] = _json
        guarded = {n: self._guarded(n, f) for n, f in self.filters.items() if n not in _WITHOUT}
        own = (("counted", self.counted), ("shown", self.shown), ("joined", self.joined))
        # given the context, a filter is not called when the template is compiled
        self.filters = guarded | {name: _at_runtime(function) for name, function in own}

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError(f"takes more than {MOST_STEPS} steps")

    def made(self, value: Any) -> Any:
        """The same, once its size is paid for."""
        if isinstance(value, str | list | tuple):
            _fits(len(value))
            self.texts -= len(value)
            if self.texts < 0:
                raise TemplateError(f"makes more than {MOST_TEXTS} characters")
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def shown(self, value: Any) -> str:
        self.step()
        text: str = self.made(str(value))
        return text

    def joined(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        _fits(sum(map(len, texts)))
        return str(self.made("".join(texts)))

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.step()
        owner = getattr(callee, "__self__", None)
        if isinstance(owner, str):
            _foreseen(callee.__name__, (owner, *args), kwargs)
        if isinstance(callee, LoopContext):  # a recursive loop's next level
            args = (self.counted(args[0]), *args[1:])
        return self.made(super().call(context, callee, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, str | list | tuple) else None for v in (left, right)]
        match operator, sizes:
            case "+", [int(), int()]:
                _fits(sum(size or 0 for size in sizes))
            case "*", [int(size), None]:
                _fits(size * right)
            case "*", [None, int(size)]:
                _fits(size * left)
            case "%", [int(), _]:
                _foreseen("format", (left, *(right if isinstance(right, tuple) else (right,))), {})
            case (("*" | "**"), _):
                _small(left, right if operator == "**" else 1)
                _small(right, 1)
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if (safe := super().wrap_str_format(value)) is None:
            return None

        def format(*args: Any, **kwargs: Any) -> str:
            _foreseen("format", (value.__self__, *args), kwargs)
            return safe(*args, **kwargs)

        return format

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise TemplateError(f"reaches for {attribute!r} of a {type(obj).__name__}")

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # and the marks by which jinja knows what to pass first
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step()
            values = args[1:] if hasattr(function, "jinja_pass_arg") else args
            _foreseen(name, values, kwargs)
            return self.made(function(*args, **kwargs))

        return call


def _at_runtime(function: Callable[..., Any]) -> Callable[..., Any]:
    return pass_context(lambda context, *values: function(*values))


def _fits(size: int) -> None:
    if size > MOST_TEXT:
        raise TemplateError(f"makes a text of {size} characters, of at most {MOST_TEXT}")


def _small(base: Any, power: Any) -> None:
    both = isinstance(base, int) and isinstance(power, int)
    if both and base.bit_length() * abs(power) > 1 << 12:
        raise TemplateError("computes with numbers of a thousand digits")


def _foreseen(name: str, values: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses a filter or a text's method whose result would outgrow all that it is given."""
    values = (*values, *kwargs.values())
    numbers = [abs(value) for value in values if isinstance(value, int)]
    if max(numbers, default=0) > MOST_NUMBER:
        raise TemplateError(f"{name} of the number {max(numbers)}")
    lengths = [len(value) for value in values if isinstance(value, str)]
    longest = max(lengths[1:], default=0)
    first = values[0] if values else None
    if name == "replace" and isinstance(first, str) and len(values) > 2:
        _fits((first.count(str(values[1])) + 1) * len(str(values[2])))
    elif name == "join":
        parts = next((v for v in values if isinstance(v, list | tuple)), ())
        separator = max(lengths, default=0)
        _fits(separator * len(parts) + sum(len(part) for part in parts if isinstance(part, str)))
    elif name == "indent" and isinstance(first, str):
        _fits(first.count("\n") * max([*numbers, longest]))
    elif name == "expandtabs" and isinstance(first, str):
        _fits(first.count("\t") * max([*numbers, 8]))
    elif name in ("format", "format_map") and isinstance(first, str):
        widths = "".join(c if c.isdecimal() else " " for c in first).split()
        if any(len(width) > 6 for width in widths):
            raise TemplateError("formats to a width of millions")
        fields = first.count("{") + first.count("%")
        _fits(sum(map(int, widths)) + fields * max([longest, *numbers]))


class _Counting(NodeTransformer):
    """Puts the counters into a template: at loops, at what is shown, and where texts join."""

    def __init__(self, sandbox: _Sandbox) -> None:
        self.sandbox = sandbox

    def _through(self, name: str, *values: Any) -> nodes.Filter:
        made = nodes.Filter(values[0], name, list(values[1:]), [], None, None)
        made.set_lineno(values[0].lineno)
        return made.set_environment(self.sandbox)  # type: ignore[return-value]

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._through("counted", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [self._through("shown", each) for each in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through("joined", *node.nodes)


# --- what templates expect to find ---------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; here it is just its text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Names(Namespace):
    """Refuses names by which Python's own machinery is reached."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _public(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"sets {name!r}, a name that begins with an underscore")


def _raise(message: Any) -> NoReturn:
    raise TemplateError(f"refuses the messages: {message}")


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where jinja's own filter writes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
