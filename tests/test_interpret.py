"""Interpretability on every architecture: activations, patterns, patching, logit lens."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from tiny import answer, build, hot
from torch import Tensor, nn

import zoo
from converters.spec import load_spec
from examples import induction
from zoo import registry
from zoo.checkpoints.sentences import SentenceModel
from zoo.components.attention import Attention
from zoo.errors import InputError, UsageError
from zoo.interpret import hook_points

ARCHITECTURES = registry.architectures()
TOKENS = 11
HEADED = ("*:[qkv]", "*:pattern", "*:heads")


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return hot(build(request.param)).double()


def example_inputs(model: Any, rows: int = 2, padded: bool = True) -> dict[str, Any]:
    """Inputs with one row padded on the left, and an encoder-decoder's answer."""
    ids = torch.randint(5, 60, (rows, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids) if padded else None
    if mask is not None:
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, **answer(model, ids, mask)}


def untouched(model: nn.Module) -> bool:
    """Whether all hooks are removed, and every module is unchanged."""
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    attends = [m.attend for m in model.modules() if isinstance(m, Attention)]
    return not hooked and not any(type(a).__module__ == "zoo.interpret" for a in attends)


def flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def layers(model: Any) -> str:
    return "decoder.blocks" if hasattr(model, "decoder") else "blocks"


# --- what flows by -------------------------------------------------------------------------------


def test_recording_does_not_change_the_output(model: Any) -> None:
    plain = model(**example_inputs(model))
    out, kept = model.run_with_cache(**example_inputs(model), names=["*", "*:*"])
    assert same(out, plain) and untouched(model)
    assert not any(x.requires_grad for each in kept.values() for x in flat(each))
    assert {f"{layers(model)}.0", f"{layers(model)}.0.attn:pattern", "embed"} <= kept.keys()


def test_recording_patterns_records_everything_else_too(model: Any) -> None:
    """Tensors computed once for all layers, such as T5's distances, belong to the run itself."""
    _, alone = model.run_with_cache(**example_inputs(model))
    _, beside = model.run_with_cache(**example_inputs(model), names=["*", "*:pattern"])
    assert [*alone] == [name for name in beside if ":" not in name]
    assert all(same(alone[name], beside[name]) for name in alone)


@pytest.mark.parametrize("name", ["gpt2", "deberta", "t5"])
def test_recording_draws_no_random_numbers(name: str) -> None:
    """Dropout is the same with and without hooks."""
    model = hot(build(name)).train()
    outs = []
    for names in ("*", "*:pattern"):
        torch.manual_seed(0)
        out, _ = model.run_with_cache(**example_inputs(model), names=names)
        outs.append((out, torch.rand(3)))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def test_patterns_reproduce_the_heads(model: Any) -> None:
    _, kept = model.run_with_cache(**example_inputs(model), names=[*HEADED, "*attn.out:in"])
    names = [name for name in kept if ":pattern" in name]
    assert len(names) >= sum(isinstance(m, Attention) for m in model.modules())
    for name in names:
        of = {what: kept[name.replace("pattern", what)] for what in ("q", "k", "v", "heads")}
        pattern, groups = kept[name], of["q"].shape[1] // of["v"].shape[1]
        assert pattern.shape == (*of["q"].shape[:3], of["k"].shape[2])
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        mixed = pattern @ of["v"].repeat_interleave(groups, dim=1)
        torch.testing.assert_close(mixed, of["heads"], rtol=1e-12, atol=1e-12)
        seen = name.replace("pattern", "heads"), name.replace(":pattern", ".out:in")
        if seen[1] in kept:
            assert torch.equal(kept[seen[0]].transpose(1, 2).flatten(2), kept[seen[1]])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "neox", "falcon", "mistral"])
def test_patterns_are_causal_and_ignore_padding(name: str) -> None:
    model = hot(build(name))
    _, kept = model.run_with_cache(**example_inputs(model), names="*:pattern")
    for pattern in kept.values():
        assert not pattern.triu(1).any()
        assert not pattern[0, :, 3:, :3].any()
        assert pattern[1].tril().gt(0).sum() > pattern[1].numel() / 4


