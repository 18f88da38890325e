"""Plant bugs in a spec, in a config, or in a loaded model."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.language import Placeholder, Rule, Template, parse_rule
from converters.spec import Spec
from zoo.components.attention import Biased, attend

Target = Literal["mapping", "config", "model"]


class NotApplicable(Exception):
    """There is nothing here that this bug could be planted in."""


def need(condition: object) -> None:
    """Refuse to plant a bug where a condition does not hold."""
    if not condition:
        raise NotApplicable


# --- specs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    """A spec and the config it is read with; edits see each enumeration and layer written out."""

    spec: Spec
    config: Any

    def edited(self, change: Callable[[str, list[str]], tuple[str, list[str]]]) -> Spec:
        """The spec with both sides of every rule through `change`, which must change something."""
        fields = self.config.to_dict()
        dialect = self.spec.dialect("hf").under(fields)
        counts = {axis: fields[name] for axis, name in self.spec.axes.items() if name in fields}
        changed = False
        rules: dict[str, tuple[Rule, ...]] = {}
        for section in ("weights", "heads"):
            edited = []
            for rule in getattr(dialect, section):
                for before in written_out(rule, counts):
                    source, targets = change(before[0], list(before[1]))
                    changed = changed or (source, targets) != before
                    edited.append(parse_rule(source, targets[0] if len(targets) == 1 else targets))
            rules[section] = tuple(edited)
        need(changed)
        return self.spec.with_dialect(
            replace(dialect, weights=rules["weights"], heads=rules["heads"])
        )

    def exchanged(self, names: Mapping[str, str]) -> Spec:
        """What went to a native name goes to the one beside it. All of them must be there."""
        # whole words of a dotted name, or values of an enumeration in it; .name stands at the start
        words = "|".join(f"(?<!.){k[1:]}" if k[0] == "." else rf"(?<!\w){k}" for k in names)
        word, used = re.compile(rf"(?:{words})(?!\w)"), set[str]()

        def other(match: re.Match[str]) -> str:
            key = match[0] if match[0] in names else f".{match[0]}"
            used.add(key)
            return names[key].removeprefix(".")

        def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
            parts = [target.partition(" [") for target in targets]
            return source, [word.sub(other, name) + bracket + axes for name, bracket, axes in parts]

        spec = self.edited(change)
        need(used == names.keys())
        return spec

    def permuted(self, name: str, axis: int, disk: str, native: str, **axes: str) -> Spec:
        """An axis of the tensors called `name` read as (disk) and written as (native)."""
        wanted = re.compile(rf"\.{name}\.(weight|bias)$")

        def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
            head, _, pattern = targets[0].partition(" [")
            bias = head.endswith("bias")
            if len(targets) > 1 or not wanted.search(head) or "(" in pattern or (bias and axis):
                return source, targets
            left, right = _patterns(source, targets[0], bias)
            old = "oi"[axis]
            need(old in right)
            left = [f"({disk})" if word == old else word for word in left]
            right = [f"({native})" if word == old else word for word in right]
            source = f"{source.partition(' [')[0]} [{' '.join(left)}]"
            return source, [f"{head} [{' '.join(right)}]"]

        return replace(self.edited(change), axes={**self.spec.axes, **axes})

    def transposed(self, name: str) -> Spec:
        """One tensor with the axes on disk the other way about."""

        def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
            if not targets[0].startswith(name):
                return source, targets
            left, right = _patterns(source, targets[0], bias=False)
            source = f"{source.partition(' [')[0]} [{' '.join(reversed(left))}]"
            return source, [f"{name} [{' '.join(right)}]"]

        return self.edited(change)

    def fused_reordered(self) -> Spec:
        """Two axes of a group that holds queries, keys and values the other way about."""

        def change(source: str, targets: list[str]) -> tuple[str, list[str]]:
            fused = "{" in targets[0]
            return re.sub(r"\((\w+) (\w+)\)", r"(\2 \1)", source) if fused else source, targets

        return self.edited(change)

    def experts(self, order: list[int]) -> Spec:
        """Gates of experts in another order than what else belongs to them."""
        dialect = self.spec.dialect("hf")

        def change(rule: Rule) -> Rule:
            if not rule.stacked or "gate" not in str(rule.targets[0]):
                return rule
            numbered = f"{{x={','.join(map(str, order))}}}"
            names = str(rule.source.name).replace("{x}", numbered)
            return parse_rule(f"{names} {rule.source.pattern}", str(rule.targets[0]))

        weights = tuple(map(change, dialect.weights))
        return self.spec.with_dialect(replace(dialect, weights=weights))


def written_out(rule: Rule, counts: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """The rule's two sides as text, once for each value of its enumerations and each layer."""
    loops = {n: p for n, p in rule.loops.items() if p.values or n in counts}
    ranges = [range(len(p.values) or counts[n]) for n, p in loops.items()]

    def spelled(name: Template, values: Mapping[str, int], pattern: object) -> str:
        parts = [
            part.spell(values[part.name])
            if isinstance(part, Placeholder) and part.name in values
            else part
            for part in name.parts
        ]
        return f"{Template(tuple(parts))} {pattern or ''}".strip()

    for point in product(*ranges):
        values = dict(zip(loops, point, strict=True))
        source = spelled(rule.source.name, values, rule.source.pattern)
        yield source, [spelled(t.name, values, t.pattern) for t in rule.targets]


