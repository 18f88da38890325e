"""OpenAI's GPT-2 and Google's BERT: bundles that TensorFlow wrote, as models, and what is refused.

What each native and each published array has to hold is said here a second time, by hand.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bundles
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import zoo
from converters.manifest import check
from converters.spec import load_spec
from zoo.cli.app import main
from zoo.errors import (
    AmbiguousCheckpoint,
    ConfigError,
    CorruptCheckpoint,
    MissingShard,
    MissingTensors,
    NotACheckpoint,
    ShapeMismatch,
    UsageError,
    ZooError,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "tf"

PREFIX = {"gpt2": "model.ckpt", "bert": "bert_model.ckpt"}
CONFIG = {"gpt2": "hparams.json", "bert": "bert_config.json"}
DIALECT = {"gpt2": "openai", "bert": "google"}
BOTH = pytest.mark.parametrize("name", ["gpt2", "bert"])
IDS = torch.arange(2 * 17).view(2, 17) % 53
KINDS = ("adam_m", "adam_v")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for each as it was published: no safetensors beside."""
    for name in PREFIX:
        shutil.copytree(
            DATA / name, tmp_path / name, ignore=shutil.ignore_patterns("same.safetensors")
        )
    return tmp_path


def tensors_of(name: str) -> dict[str, Tensor]:
    """What TensorFlow wrote, by a reader that knows nothing of it."""
    return load_file(DATA / name / "same.safetensors")


def rewritten(place: Path, name: str, tensors: Mapping[str, Tensor], **how: Any) -> Path:
    """The same directory with other tensors."""
    for path in place.glob(f"{PREFIX[name]}.*"):
        path.unlink()
    bundles.bundle(place / PREFIX[name], dict(tensors), **how)
    return place


