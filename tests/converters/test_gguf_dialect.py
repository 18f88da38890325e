"""GGUF as a dialect: by its own package, by the reference and by llama.cpp."""

import io
import json
import re
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import first_of
from safetensors.torch import load_file
from tiny import build, hot
from torch import Tensor

import zoo
from converters.formats import TensorInfo
from converters.formats.gguf import GGUFReader, Value, lay_out
from converters.formats.llama2c import Llama2cReader
from converters.manifest import check, read
from converters.quantized.blocks import quantize_q8_0
from zoo import registry
from zoo.cli.app import main
from zoo.errors import BadTokenizer, ConfigError, LossyExport, NotACheckpoint, UsageError
from zoo.parity.fixtures import write
from zoo.text.generation_config import defaults_of
from zoo.tokenizers.gguf import files as vocabulary_files
from zoo.tokenizers.llama2c import pieces

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf")

IDS = torch.arange(33).view(1, 33) * 3
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertModel",
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "gpt2": {},
    "bert": {"hidden_act": "gelu"},
}
SPOKEN = {"qwen2": ("use_sliding_window", "layer_types", "max_window_layers", "sliding_window")}


def published(name: str, place: Path, **changes: Any) -> Path:
    """A tiny checkpoint that the reference wrote, of a config that GGUF has words for."""
    fields = dict(next(iter(registry.architectures()[name].variants.values()))["config"])
    for field in SPOKEN.get(name, ()):
        fields.pop(field, None)
    write(CLASSES[name], fields | CHANGES[name] | changes, place)
    return place


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hf")
    return {name: published(name, place / name) for name in CLASSES}


def converted(source: Path, place: Path, **how: Any) -> Path:
    return zoo.convert(source, place, to="gguf", **how) / "model.gguf"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, Tensor) else out[0]


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_converted_weights_and_config_come_back(hf: Any, tmp_path: Path, name: str) -> None:
    model = zoo.load(hf[name], head="none" if name == "bert" else None)
    path = converted(hf[name], tmp_path / "gguf", **({"head": "none"} if name == "bert" else {}))
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.gguf", "zoo-manifest.json"]
    again = zoo.load(path)
    assert torch.equal(logits(again), logits(model))
    assert again.provenance.origin.dialect == "gguf" and not again.provenance.quantized
    assert zoo.info(path).architecture == name
    assert list(check(path.parent, sha256=True)) == []
    # and is the same from a model in memory, byte for byte
    zoo.save(model, tmp_path / "saved", to="gguf")
    assert (tmp_path / "saved" / "model.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", CLASSES)
def test_the_formats_own_package_reads_it(hf: Any, tmp_path: Path, name: str) -> None:
    """Names and axes by hand, from what the reference wrote."""
    gguf = pytest.importorskip("gguf")
    path = converted(hf[name], tmp_path / "gguf", **({"head": "none"} if name == "bert" else {}))
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == name
    ours = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    theirs = load_file(hf[name] / "model.safetensors")
    config = json.loads((hf[name] / "config.json").read_text())
    layer = config.get("num_hidden_layers", config.get("n_layer")) - 1
    assert reader.get_field(f"{name}.block_count").contents() == layer + 1
    if name == "gpt2":
        theirs = {n.removeprefix("transformer."): t for n, t in theirs.items()}
        wanted = theirs[f"h.{layer}.attn.c_attn.weight"].T
        assert torch.equal(ours[f"blk.{layer}.attn_qkv.weight"], wanted)
        wanted = theirs[f"h.{layer}.mlp.c_proj.weight"].T
        assert torch.equal(ours[f"blk.{layer}.ffn_down.weight"], wanted)
        assert torch.equal(ours["position_embd.weight"], theirs["wpe.weight"])
        return
    if name == "bert":
        wanted = theirs["embeddings.LayerNorm.bias"]
        assert torch.equal(ours["token_embd_norm.bias"], wanted)
        wanted = theirs[f"encoder.layer.{layer}.output.LayerNorm.weight"]
        assert torch.equal(ours[f"blk.{layer}.layer_output_norm.weight"], wanted)
        return
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for part, count in heads.items():
        wanted = theirs[f"model.layers.{layer}.self_attn.{part}_proj.weight"]
        if name == "llama":  # llama.cpp turns neighbors there, and halves in qwen2
            rows, dim = wanted.shape
            wanted = wanted.view(count, 2, rows // count // 2, dim).transpose(1, 2)
            wanted = wanted.reshape(rows, dim)
        assert torch.equal(ours[f"blk.{layer}.attn_{part}.weight"], wanted)
    assert reader.get_field(f"{name}.rope.freq_base").contents() == 5000.0
    down = theirs[f"model.layers.{layer}.mlp.down_proj.weight"]
    assert torch.equal(ours[f"blk.{layer}.ffn_down.weight"], down)


@pytest.mark.parametrize("name", first_of(["llama", "qwen2", "gpt2"], 1))
def test_the_reference_reads_it(hf: Any, tmp_path: Path, name: str) -> None:
    """transformers' own reader of GGUF knows no BERT."""
    pytest.importorskip("gguf")
    import transformers

    source = hf[name]
    if name == "gpt2":  # of which it reads no vocabulary, length and inner size
        usual = {"vocab_size": 50257, "n_positions": 1024, "n_inner": None}
        source = published("gpt2", tmp_path / "hf", **usual)
    path = converted(source, tmp_path / "gguf")
    kind, where = getattr(transformers, CLASSES[name]), {"gguf_file": path.name}
    if find_spec("accelerate") is not None:
        theirs = kind.from_pretrained(path.parent, **where).eval()
    else:  # which from_pretrained asks for, and its reader of the file does not
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        config = transformers.AutoConfig.from_pretrained(path.parent, **where)
        theirs = kind(config).eval()
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
        bad = theirs.load_state_dict(tensors["tensors"], strict=False)
        assert not bad.unexpected_keys and set(bad.missing_keys) <= {"lm_head.weight"}
    # the same weights at the same places: its own directory gives its own logits
    own = kind.from_pretrained(source).eval()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, own(IDS).logits)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_apply_to_matrices_only(hf: Any, tmp_path: Path, dtype: str) -> None:
    """Vectors stand in F32; a model that was narrow is that again, and one that was not is not."""
    code = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    zoo.convert(hf["llama"], tmp_path / "narrow", to="hf", dtype=dtype)
    path = converted(tmp_path / "narrow", tmp_path / "a")
    reader = GGUFReader(path).tensors
    assert {info.dtype for info in reader.values() if len(info.shape) == 1} == {"F32"}
    assert {info.dtype for info in reader.values() if len(info.shape) == 2} == {code}
    zoo.convert(path, tmp_path / "back", to="hf")
    before = load_file(tmp_path / "narrow" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in after
    )
    # one number of one norm that the narrow type does not have: all is read in float32
    at, _ = GGUFReader(path).span("output_norm.weight")
    data = bytearray(path.read_bytes())
    data[at : at + 4] = np.float32(1.0000001).tobytes()
    (tmp_path / "one.gguf").write_bytes(data)
    model = zoo.load(tmp_path / "one.gguf")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.state_dict()["norm.weight"][0].item() == np.float32(1.0000001)
    # norms of a model that was in float32 keep their digits
    path = converted(hf["llama"], tmp_path / "b", dtype=dtype)
    model = zoo.load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    norm = load_file(hf["llama"] / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.state_dict()["norm.weight"], norm)
    zoo.convert(path, tmp_path / "wide", to="native")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[n], t) for n, t in model.state_dict().items())


