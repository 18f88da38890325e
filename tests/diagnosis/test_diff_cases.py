"""Bugs as people make them, in specs, files, code and modules of their own: where, and why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from converters import spec_files
from converters.spec import SPECS, load_spec
from zoo import registry
from zoo.components import alibi, attention, masks, mlp, moe, norm
from zoo.components.masks import Mask
from zoo.diagnosis.diff.planted import placed
from zoo.errors import UsageError
from zoo.models import gpt2, llama

ARCHITECTURES = registry.architectures()
OUT = r"in .*blocks\.0\.attn\.out$"
DOWN = r"in .*blocks\.0\.mlp\.down$"
Plant = Callable[[Path, Path], Any]


@dataclass(frozen=True)
class Case:
    """`plant(directory, scratch)` yields the model; the first cause is `cause`, seen at `place`."""

    name: str
    architecture: str
    plant: Plant
    place: str
    cause: str
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.architecture}: {self.name}"


def check(case: Case, made: Callable[..., Path], scratch: Path) -> Any:
    directory = made(case.architecture, case.variant)
    with case.plant(directory, scratch) as model:
        result = zoo.diff(model, directory, **case.options)
    assert re.search(case.place, placed(result)), result.to_text()
    assert result.causes, result.to_text()
    assert re.search(case.cause, str(result.causes[0])), result.to_text()
    return result


# --- specs ---------------------------------------------------------------------------------------


def spec(file: str, *edits: tuple[str, str]) -> Plant:
    """The model as a spec with these texts replaced would have it."""

    @contextmanager
    def plant(directory: Path, scratch: Path) -> Iterator[Any]:
        copy = scratch / "specs"
        shutil.copytree(SPECS, copy)
        text = (copy / file / "hf.yaml").read_text()
        for old, new in edits:
            assert old in text, old
            text = text.replace(old, new, 1)
        (copy / file / "hf.yaml").write_text(text)
        with patch.object(spec_files, "SPECS", copy):
            load_spec.cache_clear()
            try:
                yield zoo.load(directory, dtype="float64")
            finally:
                load_spec.cache_clear()

    return plant


FUSED = "[i (n o)]: blocks.{layer}.attn.{n=q,k,v}.weight"
RAGGED = """query_key_value.{leaf} [(g (r|one|one) e){i}]:
    - blocks.{{layer}}.attn.q.{leaf} [(g r e){i}]
    - blocks.{{layer}}.attn.k.{leaf} [(g one e){i}]
    - blocks.{{layer}}.attn.v.{leaf} [(g one e){i}]"""
STACKED = """query_key_value.{leaf} [(q|k|v){i}]:
    - blocks.{{layer}}.attn.q.{leaf} [q{i}]
    - blocks.{{layer}}.attn.k.{leaf} [k{i}]
    - blocks.{{layer}}.attn.v.{leaf} [v{i}]"""
SPECS_READ_WRONG = [
    Case(
        "weights in another order than their biases",
        "gpt2",
        spec("gpt2", (FUSED, FUSED.replace("q,k,v", "v,k,q"))),
        r"out blocks\.0\.attn\.q$",
        r"rule of blocks\.\*\.attn\.q\.weight takes other rows .*restored.*line 8",
    ),
    Case(
        "biases alone as if heads stood inside",
        "bloom",
        spec("bloom", ("bias [(h n e)]", "bias [(n h e)]")),
        r"out blocks\.0\.attn\.q$",
        r"rule of blocks\.\*\.attn\.q\.bias takes other rows .*restored.*line 8",
    ),
    Case(
        "a square in every layer",
        "gpt2",
        spec(
            "gpt2",
            ("attn.c_proj.weight [i o]", "attn.c_proj.weight"),
            ("out.weight [o i]", "out.weight"),
        ),
        r"out blocks\.0\.attn\.out$",
        r"blocks\.\*\.attn\.out\.weight is transposed. Parity is restored.*line 10",
    ),
    Case(
        "groups read as one part below the other",
        "falcon",
        spec(
            "falcon",
            (RAGGED.format(leaf="weight", i=" i"), STACKED.format(leaf="weight", i=" i")),
            (RAGGED.format(leaf="bias", i=""), STACKED.format(leaf="bias", i="")),
        ),
        OUT,
        r"are read as \[\(g \(r\|one\|one\) e\) i\], not .*Change line 6",
        "grouped",
    ),
    Case(
        "fused head by head, weights alone",
        "deberta",
        spec("deberta", ("in_proj.weight [(h n e) i]", "in_proj.weight [(n h e) i]")),
        OUT,
        r"restored if .* are read as \[\(h n e\) i\], not \[\(n o\) i\], in its weight",
    ),
    Case(
        "two biases",
        "deberta",
        spec("deberta", ("attn.{n=q,v}.bias", "attn.{n=v,q}.bias")),
        OUT,
        r"attn\.q and .*attn\.v are exchanged, in its bias.*Change line 12",
    ),
    Case(
        "distances of the two stacks",
        "t5",
        spec("t5", ('"{stack=encoder,decoder}.distances', '"{stack=decoder,encoder}.distances')),
        r"in encoder\.blocks\.0\.attn\.out$",
        r"encoder\.distances and decoder\.distances are exchanged. Change line 10",
    ),
    Case(
        "a rule below a condition",
        "t5",
        spec(
            "t5",
            ("decoder.blocks.{below}.mlp.{n=gate,up}", "decoder.blocks.{below}.mlp.{n=up,gate}"),
        ),
        r"in decoder\.blocks\.0\.mlp\.down$",
        r"gate and .*up are exchanged. Change line 27",
        "gated-own-head",
    ),
    Case(
        "eps read from another field",
        "t5",
        spec(
            "t5",
            ("eps: layer_norm_epsilon", "eps: initializer_factor"),
            ("init_std: initializer_factor", "init_std: layer_norm_epsilon"),
        ),
        r"out encoder\.blocks\.0\.norm1$",
        r"restored if eps is 0\.001. It is read by line 44 .* as layer_norm_epsilon",
        "gated-own-head",
    ),
    Case(
        "a field that nothing reads",
        "gpt2",
        spec(
            "gpt2",
            ("  eps: layer_norm_epsilon\n  scale", "  scale"),
            ("[\n  n_ctx", "[\n  layer_norm_epsilon, n_ctx"),
        ),
        r"out blocks\.0\.norm1$",
        r"restored if eps is 3e-05. No line of .*gpt2/hf.yaml reads it. .* as layer_norm_epsilon",
    ),
    Case(
        "a default",
        "distilbert",
        spec("distilbert", ("eps: 1.0e-12", "eps: 1.0e-5")),
        r"out norm$",
        r"restored if eps is 1e-12. It is a default, of line 37",
    ),
    Case(
        "scores divided by another field's root",
        "gemma2",
        spec(
            "gemma2",
            ("query_scale: query_pre_attn_scalar", "query_scale: head_dim"),
            ("[cache", "[query_pre_attn_scalar, cache"),
        ),
        OUT,
        r"restored if query_scale is 11. It is read by line 14",
    ),
]


@pytest.mark.parametrize("case", SPECS_READ_WRONG, ids=str)
def test_wrong_line_of_a_spec_is_named_and_undone(
    case: Case, made: Callable[..., Path], tmp_path: Path
) -> None:
    assert check(case, made, tmp_path).causes[0].restored


# --- files ---------------------------------------------------------------------------------------


def files(change: Callable[[dict[str, Tensor]], object]) -> Plant:
    @contextmanager
    def plant(directory: Path, scratch: Path) -> Iterator[Any]:
        copy = scratch / "changed"
        shutil.copytree(directory, copy)
        with safe_open(copy / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(tensors)
        tensors = {name: x.contiguous().clone() for name, x in tensors.items()}
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        yield zoo.load(copy, dtype="float64")

    return plant


def edit(*names: str, by: Callable[[Tensor], Tensor]) -> Plant:
    def change(tensors: dict[str, Tensor]) -> None:
        for end in names:
            result = [name for name in tensors if name.endswith(end)]
            assert result, end
            tensors.update({name: by(tensors[name]) for name in result})

    return files(change)


def levels(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def later_rows(x: Tensor) -> Tensor:
    return torch.cat([x[:10], x[10:].roll(1, 0)])


def without_last(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], 0 * x[-1:]])


def in_pairs(tensors: dict[str, Tensor]) -> None:
    """Queries and keys of every layer as they stand in Meta's files."""
    for name, heads in (("q_proj", 6), ("k_proj", 2)):
        for key in [k for k in tensors if name in k]:
            tensors[key] = rearrange(tensors[key], "(h two e) i -> (h e two) i", h=heads, two=2)