def says(place: Path, name: str, **changes: Any) -> None:
    path = place / CONFIG[name]
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def native_gpt2(tf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {"embed.weight": tf["model/wte"], "positions.weight": tf["model/wpe"]}
    out |= {"head.weight": tf["model/wte"]}
    out |= {"norm.weight": tf["model/ln_f/g"], "norm.bias": tf["model/ln_f/b"]}
    for n in range(3):
        theirs, mine = f"model/h{n}/", f"blocks.{n}."
        for k in (1, 2):
            out[f"{mine}norm{k}.weight"] = tf[f"{theirs}ln_{k}/g"]
            out[f"{mine}norm{k}.bias"] = tf[f"{theirs}ln_{k}/b"]
        w, b = tf[f"{theirs}attn/c_attn/w"], tf[f"{theirs}attn/c_attn/b"]
        for k, part in enumerate("qkv"):
            out[f"{mine}attn.{part}.weight"] = w[0, :, 12 * k : 12 * k + 12].t()
            out[f"{mine}attn.{part}.bias"] = b[12 * k : 12 * k + 12]
        for part, other in (
            ("attn.out", "attn/c_proj"),
            ("mlp.up", "mlp/c_fc"),
            ("mlp.down", "mlp/c_proj"),
        ):
            out[f"{mine}{part}.weight"] = tf[f"{theirs}{other}/w"][0].t()
            out[f"{mine}{part}.bias"] = tf[f"{theirs}{other}/b"]
    return out


def native_bert(tf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}

    def dense(mine: str, theirs: str) -> None:
        out[f"{mine}.weight"], out[f"{mine}.bias"] = (
            tf[f"{theirs}/kernel"].t(),
            tf[f"{theirs}/bias"],
        )

    def norm(mine: str, theirs: str) -> None:
        out[f"{mine}.weight"] = tf[f"{theirs}/LayerNorm/gamma"]
        out[f"{mine}.bias"] = tf[f"{theirs}/LayerNorm/beta"]

    for mine, theirs in (("embed", "word"), ("positions", "position"), ("types", "token_type")):
        out[f"{mine}.weight"] = tf[f"bert/embeddings/{theirs}_embeddings"]
    norm("norm", "bert/embeddings")
    for n in range(2):
        at, block = f"bert/encoder/layer_{n}", f"blocks.{n}"
        for mine, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            dense(f"{block}.attn.{mine}", f"{at}/attention/self/{theirs}")
        dense(f"{block}.attn.out", f"{at}/attention/output/dense")
        norm(f"{block}.norm1", f"{at}/attention/output")
        dense(f"{block}.mlp.up", f"{at}/intermediate/dense")
        dense(f"{block}.mlp.down", f"{at}/output/dense")
        norm(f"{block}.norm2", f"{at}/output")
    dense("pooler.dense", "bert/pooler/dense")
    dense("head.dense", "cls/predictions/transform/dense")
    norm("head.norm", "cls/predictions/transform")
    out["head.decoder.weight"] = tf["bert/embeddings/word_embeddings"]
    out["head.bias"] = out["head.decoder.bias"] = tf["cls/predictions/output_bias"]
    out["nsp.weight"] = tf["cls/seq_relationship/output_weights"]
    out["nsp.bias"] = tf["cls/seq_relationship/output_bias"]
    return out


def published_gpt2(tf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the reference's own names: the same words with dots, no axis of one, no prefix."""
    words = {"/g": "/weight", "/w": "/weight", "/b": "/bias", "wte": "wte/weight"}
    words |= {"wpe": "wpe/weight"}
    out = {}
    for name, tensor in tf.items():
        tail = next(tail for tail in words if name.endswith(tail))
        name = name.removeprefix("model/").removesuffix(tail) + words[tail]
        name = name.replace("h0/", "h/0/").replace("h1/", "h/1/").replace("h2/", "h/2/")
        out[f"transformer.{name.replace('/', '.')}"] = tensor[0] if tensor.dim() == 3 else tensor
    return out


def published_bert(tf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tf.items():
        if name.endswith(KINDS) or name == "global_step":
            continue
        words = name.replace("layer_", "layer/").split("/")
        last = words.pop()
        if last.endswith("_embeddings"):
            words += [last, "weight"]
        elif name == "cls/predictions/output_bias":
            words += ["bias"]
        else:
            bias = last in ("bias", "beta", "output_bias")
            words += ["bias" if bias else "weight"]
        out[".".join(words)] = tensor.t() if last == "kernel" else tensor
    return out


NATIVE = {"gpt2": native_gpt2, "bert": native_bert}
PUBLISHED = {"gpt2": published_gpt2, "bert": published_bert}


# --- what TensorFlow wrote -----------------------------------------------------------------------


@BOTH
def test_every_native_tensor_equals_the_published_one(place: Path, name: str) -> None:
    model = zoo.load(place / name)
    actual, wanted = model.state_dict(), NATIVE[name](tensors_of(name))
    assert actual.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(actual[n], wanted[n])] == []
    assert model.architecture == name and model.provenance.origin.dialect == DIALECT[name]
    assert set(model.provenance.rules) == set(wanted) - set(model.provenance.plan.native.ties)


def test_config_fields_are_read(place: Path) -> None:
    c = zoo.load(place / "gpt2").config
    assert (c.vocab, c.positions, c.dim, c.heads, c.layers, c.hidden) == (53, 17, 12, 2, 3, 48)
    assert (c.act, c.eps, c.tied, c.bias, c.qkv_bias, c.head) == (
        *("gelu_new", 1e-5, True, True, True, "lm"),
    )
    c = zoo.load(place / "bert").config
    assert (c.vocab, c.positions, c.dim, c.heads, c.layers, c.hidden) == (59, 19, 12, 4, 2, 26)
    assert (c.types, c.act, c.eps, c.tied, c.pad) == (5, "gelu", 1e-12, True, 0)
    assert c.head == "pretraining"
    assert zoo.load(place / "bert", config={"hidden_act": "gelu_new"}).config.act == "gelu_new"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "head", "reference"),
    [
        ("gpt2", None, "GPT2LMHeadModel"),
        ("gpt2", "none", "GPT2Model"),
        ("bert", None, "BertForPreTraining"),
        ("bert", "masked_lm", "BertForMaskedLM"),
        ("bert", "pooler", "BertModel"),
    ],
)
def test_the_reference_computes_the_same(
    place: Path, tmp_path: Path, name: str, head: str | None, reference: str
) -> None:
    """From the directory that convert writes, whose values are TensorFlow's to the bit."""
    import transformers

    zoo.convert(place / name, tmp_path / "hf", to="hf", head=head)
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert data["architectures"] == [reference]
    actual, wanted = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        PUBLISHED[name](tensors_of(name)),
    )
    bare = {n.removeprefix("transformer.").removeprefix("bert."): x for n, x in wanted.items()}
    if head is None:
        assert actual.keys() == wanted.keys()
    for n, x in actual.items():
        assert torch.equal(x, wanted[n] if n in wanted else bare[n]), n
    theirs, report = getattr(transformers, reference).from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs = theirs.double().eval()
    mine = zoo.load(place / name, head=head, dtype="float64")
    more = {"token_type_ids": IDS % 5} if name == "bert" else {}
    one, other = mine(IDS, **more), theirs(IDS, **more)
    one = [one] if isinstance(one, Tensor) else list(one)
    for mine_, theirs_ in zip(one, other[: len(one)], strict=True):
        assert mine_.abs().max() > 0.1
        torch.testing.assert_close(mine_, theirs_, rtol=0, atol=1e-12 * mine_.abs().max().item())


