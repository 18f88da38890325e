"""What every model does besides computing the reference's function, which parity proves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from tiny import answer, build, run
from torch import Tensor

import zoo
from converters.spec import load_spec
from zoo import registry
from zoo.errors import ConfigError, InputError, MaskError, SequenceTooLong, TokenIdError
from zoo.parity import fixtures

IDS = torch.randint(4, 90, (2, 17), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[0, :5] = 0
NAMES = sorted(registry.architectures())
CASES = [(a, h) for a in NAMES for h in registry.architectures()[a].model.heads]
# compiling takes seconds: one head of two models' classes in `make test`, the others in `test-all`
ONCE = {
    entry.model: (name, entry.model.heads[0]) for name, entry in registry.architectures().items()
}
COMPILED = first_of(sorted(CASES, key=lambda case: case not in list(ONCE.values())[:1]), 1)


def flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "head"), COMPILED)
def test_compiles_without_graph_breaks(name: str, head: str) -> None:
    model = build(name, head=head).eval()
    for mask in (None, LEFT):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            for x, y in zip(run(compiled, IDS, mask), run(model, IDS, mask), strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("name", "head"), COMPILED)
@pytest.mark.parametrize("pad", [None, 3])
def test_exports_for_any_batch_and_length(name: str, head: str, pad: int | None) -> None:
    if pad is None and getattr(build(name).config, "positions_after_pad", False):
        pad = 1  # position ids start after it: there is no such model without one
    model = build(name, head=head, pad=pad).eval()
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=50)}
    program = torch.export.export(
        model,
        (IDS,),
        extra := {"attention_mask": LEFT, **answer(model, IDS, LEFT)},
        dynamic_shapes=dict.fromkeys(("input_ids", *extra), axes),
    )
    other, mask = IDS.repeat(2, 2)[:3, :29], torch.ones(3, 29, dtype=torch.long)
    with torch.no_grad():
        out = program.module()(other, attention_mask=mask, **answer(model, other, mask))
        for x, y in zip(flat(out), run(model, other, mask), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_parameter_gets_a_gradient(name: str, head: str) -> None:
    model = build(name, head=head)
    sum(x.square().sum() for x in run(model, IDS, LEFT)).backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lost == []


@pytest.mark.parametrize(("name", "head"), CASES)
def test_left_padding_changes_nothing(name: str, head: str) -> None:
    model = build(name, head=head).eval().double()
    with torch.no_grad():
        padded, alone = run(model, IDS, LEFT), run(model, IDS[:1, 5:])
    for x, y in zip(padded, alone, strict=True):
        row = x[:1, 5:] if x.ndim > 1 and x.shape[1] == IDS.shape[1] else x[:1]
        torch.testing.assert_close(row, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_only(name: str) -> None:
    config = registry.architectures()[name].config_class
    rates = [name for name in config.model_fields if name.endswith("dropout")]
    model = build(name, **dict.fromkeys(rates, 0.1))
    assert not torch.equal(run(model, IDS)[0], run(model, IDS)[0])
    model.eval()
    assert torch.equal(run(model, IDS)[0], run(model, IDS)[0])


@pytest.mark.parametrize("name", NAMES)
def test_initialization_matches_the_reference(name: str, tmp_path: Path) -> None:
    """Each tensor's mean and spread, against the reference's own initialization of it."""
    entry = registry.architectures()[name]
    variant = next(iter(entry.variants.values()))
    torch.manual_seed(0)
    field = load_spec(entry.spec).dialect("hf").reference_field("init_std")
    config = {**variant["config"], field: 0.03}
    fixtures.write(variant["class"], config, tmp_path / "reference", seed=None)
    theirs = zoo.load(tmp_path / "reference").state_dict()
    ours = zoo.load(tmp_path / "reference", weights="random").state_dict()
    for n, x in theirs.items():
        few = 6 / x.numel() ** 0.5
        spread = x.float().std(correction=0)
        assert abs(ours[n].mean() - x.mean()) <= few * spread, n
        assert abs(ours[n].std(correction=0) - spread) <= few * spread, n
        if n == "embed.weight":
            zero = (x == 0).all(-1)
            assert torch.equal((ours[n] == 0).all(-1), zero)


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_has_shapes_and_no_buffers(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert all(p.is_meta for p in model.parameters())
    assert list(model.buffers()) == []


@pytest.mark.parametrize("name", NAMES)
def test_bad_inputs_are_refused_by_name(name: str) -> None:
    model = build(name).eval()
    if limit := model.config.limit:
        with pytest.raises(SequenceTooLong):
            model(torch.ones(1, limit + 1, dtype=torch.long))
    for error, ids, mask in [
        (TokenIdError, torch.tensor([[model.config.vocab]]), None),
        (TokenIdError, torch.tensor([[-1]]), None),
        (InputError, torch.ones(1, 0, dtype=torch.long), None),
        (MaskError, IDS, torch.zeros_like(IDS)),
        (MaskError, IDS, torch.ones(2, 16)),
    ]:
        with pytest.raises(error):
            run(model, ids, mask)


def test_llama_extrapolates_when_the_config_allows() -> None:
    ids = torch.ones(1, 62, dtype=torch.long)
    for changes in ({"extrapolate": True}, {"rope": {"rope_type": "dynamic", "factor": 2.0}}):
        assert build("llama", **changes)(ids).shape == (1, 62, 131)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"heads": 3}),
        ("gpt2", {"act": "prelu"}),
        ("gpt2", {"pad": 113}),
        ("bert", {"head": "question_answering", "labels": 3}),
        ("llama", {"kv_heads": 4}),
        ("llama", {"head_dim": 7}),
        ("llama", {"head_dim": 2, "rope": {"rope_type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_base": 1.0, "rope": {"rope_type": "yarn", "factor": 2.0}}),
    ],
)
def test_contradictory_configs_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(name, **changes)


# --- the config's audit --------------------------------------------------------------------------

OLD = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LINEAR = {"type": "linear", "factor": 2.0}


def read(name: str, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    return load_spec(name).dialect("hf").read_config(fields)


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 9.0}, 5.0),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7.0}}, 7.0),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7.0}, "rope_theta": 9.0}, 7.0),
        ({"rope_scaling": LINEAR, "rope_theta": 9.0}, 9.0),
    ],
)
def test_rope_theta_is_read_as_the_reference_reads_it(fields: dict[str, Any], base: float) -> None:
    assert read("llama", **fields)[0]["rope_base"] == base


def test_contradictory_rope_fields_are_refused() -> None:
    assert read("llama", rope_parameters={"rope_type": "default"}, rope_scaling=LINEAR)[1]
    assert not read("llama", rope_parameters=LINEAR, rope_scaling=LINEAR)[1]
    assert not read("llama", rope_parameters=LINEAR, rope_scaling=None)[1]


def test_null_differs_from_a_missing_field() -> None:
    """BERT's padding id is 0 unless it is null."""
    fields, _ = read("bert", pad_token_id=None)
    assert fields["pad"] is None
    assert "pad" not in read("bert")[0]
    assert load_spec("bert").dialect("hf").write_config(fields) == {"pad_token_id": None}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gpt2", {"add_cross_attention": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", {"sliding_window": 8}),
    ],
)
def test_unimplemented_fields_are_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    (problem,) = read(name, **fields)[1]
    assert problem.startswith(next(iter(fields)))


def test_fields_of_published_configs_are_accepted() -> None:
    assert read("llama", max_sequence_length=2048, pretraining_tp=1, rope_scaling=None)[1] == []
    assert read("gpt2", n_ctx=1024, predict_special_tokens=True, summary_type="cls_index")[1] == []
    assert (
        read("bert", directionality="bidi", pooler_type="x", gradient_checkpointing=False)[1] == []
    )
