"""The catalogue of faults: one table of mistakes that are made when a model is ported.

A row has a name to search for and an invertible edit from one of a few families. Three commands use
the table: `make mutants` plants each fault that has a place (`at`) in every architecture that it
applies to, `zoo diff` tries what undoes a fault where two models differ, and `zoo diagnose` tries
the same on a text. A new fault is one row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.attention import Attention
from zoo.components.masks import Mask
from zoo.components.mlp import MLP, GatedMLP
from zoo.components.model import Model
from zoo.components.moe import Experts
from zoo.components.rotary import PLAIN
from zoo.diagnosis import attention, planting
from zoo.diagnosis.attention import at, rotates
from zoo.diagnosis.edits import PARTS, Hypothesis, block_of
from zoo.diagnosis.families import (
    AddedTable,
    AnyField,
    Attends,
    Code,
    Copied,
    Exchange,
    ExchangedTransposed,
    ExpertOrder,
    Family,
    Fused,
    LayerOrder,
    NormOffset,
    PermutedRows,
    RowsOff,
    Rules,
    Scaled,
    Transposed,
    WrongField,
)
from zoo.diagnosis.kinds import blocks, kinds


@dataclass(frozen=True)
class Fault:
    """A mistake: its name, its edit, and where it shows when it is planted.

    `at` is a pattern of where numbers first differ ("in" or "out" of a module); a fault without
    one is searched for and not planted. `cause` is a pattern of the cause that `zoo diff` reports
    first: without it, that cause has to bear the fault's name, or name its config field.
    """

    name: str
    edit: Family
    at: str = ""
    cause: str = ""

    @property
    def kind(self) -> planting.Target:
        """What it is planted in."""
        return self.edit.kind

    def hypotheses(self, model: Model, rules: Rules) -> Iterator[Hypothesis]:
        """What undoes this fault in a model."""
        yield from (replace(each, fault=self.name) for each in self.edit.undo(model, rules))

    def is_named(self, fault: str, text: str) -> bool:
        """Whether a reported cause is this fault, by its name or by what it says."""
        field = rf"\b{self.edit.name} is" if isinstance(self.edit, WrongField) else ""
        pattern = self.cause or field
        return fault == self.name or bool(pattern and re.search(pattern, text))


# --- the table -----------------------------------------------------------------------------------

# where the numbers of a fault first differ, by what it is in
OUT = r"in .*blocks\.0\.attn\.(out|[qk], time 2)$"
MLP_IN = r"in .*blocks\.0\.mlp\.down$|out .*blocks\.0\.mlp$"
FIRST = r"in .*blocks\.0\.(norm1|norm_attn|norm_mlp|attn\.[qkv])$"
NORM = r"out .*norm\w*$"
NORM1 = r"(in|out) .*blocks\.0\.norm1$"
POSITIONS = r"out positions$"
WINDOW = r"in blocks\.[01]\.attn\.out$"
MIDDLE = r"in .*blocks\.0\.(norm\w+|mlp\.\w+)$"
SECOND = r"in (decoder\.blocks\.1\.norm_cross|blocks\.2\.(norm\w+|mlp\.\w+)|norm)$"
FINAL = r"in (decoder\.)?norm$|in head(\.dense)?$"
HALVES, PAIRS = "{} two e", "{} e two"
NORMS = ("norm1", "norm2", "norm1_out", "norm2_out", "norm_attn", "norm_mlp", "norm_cross")


def _equal_heads(config: Any) -> bool:
    return bool(config.heads == getattr(config, "kv_heads", config.heads))


def _is_untied(config: Any) -> bool:
    return not getattr(config, "tied", False) and config.head == "lm"


def _has_windows(config: Any) -> bool:
    return hasattr(config, "windows") and any(config.windows())


def _doubled_distance(distance: int, config: Any) -> int:
    # without buckets for far distances, DeBERTa's table has a row for each: its shape would change
    fixed = getattr(config, "log_buckets", 1) <= 0
    return distance if fixed else 2 * int(getattr(config, "longest", distance))


# fmt: off
def _rotary_rows() -> Iterator[Fault]:
    """Rows of queries and keys in halves where pairs are meant, or the reverse."""
    for a, b, lie in ((PAIRS, HALVES, "pairs"), (HALVES, PAIRS, "halves")):
        for parts in (PARTS[:2], ("k",), ("q",)):
            planted = lie == "halves" and len(parts) == 1
            name = f"{'_'.join(parts)}_rows_in_{lie}"
            yield Fault(name, PermutedRows(parts, a, b), OUT * planted)
    for part, other in (("k", "q"), ("k", "one"), ("q", "k"), ("q", "one")):
        for a, b, lie in ((PAIRS, HALVES, "pairs"), (HALVES, PAIRS, "halves")):
            for again in (False, True):
                planted = (part, other, lie, again) == ("k", "q", "halves", False)
                name = f"{part}_rows_in_{lie}_of_{other}_heads{'_again' * again}"
                yield Fault(name, PermutedRows((part,), a, b, other, again), OUT * planted)


def _roles() -> Iterator[Fault]:
    """Queries, keys, values and what reads them in each other's place."""
    yield Fault("q_k_exchanged", Exchange.of("q", "k", _equal_heads), OUT)
    yield Fault("k_v_exchanged", Exchange.of("k", "v"), OUT)
    yield Fault("q_v_exchanged", Exchange.of("q", "v"))
    cycle = {"q": "v", "k": "q", "v": "k"}
    yield Fault("qkv_read_as_vqk", Exchange(cycle, _equal_heads), OUT)
    yield Fault("qkv_read_as_kvq", Exchange({b: a for a, b in cycle.items()}))
    yield Fault("q_out_exchanged", Exchange.of("q", "out"))
    yield Fault("v_out_exchanged", Exchange.of("v", "out"))