@BOTH
def test_bundle_loads_by_directory_prefix_index_or_data_file(place: Path, name: str) -> None:
    whole = zoo.load(place / name).state_dict()
    for tail in ("", ".index", ".data-00000-of-00001"):
        model = zoo.load(place / name / f"{PREFIX[name]}{tail}")
        assert all(torch.equal(x, whole[n]) for n, x in model.state_dict().items())
        files = {p.name: p for p in (place / name).glob(f"{PREFIX[name]}.*")}
        assert len(files) == 2
        assert model.provenance.hashes == {
            n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()
        }


@BOTH
def test_sharded_and_compressed_bundles_load(place: Path, name: str) -> None:
    whole = zoo.load(place / name).state_dict()
    tensors = dict(sorted(tensors_of(name).items()))
    again = zoo.load(rewritten(place / name, name, tensors, shards=2, snappy=True))
    assert all(torch.equal(x, whole[n]) for n, x in again.state_dict().items())
    assert len(again.provenance.files) == 3
    (place / name / f"{PREFIX[name]}.data-00001-of-00002").unlink()
    with pytest.raises(MissingShard, match="data-00001-of-00002"):
        zoo.load(place / name)


def test_the_checkpoint_file_selects_the_bundle(place: Path) -> None:
    for path in sorted((place / "gpt2").glob("model.ckpt.*")):
        shutil.copy(path, path.with_name(path.name.replace("model.ckpt", "model-20")))
    assert zoo.load(place / "gpt2").provenance.files[0].name == "model.ckpt.index"
    (place / "gpt2" / "checkpoint").write_text('model_checkpoint_path: "/tmp/run/model-20"\n')
    assert zoo.load(place / "gpt2").provenance.files[0].name == "model-20.index"
    (place / "gpt2" / "checkpoint").unlink()
    with pytest.raises(AmbiguousCheckpoint, match=r"model-20\.index, model\.ckpt\.index"):
        zoo.load(place / "gpt2")
    assert zoo.load(place / "gpt2" / "model-20").provenance.files[0].name == "model-20.index"


# --- what is not wanted, and which head ----------------------------------------------------------


def test_dropped_tensors_have_a_reason(place: Path) -> None:
    tf, dropped = tensors_of("bert"), zoo.load(place / "bert").provenance.dropped
    slots = {n for n in tf if n.endswith(KINDS)}
    assert dropped.keys() == slots | {"global_step"} and len(slots) == 2 * 46
    for name, why in dropped.items():
        word = {"_m": "mean of the optimizer", "_v": "mean of squares", "ep": "how many steps"}
        assert word[name[-2:]] in why
    lone = zoo.load(place / "bert", head="none").provenance.dropped
    more = lone.keys() - dropped.keys()
    assert more == {n for n in tf if n.startswith(("cls/", "bert/pooler")) and n not in slots}
    assert lone["bert/pooler/dense/kernel"].startswith("the head that was chosen reads no pooled")
    assert "head.bias belongs to a head" in lone["cls/predictions/output_bias"]
    assert zoo.load(place / "gpt2").provenance.dropped == {}


