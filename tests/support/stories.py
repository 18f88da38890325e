"""stories260K, a real model of llama2.c, laid out as a directory of the reference's."""

import json
import struct
from math import prod
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor


def publish(source: Path, directory: Path) -> None:
    """llama2.c's version 0, laid out as an HF directory: all layers of a kind stand together."""
    data = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    assert vocab > 0, "a negative vocabulary means a head of its own"
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    kv, at = dim * kv_heads // heads, 0
    tensors: dict[str, Tensor] = {}

    def take(name: str, *shape: int, each: int = layers) -> None:
        nonlocal at
        for layer in range(each):
            tensors[name.format(layer)] = numbers[at : at + prod(shape)].reshape(shape).clone()
            at += prod(shape)

    block = "model.layers.{}."
    take("model.embed_tokens.weight", vocab, dim, each=1)
    take(block + "input_layernorm.weight", dim)
    take(block + "self_attn.q_proj.weight", dim, dim)
    take(block + "self_attn.k_proj.weight", kv, dim)
    take(block + "self_attn.v_proj.weight", kv, dim)
    take(block + "self_attn.o_proj.weight", dim, dim)
    take(block + "post_attention_layernorm.weight", dim)
    take(block + "mlp.gate_proj.weight", hidden, dim)
    take(block + "mlp.down_proj.weight", dim, hidden)
    take(block + "mlp.up_proj.weight", hidden, dim)
    take("model.norm.weight", dim, each=1)
    tables = 2 * length * (dim // heads) // 2
    assert at + tables == len(numbers), "the rotary tables are all that is left"

    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # pairs stand side by side there, and half a head apart here
            halves = "(h e two) i -> (h two e) i"
            tensors[name] = rearrange(tensor, halves, two=2, e=dim // heads // 2).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