def _fused() -> Iterator[Fault]:
    """Fused queries, keys and values: each with heads of its own, or some shared."""
    layouts = {"o n": "interleaved", "h n e": "head_by_head", "n o": "one_after_another"}
    grouped = {"(q|k|v)": "parts", "(g (r|one|one) e)": "groups"}
    for names in (layouts, grouped):
        for read, lie in permutations(names, 2):
            planted = (lie, read) == ("n o", "o n")
            name = f"fused_qkv_{names[lie]}_read_as_{names[read]}"
            yield Fault(name, Fused(lie, read), OUT * planted)


def _heads() -> Iterator[Fault]:
    """Rows that go through all heads before the next one of each; queries that share a key."""
    for parts in (("v",), ("out",), ("q",), ("k",), PARTS, (*PARTS, "out")):
        planted = parts in (("v",), ("out",))
        name = f"{'_'.join(parts)}_heads"
        yield Fault(f"{name}_interleaved", PermutedRows(parts, "e {}", "{} e"), OUT * planted)
        yield Fault(f"{name}_not_interleaved", PermutedRows(parts, "{} e", "e {}"))
    yield Fault("q_out_heads_as_r_g", PermutedRows(("q", "out"), "r g e", "g r e"))
    yield Fault("q_out_heads_as_g_r", PermutedRows(("q", "out"), "g r e", "r g e"))


