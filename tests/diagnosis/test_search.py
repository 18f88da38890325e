"""A text under other readings of a file: what is wrong is told, and nothing of healthy ones."""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import first_of
from safetensors.torch import load_file, save_file
from tiny import build, hot
from torch import Tensor
from trained import MASK, MODELS, characters, trained

import zoo
from converters.spec import load_spec
from converters.spec_lines import rule_line
from zoo import registry
from zoo.components.decoder import Decoder
from zoo.diagnosis.checkup.likelihood import EVERY, TEXT, chance, ids_of, nats
from zoo.diagnosis.checkup.search import HEATS, Explanation, explanations
from zoo.diagnosis.edits import Hypothesis, applied, order
from zoo.diagnosis.faults import FAULTS as CATALOGUE
from zoo.diagnosis.faults import hypotheses, inside, without
from zoo.diagnosis.gate import planted
from zoo.diagnosis.planting import NotApplicable
from zoo.errors import InputError, UsageError
from zoo.loading import load_directory

ARCHITECTURES = list(registry.architectures())
OTHER = """\
It had rained all night. Tom put on his boots and ran out into the garden, where the grass was wet
and the path was full of mud. There was a frog on a stone, green and very still. Tom sat down in
front of it and waited. "Will you be my friend?" he asked. The frog looked at him, and then it
jumped right over his boots and into the pond. Tom laughed so much that his mother came to the
door. "What is so funny?" she said. He told her, and she laughed too, and they went inside to dry.
"""


# --- without anything trained --------------------------------------------------------------------


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that an edit may touch."""
    parameters = {
        f"{n} of": p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)
    }
    own = {f"{n}.": dict(m.__dict__) for n, m in model.named_modules()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {**parameters, **own, **{n: hash(p.numpy().tobytes()) for n, p in kept.items()}}


@pytest.mark.parametrize("name", first_of(ARCHITECTURES))
def test_an_edit_leaves_nothing_behind(name: str) -> None:
    model = hot(build(name))
    before = state(model)
    some = list(hypotheses(model))
    assert len(some) > 30
    branches = list(without(model))
    some += [h for _, h in branches] + list(inside(model, branches[0][0]))
    assert len({(h.what, h.fix) for h in some}) == len(some)
    for hypothesis in some:
        try:
            with applied(model, hypothesis) as edited:
                assert edited is model or hypothesis.config
        except (RuntimeError, zoo.ZooError):
            assert hypothesis.config  # a field that other parameters belong to
        assert state(model) == before, hypothesis.fix


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "falcon"])
def test_some_hypothesis_undoes_each_mistake_bit_for_bit(name: str) -> None:
    """Each mistake with parameters is undone, bit by bit, by some hypothesis."""
    model = hot(build(name))
    true = {n: p.detach().clone() for n, p in model.named_parameters()}

    def restores(hypothesis: Any) -> bool:
        with applied(model, hypothesis):
            return all(torch.equal(p, true[n]) for n, p in model.named_parameters())

    mistakes = [h for h in hypotheses(model) if h.parameters]
    lost = ("is left out", "head.weight is embed", "embed.weight is head", "stored", "1 + what")
    # of what nobody mistakes one way alone, the other is not tried
    other = ("off by one", "where it has")
    for mistake in mistakes:
        if any(word in mistake.fix for word in lost) or any(word in mistake.what for word in other):
            continue
        wrong = {n: make().clone() for n, make in mistake.parameters.items()}
        with applied(model, replace(mistake, parameters=wrong)):
            if all(torch.equal(p, true[n]) for n, p in model.named_parameters()):
                continue  # at these sizes it is none
            assert any(restores(h) for h in hypotheses(model) if h.parameters), mistake.fix


def test_rows_in_another_order() -> None:
    rows = order("h e two", "h two e", 12, h=2, two=2)
    assert rows.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    back = order("h two e", "h e two", 12, h=2, two=2)
    assert torch.equal(rows[back], torch.arange(12))


def test_each_token_costs_what_it_should() -> None:
    ids = torch.arange(10, 33)
    model = hot(build("gpt2"))
    with torch.no_grad():
        (costs,) = nats(model, ids)
        logits = model(ids[None])[0].log_softmax(-1)
        assert torch.allclose(costs.float(), -logits[:-1].gather(1, ids[1:, None])[:, 0], atol=1e-5)
        limit = model.config.limit
        long = torch.arange(limit + 9) % 100
        assert (
            len(nats(model, long)[0]) == limit - 1 + 8
        )  # cut, and the first of each part is given

        encoder = hot(build("bert"))
        (costs,) = nats(encoder, ids, MASK)
        assert len(costs) == len(ids) and len(nats(encoder, ids, MASK, times=1)[0]) == 4
        for n, at in ((0, 0), (3, 3 * EVERY), (4, 1), (22, 2 * EVERY + 6)):
            shown = torch.where(torch.arange(23) % EVERY == at % EVERY, MASK, ids)
            logits = encoder(shown[None])[0, at].log_softmax(-1)
            assert math.isclose(costs[n], -logits[ids[at]], rel_tol=1e-4)


def test_an_untrained_model_is_said_to_know_nothing() -> None:
    model = build("gpt2").eval()
    report = list[tuple[int, int]]()
    (result,) = explanations(model, torch.arange(40), progress=lambda n, of: report.append((n, of)))
    assert "no likelier than chance" in result.what and "untrained" in result.fix
    assert report[-1][0] <= report[-1][1] and [n for n, _ in report] == list(
        range(1, len(report) + 1)
    )


def test_a_model_that_gives_no_numbers_is_said_to_know_nothing() -> None:
    model = build("gpt2").eval()
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    assert "no likelier than chance" in explanations(model, torch.arange(40))[0].what


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="9 tokens tell nothing"):
        explanations(build("gpt2"), torch.arange(9))


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_what_gives_no_likelihood_is_refused(name: str) -> None:
    model = build(name, **({"head": "none"} if name == "bert" else {}))
    with pytest.raises(UsageError, match="likelihood"):
        explanations(model, torch.arange(40))


# --- a published model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a directory of HF's, its tokenizer beside it."""
    directory = tmp_path_factory.mktemp("stories") / "hf"
    zoo.convert(fixtures / "stories260K" / "stories260K.bin", directory, to="hf")
    shutil.copy(fixtures / "stories260K" / "tok512.model", directory / "tokenizer.model")
    return directory


