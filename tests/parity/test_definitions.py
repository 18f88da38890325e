"""What no library computes for us to compare with, against a plain reading of its definition."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build
from torch import Tensor

import zoo
from zoo import registry
from zoo.components.dual_chunk import DualChunk, DualChunkAttention
from zoo.components.masks import causal
from zoo.components.rotary import PLAIN, Rotary
from zoo.errors import ConfigError
from zoo.parity.fixtures import hot_checkpoint
from zoo.parity.reference import Lift, Reference

# --- dual chunk attention ------------------------------------------------------------------------


def turned(x: Tensor, place: int, base: float) -> Tensor:
    """One head's vector at one place, pair by pair."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for n in range(half):
        angle = place / base ** (n / half)
        low, high = x[n], x[n + half]
        out[n] = low * math.cos(angle) - high * math.sin(angle)
        out[n + half] = high * math.cos(angle) + low * math.sin(angle)
    return out


def quadratic(q: Tensor, k: Tensor, v: Tensor, sizes: DualChunk, base: float) -> Tensor:
    """One query and one key at a time; (s, e) each."""
    length = sizes.chunk_size - sizes.local_size
    out = torch.zeros_like(v)
    for i in range(len(q)):
        scores = []
        for j in range(i + 1):
            if i // length == j // length:
                place = i % length
            elif i // length == j // length + 1:
                place = min(i % length + length, sizes.chunk_size)
            else:
                place = min(2 * length - 1, sizes.chunk_size)
            score = turned(q[i], place, base) @ turned(k[j], j % length, base)
            if original := sizes.original_max_position_embeddings:
                score = score * max(1.0, 0.1 * math.log((i + 1) / original) + 1.0)
            scores.append(score / len(q[i]) ** 0.5)
        out[i] = torch.stack(scores).softmax(0) @ v[: i + 1]
    return out


@pytest.mark.parametrize(
    "sizes", [DualChunk(10, 3), DualChunk(8, 5), DualChunk(12, 0), DualChunk(9, 2, 11)], ids=str
)
@pytest.mark.parametrize("rows", [4, 1024])
def test_dual_chunk_attention_matches_its_definition(
    sizes: DualChunk, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.components.dual_chunk.ROWS", rows)
    torch.manual_seed(0)
    q = torch.randn(2, 4, 31, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 31, 6, dtype=torch.float64)
    attend = DualChunkAttention(sizes, Rotary(6, 100.0, PLAIN, 31))
    mask = causal(torch.ones(2, 31, dtype=torch.long), None)
    out = attend(q, k, v, mask, 6**-0.5, 0.0)
    for row in range(2):
        for head in range(4):
            wanted = quadratic(q[row, head], k[row, head // 2], v[row, head // 2], sizes, 100.0)
            torch.testing.assert_close(out[row, head], wanted, rtol=0, atol=1e-12)


def qwen(**sizes: int) -> Any:
    return build("qwen2", dual_chunk=sizes or None).double().eval()


IDS = torch.randint(4, 90, (2, 23), generator=torch.Generator().manual_seed(0))


def test_one_chunk_is_ordinary_attention() -> None:
    ordinary, chunked = qwen(), qwen(chunk_size=30, local_size=7)
    with torch.no_grad():
        torch.testing.assert_close(chunked(IDS), ordinary(IDS), rtol=0, atol=1e-12)


def test_several_chunks_differ_and_padding_has_no_effect() -> None:
    model = qwen(chunk_size=11, local_size=4)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        padded, alone = model(IDS, mask), model(IDS[:1, 5:])
        assert not torch.allclose(alone, qwen()(IDS[:1, 5:]))
    torch.testing.assert_close(padded[:1, 5:], alone, rtol=0, atol=1e-12)


def test_config_enables_dual_chunk_attention() -> None:
    assert build("qwen2").config.dual_chunk is None
    for sizes in ({"chunk_size": 4, "local_size": 4}, {"chunk_size": 4}, {"chunk": 1, "local": 2}):
        with pytest.raises(ConfigError, match="dual_chunk"):
            build("qwen2", dual_chunk=sizes)


# --- DeBERTa's enhanced mask decoder -------------------------------------------------------------


def test_enhanced_mask_decoder_runs_the_last_layer_twice(tmp_path: Path) -> None:
    """The layers are those of the reference; the loop around them is that of the paper."""
    entry = registry.architectures()["deberta-v2"]
    reference_class = hot_checkpoint(entry, "predictions", tmp_path)
    torch.manual_seed(0)
    places = 0.3 * torch.randn(53, 42)
    add_tensor(tmp_path, "deberta.embeddings.position_embeddings.weight", places)

    model = zoo.load(tmp_path, head="enhanced_masked_lm").double()
    theirs = Reference(tmp_path, reference_class, torch.float64, lifted=True)
    body, real = theirs.model.deberta, torch.ones_like(IDS)
    with Lift():
        states = theirs.model(IDS, output_hidden_states=True).hidden_states
        asking = states[-2] + places[: IDS.shape[1]].double()
        for _ in range(2):
            asking, _ = body.encoder.layer[-1](
                states[-2],
                body.encoder.get_attention_mask(real),
                query_states=asking,
                relative_pos=body.encoder.get_rel_pos(states[-2]),
                rel_embeddings=body.encoder.get_rel_embedding(),
            )
    wanted = theirs.model.lm_predictions(asking, body.embeddings.word_embeddings)
    torch.testing.assert_close(model(IDS), wanted, rtol=0, atol=1e-10)
    plain = zoo.load(tmp_path, head="lm_predictions").double()
    assert not torch.allclose(model(IDS), plain(IDS))


def add_tensor(directory: Path, name: str, tensor: Tensor) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path, metadata={"format": "pt"})