def _exchanges() -> Iterator[Fault]:
    """Other parameters in each other's place."""
    planted = {("norm1", "norm2"): FIRST, ("norm1", "norm1_out"): FIRST,
               ("norm2", "norm1_out"): r"in .*blocks\.0\.norm1_out$"}
    yield Fault("gate_up_exchanged", Exchange.of("gate", "up"), MLP_IN, r"gate and .*up are exch")
    for a, b in combinations(NORMS, 2):
        yield Fault(f"{a}_{b}_exchanged", Exchange.of(a, b), planted.get((a, b), ""))
    edit = Exchange.of("attn.out.bias", "mlp.down.bias")
    yield Fault("attn_out_mlp_down_bias_exchanged", edit, MIDDLE)
    yield Fault("norm_weight_bias_exchanged", Exchange.of("weight", "bias"))
    edit = Exchange({"blocks.0.norm1": "norm", ".norm": "blocks.0.norm1"})
    yield Fault("first_norm_final_norm_exchanged", edit, rf"in norm$|{FIRST}")
    yield Fault("embed_head_exchanged", Exchange.of("embed", "head", _is_untied), r"out embed$")
    edit = Exchange.of("encoder.distances", "decoder.distances")
    yield Fault("distances_of_stacks_exchanged", edit)
    yield Fault("head_holds_embed", Copied("head", "embed"))
    yield Fault("embed_holds_head", Copied("embed", "head"))


def _transposes() -> Iterator[Fault]:
    """Square matrices transposed, and others written in the other order."""
    sets: tuple[tuple[str, ...], ...] = (
        ("q",), ("k",), ("v",), ("out",), (), PARTS, ("q", "k"), ("q", "out"), ("v", "out"),
        (*PARTS, "out"),
    )
    for parts in sets:
        at = r"out blocks\.0\.attn\.out$" if parts == ("out",) else ""
        name = f"attn_{'_'.join(parts) or 'squares'}_transposed"
        yield Fault(name, Transposed((Attention,), parts), at)
    for parts in (("gate",), ("up",), ("down",), ("gate", "up", "down"), ("up", "down")):
        types = (MLP,) if parts == ("up", "down") else (MLP, GatedMLP)
        yield Fault(f"mlp_{'_'.join(parts)}_transposed", Transposed(types, parts))
    yield Fault("up_down_exchanged_transposed", ExchangedTransposed("up", "down"))
    yield Fault("head_dense_transposed", Transposed((nn.Linear,), module="head.dense"))


def _numbers() -> Iterator[Fault]:
    """Offsets, rows of tables, and scales."""
    yield Fault("norm_offset_missing", NormOffset(-1))
    yield Fault("norm_offset_added", NormOffset(1), r"out .*blocks\.0\.norm1$", r"is off by \+1")
    tables = {"vocabulary": 3, "embed": 1, "head": 1, "positions": 3}
    for table, most in tables.items():
        names = () if table == "vocabulary" else (f"{table}.weight",)
        for by in (sign * n for n in range(1, most + 1) for sign in (-1, 1)):
            at = r"out embed$" if (table, by) == ("vocabulary", 1) else ""
            yield Fault(f"{table}_rows_off_by_{by:+d}", RowsOff(by, names), at, r"off by \+1 row")
    yield Fault("types_added", AddedTable("types.weight"))
    yield Fault("positions_added", AddedTable("positions.weight"))
    yield Fault("type_of_plain_text", AddedTable("types.weight", row=1))
    yield Fault("embed_divided_by_root_of_width", Scaled("embed", -1))
    yield Fault("head_divided_by_root_of_width", Scaled("head", -1))
    yield Fault("embed_multiplied_by_root_of_width", Scaled("embed", 1))
    yield Fault("head_multiplied_by_root_of_width", Scaled("head", 1), r"in head$",
                r"head is [\d.]+ times")