def _patterns(source: str, target: str, bias: bool) -> tuple[list[str], list[str]]:
    """Axes of both sides; `[o i]` or `[o]` where the rule has none."""
    sides = []
    for ref in (source, target):
        pattern = ref.partition(" [")[2].rstrip("]")
        sides.append(pattern.split() if pattern else ["o"] if bias else ["o", "i"])
    return sides[0], sides[1]


# --- models --------------------------------------------------------------------------------------


def stacks(model: Any) -> list[Any]:
    """Every module that has blocks; an encoder-decoder has two."""
    return [module for module in model.modules() if hasattr(module, "blocks")]


def blocks(model: Any) -> list[Any]:
    """The blocks of all stacks."""
    return [block for stack in stacks(model) for block in stack.blocks]


def part(module: Any, name: str) -> Any:
    """A submodule that must be there."""
    need(getattr(module, name, None) is not None)
    return getattr(module, name)


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another value, not in place: the memory may be the file's."""
    parameter.data = value.detach().clone()


def is_causal(model: Any) -> bool:
    """Whether the last token changes nothing at the first."""
    ids = torch.arange(8)[None] + 4
    other = ids.clone()
    other[0, -1] += 1
    answers = "decoder_input_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        a, b = (model(ids, decoder_input_ids=x) if answers else model(x) for x in (ids, other))
    need(isinstance(a, Tensor) and a.shape[:2] == ids.shape)
    return torch.equal(a[0, 0], b[0, 0])


def ignore_input(model: Any, name: str) -> None:
    """Drop an argument of `forward`."""
    forward = model.forward
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def run(*args: Any, **named: Any) -> Any:
        inputs = {**dict(zip(names[: len(args)], args, strict=True)), **named}
        return forward(**{k: v for k, v in inputs.items() if k != name})

    model.forward = run


def padding_attended(model: Any) -> None:
    """Ignore the attention mask."""
    ignore_input(model, "attention_mask")


def token_types_ignored(model: Any) -> None:
    """Ignore token type ids."""
    need(getattr(model.config, "types", 1) > 1)
    ignore_input(model, "token_type_ids")


def outputs_exchanged(model: Any) -> None:
    """Return two outputs the other way about."""
    forward = model.forward
    need("decoder_input_ids" not in inspect.signature(forward).parameters)
    out = forward(torch.zeros(1, 1, dtype=torch.long))
    need(isinstance(out, tuple) and out[0].shape == out[-1].shape)

    @functools.wraps(forward)
    def run(*args: Any, **named: Any) -> Any:
        return tuple(reversed(forward(*args, **named)))

    model.forward = run


def feed(model: Any, name: str, change: Callable[..., Tensor]) -> None:
    """`change(*inputs)` in place of a module's first input."""
    part(model, name).register_forward_pre_hook(lambda _, args: (change(*args), *args[1:]))


def final_norm_missing(model: Any) -> None:
    """Leave out the norm after the last stack."""
    stack = stacks(model)[-1]
    part(stack, "norm")
    stack.norm = nn.Identity()


def positions_off_by_one(model: Any) -> None:
    """Look up each position's successor."""
    last = len(part(model, "positions").weight) - 1
    feed(model, "positions", lambda ids: (ids + 1).clamp(max=last))


def distance_directions(model: Any) -> None:
    """Tell distances ahead and behind apart, or no longer."""
    modules = [module for module in model.modules() if hasattr(module, "both_ways")]
    need(modules)
    for module in modules:
        module.both_ways = not module.both_ways