def test_q8_0_quantizes_matrices_like_the_library(tmp_path: Path) -> None:
    """Rows that divide into blocks are quantized as the format's own package does it."""
    gguf = pytest.importorskip("gguf")
    source = published(
        "llama",
        tmp_path / "hf",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=72,
    )
    path = converted(source, tmp_path / "q8", dtype="q8_0")
    theirs = load_file(source / "model.safetensors")
    reader = gguf.GGUFReader(path)
    ours = {t.name: t for t in reader.tensors}
    kinds = gguf.GGMLQuantizationType
    assert reader.get_field("general.file_type").contents() == 7
    up = theirs["model.layers.0.mlp.up_proj.weight"]
    assert ours["blk.0.ffn_up.weight"].tensor_type == kinds.Q8_0
    wanted = gguf.quants.quantize(up.numpy(), kinds.Q8_0)
    assert np.array_equal(ours["blk.0.ffn_up.weight"].data.reshape(-1), wanted.reshape(-1))
    assert ours["blk.0.ffn_down.weight"].tensor_type == kinds.F32  # rows of 72
    assert ours["blk.0.attn_norm.weight"].tensor_type == kinds.F32
    model = zoo.load(path)
    assert model.provenance.quantized["blocks.0.mlp.up.weight"] == "Q8_0"
    again = gguf.quants.dequantize(wanted, kinds.Q8_0)
    assert np.array_equal(model.blocks[0].mlp.up.weight.detach().numpy(), again)
    # the manifest of what is made of it says so, and that of the file itself
    zoo.convert(path, tmp_path / "native", to="native")
    assert read(tmp_path / "native")["quantised"]["blocks.0.mlp.up.weight"] == "Q8_0"
    assert read(tmp_path / "native")["lossy"] == "dequantized: Q8_0"
    assert "Q8_0" in zoo.info(path).quantized
    assert zoo.info(path).stored.dtypes["Q8_0"] > 0
    zoo.save(model, tmp_path / "saved")
    assert read(tmp_path / "saved")["quantised"] == model.provenance.quantized
    native = zoo.load(tmp_path / "native")
    assert torch.equal(logits(native), logits(model))
    # quantized again from what it stands for, in another order of pieces: the same bytes
    converted(tmp_path / "native", tmp_path / "again", dtype="q8_0", memory=1 << 16)
    assert (tmp_path / "again" / "model.gguf").read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="hf has no such type"):
        zoo.convert(source, tmp_path / "no", to="hf", dtype="q8_0")
    with pytest.raises(UsageError, match="meta has no such type"):
        zoo.convert(source, tmp_path / "no", to="meta", dtype="q8_0")