VARIANTS = [
    pytest.param(entry, name, id=f"{entry.name}-{name}", marks=(pytest.mark.long,) if n else ())
    for entry in ARCHITECTURES.values()
    for n, name in enumerate(entry.variants)
]


@pytest.mark.parametrize(("entry", "variant"), VARIANTS)
def test_patterns_of_every_variant(entry: registry.Architecture, variant: str) -> None:
    """Caps, windows, chunks, biases: patterns match the kernel, and the lens the output."""
    published = entry.variants[variant]["config"]
    fields, _ = load_spec(entry.spec).dialect("hf").read_config(published)
    model = hot(entry.model(entry.config_class(**fields))).double()
    inputs = example_inputs(model)
    if model.config.head == "encoder":
        inputs = {name: x for name, x in inputs.items() if "decoder" not in name}
    with torch.no_grad():
        plain = model(**inputs)
        out, kept = model.run_with_cache(**inputs, names=["*:pattern", "*:v", "*:heads"])
    assert same(out, plain)
    for name in kept:
        if ":pattern" in name:
            v, heads = (kept[name.replace("pattern", what)] for what in ("v", "heads"))
            mixed = kept[name] @ v.repeat_interleave(heads.shape[1] // v.shape[1], dim=1)
            torch.testing.assert_close(mixed, heads, rtol=1e-12, atol=1e-12)
    if model.config.head not in (*model.headless, "pooler"):
        assert same(tuple(x[-1] for x in flat(model.logit_lens(**inputs))), tuple(flat(plain)))


def test_patterns_match_the_formula() -> None:
    """By hand, for grouped heads with rotary embedding."""
    model = hot(build("llama")).double()
    _, kept = model.run_with_cache(**example_inputs(model, padded=False), names="blocks.1.attn:*")
    q, k = kept["blocks.1.attn:q"], kept["blocks.1.attn:k"]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    back = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    expected = scores.masked_fill(~back, -torch.inf).softmax(-1)
    torch.testing.assert_close(kept["blocks.1.attn:pattern"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["deberta", "deberta-v2", "t5"])
def test_distances_are_recorded_and_patched(name: str) -> None:
    """They run once for all layers; DeBERTa's are vectors and their indices."""
    model = hot(build(name)).double()
    inputs, place = example_inputs(model), "encoder.distances" if name == "t5" else "distances"
    if name != "t5":  # only distances use positions then
        model.config = model.config.replace(absolute_positions=False)

    def none(terms: Any) -> Any:
        if isinstance(terms, Tensor):
            return torch.zeros_like(terms)
        return torch.zeros_like(terms[0]), terms[1]

    with torch.no_grad():
        plain = model(**inputs)
        _, kept = model.run_with_cache(**inputs, names=[f"{place}*", "*:pattern"])
        with model.patch({place: kept[place]}):
            again = model(**inputs)
        with model.patch({place: none}):
            without = model(**inputs)
            turned = {n: x.flip(1) for n, x in inputs.items()}
            elsewhere = model(**turned)
    assert same(again, plain) and not torch.allclose(without, plain)
    assert [n for n in kept if n.startswith(place) and ":" not in n][-1] == place
    if name != "t5":  # without distances a text is a bag of tokens
        torch.testing.assert_close(elsewhere.flip(1), without)


def test_patterns_show_the_sliding_window() -> None:
    model = hot(build("mistral", window=4))
    _, kept = model.run_with_cache(**example_inputs(model, padded=False), names="*:pattern")
    assert all(
        (x[..., 8, :] > 0).nonzero()[:, -1].unique().tolist() == [5, 6, 7, 8] for x in kept.values()
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "t5"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_patterns_with_a_cache(name: str, tokens: int) -> None:
    """For later tokens they are the last rows of the whole text's patterns, and do not change."""
    model = hot(build(name)).double()
    inputs = example_inputs(model, padded=False)
    ids = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    names = [f"{layers(model)}.*.attn{what[1:]}" for what in HEADED]
    with torch.no_grad():
        _, whole = model.run_with_cache(**inputs, names=names)
        cut, past = TOKENS - tokens, zoo.Cache(TOKENS + 3)
        model(**{**inputs, ids: inputs[ids][:, :cut]}, cache=past)
        after = {**inputs, ids: inputs[ids][:, cut:]}
        _, kept = model.run_with_cache(**after, cache=past, names=names)
        before = {name: x.clone() for name, x in kept.items()}
        past.cut(cut)
        model(**{**after, ids: after[ids].flip(0)}, cache=past)
    for name, x in kept.items():
        assert torch.equal(x, before[name])
        rows = whole[name] if name[-1] in "kv" else whole[name][:, :, cut:]
        torch.testing.assert_close(x, rows, rtol=1e-9, atol=1e-12)


def test_a_second_run_of_a_module_has_a_number() -> None:
    model = hot(build("mobilellm", repeat=True))
    _, kept = model.run_with_cache(
        **example_inputs(model), names=["blocks.0", "blocks.1:in", "norm:in"]
    )
    assert [*kept] == ["blocks.0", "blocks.0@2", "blocks.1:in", "blocks.1:in@2", "norm:in"]
    assert torch.equal(kept["blocks.0@2"], kept["blocks.1:in"])


def test_a_layer_that_is_used_for_the_pattern_alone_counts_once() -> None:
    """DeBERTa projects keys again for distances, which is recorded; our own replay is not."""
    model = hot(build("deberta-v2"))
    _, plain = model.run_with_cache(**example_inputs(model), names="*.attn.*")
    _, kept = model.run_with_cache(**example_inputs(model), names=["*.attn.*", "*:pattern"])
    assert [*plain] == [name for name in kept if ":" not in name]


def test_gradients_are_kept_on_request(model: Any) -> None:
    """Also gradients of patterns, which are not part of the graph without hooks."""
    inputs = example_inputs(model)
    names = [f"{layers(model)}.0.attn", f"{layers(model)}.0.attn:pattern", "embed"]
    model.requires_grad_(False)
    out, kept = model.run_with_cache(**inputs, names=names, grad=True)
    torch.testing.assert_close(flat(out)[0], flat(model(**inputs))[0], rtol=1e-9, atol=1e-9)
    flat(out)[0].square().sum().backward()
    for name in names:
        assert kept[name].grad.abs().max() > 0, name
    name, step = names[0], 1e-6
    way = torch.randn_like(kept[name])
    moved = []
    for sign in (1, -1):
        with model.patch({name: lambda x, sign=sign: x + sign * step * way}):
            moved.append(flat(model(**inputs))[0].square().sum())
    slope = (moved[0] - moved[1]) / (2 * step)
    expected = (kept[name].grad * way).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied_or_attached() -> None:
    model = hot(build("gpt2"))
    out, kept = model.run_with_cache(**example_inputs(model))
    assert out.requires_grad and kept["head"].data_ptr() == out.data_ptr()
    assert not any(x.requires_grad for x in kept.values())


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.*.atn", r"'blocks\.\*\.atn' matches nothing\. Did you mean blocks\.\*\.attn"),
        ("blocks.1.mlp.dwn", r"Did you mean blocks\.1\.mlp\.down"),
        ("blocks.0.attn.pattern", r"Did you mean .*blocks\.0\.attn:pattern"),
        ("blocks.0.mlp:pattern", r"matches nothing"),
        (["zzz", "embed", "qqq"], r"'zzz' matches nothing\. There is embed.*; 'qqq' matches"),
        ([3], r"expected names, found 3"),
        (3, r"expected names, found 3"),
        (None, r"expected names, found None"),
        ("blocks", r"matches nothing"),
    ],
)
def test_names_that_match_nothing_are_refused(names: Any, message: str) -> None:
    model = build("gpt2")
    with pytest.raises(UsageError, match=message):
        model.run_with_cache(torch.zeros(1, 2, dtype=torch.int64), names=names)
    if isinstance(names, str):
        with pytest.raises(UsageError, match=message), model.patch({names: torch.zeros_like}):
            pass
    assert untouched(model)


def test_a_text_instead_of_ids_is_refused() -> None:
    model = build("gpt2")
    for function in (model.run_with_cache, model.logit_lens, model):
        with pytest.raises(InputError, match=r"found str\. Of texts, m\.tokenizer\.batch"):
            function("a text")


def test_an_activation_not_recorded_is_named() -> None:
    model = build("gpt2")
    _, kept = model.run_with_cache(torch.zeros(1, 2, dtype=torch.int64), names="blocks.*.attn")
    with pytest.raises(
        UsageError, match=r"blocks\.0\.atn.* not recorded\. Did you mean blocks\.0\.attn"
    ):
        kept["blocks.0.atn"]
    assert kept.get("blocks.0.mlp") is None


def test_a_hook_point_not_used_is_named() -> None:
    model = build("deberta-v2")
    inputs = example_inputs(model)
    table = "distances.embed"  # an embedding that is read as a whole, never looked up
    with pytest.raises(UsageError, match=f"{table}: hook points that were not used"):
        model.run_with_cache(**inputs, names=["embed", table])
    with (
        pytest.raises(UsageError, match=f"{table}: not used in this run, so nothing was"),
        model.patch({table: torch.zeros_like}),
    ):
        model(**inputs)


def test_hook_points_do_not_depend_on_hooks(model: Any) -> None:
    """Every owner of a parameter is a hook point."""
    names = {str(place) for place in hook_points(model)}
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert owners - {""} <= names


# --- patches -------------------------------------------------------------------------------------


def test_a_patch_from_another_run_gives_that_runs_output(model: Any) -> None:
    """The last block's output decides the logits; afterwards the model is unchanged."""
    one, two = example_inputs(model, padded=False), example_inputs(model, padded=False)
    two["input_ids"] = two["input_ids"].flip(1)
    if "decoder_input_ids" in two:
        two["decoder_input_ids"] = two["decoder_input_ids"].flip(1)
    last = f"{layers(model)}.{model.config.layers - 1}"
    if hasattr(model, "decoder"):
        last = f"{layers(model)}.{model.config.decoder_layers - 1}"
    with torch.no_grad():
        plain, other = model(**one), model(**two)
        _, kept = model.run_with_cache(**two, names=last)
        with model.patch({last: kept[last]}):
            patched = model(**one)
        again = model(**one)
    assert same(patched, other) and same(again, plain) and not same(plain, other)
    assert untouched(model)


@pytest.mark.parametrize("what", ["", ":in", ":q", ":v", ":pattern", ":heads"])
def test_every_hook_point_can_be_patched(model: Any, what: str) -> None:
    name, inputs = f"{layers(model)}.0.attn{what}", example_inputs(model)
    with torch.no_grad():
        plain = flat(model(**inputs))[0]
        with model.patch({name: lambda x: x.flip(-1)}):
            patched = flat(model(**inputs))[0]
        _, kept = model.run_with_cache(**inputs, names=name)
        with model.patch({name: kept[name]}):
            same_again = flat(model(**inputs))[0]
    assert not torch.allclose(patched, plain)
    torch.testing.assert_close(same_again, plain, rtol=1e-9, atol=1e-9)


def test_a_pattern_knocked_out() -> None:
    """A model without attention to the first token equals one that has it masked."""
    model = hot(build("llama")).double()
    inputs = example_inputs(model, padded=False)

    def blind(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        pattern[:, :, 1:, 0] = 0
        return pattern / pattern.sum(-1, keepdim=True)

    with torch.no_grad():
        with model.patch({"*:pattern": blind}):
            one = model(**inputs)
            inputs["input_ids"][:, 0] += 1
            other = model(**inputs)
        plain = model(**inputs)
    torch.testing.assert_close(one[:, 1:], other[:, 1:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain[:, 1:], one[:, 1:])


@pytest.mark.parametrize("what", [":in", ":q", ":v", ":pattern", ":heads", ""])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_patch_function_may_write_in_place(what: str, mode: Any) -> None:
    """It works like returning a new tensor, and other readers see the old one."""
    model = hot(build("llama"))
    inputs, name = example_inputs(model), f"blocks.1.attn{what}"

    def written(x: Tensor) -> Tensor:
        x[..., 0] = 0
        return x

    with mode():
        plain = model(**inputs)
        with model.patch({name: written}):
            one = model(**inputs)
        with model.patch({name: lambda x: written(x.clone())}):
            other, kept = model.run_with_cache(**inputs, names=["blocks.1.norm1", name])
    assert torch.equal(one, other) and not torch.allclose(one, plain)
    assert kept["blocks.1.norm1"][..., 0].any() and not kept[name][..., 0].any()


def test_an_in_place_patch_leaves_the_cache() -> None:
    """Values are views of the KV cache: a patch must not write to it."""
    model, past = hot(build("llama")), zoo.Cache(TOKENS)
    ids = example_inputs(model, padded=False)["input_ids"]
    with torch.no_grad():
        with model.patch({"*:v": lambda x: x.zero_()}):
            model(ids[:, :-1], cache=past)
        _, kept = model.run_with_cache(ids[:, -1:], names="blocks.0.attn:v", cache=past)
        assert kept["blocks.0.attn:v"][:, :, :-1].abs().amin(dim=-1).gt(0).any()


def test_patches_nest_and_end_with_an_exception() -> None:
    model = hot(build("gpt2"))
    inputs = example_inputs(model)
    plain = model(**inputs)
    with model.patch({"blocks.0.attn": torch.zeros_like}):
        once = model(**inputs)
        with model.patch({"blocks.0.attn": lambda x: x + 1, "blocks.0.attn:heads": lambda x: x}):
            _, kept = model.run_with_cache(**inputs, names="blocks.0.attn")
            assert (kept["blocks.0.attn"] == 1).all()
        assert torch.equal(model(**inputs), once)
        with pytest.raises(ZeroDivisionError), model.patch({"*:*": lambda x: 1 // 0}):
            model(**inputs)
        assert torch.equal(model(**inputs), once)
    assert torch.equal(model(**inputs), plain) and untouched(model)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.zeros(1, 1),
            r"blocks\.0\.mlp: expected float32 \[2, 11, 48\] on cpu, found float32 \[1, 1\]",
        ),
        (torch.zeros(2, 11, 48).double(), r"found float64 \[2, 11, 48\] on cpu"),
        (lambda x: None, "found NoneType"),
        (3, "found int"),
        (lambda x: (x,), r"found \(float32 \[2, 11, 48\] on cpu\)"),
    ],
)
def test_patches_of_another_shape_or_dtype_are_refused(value: Any, message: str) -> None:
    model = build("gpt2")
    width = model.config.dim
    if isinstance(value, Tensor) and value.shape[-1] == 48:
        value = value[..., :1].expand(2, 11, width)
    message = message.replace("48", str(width))
    with pytest.raises(UsageError, match=message), model.patch({"blocks.0.mlp": value}):
        model(**example_inputs(model))
    assert untouched(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_is_patched(name: str) -> None:
    """At the prompt and at each token: removing the last block equals removing its branches."""
    model = hot(build(name))
    ids = torch.tensor([[7, 8, 9]])
    last = f"{layers(model)}.{len(model.get_submodule(layers(model))) - 1}"
    branches = [f"{last}.attn", f"{last}.mlp", *([f"{last}.cross"] if name == "t5" else [])]
    options: dict[str, Any] = {"max_new_tokens": 6}
    plain = model.generate(ids, **options)
    with model.patch(dict.fromkeys(branches, torch.zeros_like)):
        patched = model.generate(ids, **options)
    blocks = model.get_submodule(layers(model))
    again = model.generate(ids, **options)
    assert torch.equal(plain, again) and not torch.equal(plain, patched) and untouched(model)
    with torch.no_grad():
        for branch in branches:
            part = model.get_submodule(branch)
            for parameter in getattr(part, "out", getattr(part, "down", None)).parameters():
                parameter.zero_()
    assert len(blocks) > 1 and torch.equal(model.generate(ids, **options), patched)


def test_other_threads_see_no_patch() -> None:
    model = hot(build("llama"))
    inputs = example_inputs(model)
    plain = model(**inputs)
    changes = {"blocks.0.attn": torch.zeros_like, "blocks.1.attn:pattern": lambda x: x.flip(-1)}
    with ThreadPoolExecutor(1) as other, model.patch(changes):
        assert torch.equal(other.submit(lambda: model(**inputs)).result(), plain)
        assert not torch.allclose(model(**inputs), plain)


def test_threads_record_at_once() -> None:
    model = hot(build("llama"))
    inputs = example_inputs(model)

    def look(_: int) -> list[str]:
        return [*model.run_with_cache(**inputs, names=["*", "*:*"])[1]]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(look, range(12)))
    assert all(names == results[0] for names in results) and untouched(model)


# --- compiled, prepared, wrapped -----------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", first_of(["gpt2", "t5"], 1))
def test_a_compiled_model_runs_eagerly_with_hooks(name: str) -> None:
    """Whether it was compiled before or not; nothing is compiled again."""
    model = hot(build(name))
    inputs, graphs = example_inputs(model, padded=False), list[Any]()

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=counted, fullgraph=True)
    changes = [{f"{layers(model)}.1{of}": torch.zeros_like} for of in (".mlp", ".attn:pattern")]
    with torch.no_grad():
        expected = []
        for change in changes:
            with model.patch(change):
                expected.append(compiled(**inputs))
        assert not graphs
        plain = compiled(**inputs)
        assert len(graphs) == 1
        for change, result in zip(changes, expected, strict=True):
            with model.patch(change):
                assert torch.equal(compiled(**inputs), result)
            assert not torch.allclose(result, plain)
            _, kept = compiled.run_with_cache(**inputs, names=change)
            assert [*kept] == [*change]
        assert torch.equal(compiled(**inputs), plain) and len(graphs) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_logit_lens_of_a_compiled_model() -> None:
    model = hot(build("gpt2"))
    expected = model.logit_lens(**example_inputs(model))
    model.compile(backend="eager")
    model(**example_inputs(model))
    assert torch.equal(model.logit_lens(**example_inputs(model)), expected)


COMPILED_WITHIN = """
import sys, torch
from converters.spec import load_spec
import sys
sys.path.insert(0, "tests/support")
from tiny import build, hot
from zoo.errors import InputError, UsageError
model, ids = hot(build("gpt2")), torch.arange(9)[None]
with torch.no_grad():
    plain = model(ids)
    assert "torch._dynamo" not in sys.modules
    with model.patch({"blocks.1.mlp": torch.zeros_like, "blocks.0.attn:heads": torch.zeros_like}):
        expected = model(ids)
        compiled = torch.compile(model, backend="eager")
        print(torch.equal(compiled(ids), expected), torch.equal(expected, plain))
    print(torch.equal(compiled(ids), plain))
"""


@pytest.mark.slow
def test_compiled_code_does_not_keep_a_patch(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_WITHIN], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "False", "True"], done.stderr


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_prepared_models_are_recorded_and_patched(tokens: int) -> None:
    plain, fast = hot(build("llama")), zoo.prepare(hot(build("llama")))
    names = ["blocks.[0-9]", "blocks.*.attn:*"]
    inputs = example_inputs(plain, padded=False)
    inputs["input_ids"] = inputs["input_ids"][:, :tokens]
    with torch.no_grad():
        kept = [model.run_with_cache(**inputs, names=names)[1] for model in (plain, fast)]
    assert [*kept[0]] == [*kept[1]]
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[1][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        fast.logit_lens(**inputs), plain.logit_lens(**inputs), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UsageError, match="other parts: use the model as"):
        fast.run_with_cache(**inputs, names="blocks.0.attn.q")
    with pytest.raises(UsageError, match="a prepared model has no gradients"):
        fast.run_with_cache(**inputs, grad=True)