def encoder() -> dict[str, Tensor]:
    """A fine-tuned model's: no heads of pretraining."""
    return {n: x for n, x in tensors_of("bert").items() if n.startswith("bert/")}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_a_classifier_needs_its_head_named(place: Path, tmp_path: Path) -> None:
    tensors = encoder() | {"output_weights": drawn(3, 12), "output_bias": drawn(3)}
    tensors |= {f"output_bias/{kind}": drawn(3) for kind in KINDS}
    source = rewritten(place / "bert", "bert", tensors)
    with pytest.raises(ConfigError, match="sequence_classification or a token_classification head"):
        zoo.load(source)
    assert zoo.info(source).head == "sequence_classification or token_classification"
    model = zoo.load(source, head="sequence_classification")
    assert torch.equal(model.classifier.weight, tensors["output_weights"])
    assert torch.equal(model.classifier.bias, tensors["output_bias"])
    assert list(model.config.labels) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    labels = {"0": "no", "1": "perhaps", "2": "yes"}
    model = zoo.load(source, head="token_classification", config={"labels": labels})
    assert list(model.config.labels) == ["no", "perhaps", "yes"]
    with pytest.raises(ShapeMismatch, match=r"output_weights: shape \[3, 12\], expected \[2, 12\]"):
        zoo.load(source, head="sequence_classification", config={"labels": 2})
    with pytest.raises(MissingTensors, match="cls/predictions/output_bias"):
        zoo.load(source, head="masked_lm")
    asked: dict[str, Any] = {"head": "sequence_classification", "config": {"labels": labels}}
    zoo.convert(source, tmp_path / "hf", to="hf", **asked)
    data = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert data["id2label"] == labels
    again, state = zoo.load(tmp_path / "hf"), zoo.load(source, **asked).state_dict()
    assert again.config.head == "sequence_classification"
    assert all(torch.equal(x, state[n]) for n, x in again.state_dict().items())


@pytest.mark.parametrize(
    ("more", "without", "head"),
    [
        ((), ("cls/seq",), "masked_lm"),
        ((), ("cls/",), "pooler"),
        ((), ("cls/", "bert/pooler"), "none"),
        (("cls/squad/output_weights", "cls/squad/output_bias"), ("cls/",), "question_answering"),
    ],
)
def test_the_head_follows_from_the_tensors(
    place: Path, more: tuple[str, ...], without: tuple[str, ...], head: str
) -> None:
    tensors = {n: x for n, x in tensors_of("bert").items() if not n.startswith(without)}
    tensors |= {n: drawn(2, 12) if n.endswith("weights") else drawn(2) for n in more}
    source = rewritten(place / "bert", "bert", tensors)
    model = zoo.load(source)
    assert model.config.head == head == zoo.info(source).head
    if more:
        assert torch.equal(model.span.weight, tensors["cls/squad/output_weights"])


# --- what is refused -----------------------------------------------------------------------------