def test_an_interrupted_conversion_resumes(tmp_path: Path) -> None:
    """Coded tensors are journaled as they lie in the file."""
    wide = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = published("llama", tmp_path / "hf", **wide)
    whole = converted(source, tmp_path / "whole", dtype="q8_0")
    seen: list[dict[str, Any]] = []

    def stop(event: dict[str, Any]) -> None:
        seen.append(event)
        if sum(e["event"] == "tensor" for e in seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "out", dtype="q8_0", tell=stop, threads=1)
    assert not (tmp_path / "out").exists()
    seen.clear()
    path = converted(source, tmp_path / "out", dtype="q8_0", tell=seen.append)
    assert seen[-1]["resumed"] > 0 and path.read_bytes() == whole.read_bytes()


def test_a_conversion_opens_its_source_once(
    hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted(hf["llama"], tmp_path / "gguf")
    opened: list[Path] = []
    real = GGUFReader.__init__

    def counted(self: GGUFReader, path: Path, *how: Any, **more: Any) -> None:
        opened.append(path)
        real(self, path, *how, **more)

    monkeypatch.setattr(GGUFReader, "__init__", counted)
    zoo.convert(path, tmp_path / "native", to="native")
    assert opened == [path]


# --- rotary scaling ------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_scaled_rope_is_written_as_factors(tmp_path: Path, rope: dict[str, Any]) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    source = published("llama", tmp_path / "hf", rope_parameters=rope, **wide)
    path = converted(source, tmp_path / "gguf")
    reader = GGUFReader(path)
    assert ("rope_freqs.weight" in reader.tensors) is (rope is LLAMA3)
    if rope is LLAMA3:  # as Llama 3 was published, by the formula written out
        factors = []
        for n in range(16):
            wavelength = 2 * np.pi * 500000.0 ** (2 * n / 32)
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            smooth = min(1.0, max(0.0, smooth))
            factors.append(1 / ((1 - smooth) / 32.0 + smooth))
        assert np.allclose(reader.tensor("rope_freqs.weight").numpy(), factors, rtol=1e-6)
        assert {1.0, 32.0} < set(factors), "some between"
    else:
        assert reader.values["llama.rope.scaling.type"] == "linear"
        assert reader.values["llama.rope.scaling.factor"] == 4.0
    model, again = zoo.load(source), zoo.load(path)
    assert again.config.rope == model.config.rope
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_freq_factor": 2.0}, "rope_freqs.weight: factors of frequencies that are not"),
        ({"original_max_position_embeddings": 4096}, "rope_freqs.weight: factors of"),
    ],
)
def test_other_scaling_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    source = published("llama", tmp_path / "hf", rope_parameters=LLAMA3 | change, **wide)
    with pytest.raises((LossyExport, ConfigError), match=message):
        converted(source, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_scaling_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0}
    source = published("llama", tmp_path / "hf", rope_parameters=rope)
    with pytest.raises(LossyExport, match=r"rope\.scaling\.type: 'dynamic' is not implemented"):
        converted(source, tmp_path / "gguf")
    made = converted(
        published("llama", tmp_path / "linear", rope_parameters=LINEAR), tmp_path / "b"
    )
    values = {"llama.rope.scaling.type": Value("str", "longrope")}
    with pytest.raises(ConfigError, match=r"rope\.scaling\.type: 'longrope' is not implemented"):
        zoo.load(rewritten(made, tmp_path / "long.gguf", values))


# --- what a file says ----------------------------------------------------------------------------