FILES_CHANGED = [
    Case(
        "eight bits",
        "llama",
        edit("layers.0.mlp.down_proj.weight", by=levels),
        r"out blocks\.0\.mlp\.down$",
        r"down\.weight lost precision: it went through int8",
    ),
    Case(
        "a norm scaled",
        "distilbert",
        edit("layer.1.sa_layer_norm.weight", by=lambda x: 1.01 * x),
        r"out blocks\.1\.norm1$",
        r"norm1\.weight is 1\.01 times",
    ),
    Case(
        "an offset stored",
        "gemma2",
        edit("model.norm.weight", by=lambda x: x + 1),
        r"out norm$",
        r"norm\.weight is off by \+1",
    ),
    Case(
        "rows of a table from the tenth on",
        "t5",
        edit("shared.weight", by=later_rows),
        r"out embed$",
        r"rows 11 to 130 are off by \+1",
    ),
    Case(
        "the last row of the head",
        "llama",
        edit("lm_head.weight", by=without_last),
        r"out head$",
        r"differs in row 130 alone, zero there",
    ),
    Case(
        "queries and keys in pairs",
        "llama",
        files(in_pairs),
        r"out blocks\.0\.attn\.q$",
        r"6 parameters in all: blocks\.\*\.attn\.q\.weight, blocks\.\*\.attn\.k\.weight",
    ),
    Case(
        "a bias that no module's output shows",
        "deberta",
        edit("layer.1.attention.self.q_bias", by=torch.zeros_like),
        r"in blocks\.1\.attn\.out$",
        r"blocks\.1\.attn\.q\.bias is zero",
    ),
    Case(
        "distances from behind",
        "deberta-v2",
        edit("encoder.rel_embeddings.weight", by=lambda x: x.flip(0)),
        r"in distances\.norm$",
        r"distances\.embed\.weight .*the last row first",
    ),
]


