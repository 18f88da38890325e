"""Why two models part: planted bugs are named, with the line to change, and so are users' own."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from converters.language import parse_rule
from converters.spec import load_spec
from converters.spec_lines import rule_line
from zoo import registry
from zoo.cli import app
from zoo.diagnosis.diff.difference import Cause
from zoo.diagnosis.diff.planted import Trace, Tracer, run, table
from zoo.diagnosis.faults import FAULTS
from zoo.diagnosis.planting import Mapped
from zoo.loading import load_directory

ARCHITECTURES = registry.architectures()
FEW = [
    ("gpt2", "norm1_norm2_exchanged"),
    ("gpt2", "qkv_read_as_vqk"),
    ("gpt2", "layers_out_of_order"),
    ("gpt2", "attn_out_mlp_down_bias_exchanged"),
    ("gpt2", "attn_out_transposed"),
    ("gpt2", "fused_qkv_one_after_another_read_as_interleaved"),
    ("gpt2", "last_attention_left_out"),
    ("gpt2", "positions_count_padding"),
    ("gpt2", "tie_broken"),
    ("llama", "gate_up_exchanged"),
    ("llama", "k_rows_in_halves_of_q_heads"),
    ("llama", "embed_head_exchanged"),
    ("llama", "rope_factor_a_tenth_larger"),
    ("llama", "keys_not_rotated"),
    ("llama", "norm_moved_in_branch"),
    ("llama", "first_two_layers_exchanged"),
    ("bert", "k_rows_in_halves"),
    ("bert", "padding_attended"),
    ("bert", "pooler_reads_last_token"),
    ("bert", "dropout_active"),
]


@pytest.fixture(scope="module")
def tracers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tracer]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scratch = tmp_path_factory.mktemp("traced")
    yield functools.cache(lambda name: Tracer(ARCHITECTURES[name], scratch))
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "bug"), FEW, ids=lambda value: value)
def test_planted_bug_is_located_and_explained(
    name: str, bug: str, tracers: Callable[[str], Tracer]
) -> None:
    result = tracers(name).trace(FAULTS[bug])
    assert result is not None and result.ok, result


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_planted_bug(name: str) -> None:
    """Each is located; the right cause is the first in nine of ten."""
    traces = list(run([ARCHITECTURES[name]]))
    assert not [t for t in traces if not t.located]
    assert sum(t.diagnosed for t in traces) >= 0.9 * len(traces), table(traces, ())


def test_the_table_counts_what_fell_short() -> None:
    traces = [
        Trace("a", "fine", True, True),
        Trace("a", "unseen", False, False),
        Trace("b", "misread", True, False, "base", "out norm", ("a | b",)),
    ]
    message = table(traces, {("a", "fine"), ("b", "misread")})
    assert "| a | 2 | 1 | 1 | 1 | 0 |" in message and "| all | 3 | 2 | 2 | 1 | 0 |" in message
    assert "| unseen | a | nowhere | nothing |" in message and "a \\| b" in message


def planted(directory: Path, name: str, change: Callable[[str, list[str]], Any]) -> Any:
    """A model that was read by an edited spec."""
    load = functools.partial(load_directory, directory, ARCHITECTURES[name], dtype=torch.float64)
    spec = load_spec(ARCHITECTURES[name].spec)
    return load(spec=Mapped(spec, load().config).edited(change))


def test_the_line_to_change_is_named(made: Callable[[str], Path]) -> None:
    """Also where it stands in the file of the architecture that a spec is laid over."""

    def pairs(source: str, targets: list[str]) -> tuple[str, list[str]]:
        if not targets[0].startswith("blocks.") or ".attn.k.weight" not in targets[0]:
            return source, targets
        name = targets[0].partition(" [")[0]
        return f"{source.partition(' [')[0]} [(g e two) i]", [f"{name} [(g two e) i]"]

    spec = load_spec("qwen2")
    model = planted(made("llama"), "llama", lambda s, t: pairs(s, t))
    cause = zoo.diff(model, made("llama")).causes[0]
    assert cause.restored, cause
    assert "blocks.*.attn.k is read as [o i]" in cause.fix
    text = Path("converters/specs/llama/hf.yaml").read_text().splitlines()
    line = next(n for n, each in enumerate(text, 1) if "self_attn.{n=q_proj" in each)
    assert f"line {line} of converters/specs/llama/hf.yaml: " in cause.change
    assert rule_line(spec, "blocks.3.attn.k.weight").startswith(f"line {line} of ")
    assert rule_line(spec, "blocks.3.attn.nothing") == ""


def test_a_field_read_wrong_where_no_config_says_it(made: Callable[[str], Path]) -> None:
    """Against another native model: nothing but the numbers tells which field it is."""
    ours = zoo.load(made("llama"), dtype="float64", config={"rope_base": 1234.0})
    theirs = zoo.load(made("llama"), dtype="float64")
    ours.provenance = None
    cause = zoo.diff(ours, theirs).causes[0]
    assert cause.restored and f"rope_base is {theirs.config.rope_base:g}"[:12] in cause.fix
    result = zoo.diff(zoo.load(made("llama"), config={"eps": 7e-4}), theirs, dtype="float32")
    assert result.causes[0].restored and "eps" in result.causes[0].what


def test_what_the_class_itself_does_wrong(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No healthy model of the class is there to be held against: both are fitted."""
    from zoo.components import mlp, rotary

    kept = rotary.rotate

    def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return kept(x, cos, -sin)

    with monkeypatch.context() as patch:
        patch.setattr(rotary, "rotate", backwards)
        cause = zoo.diff(made("llama")).causes[0]
    assert cause.restored and "rotated backwards" in cause.what
    with monkeypatch.context() as patch:
        patch.setattr(
            mlp.GatedMLP,
            "forward",
            lambda self, x: self.down(self.gate(x) * self.act(self.up(x))),
        )
        cause = zoo.diff(made("llama")).causes[0]
    assert cause.restored and "gate" in cause.what and "up" in cause.what