def _fields() -> Iterator[Fault]:
    """Config fields with a wrong value, as they are planted; then any field with another."""
    def field(fault: str, name: str, wrong: Callable[[Any, Any], Any], at: str,
              cause: str = "") -> Fault:
        return Fault(fault, WrongField(name, wrong), at, cause)

    gelu, gelus = r"(act|mlp) is .*(silu|gelu)", {"gelu": "gelu_new", "gelu_new": "gelu",
                                                  "gelu_pytorch_tanh": "gelu"}
    yield field("eps_ten_times", "eps", lambda eps, c: 10 * eps, NORM)
    yield field("eps_of_another_library", "eps", lambda eps, c: 1e-5 if eps == 1e-6 else 1e-6, NORM)
    yield field("rope_base_default", "rope_base", lambda base, c: 10000.0, OUT,
                r"rope_base is 10000\.0, not")
    yield field("rope_scaling_ignored", "rope", lambda rope, c: PLAIN.to_json(), OUT,
                r"rope is .*default.*, not")
    yield field("rope_factor_a_tenth_larger", "rope",
                lambda rope, c: rope | {k: 1.1 * rope[k] for k in rope if k == "factor"}, OUT,
                r"rope is .*factor.*, not .*factor")
    yield field("rope_ramp_rounding", "rope",
                lambda rope, c: rope | {k: not rope[k] for k in rope if k == "truncate"}, OUT,
                r"rope is .*, not .*truncate")
    yield field("act_other_gelu", "act", lambda act, c: gelus.get(act, act), MLP_IN, gelu)
    yield field("act_silu_for_gelu", "act",
                lambda act, c: "gelu" if act in ("silu", "swish") else "silu", MLP_IN, gelu)
    yield field("window_off_by_one", "window", lambda n, c: n + _has_windows(c), WINDOW)
    yield field("window_ignored", "window",
                lambda n, c: max(n, 10**6) if _has_windows(c) else n, WINDOW)
    yield field("one_expert_fewer", "experts_per_token",
                lambda n, c: n - 1 if c.experts and n > 1 else n, MLP_IN)
    yield field("parallel_branches", "parallel", lambda flag, c: not flag,
                r"in blocks\.0\.(norm2|mlp\.up)$|out blocks\.0\.norm2$")
    yield field("layers_run_twice", "repeat", lambda flag, c: not flag,
                r"in blocks\.[01]\.norm1(, time 2)?$")
    yield field("score_cap_missing", "score_cap", lambda cap, c: None, OUT)
    yield field("distance_doubled", "max_distance", _doubled_distance, OUT)
    # of an encoder-decoder only generation needs it
    yield field("padding_unknown", "pad", lambda pad, c: pad if hasattr(c, "start") else None,
                r"out (embed\.weight|the model)$")
    yield Fault("config_field", AnyField())


def _attention() -> Iterator[Fault]:
    """Attention that computes another function of the same queries, keys and values."""
    a = attention

    def fault(name: str, group: str, what: str, change: a.Change, *, text: bool = False,
              at: str = OUT, when: Callable[[Any], object] = lambda model: True) -> Fault:
        return Fault(name, Attends(group, what, change, text, when), at)

    yield fault("rotary_missing", "rotary", "queries and keys are not rotated", a.unrotated,
                text=True)
    yield fault("keys_not_rotated", "rotary", "keys are not rotated",
                rotates(lambda rotary, q, k, mask: (rotary(q, k, mask)[0], k)))
    yield fault("queries_not_rotated", "rotary", "queries are not rotated", at="",
                change=rotates(lambda rotary, q, k, mask: (q, rotary(q, k, mask)[1])))
    yield fault("queries_one_position_ahead", "rotary",
                "queries are rotated as if one position ahead", rotates(a.queries_moved(1)))
    yield fault("queries_one_position_behind", "rotary", at="",
                what="queries are rotated as if one position behind",
                change=rotates(a.queries_moved(-1)))
    yield fault("rotated_backwards", "rotary", "queries and keys are rotated backwards",
                rotates(lambda rotary, q, k, m: rotary(q, k, at(m, -m.positions))), text=True)
    yield fault("neighbors_rotated", "rotary", "neighbors are rotated as pairs, not halves",
                rotates(a.pairs_of_neighbors))
    yield fault("scores_not_scaled", "scale", "scores are not scaled",
                a.scaled(lambda f, s: 1.0), text=True)
    yield fault("scores_scaled_by_head_width", "scale", at="", text=True,
                what="scores are divided by the root of the head's width",
                change=a.scaled(lambda f, s: s.width**-0.5))
    yield fault("scores_scaled_by_model_width", "scale", text=True,
                what="scores are divided by the root of the whole width",
                change=a.scaled(lambda f, s: s.config.dim**-0.5))
    yield fault("scores_scaled_twice", "scale", "scores are divided by the head's width",
                a.scaled(lambda f, s: 1.0 / s.width), text=True, at="")
    yield fault("scores_scaled_by_layer", "scale", at="", text=True,
                what="scores are divided by the layer's number, too", change=a.scaled_by_layer)
    yield fault("scores_not_scaled_by_layer", "scale", at="",
                what="scores are not divided by the layer's number",
                change=a.scaled(lambda f, s: f.scale * s.layer))
    yield fault("mask_off_by_one", "mask", "tokens see one position ahead", a.masked(a.one_ahead),
                when=planting.is_causal)
    yield fault("own_position_hidden", "mask", "a token does not see itself",
                a.masked(a.without_itself))
    yield fault("future_visible", "mask", "the future is visible", a.masked(a.both_ways),
                when=planting.is_causal)
    yield fault("kv_heads_tiled", "kv", change=a.tiled,
                what="key and value heads are tiled over the queries', not repeated")