def rewritten(path: Path, to: Path, change: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    """The same file with other key/values, or without some."""
    reader = GGUFReader(path)
    values = {
        k: Value(reader.kinds[k], v) for k, v in reader.values.items() if k not in drop
    } | change
    infos = [info for name, info in reader.tensors.items() if name not in drop]
    layout = lay_out(infos, values, to)
    data = bytearray(layout.head) + bytes(layout.size)
    for info in infos:
        at = len(layout.head) + layout.starts[info.name]
        start, end = reader.span(info.name)
        data[at : at + end - start] = path.read_bytes()[start:end]
    to.write_bytes(data)
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.attention.sliding_window": 64}, r"sliding_window: unknown field"),
        ({"llama.expert_count": 8}, r"expert_count: 8 is not implemented"),
        ({"llama.rope.dimension_count": 4}, r"differ, and only one of them can count"),
        ({"llama.rope.scaling.type": "longrope"}, r"'longrope' is not implemented"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, r"head_count_kv: expected int"),
        ({"llama.block_count": 4}, r"blk\.3"),
        ({"clip.vision": True}, r"clip: unknown field"),
        ({"llama.long": list(range(2000))}, r"llama\.long: longer than anything"),
    ],
)
def test_config_is_audited(hf: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = converted(hf["llama"], tmp_path / "gguf")
    bad = rewritten(path, tmp_path / "odd.gguf", change)
    with pytest.raises(zoo.errors.ZooError, match=message):
        zoo.load(bad)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
def test_missing_values_that_no_shape_shows_are_refused(hf: Any, tmp_path: Path, name: str) -> None:
    head: Any = {"head": "none"} if name == "bert" else {}
    path = converted(hf[name], tmp_path / "gguf", **head)
    for key in ("head_count", "layer_norm_rms_epsilon", "layer_norm_epsilon"):
        if f"{name}.attention.{key}" not in GGUFReader(path).values:
            continue
        bad = rewritten(path, tmp_path / "odd.gguf", {}, (f"{name}.attention.{key}",))
        with pytest.raises(ConfigError, match=rf"nothing says attention\.{key} "):
            zoo.load(bad, **head)


def test_sentence_modules_are_left_out_with_a_note(hf: Any, tmp_path: Path) -> None:
    """A GGUF file holds the model alone."""
    source = tmp_path / "sentences"
    shutil.copytree(hf["bert"], source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    step = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    pool = {**step, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (source / "modules.json").write_text(json.dumps([step, pool]))
    path = converted(source, tmp_path / "gguf", head="none")
    assert read(path.parent)["left"].keys() == {"modules.json"}


def test_metadata_that_changes_no_model_is_ignored(hf: Any, tmp_path: Path) -> None:
    path = converted(hf["llama"], tmp_path / "gguf")
    more = {"general.license": "mit", "general.license.link": "x", "quantize.imatrix.file": "y"}
    bad = rewritten(path, tmp_path / "odd.gguf", more | {"llama.rope.scaling.type": "none"})
    assert torch.equal(logits(zoo.load(bad)), logits(zoo.load(hf["llama"])))
    # and stays with the file when it is written again
    again = converted(bad, tmp_path / "again")
    assert GGUFReader(again).values["general.license.link"] == "x"


def test_unknown_names_and_architectures_are_refused(hf: Any, tmp_path: Path) -> None:
    path = converted(hf["llama"], tmp_path / "gguf")
    bad = rewritten(path, tmp_path / "odd.gguf", {"general.architecture": "rwkv"})
    with pytest.raises(NotACheckpoint, match=r"general.architecture is 'rwkv'"):
        zoo.load(bad)
    with pytest.raises(LossyExport, match="window"):
        model = zoo.load(hf["qwen2"])
        changed = model.config.replace(windowed=True, window=8, window_from=0)
        zoo.save(type(model)(changed), tmp_path / "no", to="gguf")
    with pytest.raises(LossyExport, match=r"no rule for pooler\.dense"):
        zoo.convert(hf["bert"], tmp_path / "no", to="gguf")


def test_a_float_that_single_precision_changes_is_refused(hf: Any, tmp_path: Path) -> None:
    """Half of a float's digits are lost: an eps that needs them is refused by name."""
    model = zoo.load(hf["llama"], config={"eps": 1.23456789012e-5})
    with pytest.raises(LossyExport, match=r"eps: 1\.23456789012e-05 cannot be said"):
        zoo.save(model, tmp_path / "no", to="gguf")


# --- tokenizers ----------------------------------------------------------------------------------

TEXTS = [
    "Once upon a time, there was a  little girl.",
    " two\n\nlines\tand 12345 numbers, don't they?",
    "naïve Ünïcode 你好 مرحبا 🙂‍↔️",
    "",
]


def tiny_with(name: str, place: Path, vocab: int, fields: dict[str, Any] | None = None) -> Path:
    """A tiny model for a real vocabulary."""
    return published(name, place, vocab_size=vocab, **(fields or {}))


@pytest.mark.slow
def test_byte_level_bpe(fixtures: Path, tmp_path: Path) -> None:
    for kind, vocab in (("gpt2", 50257), ("qwen2", 151936)):
        source = tiny_with(kind, tmp_path / kind, vocab)
        for path in (fixtures / "tokenizers" / kind).iterdir():
            shutil.copy(path, source)
        values = {"tokenizer_class": "GPT2Tokenizer" if kind == "gpt2" else "Qwen2Tokenizer"}
        (source / "tokenizer_config.json").write_text(json.dumps(values))
        theirs = zoo.tokenizer(source)
        path = converted(source, tmp_path / f"{kind}-gguf")
        reader = GGUFReader(path)
        pre = {"gpt2": "gpt-2", "qwen2": "qwen2"}[kind]
        assert reader.values["tokenizer.ggml.pre"] == pre
        assert len(reader.values["tokenizer.ggml.tokens"]) == vocab
        ours = zoo.tokenizer(path)
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
        assert ours.eos == theirs.eos and ours.bos == theirs.bos
        try:
            import llama_cpp as package
        except ImportError:
            package = None
        if package is not None:
            llama = package.Llama(str(path), vocab_only=True, verbose=False)
            for text in TEXTS[:3]:
                assert llama.tokenize(text.encode(), add_bos=False) == theirs.encode(text)
            llama.close()
        end = "<|endoftext|>"
        assert ours.encode(end, special=True) == theirs.encode(end, special=True)
        # what hf gets of it is read alike, and gives the same file again
        zoo.convert(path, tmp_path / f"{kind}-hf", to="hf")
        back = zoo.tokenizer(tmp_path / f"{kind}-hf")
        assert all(back.encode(text) == theirs.encode(text) for text in TEXTS)
        again = converted(tmp_path / f"{kind}-hf", tmp_path / f"{kind}-again")
        held_again = GGUFReader(again).values
        for key in ("tokens", "merges", "token_type"):
            whole = f"tokenizer.ggml.{key}"
            assert list(held_again[whole]) == list(reader.values[whole]), key


@pytest.mark.slow
def test_ranks_give_back_the_merges_of_llama3(fixtures: Path, tmp_path: Path) -> None:
    """Llama 3's own file says no merges; what it implies is read back to the same ids."""
    source = tiny_with("llama", tmp_path / "llama", 128256)
    shutil.copy(fixtures / "tokenizers/llama3/tokenizer.model", source)
    theirs = zoo.tokenizer(source)
    path = converted(source, tmp_path / "gguf")
    values = GGUFReader(path).values
    assert values["tokenizer.ggml.pre"] == "llama-bpe" and values["tokenizer.ggml.add_bos_token"]
    ours = zoo.tokenizer(path)
    assert ours.bos == theirs.bos == 128000
    mark = "<|eot_id|>"
    assert ours.encode(mark, special=True) == theirs.encode(mark, special=True) == [128000, 128009]
    for text in [*TEXTS, mark, "    indented = {'a': [1, 22, 333, 4444]}"]:
        assert ours.encode(text) == theirs.encode(text)
    package = pytest.importorskip("llama_cpp")
    llama = package.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS[:3]:
        assert llama.tokenize(text.encode(), add_bos=True) == theirs.encode(text)
    llama.close()


def test_word_pieces(fixtures: Path, tmp_path: Path) -> None:
    vocab = len((fixtures / "tokenizers/bert-uncased/vocab.txt").read_text().splitlines())
    source = tiny_with("bert", tmp_path / "bert", vocab)
    shutil.copy(fixtures / "tokenizers/bert-uncased/vocab.txt", source)
    theirs = zoo.tokenizer(source)
    path = converted(source, tmp_path / "gguf", head="none")
    values = GGUFReader(path).values
    assert values["tokenizer.ggml.token_type_count"] == 3
    tokens = list(values["tokenizer.ggml.tokens"])
    assert tokens[values["tokenizer.ggml.seperator_token_id"]] == "[SEP]"
    assert "\u2581the" in tokens and "ing" in tokens
    ours = zoo.tokenizer(path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    zoo.convert(path, tmp_path / "hf", to="hf")
    words = (fixtures / "tokenizers/bert-uncased/vocab.txt").read_text().splitlines()
    assert (tmp_path / "hf" / "vocab.txt").read_text().splitlines() == words
    # llama.cpp makes letters small
    (source / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(LossyExport, match=r"case or accents.*'vocabulary': 0"):
        converted(source, tmp_path / "no", head="none")
    path = converted(source, tmp_path / "bare", head="none", layout={"vocabulary": 0})
    assert GGUFReader(path).values["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.slow
def test_a_graph_has_the_vocabulary_and_says_what_it_was(fixtures: Path, tmp_path: Path) -> None:
    for name in ("stories260K.bin", "tok512.model"):
        shutil.copy(fixtures / "stories260K" / name, tmp_path)
    path = converted(tmp_path / "stories260K.bin", tmp_path / "gguf", dtype="q8_0")
    zoo.convert(path, tmp_path / "graph", to="pt2")
    ours = zoo.tokenizer(tmp_path / "graph")
    assert ours.encode("Once upon a time") == zoo.tokenizer(path).encode("Once upon a time")
    assert read(tmp_path / "graph")["quantised"]["blocks.0.mlp.up.weight"] == "Q8_0"


@pytest.mark.slow
def test_sentence_pieces(fixtures: Path, tmp_path: Path) -> None:
    """Of the file's own pieces, scores and types; a larger embedding gets fillers."""
    source = tiny_with("llama", tmp_path / "llama", 32003)
    shutil.copy(fixtures / "tokenizers/llama2/tokenizer.model", source)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages }}"})
    )
    (source / "added_tokens.json").write_text('{"<pad>": 32000}')
    theirs = zoo.tokenizer(source)
    path = converted(source, tmp_path / "gguf")
    values = GGUFReader(path).values
    tokens, types = list(values["tokenizer.ggml.tokens"]), list(values["tokenizer.ggml.token_type"])
    assert tokens[32000:] == ["<pad>", "[PAD32001]", "[PAD32002]"]
    assert types[:4] == [2, 3, 3, 6] and types[32000:] == [4, 5, 5]
    ours = zoo.tokenizer(path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.templates == theirs.templates and (ours.bos, ours.eos) == (1, 2)
    zoo.convert(path, tmp_path / "hf", to="hf")
    back = zoo.tokenizer(tmp_path / "hf")
    assert all(back.encode(text) == theirs.encode(text) for text in TEXTS)


def test_vocabularies_that_gguf_cannot_hold_are_refused(fixtures: Path, tmp_path: Path) -> None:
    source = tiny_with("llama", tmp_path / "llama", 32128)
    shutil.copy(fixtures / "tokenizers/t5/spiece.model", source)
    with pytest.raises(LossyExport, match="unigrams"):
        converted(source, tmp_path / "no")
    (source / "spiece.model").unlink()
    shutil.copy(fixtures / "tokenizers/llama2/tokenizer.model", source)
    small = tiny_with("llama", tmp_path / "small", 1009)
    shutil.copy(fixtures / "tokenizers/llama2/tokenizer.model", small)
    with pytest.raises(LossyExport, match="32000 tokens, and the embedding has 1009 rows"):
        converted(small, tmp_path / "no")


@pytest.mark.parametrize(
    ("change", "output"),
    [
        ({"tokenizer.ggml.model": "t5"}, r"model: 't5' is not implemented"),
        ({"tokenizer.ggml.scores": [0.5]}, r"scores: expected \d+ of them"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokens: expected an array of str"),
        ({"tokenizer.ggml.add_bos_token": 1}, r"add_bos_token: expected true or false"),
        ({"tokenizer.ggml.tokens": "abc"}, r"tokens: expected an array of str"),
        ({"tokenizer.ggml.model": ["llama"]}, r"model: \['llama'\] is not implemented"),
        ({"tokenizer.ggml.token_type": [999] * 512}, r"token_type: expected numbers from 1 to 6"),
        ({"tokenizer.ggml.model": "gpt2"}, r"pre: expected gpt-2 or qwen2 or llama-bpe"),
    ],
)
def test_bad_vocabularies_are_refused(
    stories: Path, tmp_path: Path, change: dict[str, Any], output: str, capsys: Any
) -> None:
    bad = rewritten(stories, tmp_path / "odd.gguf", change)
    with pytest.raises(BadTokenizer, match=output):
        zoo.tokenizer(bad)
    # the weights are none the worse, and what is left behind is said
    assert main(["convert", str(bad), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    err = capsys.readouterr().err
    assert "left behind: tokenizer" in err and re.search(output, err)
    assert not (tmp_path / "hf" / "tokenizer.model").exists()


# --- a real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """.bin -> hf -> GGUF"""
    place = tmp_path_factory.mktemp("stories")
    for name in ("stories260K.bin", "tok512.model"):
        shutil.copy(fixtures / "stories260K" / name, place)
    zoo.convert(place / "stories260K.bin", place / "hf", to="hf")
    return converted(place / "hf", place / "gguf")


def test_stories_survive_gguf_with_the_same_logits(
    fixtures: Path, stories: Path, tmp_path: Path, capsys: Any
) -> None:
    expected = json.loads((fixtures / "stories260K" / "EXPECTED.json").read_text())
    ids = torch.tensor([expected["greedy_ids_from_BOS"][:64]])
    first = zoo.load(stories.parents[1] / "stories260K.bin")
    zoo.convert(stories, tmp_path / "native", to="native")
    with torch.no_grad():
        wanted = first(ids)
        assert torch.equal(zoo.load(stories)(ids), wanted)
        assert torch.equal(zoo.load(tmp_path / "native")(ids), wanted)
        truth = torch.from_numpy(np.load(fixtures / "stories260K" / "ref_logits_64tok.npy"))
        torch.testing.assert_close(wanted.reshape(truth.shape), truth, atol=2e-4, rtol=0)
    model = zoo.load(stories)
    assert defaults_of(model).special.eos == (2,)
    out = model.generate(ids[:, :1], max_new_tokens=len(expected["greedy_ids_from_BOS"]) - 1)
    assert out[0].tolist() == expected["greedy_ids_from_BOS"]
    text = "Once upon a time"
    assert main(["generate", str(stories), text, "--max-new-tokens", "20"]) == 0
    output = capsys.readouterr().out
    assert output.strip() in model.tokenizer.decode(out[0], skip_special=True)
    # whatever lies beside it, its own vocabulary counts
    shutil.copy(stories, tmp_path / "x.gguf")
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\n")
    alone = zoo.load(tmp_path / "x.gguf").tokenizer
    assert alone.encode(text) == zoo.tokenizer(tmp_path / "x.gguf").encode(text)
    assert alone.encode(text) == model.tokenizer.encode(text)
    # the same bytes each time, and from the same file again
    again = converted(stories, tmp_path / "again")
    assert again.read_bytes() == stories.read_bytes()


def test_llama_cpp_reads_it(fixtures: Path, stories: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("llama_cpp")
    expected = json.loads((fixtures / "stories260K" / "EXPECTED.json").read_text())
    ids = expected["greedy_ids_from_BOS"][:64]
    truth = logits_of(zoo.load(stories), ids)
    floor = truth.abs().max().item()
    for dtype, most in ((None, 1e-5), ("bfloat16", 2e-2), ("q8_0", 2e-2)):
        path = stories if dtype is None else converted(stories, tmp_path / str(dtype), dtype=dtype)
        actual = theirs_of(package, path, ids)
        # what they quantize beside the weights is theirs alone
        distance = (actual - logits_of(zoo.load(path), ids)).abs().max().item() / floor
        assert distance < most, (dtype, distance)
    theirs = package.Llama(str(stories), vocab_only=True, verbose=False)
    ours = zoo.tokenizer(stories)
    for text in ("Once upon a time, there was a little girl.", "Lily and Tom went\nhome"):
        assert theirs.tokenize(text.encode()) == ours.encode(text)
    theirs.close()


def theirs_of(package: Any, path: Path, ids: list[int]) -> Tensor:
    """llama.cpp's logits, with its cache in float32."""
    exact = {"type_k": package.GGML_TYPE_F32, "type_v": package.GGML_TYPE_F32}
    theirs = package.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **exact)
    theirs.eval(ids)
    actual = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    theirs.close()
    return actual


def logits_of(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        actual: Tensor = model(torch.tensor([ids]))[0]
    return actual


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_llama_cpp_agrees(hf: Any, tmp_path: Path, name: str) -> None:
    """Rotary layouts, biases, eps and activations as the other side computes them."""
    package = pytest.importorskip("llama_cpp")
    path = converted(hf[name], tmp_path / "gguf")
    model = zoo.load(path)
    ids = [n % model.config.vocab for n in range(0, 99, 3)]
    actual = theirs_of(package, path, ids)
    wanted = logits_of(model, ids)
    # ggml looks its gelu up in a table of half precision
    most = 1e-3 if name == "gpt2" else 1e-5
    assert (actual - wanted).abs().max() < most * wanted.abs().max()


def test_llama_cpp_agrees_on_bert(fixtures: Path, tmp_path: Path) -> None:
    """Hidden states of a text, by its own tokenizer: types, positions, and norms on the sums."""
    package = pytest.importorskip("llama_cpp")
    words = fixtures / "tokenizers/bert-uncased/vocab.txt"
    source = tiny_with("bert", tmp_path / "bert", len(words.read_text().splitlines()))
    shutil.copy(words, source)
    path = converted(source, tmp_path / "gguf", head="none")
    each = {"embedding": True, "pooling_type": package.LLAMA_POOLING_TYPE_NONE}
    llama = package.Llama(str(path), n_ctx=53, verbose=False, **each)
    text = "The quick brown Fox, isn't it?"
    model = zoo.load(path)
    assert llama.tokenize(text.encode()) == model.tokenizer.encode(text)
    actual = torch.tensor(llama.embed(text, normalize=False))
    llama.close()
    wanted = logits_of(model, model.tokenizer.encode(text))
    assert (actual - wanted).abs().max() < 1e-3 * wanted.abs().max()  # as of GPT-2


def test_info_describes_a_gguf_file(stories: Path, capsys: Any) -> None:
    assert main(["info", str(stories)]) == 0
    output = capsys.readouterr().out
    assert "gguf (GGUF)" in output and "attention" in output and "llama" in output


def test_q8_0_is_what_the_format_layer_makes() -> None:
    """A tensor in pieces is quantized as the whole is."""
    from converters.block_codes import in_units, q8_0

    numbers = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    pieces = [numbers.view(-1)[:50], numbers.view(-1)[50:51], numbers.view(-1)[51:]]
    made = torch.cat([coded.reshape(-1) for _, coded in in_units(iter(pieces), q8_0())])
    assert torch.equal(made, quantize_q8_0(numbers).reshape(-1))


def test_every_file_of_a_vocabulary_is_made_of_values() -> None:
    assert vocabulary_files({"tokenizer.ggml.model": "no_vocab"}, Path("x")) == {}


# --- what llama.cpp makes of llama2.c's files ----------------------------------------------------

NO_TOKEN = Value("u32", 0xFFFFFFFF)  # LLAMA_TOKEN_NULL
LLAMA2C_NAMES = {
    "rms_att_weight": "attn_norm",
    **{f"w{x}": f"attn_{n}" for x, n in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    "rms_ffn_weight": "ffn_norm",
    **{f"w{n}": f"ffn_{part}" for n, part in ((1, "gate"), (2, "down"), (3, "up"))},
}


def from_llama2c(model: Path, vocabulary: Path, to: Path, **ids: Value) -> Path:
    """What llama.cpp's convert-llama2c-to-ggml writes, name by name: all in F32, no more keys."""
    reader = Llama2cReader(model)
    dim, hidden, layers, heads, kv_heads, _, length = reader.header.sizes
    embedding = reader.tensor("token_embedding_table")
    tensors = {
        "token_embd.weight": embedding,
        "output_norm.weight": reader.tensor("rms_final_weight"),
    }
    tensors["output.weight"] = embedding  # written once more where it is shared
    for name, short in LLAMA2C_NAMES.items():
        array = reader.tensor(name)
        tensors |= {f"blk.{layer}.{short}.weight": array[layer] for layer in range(layers)}
    texts, scores, types = list[str](), list[float](), list[int]()
    for id, (text, score) in enumerate(pieces(vocabulary)):
        is_byte = len(text) == 6 and text.startswith("<0x")
        texts.append(["<unk>", "<s>", "</s>"][id] if id < 3 else text.replace(" ", "\u2581"))
        types.append([2, 3, 3][id] if id < 3 else 6 if is_byte else 1)
        scores.append(score)
    sizes = {
        "context_length": length,
        "embedding_length": dim,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "block_count": layers,
        "rope.dimension_count": dim // heads,
    }
    special = {
        "unknown_token_id": Value("u32", 0),
        "bos_token_id": Value("u32", 1),
        "eos_token_id": Value("u32", 2),
        "seperator_token_id": NO_TOKEN,
        "padding_token_id": NO_TOKEN,
        **ids,
    }
    values = {
        "tokenizer.ggml.tokens": Value("[str]", texts),
        "tokenizer.ggml.scores": Value("[f32]", scores),
        "tokenizer.ggml.token_type": Value("[i32]", types),
        "tokenizer.ggml.model": "llama",
        "general.architecture": "llama",
        "general.name": "llama",
        **{f"tokenizer.ggml.{key}": id for key, id in special.items()},
        **{f"llama.{key}": Value("u32", size) for key, size in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": Value("f32", 1e-5),
    }
    infos = [TensorInfo(name, tuple(x.shape), "F32") for name, x in tensors.items()]
    layout = lay_out(infos, values, to)
    data = bytearray(layout.head) + bytes(layout.size)
    for name, x in tensors.items():
        raw = x.contiguous().numpy().tobytes()
        at = len(layout.head) + layout.starts[name]
        data[at : at + len(raw)] = raw
    to.write_bytes(data)
    return to


@pytest.fixture(scope="module", params=["tiny", "stories260K"])
def llama2c(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model.bin and its tokenizer.bin."""
    if request.param == "stories260K":
        place = request.getfixturevalue("fixtures") / "stories260K"
        return place / "stories260K.bin", place / "tok512.bin"
    place = tmp_path_factory.mktemp("tiny")
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += [" ", *"abcehnoptu", " a", "on", "ce", "once", " once", " up", "up"]
    data = struct.pack("<I", max(map(len, texts)))
    for id, text in enumerate(texts):
        data += struct.pack("<fI", 0.0 if id < 259 else 259.0 - id, len(text)) + text.encode()
    (place / "tokenizer.bin").write_bytes(data)
    sizes = {"vocab": len(texts), "eps": 1e-5, "rope_base": 1e4, "act": "silu", "tied": True}
    zoo.save(hot(build("llama", **sizes)), place / "model", to="llama2c")
    return place / "model" / "model.bin", place / "tokenizer.bin"


def test_llama_cpps_file_of_a_llama2c_model_is_read_and_exported(
    llama2c: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its ids of padding and separator are 0xFFFFFFFF: there are none."""
    shutil.copy(llama2c[0], tmp_path / "model.bin")
    shutil.copy(llama2c[1], tmp_path / "tokenizer.bin")
    source = zoo.load(tmp_path / "model.bin")
    path = from_llama2c(*llama2c, tmp_path / "x.gguf")
    text = "once upon a one"
    model, ids = zoo.load(path), source.tokenizer.encode(text)
    assert zoo.tokenizer(path).encode(text) == ids
    assert (model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.pad) == (1, 2, None)
    assert (defaults_of(model).special.eos, defaults_of(model).special.pad) == ((2,), None)
    wanted = source.generate(torch.tensor([ids]), max_new_tokens=8)
    assert torch.equal(model.generate(torch.tensor([ids]), max_new_tokens=8), wanted)
    assert main(["generate", str(path), text, "--max-new-tokens", "8"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("once\n"))
    assert main(["chat", str(path), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
    for to in ("hf", "native", "llama2c", "llama2c-ckpt", "gguf"):
        zoo.convert(path, tmp_path / to, to=to)
        again = zoo.load(tmp_path / to)
        assert torch.equal(again(wanted), source(wanted))
        if to != "llama2c-ckpt":  # which no tokenizer lies beside
            assert again.tokenizer.encode(text) == ids
    for to in ("hf", "native", "llama2c"):
        back = converted(tmp_path / to, tmp_path / "back" / to)
        assert torch.equal(zoo.load(back)(wanted), source(wanted))
        assert zoo.load(back).tokenizer.encode(text) == ids
        assert not {k for k, v in GGUFReader(back).values.items() if v == 0xFFFFFFFF}


@pytest.mark.parametrize("key", ["padding", "eos", "eot", "mask"])
@pytest.mark.parametrize("id", [Value("u32", 100_000), Value("i32", -2)])
def test_special_token_outside_the_vocabulary_is_refused(
    key: str, id: Value, stories: Path, tmp_path: Path
) -> None:
    change = {f"tokenizer.ggml.{key}_token_id": id}
    bad = rewritten(stories, tmp_path / "odd.gguf", change)
    message = (
        rf"{key}_token_id: expected an id of 512 tokens, or 4294967295 for none, found {id[1]}"
    )
    with pytest.raises(BadTokenizer, match=message):
        zoo.tokenizer(bad)


def test_a_token_id_of_minus_one_means_none(stories: Path, tmp_path: Path) -> None:
    change = {"tokenizer.ggml.padding_token_id": Value("i32", -1)}
    assert zoo.tokenizer(rewritten(stories, tmp_path / "odd.gguf", change)).pad is None