@pytest.fixture
def wrong(stories: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Any]:
    """The model in a file that somebody else wrote down otherwise."""

    def make(change: Callable[[dict[str, Tensor]], None]) -> Any:
        directory = tmp_path / "wrong"
        shutil.copytree(stories, directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file({n: x.contiguous() for n, x in tensors.items()}, directory / "model.safetensors")
        return zoo.load(directory)

    return make


def each(tensors: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor]) -> None:
    for name in tensors:
        if part in name:
            tensors[name] = change(tensors[name])


def swap(tensors: dict[str, Tensor], a: str, b: str) -> None:
    for name in [n for n in tensors if a in n]:
        other = name.replace(a, b)
        tensors[name], tensors[other] = tensors[other], tensors[name]


def pairs(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows in halves, as they are here, side by side as Meta has them."""
    return lambda x: x[order("h two e", "h e two", len(x), h=heads, two=2)]


@pytest.mark.parametrize("text", [TEXT, pytest.param(OTHER, marks=pytest.mark.slow)])
@torch.no_grad()
def test_nothing_is_wrong_in_a_healthy_model(stories: Path, text: str) -> None:
    model = zoo.load(stories)
    ids = ids_of(model, text)
    assert float(nats(model, ids).mean()) < 0.4 * chance(model)
    assert explanations(model, ids) == []


def test_rows_of_rotary_pairs_are_named_with_their_line(wrong: Any) -> None:
    model = wrong(lambda tensors: each(tensors, "k_proj", pairs(4)))
    result = explanations(model, ids_of(model))
    assert result[0].what == (
        "rows of blocks.*.attn.k lie as [(g e two)], and are read as [(g two e)]"
    )
    assert "if blocks.*.attn.k is read as [(g e two) i]: [(g two e) i]" in result[0].seen
    assert result[0].where == ("model.layers.*.self_attn.k_proj.weight",)
    assert result[0].likely > 0.9
    line = rule_line(load_spec("llama"), "blocks.0.attn.k.weight")
    assert result[0].fix == f"It is read by {line}."
    assert [f.likely for f in result] == sorted((f.likely for f in result), reverse=True)


def test_one_matrix_of_one_layer(wrong: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        each(tensors, "layers.2.self_attn.o_proj", lambda x: x.T)

    model = wrong(change)
    result = explanations(model, ids_of(model))[0]
    assert result.what == "blocks.2.attn.out.weight is transposed"
    assert result.where == ("model.layers.2.self_attn.o_proj.weight",)


def test_two_faults_are_told_together(wrong: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        each(tensors, "q_proj", pairs(8))
        swap(tensors, "gate_proj", "up_proj")

    model = wrong(change)
    result = explanations(model, ids_of(model))[0]
    assert "mlp.gate and blocks.*.mlp.up are exchanged" in result.seen
    assert "blocks.*.attn.q is read as [(h e two) i]" in result.seen


def backwards(tensors: dict[str, Tensor]) -> None:
    parameters = dict(tensors)
    for name in parameters:
        for n in range(5):
            if f".layers.{n}." in name:
                tensors[name.replace(f".{n}.", f".{4 - n}.")] = parameters[name]


def both_in_pairs(tensors: dict[str, Tensor]) -> None:
    each(tensors, "q_proj", pairs(8))
    each(tensors, "k_proj", pairs(4))


def both_transposed(tensors: dict[str, Tensor]) -> None:
    each(tensors, "q_proj", lambda x: x.T)
    each(tensors, "o_proj", lambda x: x.T)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "q and k in pairs": (
        both_in_pairs,
        "blocks.*.attn.q and blocks.*.attn.k are read as [(h e two) i]",
    ),
    "k turned with the queries' heads": (
        lambda t: each(t, "k_proj", pairs(8)),
        "blocks.*.attn.k is read as [(h e two) i]: [(h two e) i] with 8 heads",
    ),
    "norms": (
        lambda t: swap(t, "input_layernorm", "post_attention_layernorm"),
        "norm1 and blocks.*.norm2 are exchanged",
    ),
    "k and v": (lambda t: swap(t, "k_proj", "v_proj"), "attn.k and blocks.*.attn.v are exchanged"),
    "an offset": (
        lambda t: each(t, "norm", lambda x: x - 1),
        "the weight of each norm is 1 + what is stored",
    ),
    "a vocabulary": (
        lambda t: each(t, "embed", lambda x: x.roll(1, 0)),
        "embed.weight is read 1 row",
    ),
    "layers": (backwards, "blocks.* are put in order"),
    "two layers": (lambda t: swap(t, ".1.", ".3."), "blocks.* are put in order"),
    "q and out transposed": (
        both_transposed,
        "blocks.*.attn.q.weight and blocks.*.attn.out.weight are read as [i o]",
    ),
    "heads of values": (
        lambda t: each(t, "v_proj", lambda x: x[order("g e", "e g", 32, g=4)]),
        "blocks.*.attn.v is read as [(e g) i]: [(g e) i]",
    ),
}


def test_being_less_sure_is_no_better_knowledge(stories: Path) -> None:
    """The same knowledge, twice as sure of itself, costs more and is as good."""
    model = zoo.load(stories)
    ids = ids_of(model)
    with torch.no_grad():
        plain = Explanation((), nats(model, ids, None, HEATS))
        twice = {"forward": lambda x: 2 * F.linear(x, model.embed.weight)}
        sure = Hypothesis("twice as sure", settings={"head": twice})
        with applied(model, sure):
            hot = Explanation((), nats(model, ids, None, HEATS))
    assert hot.plain > plain.plain + 0.1
    assert abs(plain.gain(hot)[0]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_file(fault: str, wrong: Any) -> None:
    change, fix = FAULTS[fault]
    model = wrong(change)
    assert fix in explanations(model, ids_of(model))[0].seen


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({"act": "relu"}, "act is 'silu'"),
        pytest.param({"rope_base": 500.0}, "rope_base is 10000", marks=pytest.mark.slow),
    ],
)
def test_fields_of_a_config(stories: Path, fields: dict[str, Any], fix: str) -> None:
    model = zoo.load(stories, config=fields)
    result = explanations(model, ids_of(model))[0]
    assert fix in result.seen and "converters/specs/llama/hf.yaml" in result.fix


def test_what_a_text_cannot_tell_is_not_claimed(stories: Path) -> None:
    """Another eps changes no likelihood that could be seen."""
    model = zoo.load(stories, config={"eps": 1e-6})
    assert explanations(model, ids_of(model)) == []


def test_a_tokenizer_of_another_model(stories: Path, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(stories, directory)
    model = zoo.load(directory)
    object.__setattr__(model.config, "vocab", 200)
    with pytest.raises(InputError, match="another model's tokenizer"):
        ids_of(model)


# --- others, trained here ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shakespeare(fixtures: Path) -> tuple[Tensor, Tensor, int]:
    """What is learnt, what is looked at, and how many characters there are."""
    text, vocab = characters(fixtures / "tinyshakespeare" / "input.txt")
    return text[:-20000], text[-15000:-14680], vocab


# a bug of the mutation gate, planted in the spec or the config: how the text is likelier
RIGHT = {
    "norm1_norm2_exchanged": "norm1 and .*norm2 are exchanged",
    "norm1_norm1_out_exchanged": "norm1 and .*norm1_out are exchanged",
    "norm2_norm1_out_exchanged": "norm2 and .*norm1_out are exchanged",
    "first_norm_final_norm_exchanged": r"blocks\.0\.norm1 and norm are exchanged",
    "gate_up_exchanged": "gate and .*up are exchanged",
    "q_k_exchanged": "attn.q and .*attn.k are exchanged",
    "k_v_exchanged": "attn.k and .*attn.v are exchanged",
    "qkv_read_as_vqk": "q is read from what v .*k is read from what q",
    "layers_out_of_order": "put in order",
    "embed_head_exchanged": "embed and head are exchanged",
    "attn_out_transposed": r"blocks\.0\.attn\.out\.weight is read as \[i o\]",
    "q_rows_in_halves": "q is read as",
    "k_rows_in_halves": "k is read as",
    # where a file's rows are the model's own, the rule that mends it counts no heads
    "k_rows_in_halves_of_q_heads": r"k is read as (.* heads|\[o i\], as it stands)",
    "v_heads_interleaved": "v is read as",
    "out_heads_interleaved": "out is read as",
    "fused_qkv_one_after_another_read_as_interleaved": r"\{q,k,v\} are read as",
    "rope_base_default": "rope_base is",
    "act_silu_for_gelu": "act is",
    "parallel_branches": "parallel is",
    "layers_run_twice": "repeat is",
    "score_cap_missing": "score_cap is",
    "norm_offset_added": r"norm1 is what is stored - 1",
    "vocabulary_rows_off_by_+1": r"embed\.weight.* read 1 row earlier",
    "first_two_layers_exchanged": "put in order",
    "experts_out_of_order": "experts of .* are put in order",
}
FEW = ["q_k_exchanged", "layers_out_of_order", "fused_qkv_one_after_another_read_as_interleaved"]
SEEN = 0.15  # nats a token: less is not to be told from noise with so short a text


class Planted:
    """A trained model as a file, and what is told of it when it is read with a bug."""

    def __init__(self, model: Any, ids: Tensor, directory: Path) -> None:
        self.ids, self.mask = ids, None if isinstance(model, Decoder) else MASK
        self.entry = registry.architectures()[model.architecture]
        zoo.save(model, directory)
        self.load = functools.partial(load_directory, directory, self.entry)
        self.healthy = self.nll(self.load())

    def nll(self, model: Any) -> float:
        with torch.no_grad():
            return float(nats(model, self.ids, self.mask).mean())

    def report(self, bug: str) -> tuple[float, str] | None:
        """By how much the text is less likely with it, and what would mend that."""
        try:
            model = planted(self.load, CATALOGUE[bug], self.entry, torch.float32)
        except (NotApplicable, zoo.ZooError):
            return None
        result = explanations(model, self.ids, mask=self.mask)
        return self.nll(model) - self.healthy, result[0].seen if result else "nothing"


@pytest.fixture(scope="session")
def of(
    shakespeare: tuple[Tensor, Tensor, int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Planted]:
    text, looked_at, vocab = shakespeare

    @functools.cache
    def make(name: str) -> Planted:
        directory = tmp_path_factory.mktemp("trained") / name
        return Planted(trained(name, text, vocab), looked_at, directory)

    return make


@pytest.mark.slow
def test_nothing_is_wrong_in_what_was_just_trained(of: Callable[[str], Planted]) -> None:
    gpt2 = of("gpt2")
    assert explanations(gpt2.load(), gpt2.ids) == []


@pytest.mark.slow
@pytest.mark.parametrize("bug", FEW)
def test_planted_bug_is_named_by_a_text(bug: str, of: Callable[[str], Planted]) -> None:
    report = of("gpt2").report(bug)
    assert report is not None and re.search(RIGHT[bug], report[1]), report


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_every_planted_bug(name: str, of: Callable[[str], Planted]) -> None:
    """What a text shows is the first to be named in nine of ten; a healthy one is left alone."""
    model = of(name)
    assert explanations(model.load(), model.ids, mask=model.mask) == []
    report = {bug: result for bug in RIGHT if (result := model.report(bug)) is not None}
    shown = {bug: message for bug, (worse, message) in report.items() if worse > SEEN}
    right = dict(RIGHT)
    if not hasattr(model.load().config, "rope_base"):
        # without rotary embeddings the same rows of q or of k in the other order are one fault
        right |= dict.fromkeys(("q_rows_in_halves", "k_rows_in_halves"), r"attn\.[qk] is read as")
    wrong = {bug: message for bug, message in shown.items() if not re.search(right[bug], message)}
    assert len(shown) >= 4 and len(wrong) <= len(shown) / 10, wrong
