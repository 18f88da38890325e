"""Match tensors on disk with tensors of a model by name and shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations

# native module name -> names in published files
CALLED = {
    "embed": "wte embed_tokens tokens_embed embed_in word_embeddings tok_embeddings",
    "positions": "wpe positions_embed position_embeddings embed_positions",
    "norm": "ln_f final_layer_norm final_layernorm layer_norm norm_f",
    "norm1": "ln_1 input_layernorm attention_norm self_attn_layer_norm sa_layer_norm norm_1",
    "norm2": "ln_2 post_attention_layernorm ffn_norm final_layer_norm output_layer_norm norm_2",
    "attn": "self_attn attention self_attention self",
    "q": "q_proj query wq q_lin",
    "k": "k_proj key wk k_lin",
    "v": "v_proj value wv v_lin",
    "out": "o_proj out_proj c_proj dense wo out_lin",
    "mlp": "ffn feed_forward intermediate",
    "gate": "gate_proj w1",
    "up": "up_proj w3 c_fc fc1 dense_h_to_4h fc_in lin1",
    "down": "down_proj w2 c_proj fc2 dense_4h_to_h fc_out lin2",
    "head": "lm_head embed_out",
}
LEAVES = {"gamma": "weight", "beta": "bias"}
LAYERS = {"layers", "layer", "h", "blocks", "block"}
ALIKE = 0.75  # names with a lower similarity are not paired


@dataclass(frozen=True)
class Family:
    """Tensors whose names differ only in their indices."""

    name: str  # with {layer} and the like for numbers
    shape: tuple[int, ...]
    head: bool = False  # on disk: never under the prefix

    @property
    def path(self) -> list[str]:
        return self.name.split(".")[:-1]

    @property
    def leaf(self) -> str:
        leaf = self.name.rpartition(".")[2]
        return LEAVES.get(leaf, leaf)

    @property
    def indices(self) -> list[str]:
        return [part for part in self.path if part.startswith("{")]

    @property
    def tail(self) -> list[str]:
        """The modules below the last index, which distinguish the tensors of a layer."""
        last = max((k for k, part in enumerate(self.path) if part.startswith("{")), default=-1)
        return self.path[last + 1 :] or self.path

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


def plain(name: str) -> str:
    """Replace indices by placeholders: `h.3.attn.q` becomes `h.{layer}.attn.q`."""
    parts: list[str] = []
    for part in name.split("."):
        if part.isdigit():
            before = parts[-1] if parts else ""
            word = "layer" if before in LAYERS else before.removesuffix("s")
            word = word if word.isidentifier() else "n"
            while f"{{{word}}}" in parts:
                word += "2"
            part = f"{{{word}}}"
        parts.append(part)
    return ".".join(parts)


def families(tensors: Iterable[tuple[str, tuple[int, ...], bool]]) -> list[Family]:
    out: dict[str, Family] = {}
    for name, shape, head in tensors:
        out.setdefault(plain(name), Family(plain(name), shape, head))
    return list(out.values())


def fits(disk: Family, native: Family) -> bool:
    if disk.leaf != native.leaf or disk.indices != native.indices:
        return False
    return native.shape in (disk.shape, disk.shape[::-1])


def alike(disk: Family, native: Family) -> float:
    """Return the similarity of two names, 0 to 1. The last module counts most."""
    here, there = disk.tail, native.tail
    around = [_same(a, b) for a in here[:-1] for b in there[:-1]]
    outer = max(around) if around else 1.0 if len(here) == len(there) else 0.5
    return 0.7 * _same(here[-1], there[-1]) + 0.3 * outer


def _same(disk: str, native: str) -> float:
    if disk == native or disk in CALLED.get(native, "").split():
        return 1.0
    if native in disk.split("_"):
        return 0.8
    return 0.6 * SequenceMatcher(None, disk, native).ratio()


def fused(disk: Family, native: Sequence[Family]) -> list[Family]:
    """Return sibling tensors of the model that are concatenated in one tensor on disk."""
    sisters: dict[tuple[str, ...], list[Family]] = {}
    for n in native:
        if n.leaf == disk.leaf and n.indices == disk.indices and len(n.shape) == len(disk.shape):
            sisters.setdefault(tuple(n.path[:-1]), []).append(n)
    for group in sisters.values():
        outer = group[0].tail[:-1]
        if outer and not any(_same(a, outer[-1]) >= ALIKE for a in disk.tail):
            continue
        for count in range(len(group), 1, -1):
            for parts in combinations(group, count):
                total = sum(p.shape[0] for p in parts)
                if all((total, *p.shape[1:]) in (disk.shape, disk.shape[::-1]) for p in parts):
                    return list(parts)
    return []