def _code() -> Iterator[Fault]:
    """Structural mistakes of code; what plants each has its name."""
    p = planting

    def fault(tamper: Callable[[Any], object], at: str, cause: str) -> Fault:
        return Fault(tamper.__name__, Code(tamper), at, cause)

    def fed(name: str, module: str, change: Callable[..., Tensor], at: str, cause: str) -> Fault:
        return Fault(name, Code(partial(p.feed, name=module, change=change)), at, cause)

    def cross(name: str, change: Callable[..., Tensor], at: str, cause: str) -> Fault:
        return Fault(name, Code(partial(p.cross_attention, change=change)), at, cause)

    yield fault(p.padding_attended, rf"{POSITIONS}|in norm$|in .*blocks\.0\.(norm1|attn\.out)$",
                r"padding is looked at")
    yield fault(p.token_types_ignored, r"out types$", r"types.* ignored")
    yield fault(p.outputs_exchanged, r"out the model$", r"outputs are exchanged")
    yield fed("pooler_reads_last_token", "pooler", lambda x, *_: x.flip(1), r"in pooler\.dense$",
              r"the last token")
    yield fault(p.final_norm_missing, r"out (decoder\.)?norm$", r"norm is missing")
    yield fault(p.positions_off_by_one, POSITIONS, r"off by \+1")
    # RoBERTa's are counted from 2 on, which is ignored with the padding
    yield fed("positions_count_padding", "positions",
              lambda ids: torch.arange(ids.shape[1]).expand_as(ids), POSITIONS,
              r"count the padding|off by -2")
    yield fault(p.distance_directions, OUT, r"distances ahead")
    yield fault(p.distances_reversed, OUT, r"distances are counted the other way")
    yield fault(p.content_to_position_exchanged, OUT,
                r"here (content attends to positions|positions attend to content)")
    yield fault(p.distance_norm_missing, OUT,
                r"distances(\.norm does not run here| are not normed)")
    yield fault(p.convolution_reads_padding, r"in conv\.norm$", r"padding is read")
    yield fed("convolution_after_layer", "conv", lambda x, y: y, r"in conv\.conv$",
              r"norm2 is in it")
    yield fault(p.distance_bias_first_layer_only, r"in .*blocks\.1\.attn\.out$",
                r"no bias by distance")
    yield cross("decoder_reads_itself",
                lambda read, x, mask, y: read(x, Mask(None, mask.positions)),
                r"in decoder\.blocks\.0\.cross\.[kv]$", r"norm_cross is in it once here")
    yield cross("decoder_reads_padding",
                lambda read, x, mask, y: read(x, Mask(None, mask.positions), y),
                r"in decoder\.blocks\.0\.cross\.out$", r"question's padding is looked at")
    yield fault(p.norm_centers_input, NORM1, r"norm1.* centered")
    yield fault(p.norm_does_not_center, r"out blocks\.0\.norm2$", r"norm2.* not centered here")
    yield fault(p.norm_moved_in_branch, rf"{NORM1}|in .*blocks\.0\.attn\.[qkv]$", r"norm is moved")
    yield fault(p.last_attention_left_out, SECOND, r"attn\.out is in it not at all here")
    yield fault(p.last_layer_skipped, FINAL, r"blocks\.[12] does not run here")
    yield fault(p.first_two_layers_exchanged, FIRST.replace("in .*", r"(in|out) (encoder\.)?"),
                r"blocks\.0 holds what .*blocks\.1 should")
    yield fault(p.one_tensor_through_fp16, r"out .*blocks\.0\.mlp(\.down)?$",
                r"mlp\.down.* float16")
    yield fault(p.bias_dropped, r"out blocks\.0\.attn\.out$", r"attn\.out\.bias is zero")
    yield fault(p.tie_broken, r"tie .*embed\.weight", r"tie is broken")
    yield fault(p.dropout_active, r"in (encoder\.)?blocks\.0\.(norm1|attn\.q)$",
                r"dropout is active")