@pytest.mark.parametrize("case", FILES_CHANGED, ids=str)
def test_damaged_weights_are_named_and_undone(
    case: Case, made: Callable[..., Path], tmp_path: Path
) -> None:
    assert check(case, made, tmp_path).causes[0].restored


# --- code ----------------------------------------------------------------------------------------


def code(owner: Any, name: str, value: Any) -> Plant:
    @contextmanager
    def plant(directory: Path, scratch: Path) -> Iterator[Any]:
        with patch.object(owner, name, value):
            yield zoo.load(directory, dtype="float64")

    return plant


def tampered(change: Callable[[Any], object]) -> Plant:
    @contextmanager
    def plant(directory: Path, scratch: Path) -> Iterator[Any]:
        model = zoo.load(directory, dtype="float64")
        change(model)
        yield model

    return plant


def looking(
    scores: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
    merged: str = "b h s e -> b s (h e)",
) -> Plant:
    """Attention written out, with a softmax and a way to put heads together of its own."""

    def forward(self: Any, x: Tensor, mask: Mask, source: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x)
        q, k = self.rotary(q, k, mask)
        allowed = mask.dense(q.shape[2])
        result = (q @ k.mT) * self.scale
        if allowed is not None:
            result = result.masked_fill(~allowed, -torch.inf)
        out: Tensor = self.out(rearrange(scores(result) @ v, merged))
        return out

    return code(attention.Attention, "forward", forward)


def moved_behind(by: int) -> Plant:
    """Positions of what comes behind others in a cache."""
    kept = masks._after_others

    def behind(step: Any, window: int | None) -> Mask:
        mask = kept(step, window)
        return Mask(mask.allowed, mask.positions + by, mask.causal, mask.keys)

    return code(masks, "_after_others", behind)


def rms(scale: Callable[[Tensor, float], Tensor]) -> Plant:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.weight * x * scale(x, self.eps)
        return out.to(x.dtype)

    return code(norm.RMSNorm, "forward", forward)


def gated(made: Callable[[Any, Tensor, Tensor], Tensor]) -> Plant:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down(made(self.act, self.gate(x), self.up(x)))
        return out

    return code(mlp.GatedMLP, "forward", forward)