def distances_reversed(model: Any) -> None:
    """Count relative distances the other way."""
    distances = part(model, "distances")
    rows = distances.rows
    distances.rows = lambda positions: rows(-positions)


def content_to_position_exchanged(model: Any) -> None:
    """Let positions attend to content, not content to positions, or the reverse."""
    for block in blocks(model):
        terms = set(getattr(block.attn, "position_terms", ()))
        need(len(terms) == 1)
        block.attn.position_terms = tuple({"c2p", "p2c"} - terms)


def distance_norm_missing(model: Any) -> None:
    """Leave out the norm of relative position vectors."""
    part(part(model, "distances"), "norm")
    model.distances.norm = None


def convolution_reads_padding(model: Any) -> None:
    """Feed the convolution noise where padding is."""
    noise = torch.randn(model.config.dim, dtype=model.embed.weight.dtype)
    feed(model, "conv", lambda x, *_: torch.where((x == 0).all(-1, keepdim=True), noise, x))


def distance_bias_first_layer_only(model: Any) -> None:
    """Add the bias by distance in the first layer alone."""
    need(isinstance(blocks(model)[-1].attn.attend, Biased) and len(blocks(model)) > 1)
    for stack in stacks(model):
        for block in list(stack.blocks)[1:]:
            block.attn.attend = attend


def cross_attention(model: Any, change: Callable[..., Any]) -> None:
    """`change(forward, x, mask, source)` in place of each attention to another sequence."""
    for block in stacks(model)[-1].blocks:
        cross = part(block, "cross")
        cross.forward = functools.partial(change, cross.forward)


def _centers(model: Any, norm: Any, shift: float) -> bool:
    """Whether a norm takes the mean from its input."""
    x = torch.randn(3, model.config.dim, dtype=model.embed.weight.dtype) + shift
    return bool((norm(x) - norm(x - x.mean(-1, keepdim=True))).abs().max() < 1e-3)


def norm_centers_input(model: Any) -> None:
    """Take the mean from the input of an RMS norm."""
    block = blocks(model)[0]
    need(not _centers(model, part(block, "norm1"), 0))
    feed(block, "norm1", lambda x: x - x.mean(-1, keepdim=True))


def norm_does_not_center(model: Any) -> None:
    """Keep the mean in the input of a layer norm."""
    norm = part(blocks(model)[0], "norm2")
    need(_centers(model, norm, 1))
    scale, shift = norm.weight, norm.bias
    norm.forward = lambda x: F.rms_norm(x, x.shape[-1:], scale, model.config.eps) + shift


def norm_moved_in_branch(model: Any) -> None:
    """Move the norm from the input of attention to its output."""
    for block in blocks(model):
        norm, block.norm1 = part(block, "norm1"), nn.Identity()
        block.attn.register_forward_hook(lambda _, args, out, norm=norm: norm(out))


def last_attention_left_out(model: Any) -> None:
    """Leave the last attention out of the residual stream."""
    blocks(model)[-1].attn.register_forward_hook(lambda _, args, out: out * 0)


def last_layer_skipped(model: Any) -> None:
    """Leave out the last layer."""
    stack = stacks(model)[-1]
    need(len(stack.blocks) > 1)
    stack.blocks = stack.blocks[:-1]


def first_two_layers_exchanged(model: Any) -> None:
    """Exchange the first two layers."""
    stack = stacks(model)[0]
    need(len(stack.blocks) > 1)
    first, second, *rest = stack.blocks
    stack.blocks = nn.ModuleList([second, first, *rest])


def one_tensor_through_fp16(model: Any) -> None:
    """Round the first MLP's output matrix to fp16."""
    mlp = dict(blocks(model)[0].mlp.named_parameters())
    weight = next(p for name, p in mlp.items() if name.startswith("down"))
    overwrite(weight, weight.half().to(weight.dtype))


def bias_dropped(model: Any) -> None:
    """Set the first attention's output bias to zero."""
    bias = blocks(model)[0].attn.out.bias
    need(bias is not None)
    overwrite(bias, torch.zeros_like(bias))


def tie_broken(model: Any) -> None:
    """Give tied weights an array each."""
    weight = model.embed.weight
    others = (m for m in model.modules() if m is not model.embed)
    tied = [module for module in others if getattr(module, "weight", None) is weight]
    need(tied)
    for module in tied:
        module.weight = nn.Parameter(weight.detach().clone())


def dropout_active(model: Any) -> None:
    """Leave dropout on in evaluation."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    need(any(layer.p for layer in layers))
    for layer in layers:
        layer.train()
