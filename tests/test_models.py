"""What every model does beside computing the reference's function: parity holds the latter."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from converters.spec import load_spec
from zoo import registry
from zoo.errors import ConfigError, InputError, MaskError, SequenceTooLong, TokenIdError

SIZES: dict[str, Any] = {"vocab": 113, "positions": 53, "dim": 40, "layers": 2, "heads": 4}
IDS = torch.randint(4, 90, (2, 17), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[0, :5] = 0
NAMES = sorted(registry.architectures())
CASES = [(a, h) for a in NAMES for h in registry.architectures()[a].model.heads]


def build(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    entry = registry.architectures()[name]
    wanted = {**SIZES, "hidden": 60}
    known = {field.name for field in dataclasses.fields(entry.config_class)}
    sizes = {name: size for name, size in wanted.items() if name in known}
    return entry.model(entry.config_class(**{**sizes, **changes}))


def flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_compiled_without_breaks(name: str, head: str) -> None:
    model = build(name, head=head).eval()
    for mask in (None, LEFT):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            for x, y in zip(flat(compiled(IDS, mask)), flat(model(IDS, mask)), strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("name", "head"), CASES)
@pytest.mark.parametrize("pad", [None, 3])
def test_exported_for_any_batch_and_length(name: str, head: str, pad: int | None) -> None:
    model = build(name, head=head, pad=pad).eval()
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=50)}
    program = torch.export.export(
        model,
        (IDS,),
        {"attention_mask": LEFT},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )
    other, mask = IDS.repeat(2, 2)[:3, :29], torch.ones(3, 29, dtype=torch.long)
    with torch.no_grad():
        out = program.module()(other, attention_mask=mask)
        for x, y in zip(flat(out), flat(model(other, mask)), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_parameter_learns(name: str, head: str) -> None:
    model = build(name, head=head)
    sum(x.square().sum() for x in flat(model(IDS, LEFT))).backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lost == []


@pytest.mark.parametrize(("name", "head"), CASES)
def test_left_padding_changes_nothing(name: str, head: str) -> None:
    model = build(name, head=head).eval().double()
    with torch.no_grad():
        padded, alone = flat(model(IDS, LEFT)), flat(model(IDS[:1, 5:]))
    for x, y in zip(padded, alone, strict=True):
        row = x[:1, 5:] if x.ndim > 1 and x.shape[1] == IDS.shape[1] else x[:1]
        torch.testing.assert_close(row, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_in_training_only(name: str) -> None:
    config = registry.architectures()[name].config_class
    rates = [f.name for f in dataclasses.fields(config) if f.name.endswith("dropout")]
    model = build(name, **dict.fromkeys(rates, 0.1))
    assert not torch.equal(flat(model(IDS))[0], flat(model(IDS))[0])
    model.eval()
    assert torch.equal(flat(model(IDS))[0], flat(model(IDS))[0])


@pytest.mark.parametrize("name", NAMES)
def test_initialised_as_the_original(name: str) -> None:
    model = build(name, dim=160, hidden=320, init_std=0.03)
    for n, p in model.named_parameters():
        if n.endswith("bias"):
            assert p.abs().max() == 0, n
        elif "norm" in n:
            assert (p == 1).all(), n
        else:
            branch = name == "gpt2" and n.endswith(("attn.out.weight", "mlp.down.weight"))
            wanted = 0.03 / (2 * SIZES["layers"]) ** 0.5 if branch else 0.03
            few = 4 / p.numel() ** 0.5
            assert abs(p.std().item() / wanted - 1) < 0.05 + few, n
    if name != "gpt2":
        for tied in (True, False):
            assert build(name, pad=7, tied=tied).embed.weight[7].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_on_meta_there_are_shapes_and_no_buffers(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert all(p.is_meta for p in model.parameters())
    assert list(model.buffers()) == []


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_named(name: str) -> None:
    model = build(name).eval()
    for error, ids, mask in [
        (TokenIdError, torch.tensor([[113]]), None),
        (TokenIdError, torch.tensor([[-1]]), None),
        (SequenceTooLong, torch.ones(1, 54, dtype=torch.long), None),
        (InputError, torch.ones(1, 0, dtype=torch.long), None),
        (MaskError, IDS, torch.zeros_like(IDS)),
        (MaskError, IDS, torch.ones(2, 16)),
    ]:
        with pytest.raises(error):
            model(ids, mask)


def test_llama_goes_beyond_its_positions_when_asked() -> None:
    ids = torch.ones(1, 54, dtype=torch.long)
    for changes in ({"extrapolate": True}, {"rope": {"rope_type": "dynamic", "factor": 2.0}}):
        assert build("llama", **changes)(ids).shape == (1, 54, 113)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"heads": 3}),
        ("gpt2", {"act": "prelu"}),
        ("gpt2", {"pad": 113}),
        ("bert", {"head": "question_answering", "labels": 3}),
        ("llama", {"kv_heads": 3}),
        ("llama", {"head_dim": 7}),
        ("llama", {"head_dim": 2, "rope": {"rope_type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_base": 1.0, "rope": {"rope_type": "yarn", "factor": 2.0}}),
    ],
)
def test_configs_that_cannot_be(name: str, changes: dict[str, Any]) -> None:
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
def test_theta_is_found_where_the_reference_finds_it(fields: dict[str, Any], base: float) -> None:
    assert read("llama", **fields)[0]["rope_base"] == base


def test_two_ropes_that_differ_are_refused() -> None:
    assert read("llama", rope_parameters={"rope_type": "default"}, rope_scaling=LINEAR)[1]
    assert not read("llama", rope_parameters=LINEAR, rope_scaling=LINEAR)[1]
    assert not read("llama", rope_parameters=LINEAR, rope_scaling=None)[1]


def test_a_null_is_said_and_not_left_out() -> None:
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
        ("llama", {"pooler_type": "first_token_transform"}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    (problem,) = read(name, **fields)[1]
    assert problem.startswith(next(iter(fields)))


def test_fields_of_published_configs_pass() -> None:
    assert read("llama", max_sequence_length=2048, pretraining_tp=1, rope_scaling=None)[1] == []
    assert read("gpt2", n_ctx=1024, predict_special_tokens=True, summary_type="cls_index")[1] == []
    assert (
        read("bert", directionality="bidi", pooler_type="x", gradient_checkpointing=False)[1] == []
    )