def test_nothing_is_claimed_that_was_not_seen(made: Callable[[str], Path]) -> None:
    """A change that no standard cause explains is told as what it is, and the model is left so."""
    model = zoo.load(made("gpt2"), dtype="float64")
    model.blocks[1].mlp.up.register_forward_hook(lambda _, args, out: out + out.square())
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = zoo.diff(model, made("gpt2"))
    assert result.first is not None and result.first.place == "blocks.1.mlp.up"
    assert not any(cause.restored and cause.fix for cause in result.causes)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert zoo.diff(model, made("gpt2"), diagnose=False).causes == []
    with torch.no_grad():
        model.blocks[0].attn.out.bias.zero_()
    cause = zoo.diff(model, made("gpt2")).causes[0]
    assert cause.tried and not cause.restored and cause.after == "blocks.1.mlp.up"


def test_what_a_cause_says() -> None:
    restored = Cause("a and b are exchanged", "they are put back", "Change line 3.", True, True)
    assert str(restored) == (
        "a and b are exchanged. Parity is restored if they are put back. Change line 3."
    )
    moved = replace(restored, restored=False, after="blocks.1.norm1", change="")
    assert str(moved).endswith(
        "If they are put back, the first difference moves on to blocks.1.norm1."
    )
    assert "Not confirmed" in str(replace(moved, tried=False))


def test_diff_command_reports_the_cause(
    made: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    model = zoo.load(made("gpt2"))
    with torch.no_grad():
        model.blocks[1].attn.out.bias.zero_()
    zoo.save(model, tmp_path / "changed")
    asked = ["diff", str(tmp_path / "changed"), str(made("gpt2"))]
    assert app.main(asked) == 1
    assert "cause: blocks.1.attn.out.bias is zero: it was dropped." in capsys.readouterr().out
    assert app.main([*asked, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["causes"][0]["restored"]
    assert app.main([*asked, "--no-diagnose"]) == 1
    assert "cause" not in capsys.readouterr().out


def test_a_rule_is_found_by_what_it_makes() -> None:
    rule = parse_rule("a.{layer}.b", "blocks.{layer}.norm1.weight")
    assert rule.targets[0].name.match("blocks.2.norm1.weight")
    assert "line " in rule_line(load_spec("gpt2"), "blocks.2.norm1.weight")