def unshared(self: Any, x: Tensor) -> Tensor:
    """Experts whose shares do not sum to one."""
    tokens = x.flatten(0, 1)
    share, index = self.router(tokens).softmax(-1).topk(self.experts_per_token, -1)
    out: Tensor = self.run_sparse(tokens, share, index).view_as(x)
    return out


def unnormed(self: Any, x: Tensor, mask: Mask) -> Tensor:
    x = x + self.attn(self.norm1(x), mask)
    out: Tensor = x + self.mlp(x)
    return out


def cut_stream(self: Any, x: Tensor, mask: Mask) -> Tensor:
    x = x + self.attn(self.norm1(x), mask)
    out: Tensor = x.detach() + self.mlp(self.norm2(x))
    return out


def detached(model: Any) -> None:
    for block in model.blocks:
        block.mlp.gate.register_forward_hook(lambda _, args, out: out.detach())


def doubled(model: Any) -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    model.blocks[1].mlp.up.register_forward_hook(lambda _, args, out: Twice.apply(out))


def weaker(model: Any) -> None:
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, out: 0.9 * out)


BACK = {"backward": True}
CODE_WRONG = [
    Case("a softmax over queries", "bert", looking(lambda s: s.softmax(-2)), OUT, r"over queries"),
    Case(
        "a softmax in bfloat16",
        "gpt2",
        looking(lambda s: s.bfloat16().softmax(-1).to(s.dtype)),
        OUT,
        r"here the softmax is computed in bfloat16",
    ),
    Case(
        "heads merged otherwise",
        "bert",
        looking(merged="b h s e -> b s (e h)"),
        OUT,
        r"here heads are interleaved",
    ),
    Case(
        "slopes of another series",
        "bloom",
        code(alibi, "slopes", lambda h: [2 ** (-8 * n / h) for n in range(1, h + 1)]),
        OUT,
        r"in the other model slopes are those of the next lower power of two",
    ),
    Case(
        "eps outside the root",
        "llama",
        rms(lambda x, eps: 1 / (x.square().mean(-1, keepdim=True).sqrt() + eps)),
        r"out blocks\.0\.norm1$",
        r"and eps beside it here, and by the root of the mean square and eps there",
    ),
    Case(
        "no eps",
        "qwen2",
        rms(lambda x, eps: torch.rsqrt(x.square().mean(-1, keepdim=True))),
        r"out blocks\.0\.norm1$",
        r"eps is 0 here and 3e-05 there",
    ),
    Case(
        "a norm whose factor is rounded",
        "llama",
        rms(lambda x, eps: torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).half().double()),
        r"out blocks\.0\.norm1$",
        r"by another number for each token, .* here, and by the root of the mean square and eps",
    ),
    Case(
        "an activation of the product",
        "mistral",
        gated(lambda act, gate, up: act(gate * up)),
        DOWN,
        r"of the product of gate and up here, and of gate there",
    ),
    Case(
        "no activation",
        "llama",
        gated(lambda act, gate, up: gate * up),
        DOWN,
        r"activation is linear here and silu there",
    ),
    Case(
        "shares that do not sum to one",
        "mixtral",
        code(moe.Experts, "forward", unshared),
        r"out blocks\.0\.mlp$",
        r"are the router's own here, and are made to sum to one there",
    ),
    Case(
        "a branch that counts less",
        "gpt2",
        tampered(weaker),
        r"in blocks\.0\.norm2$",
        r"attn\.out is in it 0\.9 times .*restored if .* counts 1\.11111 times as much",
    ),
    Case(
        "a norm left out",
        "mistral",
        code(llama.Block, "forward", unnormed),
        r"in blocks\.0\.mlp\.gate$",
        r"blocks\.\*\.norm2 does not run here",
    ),
    Case(
        "positions behind a cache",
        "gpt2",
        moved_behind(1),
        r"out positions$",
        r"from place 24 on .* off by \+1",
        options={"way": "cached"},
    ),
    Case(
        "turned behind a cache",
        "llama",
        moved_behind(1),
        OUT,
        r"here positions of tokens that come after others in a cache are off by \+1",
        options={"way": "cached"},
    ),
    Case(
        "no gradient through gates",
        "qwen2",
        tampered(detached),
        r"out blocks\.2\.mlp\.gate$",
        r"blocks\.2\.mlp\.gate is cut from its gradient",
        options=BACK,
    ),
    Case(
        "no gradient through the stream",
        "gpt2",
        code(gpt2.Block, "forward", cut_stream),
        r"in blocks\.2\.norm2$",
        r"what comes to norm is cut off here",
        options=BACK,
    ),
    Case(
        "a gradient twice",
        "neox",
        tampered(doubled),
        r"in blocks\.1\.mlp\.up$",
        r"blocks\.1\.mlp\.up gives back counts 2 times here, 1 there",
        options=BACK,
    ),
    Case(
        "a parameter that learns nothing",
        "bert",
        tampered(lambda m: m.blocks[1].attn.out.weight.requires_grad_(False)),
        r"out blocks\.1\.attn\.out\.weight$",
        r"requires_grad is off",
        options=BACK,
    ),
]