def test_a_missing_config_is_refused_unless_fields_are_given(place: Path) -> None:
    (place / "gpt2" / "hparams.json").unlink()
    (place / "bert" / "bert_config.json").unlink()
    with pytest.raises(ConfigError, match=r"nothing says n_head .*hparams\.json, which is not th"):
        zoo.load(place / "gpt2")
    with pytest.raises(
        ConfigError,
        match=r"nothing says num_attention_heads, hidden_act .*bert_config\.json, which is not th",
    ):
        zoo.load(place / "bert")
    model = zoo.load(place / "gpt2", config={"n_head": 2})
    assert (model.config.vocab, model.config.positions, model.config.layers) == (53, 17, 3)
    message = {"num_attention_heads": 4, "hidden_act": "relu"}
    c = zoo.load(place / "bert", config=message).config
    assert (c.heads, c.act, c.types, c.positions, c.hidden) == (4, "relu", 5, 19, 26)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "why"),
    [
        ("gpt2", {"n_vocab": 54}, ShapeMismatch, r"model/wte: shape \[53, 12\], expected \[54"),
        ("gpt2", {"n_ctx": 18}, ShapeMismatch, r"model/wpe: shape \[17, 12\], expected \[18"),
        ("gpt2", {"n_embd": 14}, ShapeMismatch, r"model/h0/attn/c_attn/w: shape \[1, 12, 36\]"),
        ("gpt2", {"n_layer": 4}, ConfigError, "n_layer: 3 found, 4 declared"),
        ("gpt2", {"n_layer": 2}, ConfigError, "n_layer: 3 found, 2 declared"),
        ("gpt2", {"n_head": 5}, ConfigError, "n_head: 5 does not divide"),
        ("gpt2", {"n_head": None}, ConfigError, r"nothing says n_head \(looked in .*json and at"),
        ("gpt2", {"n_heads": 2}, ConfigError, r"hparams\.json:\n  n_heads: unknown.*n_head"),
        ("gpt2", {"n_embd": "12"}, ConfigError, "n_embd: expected int, found '12'"),
        ("bert", {"vocab_size": 60}, ShapeMismatch, r"word_embeddings: shape \[59, 12\]"),
        ("bert", {"type_vocab_size": 2}, ShapeMismatch, r"token_type_embeddings: shape \[5, 12\]"),
        ("bert", {"max_position_embeddings": 512}, ShapeMismatch, r"position_embeddings: shape"),
        ("bert", {"intermediate_size": 48}, ShapeMismatch, r"intermediate/dense/kernel: shape"),
        ("bert", {"num_hidden_layers": 3}, ConfigError, "num_hidden_layers: 2 found, 3 declared"),
        ("bert", {"num_attention_heads": 5}, ConfigError, "num_attention_heads: 5 does not divid"),
        ("bert", {"hidden_act": "glue"}, ConfigError, "hidden_act: 'glue' is not one of"),
        ("bert", {"embedding_size": 128}, ConfigError, "embedding_size: unknown field"),
    ],
)
def test_config_sizes_that_disagree_with_tensors_are_refused(
    place: Path, name: str, changes: dict[str, Any], kind: type[ZooError], why: str
) -> None:
    says(place / name, name, **changes)
    with pytest.raises(kind, match=why) as error:
        zoo.load(place / name)
    assert str(place / name) in str(error.value)


@BOTH
def test_damage_is_named(place: Path, tmp_path: Path, name: str) -> None:
    tensor = {"gpt2": "model/h1/mlp/c_fc/w", "bert": "bert/encoder/layer_1/output/dense/kernel"}
    path = place / name / f"{PREFIX[name]}.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[data.index(tensors_of(name)[tensor[name]].numpy().tobytes()) + 7] ^= 16
    path.write_bytes(data)
    why = rf"{path.name}: tensor {tensor[name]}, bytes .* CRC"
    with pytest.raises(CorruptCheckpoint, match=why):
        zoo.load(place / name)
    with pytest.raises(CorruptCheckpoint, match=why):
        zoo.convert(place / name, tmp_path / "out", to="native")
    assert not (tmp_path / "out").exists()


def test_missing_and_unknown_tensors_are_refused(place: Path) -> None:
    tensors = tensors_of("gpt2")
    bias = tensors.pop("model/h1/mlp/c_fc/b")
    source = rewritten(place / "gpt2", "gpt2", tensors)
    with pytest.raises(MissingTensors, match="1 tensor missing: model/h1/mlp/c_fc/b"):
        zoo.load(source)
    rewritten(source, "gpt2", tensors | {"model/h1/mlp/c_fc/bias": bias})
    with pytest.raises(NotACheckpoint, match=r"gpt2 of OpenAI's.*not \['model/h1/mlp/c_fc/bias'\]"):
        zoo.load(source)
    # an optimizer's, of nothing that is known
    tensors = tensors_of("bert") | {"bert/adapter/kernel/adam_m": drawn(2, 2)}
    source = rewritten(place / "bert", "bert", tensors)
    with pytest.raises(NotACheckpoint, match=r"not \['bert/adapter/kernel/adam_m'\]"):
        zoo.load(source)
    google = load_spec("bert").dialect("google")
    assert google.dropped("bert/adapter/kernel/adam_m") is None
    assert google.dropped("bert/pooler/dense/kernel/adam_m") is not None


