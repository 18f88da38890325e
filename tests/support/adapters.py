"""Checkpoints, adapters for them as peft saves them, and what both together compute."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo import registry
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Reference

FP64 = 1e-10  # of the outputs' scale, as parity has it
IDS = torch.randint(3, 30, (2, 11), generator=torch.Generator().manual_seed(5))

# architecture/variant -> ends of the adapted modules' names on disk
ADAPTED = {
    "gpt2/base": ("c_attn", "c_proj", "wpe"),
    "llama/base": ("q_proj", "k_proj", "o_proj", "down_proj"),
    "neox/base": ("query_key_value", "dense_h_to_4h", "embed_out"),
    "bert/masked-lm": ("query", "output.dense", "token_type_embeddings"),
    "falcon/grouped": ("query_key_value",),
    "mixtral/base": ("q_proj", "gate", "1.w1", "2.w1", "2.w2", "3.w3"),
    "t5/gated-own-head": ("q", "k", "wi_0", "wo", "lm_head"),
    "deberta/base": ("in_proj", "pos_proj"),
    "gemma2/base": ("q_proj", "up_proj"),
    "qwen2/base": ("k_proj", "gate_proj"),
    "mistral/base": ("v_proj", "lm_head"),
    "bloom/base": ("query_key_value", "dense_4h_to_h"),
    "roberta/masked-lm": ("value", "attention.output.dense"),
    "xlm-roberta/masked-lm": ("key", "intermediate.dense"),
    "distilbert/masked-lm": ("q_lin", "lin1", "vocab_transform"),
    "deberta-v2/v3": ("query_proj", "output.dense"),
    "mobilellm/base": ("q_proj", "down_proj"),
}
TURNED = ("gpt2",)  # kernels that lie (in, out)


class Made:
    """A checkpoint, an adapter for it as peft would save it, and the two merged by hand."""

    def __init__(
        self,
        place: Path,
        key: str,
        ends: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float64,
        **config: Any,
    ) -> None:
        name, variant = key.split("/")
        self.base, self.adapter, self.merged = (place / n for n in ("base", "adapter", "merged"))
        entry = registry.architectures()[name]
        self.reference_class = hot_checkpoint(entry, variant, self.base, dtype=dtype)
        tensors = load_file(self.base / "model.safetensors")
        torch.manual_seed(3)
        settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "bias": "none", **config}
        self.factors: dict[str, Tensor] = {}
        for end in ends or ADAPTED[key]:
            weights = [n for n in tensors if n.endswith(f".{end}.weight") or n == f"{end}.weight"]
            assert weights, end
            for weight in weights:
                self._adapt(tensors, weight.removesuffix(".weight"), settings, name in TURNED)
        self.adapter.mkdir()
        save_file(self.factors, self.adapter / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps({**settings, "target_modules": list(ends or ADAPTED[key])})
        (self.adapter / "adapter_config.json").write_text(text)
        self.merged.mkdir()
        save_file(tensors, self.merged / "model.safetensors", {"format": "pt"})
        (self.merged / "config.json").write_bytes((self.base / "config.json").read_bytes())

    def _adapt(
        self, tensors: dict[str, Tensor], module: str, settings: dict[str, Any], turned: bool
    ) -> None:
        weight, rank, scale = tensors[f"{module}.weight"], settings["r"], 0.0
        for end, value in settings.get("rank_pattern", {}).items():
            rank = value if module.endswith(end) else rank
        alpha = settings["lora_alpha"]
        for end, value in settings.get("alpha_pattern", {}).items():
            alpha = value if module.endswith(end) else alpha
        scale = alpha / rank ** (0.5 if settings.get("use_rslora") else 1)
        embedding = "embeddings" in module or module.endswith(("wpe", "wte", "embed_tokens"))
        out, into = weight.shape if not (embedding or turned) else weight.mT.shape
        a, b = (torch.randn(shape).to(weight.dtype) * 0.1 for shape in ((rank, into), (out, rank)))
        product = scale * b @ a
        tensors[f"{module}.weight"] = weight + (product.mT if embedding or turned else product)
        ends = ("lora_embedding_A", "lora_embedding_B")
        ends = ends if embedding else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (a, b), strict=True):
            self.factors[f"base_model.model.{module}.{end}"] = factor.contiguous()


def run(model: Any, ids: Tensor = IDS) -> Tensor:
    more = {"decoder_input_ids": ids} if "t5" in type(model).__module__ else {}
    out = model(ids, **more)
    return out[0] if isinstance(out, tuple) else out


def distance(x: Tensor, y: Tensor) -> float:
    return ((x - y).abs().max() / y.pow(2).mean().sqrt()).item()


def truth(made: Made) -> Tensor:
    """What the reference computes with the merged weights."""
    reference = Reference(made.merged, made.reference_class, torch.float64, lifted=True)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert not reference.problems
    return next(iter(reference(inputs).values())).detach()