@pytest.mark.parametrize("case", CODE_WRONG, ids=str)
def test_wrong_code_is_located_and_explained(
    case: Case, made: Callable[..., Path], tmp_path: Path
) -> None:
    check(case, made, tmp_path)


# --- no bug at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"backward": True}, {"backward": True, "dtype": "bfloat16"}])
def test_shared_layers_learn_from_each_time(
    options: dict[str, Any], made: Callable[..., Path]
) -> None:
    result = zoo.diff(made("mobilellm", "layer-sharing"), **options)
    assert result.ok, result.to_text()


@pytest.mark.parametrize(
    ("name", "variant"), [("gpt2", "upcast"), ("bert", "answer"), ("neox", "base")]
)
def test_other_rounding_of_gradient_sums_is_no_difference(
    name: str, variant: str, made: Callable[..., Path]
) -> None:
    for way in ("whole", "padded", "unmasked"):
        result = zoo.diff(made(name, variant), dtype="bfloat16", backward=True, way=way)
        assert result.ok, result.to_text()


@pytest.mark.parametrize("seed", [12, 13])
def test_a_gradient_that_rounding_decides_on(seed: int, made: Callable[..., Path]) -> None:
    """A number beside the kink of relu is on the one side of it here and on the other there."""
    directory = made("distilbert", "classify")
    options = {"dtype": "bfloat16", "way": "padded", "backward": True, "seed": seed}
    result = zoo.diff(directory, **options)
    assert result.ok, result.to_text()
    model = zoo.load(directory, dtype="bfloat16")
    model.blocks[1].mlp.down.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    result = zoo.diff(model, directory, **options)
    assert result.first is not None and result.first.place == "blocks.1.mlp.down", result.to_text()


def test_tables_of_which_rows_take_what_they_need(made: Callable[..., Path]) -> None:
    result = zoo.diff(made("deberta", "content-to-place"), backward=True, way="padded")
    assert result.ok, result.to_text()


def test_positions_that_begin_elsewhere_turn_alike(made: Callable[..., Path]) -> None:
    kept = masks.positions_of
    with patch.object(masks, "positions_of", lambda *inputs: kept(*inputs) + 1):
        assert zoo.diff(made("llama")).ok


def test_what_is_lost_in_a_narrower_dtype_is_found(made: Callable[..., Path]) -> None:
    """Experts that add little: what they differ in is below the noise of what it is added to."""
    model = zoo.load(made("mixtral"), dtype="bfloat16")
    for block in model.blocks:
        block.mlp.experts_per_token = 1
    result = zoo.diff(model, made("mixtral"), dtype="bfloat16", seed=16)
    assert result.first is not None and result.first.place == "blocks.0.mlp", result.to_text()
    assert "1 experts are chosen here, and 2 there" in result.causes[0].what


def test_a_tie_is_made_again(made: Callable[..., Path]) -> None:
    model = zoo.load(made("gpt2"), dtype="float64")
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    result = zoo.diff(model, made("gpt2"))
    assert result.causes[0].restored and "the tie is broken" in result.causes[0].what
    assert model.head.weight is not model.embed.weight


# --- what cannot be held against what ------------------------------------------------------------


def test_comparisons_that_make_no_sense_are_refused(made: Callable[..., Path]) -> None:
    for name, variant in (("bert", ""), ("llama", "classify"), ("t5", "encoder")):
        with pytest.raises(UsageError, match="keeps no cache"):
            zoo.diff(made(name, variant), way="cached")
    with pytest.raises(UsageError, match="a llama and a gpt2"):
        zoo.diff(made("llama"), made("gpt2"))