def test_modules_with_two_outputs_are_patched() -> None:
    """Such as the model inside a sentence model."""
    model = SentenceModel(hot(build("bert", head="pooler")), [], [])
    inputs = example_inputs(model)
    plain, kept = model.run_with_cache(**inputs, names=["model", "model.pooler"])
    assert type(kept["model"]).__name__ == "Pooled"
    assert torch.equal(kept["model"].pooled, kept["model.pooler"])
    with model.patch({"model": lambda pair: (pair.hidden * 2, pair.pooled)}):
        assert torch.equal(model(**inputs), plain * 2)
    with model.patch({"model": kept["model"]}):
        assert torch.equal(model(**inputs), plain)
    wrong = pytest.raises(UsageError, match=r"expected .* found")
    with wrong, model.patch({"model": plain}):
        model(**inputs)
    with pytest.raises(UsageError, match="'pooler' has no logits"):
        model.logit_lens(**inputs)


# --- the lens ------------------------------------------------------------------------------------


def test_logit_lens_ends_with_the_models_output(model: Any) -> None:
    inputs = example_inputs(model)
    with torch.no_grad():
        out = model(**inputs)
    if model.config.head in model.headless:
        pytest.skip("no head")
    logits, blocks = model.logit_lens(**inputs), len(model.get_submodule(layers(model)))
    assert torch.equal(logits[-1], out) and untouched(model)
    assert logits.shape == (blocks + 1, *out.shape)
    assert not any(torch.allclose(a, b) for a, b in pairwise(logits))
    lazy = model.logit_lens(**inputs, lazy=True)
    assert all(torch.equal(a, b) for a, b in zip(lazy, logits, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama", "t5", "bert"])
def test_logit_lens_applies_norm_and_head(name: str) -> None:
    """By hand: the final norm, T5's scale, the head, Gemma's soft cap."""
    model = hot(build(name)).double()
    inputs = example_inputs(model)
    _, kept = model.run_with_cache(**inputs, names=f"{layers(model)}.0")
    x = kept[f"{layers(model)}.0"]
    with torch.no_grad():
        if name == "t5":
            logits = model.head(model.decoder.norm(x) * model.config.dim**-0.5)
        else:
            logits = model.head(x if name == "bert" else model.norm(x))
        if name == "gemma2":
            logits = (logits / model.config.logit_cap).tanh() * model.config.logit_cap
    assert model.config.tied or name == "llama"
    torch.testing.assert_close(model.logit_lens(**inputs)[1], logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "changes", "more"),
    [
        ("mobilellm", {"repeat": True}, 3),
        ("deberta-v2", {"head": "enhanced_masked_lm", "absolute_positions": False}, 2),
        ("deberta-v2", {"conv": 3}, 0),
        ("bert", {"head": "pretraining"}, 0),
        ("bert", {"head": "question_answering"}, 0),
        ("gpt2", {"head": "sequence_classification"}, 0),
    ],
)
def test_logit_lens_of_unusual_models(name: str, changes: dict[str, Any], more: int) -> None:
    """Repeated blocks, a convolution between blocks, heads with several outputs."""
    model = hot(build(name, **changes))
    inputs = example_inputs(model)
    with torch.no_grad():
        out = model(**inputs)
    logits = model.logit_lens(**inputs)
    assert same(tuple(x[-1] for x in flat(logits)), tuple(flat(out)))
    assert type(logits) is type(out)
    assert len(flat(logits)[0]) == model.config.layers + more + 1


def test_logit_lens_sees_patches() -> None:
    model = hot(build("gpt2"))
    inputs = example_inputs(model)
    with torch.no_grad(), model.patch({"blocks.0.attn": torch.zeros_like}):
        assert torch.equal(model.logit_lens(**inputs)[-1], model(**inputs))


def test_logit_lens_needs_a_head_and_a_whole_text() -> None:
    with pytest.raises(UsageError, match="'none' has no logits"):
        build("gpt2", head="none").logit_lens(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UsageError, match="no cache"):
        build("gpt2").logit_lens(torch.zeros(1, 2, dtype=torch.int64), cache=zoo.Cache(4))


# --- the example ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """In half the steps of the script's default."""
    result = induction.main(["--steps", "300"])
    heads = result.induction.shape[1]
    assert result.induction[1].max() > 10 * result.chance
    assert result.before[0].max() > 5 * result.chance
    assert result.induction[0].max() < 5 * result.chance
    assert result.groups["induction"] and all(layer == 1 for layer, _ in result.groups["induction"])
    assert sum(map(len, result.groups.values())) == 2 * heads
    chance = math.log(induction.VOCAB)
    assert result.plain < chance / 2 < result.lens[1]
    assert result.lens[-1] == result.plain
    for way in ("zero", "mean"):
        assert result.without["induction", way] > result.plain + 1.5
        assert result.without["previous token", way] > result.plain + 1.5
    assert result.recovered[1].max() > 0.15 > result.recovered[0].max()
    assert "loss without heads" in capsys.readouterr().out


def test_the_document_quotes_the_example(root: Path) -> None:
    """The document's code is that of the example."""
    text = (root / "docs/looking-inside.md").read_text(encoding="utf-8")
    code = (root / "examples/induction.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in code.splitlines()}
    quoted = text.split("<!-- from examples/induction.py -->")[1:]
    assert quoted
    for part in quoted:
        block = part.split("```python\n")[1].split("```")[0]
        assert [line for line in block.splitlines() if line.strip() not in lines] == []
