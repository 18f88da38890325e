"""zoo.diff: of two models that are one no place differs; of others the first that does is named."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.cli import app
from zoo.diagnosis.diff.difference import Difference
from zoo.diagnosis.faults import FAULTS
from zoo.diagnosis.gate import planted
from zoo.errors import UsageError
from zoo.loading import load_directory

ARCHITECTURES = registry.architectures()
# tables by distance, of which the reference takes the rows it needs, and a bias that stands alone
INCOMPARABLE = re.compile(r"\bpos_[kq]$|\bdistances\b|^predictions|^head$")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_difference(name: str, made: Callable[..., Path]) -> None:
    result = zoo.diff(made(name))
    assert result.ok, result.to_text()
    modules = {reading.match.native for reading in result.readings}
    model = zoo.load(made(name))
    parameters = {n.rpartition(".")[0] for n, _ in model.named_parameters(remove_duplicate=False)}
    assert not [m for m in parameters - modules if not INCOMPARABLE.search(m)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"way": "padded"},
        {"way": "padded", "backward": True},
        {"backward": True},
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_no_difference_in_other_ways(
    name: str, options: dict[str, Any], made: Callable[..., Path]
) -> None:
    result = zoo.diff(made(name), **options)
    assert result.ok, result.to_text()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_no_difference_with_a_cache(name: str, made: Callable[..., Path]) -> None:
    result = zoo.diff(made(name), way="cached")
    assert result.ok, result.to_text()


def of_mutant(directory: Path, name: str, bug: str, **options: Any) -> Difference:
    load = functools.partial(load_directory, directory, ARCHITECTURES[name])
    model = planted(load, FAULTS[bug], ARCHITECTURES[name], torch.float64)
    return zoo.diff(model, directory, **options)


@pytest.mark.parametrize(
    ("name", "bug", "place"),
    [
        ("gpt2", "norm1_norm2_exchanged", ""),
        ("gpt2", "k_v_exchanged", "blocks.0.attn"),
        ("gpt2", "attn_out_transposed", "blocks.0.attn.out"),
        ("gpt2", "eps_ten_times", "blocks.0.norm1"),
        ("gpt2", "act_other_gelu", "blocks.0.mlp"),
        ("gpt2", "positions_off_by_one", "positions"),
        ("gpt2", "future_visible", "blocks.0.attn"),
        ("gpt2", "last_attention_left_out", "blocks.2"),
        ("gpt2", "one_tensor_through_fp16", "blocks.0.mlp.down"),
        ("gpt2", "vocabulary_rows_off_by_+1", "embed"),
        ("gpt2", "final_norm_missing", "norm"),
        ("llama", "gate_up_exchanged", "blocks.0.mlp"),
        ("llama", "k_rows_in_halves_of_q_heads", "blocks.0.attn"),
        ("llama", "rope_base_default", "blocks.0.attn"),
        ("llama", "keys_not_rotated", "blocks.0.attn"),
        ("llama", "embed_head_exchanged", "embed"),
    ],
)
def test_the_place_is_named(name: str, bug: str, place: str, made: Callable[..., Path]) -> None:
    result = of_mutant(made(name), name, bug)
    assert result.first is not None
    assert result.first.place == place, result.to_text()


def test_padding_and_ties_have_ways_of_their_own(made: Callable[..., Path]) -> None:
    directory = made("gpt2")
    assert of_mutant(directory, "gpt2", "positions_count_padding").ok
    padded = of_mutant(directory, "gpt2", "positions_count_padding", way="padded")
    assert padded.first is not None and padded.first.place == "positions"
    assert of_mutant(directory, "gpt2", "tie_broken").untied == [("head.weight", "embed.weight")]


def test_the_first_gradient_to_differ(made: Callable[..., Path]) -> None:
    """A state kept from its gradient computes the same, and learns nothing before it."""
    model = zoo.load(made("gpt2"), dtype="float64")
    model.blocks[1].mlp.up.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    assert zoo.diff(model, made("gpt2")).ok
    result = zoo.diff(model, made("gpt2"), backward=True)
    assert result.first is not None and result.back
    assert result.first.place == "blocks.1.mlp.up"
    assert "is cut from its gradient" in result.causes[0].what


def test_two_native_models(made: Callable[..., Path]) -> None:
    ours, theirs = (zoo.load(made("llama")) for _ in range(2))
    assert zoo.diff(ours, theirs).ok
    with torch.no_grad():
        theirs.blocks[1].mlp.gate.weight.mul_(1.001)
    result = zoo.diff(ours, theirs)
    assert result.first is not None and result.first.place == "blocks.1.mlp.gate"
    assert result.first.measurement.match.parameters.keys() == {"blocks.1.mlp.gate.weight"}


@pytest.mark.parametrize("name", first_of(ARCHITECTURES))
def test_two_loaded_models_with_one_checkpoint_do_not_differ(
    name: str, made: Callable[..., Path]
) -> None:
    """Also where names share an array: a tied head, T5's embedding, MobileLLM's shared layers."""
    ours, theirs = (zoo.load(made(name), modules=False) for _ in range(2))
    same = zoo.diff(ours, theirs)
    assert same.ok, same.to_text()
    assert not same.untied
    with torch.no_grad():
        theirs.embed.weight.mul_(1.001)
    changed = zoo.diff(ours, theirs, diagnose=False)
    assert changed.first is not None and not changed.untied


VARIANTS = [(name, v) for name, entry in ARCHITECTURES.items() for v in [*entry.variants][1:]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_two_loaded_variants_do_not_differ(
    name: str, variant: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    directory = made(name, variant)
    native = zoo.convert(directory, tmp_path / "native", to="native")
    model, again = (zoo.load(directory, modules=False) for _ in range(2))
    for ours, theirs in ((model, again), (model, native), (native, native), (native, directory)):
        result = zoo.diff(ours, theirs)
        assert result.ok, result.to_text()


def test_models_that_cannot_be_matched_are_refused(
    made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, llama = zoo.load(made("gpt2")), zoo.load(made("llama"))
    with pytest.raises(UsageError, match="a gpt2 and a llama"):
        zoo.diff(model, llama)
    with pytest.raises(UsageError, match=r"head 'lm' and 'none'.* Load both with the same head"):
        zoo.diff(model, zoo.load(made("gpt2"), head="none"))
    with pytest.raises(UsageError, match=r"different arrays.*: layers 3 and 2\."):
        small = zoo.load(made("gpt2"), weights="random", config={"layers": 2})
        zoo.diff(model, small)
    with pytest.raises(UsageError, match="tied True and False"):
        zoo.diff(model, made("gpt2", "untied"))
    assert app.main(["diff", str(made("llama")), str(made("llama", "multi-head"))]) == 2
    assert "dim 72 and 40" in capsys.readouterr().err


def test_adapters_are_refused(made: Callable[..., Path]) -> None:
    model, adapted = (zoo.load(made("gpt2")) for _ in range(2))
    adapted.add_adapter(("c_attn",), r=2)
    with pytest.raises(UsageError, match="the first model has a LoRA adapter"):
        zoo.diff(adapted)
    with pytest.raises(UsageError, match="the second model has a LoRA adapter"):
        zoo.diff(model, adapted)
    adapted.merge_adapter()
    assert zoo.diff(model, adapted).ok  # it is new, and changes nothing


@pytest.mark.parametrize("name", first_of(ARCHITECTURES))
def test_a_native_directory(name: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """Tied names are one in it; a change of an array is seen."""
    directory = zoo.convert(made(name), tmp_path / "native", to="native")
    assert zoo.diff(made(name), directory).ok
    assert app.main(["diff", str(directory), str(directory)]) == 0
    model = zoo.load(directory, dtype="float64")
    with torch.no_grad():
        model.embed.weight.mul_(1.001)
    result = zoo.diff(model, directory, diagnose=False)
    assert result.first is not None and not result.untied


class Own(nn.Module):
    """Somebody's GPT-2 under the names of books, with a norm's eps of its own."""

    def __init__(self, model: Any, eps: float) -> None:
        super().__init__()
        c = model.config
        self.tok_emb, self.pos_emb = nn.Embedding(c.vocab, c.dim), nn.Embedding(c.positions, c.dim)
        self.trf_blocks = nn.ModuleList(self.block(c, eps) for _ in range(c.layers))
        self.final_norm = Norm(c.dim, c.eps)
        self.out_head = nn.Linear(c.dim, c.vocab, bias=False)
        self.heads = c.heads

    @staticmethod
    def block(c: Any, eps: float) -> nn.ModuleDict:
        names = ("W_query", "W_key", "W_value", "out_proj")
        att = nn.ModuleDict({name: nn.Linear(c.dim, c.dim) for name in names})
        layers = nn.Sequential(
            nn.Linear(c.dim, c.hidden), nn.GELU(approximate="tanh"), nn.Linear(c.hidden, c.dim)
        )
        ff = nn.ModuleDict({"layers": layers})
        norms = {"norm1": Norm(c.dim, c.eps), "norm2": Norm(c.dim, eps)}
        return nn.ModuleDict({"att": att, "ff": ff, **norms})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        for block in self.trf_blocks:
            a, y = block["att"], block["norm1"](x)
            q, k, v = (
                a[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for n in ("W_query", "W_key", "W_value")
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + a["out_proj"](y.transpose(1, 2).flatten(2))
            x = x + block["ff"]["layers"](block["norm2"](x))
        return self.out_head(self.final_norm(x))


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.eps)


def test_a_module_of_ones_own(made: Callable[..., Path], tmp_path: Path) -> None:
    model = zoo.load(made("gpt2"), config={"eps": 1e-5})
    zoo.save(model, tmp_path / "book", to="book")
    (file,) = (p for p in (tmp_path / "book").iterdir() if p.suffix in (".pth", ".pt"))
    state = torch.load(file, weights_only=True)
    for eps, place in ((model.config.eps, None), (1e-3, "blocks.0.norm2")):
        own = Own(model, eps)
        own.load_state_dict({n: state[n] for n in own.state_dict()})
        result = zoo.diff(model, own)
        assert (result.first.place if result.first else None) == place, result.to_text()
    with pytest.raises(UsageError, match="fit no dialect of gpt2"):
        zoo.diff(model, nn.Linear(3, 4))


def test_diff_command_reports_the_first_difference(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["diff", str(made("gpt2"))]) == 0
    assert "no difference" in capsys.readouterr().out
    changed = tmp_path / "changed"
    model = zoo.load(made("gpt2"))
    with torch.no_grad():
        model.blocks[1].attn.out.bias.add_(0.01)
    zoo.save(model, changed)
    assert app.main(["diff", str(changed), str(made("gpt2")), "--json"]) == 1
    message = json.loads(capsys.readouterr().out)
    assert message["first"]["place"] == "blocks.1.attn.out"
    assert message["first"]["others"] == ["transformer.h.1.attn.c_proj"]
    assert app.main(["diff", str(changed), str(made("gpt2"))]) == 1
    assert "blocks.1.attn.out" in capsys.readouterr().out
    assert app.main(["diff", str(changed), "--way", "padde"]) == 2
    assert "padded" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [10**25, -1, 1.5, None])
def test_a_seed_that_no_generator_takes_is_refused(made: Any, seed: Any) -> None:
    with pytest.raises(UsageError, match="seed="):
        zoo.diff(made("gpt2"), seed=seed)