def _orders() -> Iterator[Fault]:
    """Layers and experts in another order."""
    cause = r"blocks\.0 is read as (\w+\.)?blocks\.1\b"
    yield Fault("layers_out_of_order", LayerOrder(), FIRST, cause)
    cause = r"mlp\.gate .*0 in the place of 1"
    yield Fault("experts_out_of_order", ExpertOrder(), MLP_IN, cause)
# fmt: on


def _table() -> Iterator[Fault]:
    """All faults; where several explain a text as well, the earlier one is reported."""
    sections = (_rotary_rows, _roles, _fused, _heads, _exchanges, _transposes, _numbers, _fields)
    for section in (*sections, _attention, _orders, _code):
        yield from section()


FAULTS: dict[str, Fault] = {fault.name: fault for fault in _table()}


# --- hypotheses about a model --------------------------------------------------------------------


def planted_faults() -> list[Fault]:
    """Those that the mutation gate plants."""
    return [fault for fault in FAULTS.values() if fault.at]


def hypotheses(model: Model, rules: Rules | None = None) -> Iterator[Hypothesis]:
    """What may be wrong in a model, and undone: the whole catalogue, each edit once.

    Args:
        model: A native model.
        rules: The rule that makes each parameter; by default those that the model was read by.
    """
    if rules is None:
        rules = {} if model.provenance is None else model.provenance.rules
    seen = set[tuple[str, str]]()
    for fault in FAULTS.values():
        for each in fault.hypotheses(model, rules):
            if (each.what, each.fix) not in seen:
                seen.add((each.what, each.fix))
                yield each


def without(model: Model) -> Iterator[tuple[str, Hypothesis]]:
    """Each branch of each block left out: (the branch, what that is)."""
    for kind in kinds(model, Attention, MLP, GatedMLP, Experts):
        for name in kind.modules:
            settings = {name: {"forward": _silent}}
            yield name, Hypothesis(f"{name} does harm", f"{name} is left out", settings=settings)


def _silent(x: Tensor, *rest: Any) -> Tensor:
    return x * 0


def narrowed(model: Model, some: Iterable[Hypothesis]) -> Iterator[Hypothesis]:
    """The same hypotheses of each block alone."""
    every = [name for stack in blocks(model) for name in stack.modules]
    for hypothesis in some:
        inside = (hypothesis.within(block) for block in every)
        yield from (each for each in inside if each is not None)


def inside(model: Model, branch: str) -> Iterator[Hypothesis]:
    """Hypotheses about one branch of a block, or a norm beside it, in this block alone."""
    block = block_of(branch)
    for each in hypotheses(model):
        narrow = each.within(block)
        if narrow is None:
            continue
        parts = {name.rpartition(".")[0] for name in narrow.parameters}
        if any(part.startswith(branch) or "norm" in part for part in parts):
            yield narrow
