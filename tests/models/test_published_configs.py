"""config.json as published: each loads, or is refused for a field that changes the function."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from zoo.checkpoints.locate import locate
from zoo.errors import ConfigError, UnusedFieldsWarning, ZooError

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "published_configs.yaml").read_text(encoding="utf-8")
)


def config(name: str) -> dict[str, Any]:
    fields = dict(PUBLISHED[name])
    return {**config(fields.pop("like")), **fields} if "like" in fields else fields


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_loads_or_is_refused(name: str, tmp_path: Path) -> None:
    fields = {"architectures": None, **config(name)}
    refused = fields.pop("refused", "")
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedFieldsWarning)
        if fields["architectures"] is None:
            with pytest.raises(ConfigError, match="no class, and there are no tensors to tell"):
                locate(tmp_path)
        elif refused:
            with pytest.raises(ZooError, match=refused):
                locate(tmp_path)
        else:
            locate(tmp_path)


def test_falcons_former_field_names_are_read(made: Callable[..., Path], tmp_path: Path) -> None:
    """RefinedWeb's own code assumes `new_decoder_architecture`, and publishes no class."""
    source = made("falcon", "grouped")
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    older = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_kv_heads": "n_head_kv",
    }
    fields = {older.get(name, name): value for name, value in written.items()}
    del fields["new_decoder_architecture"]
    fields |= {"model_type": "RefinedWeb", "architectures": ["RWForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    shutil.copy(source / "model.safetensors", tmp_path)
    model, expected = zoo.load(tmp_path), zoo.load(source)
    ids = torch.tensor([[5, 9, 40, 2, 17]])
    assert model.config == expected.config and torch.equal(model(ids), expected(ids))
    kept = zoo.save(model, tmp_path / "kept") / "config.json"
    assert kept.read_text(encoding="utf-8") == (tmp_path / "config.json").read_text(
        encoding="utf-8"
    )
    changed = zoo.save(zoo.load(tmp_path, head="none"), tmp_path / "changed") / "config.json"
    now = json.loads(changed.read_text(encoding="utf-8"))
    assert now["model_type"] == "falcon" and now["architectures"] == ["FalconModel"]
    assert zoo.load(tmp_path / "changed").config.layers == model.config.layers


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", {"hidden_size": 48, "num_attention_heads": 6}),
        ("NousResearch/Yarn-Llama-2-7b-64k", {"hidden_size": 48, "num_attention_heads": 6}),
        ("google/gemma-2-9b", {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}),
        ("databricks/dolly-v2-3b", {"hidden_size": 48, "num_attention_heads": 3}),
        ("tiiuae/falcon-11B", {"hidden_size": 48, "num_attention_heads": 6}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_load_with_a_warning_change_no_logits(
    name: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    """Both the reference and zoo get every field."""
    from zoo.checkpoints.oracle import transformers
    from zoo.parity.fixtures import write

    fields = {**config(name), **sizes, "vocab_size": 131, "num_hidden_layers": 2}
    kv = {key: 3 for key in ("num_key_value_heads", "num_kv_heads") if key in fields}
    wide = {key: 52 for key in ("intermediate_size", "ffn_hidden_size") if key in fields}
    fields |= {**kv, **wide, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (named,) = fields["architectures"]
    reference_fields = {key: value for key, value in fields.items() if key != "auto_map"}
    write(named, reference_fields, tmp_path, seed=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.warns(UnusedFieldsWarning):
        ours = zoo.load(tmp_path, dtype="float64")
    path.write_text(json.dumps(reference_fields), encoding="utf-8")
    theirs = getattr(transformers(), named).from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.randint(3, 131, (1, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        # the reference's norms and rotary tables stay in fp32
        assert (ours(ids) - expected).abs().max() < 1e-4 * expected.abs().max()