# --- a module of one's own -----------------------------------------------------------------------


class Own(nn.Module):
    """Somebody's Llama under the hub's names; `bug` is what went wrong."""

    def __init__(self, c: Any, bug: str) -> None:
        super().__init__()
        self.c, self.bug = c, bug
        self.model, self.lm_head = nn.Module(), nn.Linear(c.dim, c.vocab, bias=False)
        self.model.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.model.layers = nn.ModuleList(self.layer(c) for _ in range(c.layers))
        self.model.norm = nn.RMSNorm(c.dim, c.eps)

    @staticmethod
    def layer(c: Any) -> nn.Module:
        layer, heads, groups = nn.Module(), c.heads * c.head_dim, c.kv_heads * c.head_dim
        sizes = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
        parts = {name: nn.Linear(c.dim, size, bias=False) for name, size in sizes.items()}
        parts["o_proj"] = nn.Linear(heads, c.dim, bias=False)
        layer.self_attn = nn.ModuleDict(parts)
        parts = {name: nn.Linear(c.dim, c.hidden, bias=False) for name in ("gate_proj", "up_proj")}
        parts["down_proj"] = nn.Linear(c.hidden, c.dim, bias=False)
        layer.mlp = nn.ModuleDict(parts)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, nn.RMSNorm(c.dim, c.eps))
        return layer

    def turned(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        base = 10000.0 if self.bug == "theta" else self.c.rope_base
        steps = torch.arange(0, width, 2, dtype=x.dtype) / width
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * base**-steps
        if self.bug == "pairs":
            a, b = x[..., ::2], x[..., 1::2]
        else:
            a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        halves = a * cos - b * sin, b * cos + a * sin
        return torch.stack(halves, -1).flatten(-2) if self.bug == "pairs" else torch.cat(halves, -1)

    def forward(self, input_ids: Tensor) -> Tensor:
        c, x = self.c, self.model.embed_tokens(input_ids)
        for n, layer in enumerate(self.model.layers):
            if self.bug == "layer" and n == 1:
                continue
            y = layer.input_layernorm(x)
            parts = (layer.self_attn[n](y) for n in ("q_proj", "k_proj", "v_proj"))
            q, k, v = (p.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in parts)
            q, k, times = self.turned(q), self.turned(k), c.heads // c.kv_heads
            if self.bug == "tiled":
                k, v = (p.repeat(1, times, 1, 1) for p in (k, v))
            else:
                k, v = (p.repeat_interleave(times, 1) for p in (k, v))
            scale = 1.0 if self.bug == "scale" else None
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            x = x + layer.self_attn["o_proj"](y.transpose(1, 2).flatten(2))
            y = layer.post_attention_layernorm(x)
            act = F.gelu if self.bug == "gelu" else F.silu
            x = x + layer.mlp["down_proj"](act(layer.mlp["gate_proj"](y)) * layer.mlp["up_proj"](y))
        return self.lm_head(x if self.bug == "norm" else self.model.norm(x))


@pytest.mark.parametrize(
    ("bug", "place", "cause"),
    [
        ("theta", OUT, "in the other model theta is 10000"),
        ("pairs", OUT, "neighbors are rotated as pairs"),
        ("tiled", OUT, "key and value heads are tiled"),
        ("scale", OUT, "in the other model scores are not scaled"),
        ("gelu", DOWN, "activation is silu here and gelu there"),
        ("layer", r"in blocks\.1\.norm1$", r"blocks\.1 runs here, and not in the other model"),
        ("norm", r"in norm$", "norm runs here, and not in the other model"),
    ],
)
def test_a_module_of_ones_own(bug: str, place: str, cause: str, made: Callable[..., Path]) -> None:
    model = zoo.load(made("llama"), dtype="float64")
    with safe_open(made("llama") / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for wrong in ("", bug):
        own = Own(model.config, wrong).double()
        own.load_state_dict(state)
        result = zoo.diff(model, own)
        if not wrong:
            assert result.ok, result.to_text()
    assert re.search(place, placed(result)), result.to_text()
    assert re.search(cause, str(result.causes[0])), result.to_text()
