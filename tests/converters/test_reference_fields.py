"""Fields of config.json that zoo does not map: which may be ignored, and which may not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build

import zoo
from converters.reference_fields import ROPE, SHARED, reference_fields
from converters.spec import MOST_UNKNOWN, load_spec
from zoo.errors import ConfigError, UnusedFieldsWarning

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def saved(place: Path, name: str = "llama", **fields: Any) -> Path:
    """A published checkpoint whose config.json holds more fields."""
    directory = zoo.save(build(name).eval(), place / name)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=1))
    return directory


def audit(name: str, /, **fields: Any) -> tuple[list[str], list[str]]:
    """(problems, unused fields) of a config."""
    dialect = load_spec(name).dialect("hf")
    return dialect.read_config(fields)[1], dialect.unused(fields)


def test_lists_are_those_of_the_installed_reference() -> None:
    """`python tools/reference_fields.py` rewrites the file."""
    import reference_fields as tool

    assert {k: frozenset(v) for k, v in tool.derive().items()} == reference_fields()


def test_lists_are_read_where_a_field_is_unknown_and_no_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path, "gpt2")
    asked = []
    monkeypatch.setattr(
        "converters.spec.reference_fields", lambda: asked.append(1) or reference_fields()
    )
    load_spec.cache_clear()
    zoo.load(directory)
    assert not asked
    audit("gpt2", unsloth_fixed=True)
    assert asked


def test_fields_that_the_reference_never_reads_load_with_one_warning(tmp_path: Path) -> None:
    directory = saved(tmp_path, is_llama_config=True, rope_interleaved=False, unsloth_fixed=True)
    with pytest.warns(UnusedFieldsWarning) as raised:
        zoo.load(directory)
    message = str(raised[0].message)
    assert len(raised) == 1 and str(directory / "config.json") in message
    assert message.endswith(": is_llama_config, rope_interleaved, unsloth_fixed")


def test_unused_fields_come_back_byte_for_byte(tmp_path: Path) -> None:
    directory = saved(tmp_path, unsloth_fixed=True, author={"name": "a"})
    with pytest.warns(UnusedFieldsWarning):
        model = zoo.load(directory)
    assert (zoo.save(model, tmp_path / "again") / "config.json").read_bytes() == (
        directory / "config.json"
    ).read_bytes()
    with pytest.warns(UnusedFieldsWarning):
        native = zoo.convert(directory, tmp_path / "native", to="native")
    back = zoo.convert(native, tmp_path / "back", to="hf")
    assert (back / "config.json").read_bytes() == (directory / "config.json").read_bytes()


def test_unused_fields_stay_with_a_model_that_changed(tmp_path: Path) -> None:
    directory = saved(tmp_path, unsloth_fixed=True)
    with pytest.warns(UnusedFieldsWarning):
        model = zoo.load(directory, dtype="bfloat16")
    with torch.no_grad():
        model.norm.weight.add_(1)
    with pytest.warns(UnusedFieldsWarning):
        bare = zoo.load(directory, head="none")
    for n, changed in enumerate((model, bare)):
        written = zoo.save(changed, tmp_path / str(n)) / "config.json"
        assert json.loads(written.read_text())["unsloth_fixed"] is True


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "sliding_window", 64),
        ("llama", "layer_types", ["full_attention"]),
        ("gpt2", "per_layer_config", {"0": {"n_inner": 5}}),
        ("bert", "embedding_size", 128),
        ("neox", "attention_chunk_size", 16),
    ],
)
def test_a_field_that_the_reference_reads_is_refused(name: str, field: str, value: Any) -> None:
    problems, unused = audit(name, **{field: value})
    assert not unused
    assert problems == [
        f"{field}: the reference reads this field, and zoo does not implement it. If it does not "
        f"change inference, pass ignore_config=({field!r},)"
    ]


@pytest.mark.parametrize(
    ("name", "field", "meant"),
    [
        ("llama", "rope_thetaa", "rope_theta"),
        ("llama", "num_hidden_layer", "num_hidden_layers"),
        ("llama", "sliding_windows", "sliding_window"),
        ("llama", "rms_norm_epsilon", "rms_norm_eps"),
        ("gpt2", "n_haed", "n_head"),
        ("gpt2", "layer_norm_eps", "layer_norm_epsilon"),
        ("t5", "d_modl", "d_model"),
        ("bert", "hidden_act_", "hidden_act"),
    ],
)
def test_a_misspelt_field_is_refused(name: str, field: str, meant: str) -> None:
    problems, unused = audit(name, **{field: 1, meant: 1})
    problems = [problem for problem in problems if problem.startswith(f"{field}:")]
    assert not unused and len(problems) == 1
    assert problems[0].startswith(f"{field}: unknown field. Did you mean {meant}")


NOISE = (
    "is_llama_config",
    "rope_interleaved",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "sliding_window_size",
    "custom_pipelines",
    "language",
    "name",
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "summary_last_dropout",
    "pooler_size",
    "author",
    "created_date",
    "license",
    "_flash_attn_2_enabled",
    "neftune_noise_alpha",
    "quantization",
    "eos_token_ids",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)


@pytest.mark.parametrize("name", sorted(reference_fields().keys() - {SHARED, ROPE}))
def test_fields_of_published_configs_are_not_taken_for_misspellings(name: str) -> None:
    assert audit(name, **dict.fromkeys(NOISE))[0] == []


def test_an_unread_key_of_rope_scaling_is_ignored(tmp_path: Path) -> None:
    directory = saved(tmp_path, rope_parameters=None, rope_scaling={**YARN, "finetuned": True})
    with pytest.warns(UnusedFieldsWarning, match=r": rope_scaling\.finetuned$"):
        model = zoo.load(directory)
    assert model.config.to_dict()["rope"] == {**model.config.rope.to_json(), **YARN}
    zoo.load(directory, ignore_config=("rope_scaling.finetuned",))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"factr": 2.0}, r"rope_scaling.factr: unknown field. Did you mean factor"),
        ({"full_attention": {"factor": 2.0}}, "rope_scaling.full_attention: unknown field"),
    ],
)
def test_other_keys_of_rope_scaling_are_refused(more: dict[str, Any], message: str) -> None:
    problems, _ = audit("llama", rope_scaling={"rope_type": "linear", **more})
    assert [p for p in problems if p.startswith(message)]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *((name, "rope_theta") for name in ("llama", "mistral", "mixtral", "qwen2", "gemma2")),
        *(("falcon", "rope_theta"), ("neox", "rotary_emb_base"), ("neox", "rope_theta")),
    ],
)
def test_two_bases_of_rotary_that_differ_are_refused(name: str, field: str) -> None:
    """The reference takes one of them without a word."""
    data = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    problems, _ = audit(name, **data, **{field: 10000.0})
    assert len(problems) == 1 and "differ, and only one of them can count" in problems[0]
    assert field in problems[0] and "rope_parameters.rope_theta" in problems[0]
    assert audit(name, **data, **{field: 500000})[0] == []


def test_an_architecture_without_a_list_refuses_every_unknown_field() -> None:
    """MobileLLM's code lies in its repositories, and what that reads is not derived."""
    problems, unused = audit("mobilellm", license="mit")
    assert not unused and problems[0].startswith("license: unknown field")


def test_thousands_of_unknown_fields_are_refused_at_once() -> None:
    problems, _ = audit("llama", **{f"field_{n}": n for n in range(MOST_UNKNOWN + 1)})
    assert problems == [
        f"{MOST_UNKNOWN + 1} unknown fields, no model's config: field_0, field_1, field_2, "
        "field_3, field_4 … and 196 more"
    ]


def test_other_dialects_refuse_every_unknown_field(made: Callable[..., Path]) -> None:
    problems = load_spec("llama").dialect("meta").read_config({"moe_args": {}})[1]
    assert problems and problems[0].startswith("moe_args: unknown field")


def test_ignored_fields_cause_no_warning(tmp_path: Path) -> None:
    directory = saved(tmp_path, unsloth_fixed=True, layer_types=["full_attention"])
    with pytest.raises(ConfigError, match="layer_types: the reference reads this field"):
        zoo.load(directory)
    zoo.load(directory, ignore_config=("unsloth_fixed", "layer_types"))