@BOTH
def test_tensorflow_files_are_read_and_never_written(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = zoo.load(place / name)
    with pytest.raises(UsageError, match="TensorFlow saved it can be read, not written; one of hf"):
        zoo.save(model, tmp_path / "out", to=DIALECT[name])
    source = str(place / name)
    assert main(["convert", source, "--to", DIALECT[name], "--out", str(tmp_path / "out")]) == 2
    assert "can be read, not written" in capsys.readouterr().err


# --- the command line, and what lies beside ------------------------------------------------------


@BOTH
def test_info_and_convert(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    info = zoo.info(place / name)
    assert (info.architecture, info.dialect) == (name, DIALECT[name])
    # what the optimizer keeps is stored, and none of the model's
    parameters = {id(p): p.numel() for p in zoo.load(place / name).parameters()}
    assert info.parameters == sum(parameters.values())
    assert main(["info", str(place / name / PREFIX[name])]) == 0
    output = capsys.readouterr().out
    for word in ("as TensorFlow saved it", f"{PREFIX[name]}.index, {PREFIX[name]}.data-00000-of"):
        assert word in output
    out = str(tmp_path / "native")
    assert main(["convert", str(place / name), "--to", "native", "--out", out]) == 0
    assert list(check(tmp_path / "native", sha256=True)) == []
    mine, theirs = zoo.load(out), zoo.load(place / name)
    assert all(torch.equal(x, mine.state_dict()[n]) for n, x in theirs.state_dict().items())
    assert not list((tmp_path / "native").glob(CONFIG[name]))
    zoo.save(theirs, tmp_path / "saved", to="hf")
    zoo.convert(out, tmp_path / "hf", to="hf")
    for file in ("model.safetensors", "config.json"):
        saved, converted = (tmp_path / place_ / file for place_ in ("saved", "hf"))
        assert saved.read_bytes() == converted.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_openais_tokenizer(place: Path, tmp_path: Path, fixtures: Path, alone: bool) -> None:
    """encoder.json and vocab.bpe are what others call vocab.json and merges.txt."""
    from transformers import AutoTokenizer

    for path in (fixtures / "tokenizers" / "gpt2").iterdir():
        shutil.copy(path, place / "gpt2")
    source = place / "gpt2" / "model.ckpt.index" if alone else place / "gpt2"
    text = "Hello,  world's end: 12 naïve…"
    wanted = zoo.load(source).tokenizer.encode(text)
    assert wanted[:2] == [15496, 11] and zoo.tokenizer(source).encode(text) == wanted
    zoo.convert(source, tmp_path / "hf", to="hf")
    zoo.save(zoo.load(source), tmp_path / "saved", to="hf")
    zoo.convert(source, tmp_path / "native", to="native")
    for name in ("hf", "saved", "native"):
        there = {p.name for p in (tmp_path / name).iterdir()}
        assert {"vocab.json", "merges.txt"} <= there
        assert not {"encoder.json", "vocab.bpe", "hparams.json", "checkpoint"} & there
        assert zoo.tokenizer(tmp_path / name).encode(text) == wanted
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text) == wanted
    # where both are there, each is what it was
    for name, other in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(place / "gpt2" / name, place / "gpt2" / other)
    zoo.convert(source, tmp_path / "both", to="native")
    files = {"encoder.json", "vocab.json", "vocab.bpe", "merges.txt"}
    assert files <= {p.name for p in (tmp_path / "both").iterdir()}


def test_googles_tokenizer(place: Path, tmp_path: Path, fixtures: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copy(fixtures / "tokenizers" / "bert-uncased" / "vocab.txt", place / "bert")
    wanted = zoo.load(place / "bert").tokenizer.encode("Hello, World's end")
    assert wanted[0] == 101 and wanted[-1] == 102
    zoo.convert(place / "bert", tmp_path / "hf", to="hf")
    assert zoo.tokenizer(tmp_path / "hf").encode("Hello, World's end") == wanted
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("Hello, World's end") == wanted
