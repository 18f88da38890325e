"""zoo diagnose: each fault is planted alone and must be told first; of what is sound nothing is."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from einops import rearrange
from grown import grown
from safetensors.torch import load_file, save_file
from tiny import build
from torch import Tensor

import zoo
from converters.formats.llama2c import Llama2cReader
from zoo import registry
from zoo.cli import app
from zoo.components.model import Model
from zoo.diagnosis.checkup.report import Diagnosis

WIDE = {"vocab": 512, "dim": 64, "layers": 5, "heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 4, "head_dim": 8, "hidden": 172, "tied": False},
    "gpt2": {"positions": 128, "hidden": 256, "act": "gelu"},
    "gemma2": {"kv_heads": 4, "head_dim": 8, "hidden": 172},
    "neox": {"rope_share": 1.0, "hidden": 256},
    "bert": {"positions": 128, "hidden": 256, "head": "masked_lm"},
}


@cache
def state(name: str) -> dict[str, Tensor]:
    model = grown(made(name))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def made(name: str) -> Model:
    entry = registry.architectures()[name]
    fields = {"head": "lm", **WIDE, **SHAPES[name]}
    model: Model = entry.model(entry.config_class(**fields))
    model.architecture = name
    return model


def planted(name: str, place: Path, fault: Callable[[Model], None] | None = None) -> Diagnosis:
    model = made(name)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            parameter.copy_(state(name)[each])
        if fault is not None:
            fault(model)
    zoo.save(model, place / name, allow_nonfinite=True)
    return zoo.diagnose(place / name)


# --- what is sound -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_sound_checkpoint_has_no_findings(name: str, tmp_path: Path) -> None:
    diagnosis = planted(name, tmp_path)
    assert diagnosis.ok, diagnosis.to_text()
    assert "Nothing looks wrong." in diagnosis.to_text()


@pytest.mark.parametrize("name", registry.architectures())
def test_untrained_model_has_one_finding(name: str, tmp_path: Path) -> None:
    zoo.save(build(name), tmp_path / "new")
    diagnosis = zoo.diagnose(tmp_path / "new")
    assert [each.what for each in diagnosis.findings] == [
        "nothing of it looks trained: its matrices are as initialized"
    ]


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("hf", {}),
    ("hf", {"dtype": "bfloat16"}),
    ("hf", {"dtype": "float16"}),
    ("hf", {"max_shard_size": 300_000}),
    ("native", {}),
    ("meta", {}),
    ("meta", {"layout": {"shards": 2}}),
    ("llama2c", {"layout": {"version": 1}}),
    ("gguf", {}),
    ("gguf", {"dtype": "q8_0"}),
]


def test_a_trained_model_is_sound(fixtures: Path) -> None:
    assert zoo.diagnose(fixtures / "stories260K" / "stories260K.bin").ok


@pytest.mark.parametrize(("to", "how"), first_of([LAYOUTS[0], LAYOUTS[-1], *LAYOUTS[1:-1]], 2))
def test_a_trained_model_is_sound_in_every_layout(
    to: str, how: dict[str, Any], fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "stories260K" / "stories260K.bin"
    diagnosis = zoo.diagnose(zoo.convert(source, tmp_path / to, to=to, **how))
    assert diagnosis.ok, diagnosis.to_text()


# --- what is not ---------------------------------------------------------------------------------


def at(model: Model, name: str) -> Tensor:
    return model.get_parameter(name).data


def change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[Model], None]:
    """`*` is every layer."""

    def fault(model: Model) -> None:
        layers = range(model.config.layers) if "*" in name else [0]
        for layer in layers:
            each = at(model, name.replace("*", str(layer)))
            each.copy_(how(each.clone()))

    return fault


def copied(source: str, target: str) -> Callable[[Model], None]:
    def fault(model: Model) -> None:
        at(model, target).copy_(at(model, source))

    return fault


def exchange(a: str, b: str) -> Callable[[Model], None]:
    def fault(model: Model) -> None:
        for layer in range(model.config.layers) if "*" in a else [0]:
            first, second = (at(model, each.replace("*", str(layer))) for each in (a, b))
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)

    return fault


def side_by_side(name: str, heads: int) -> Callable[[Model], None]:
    return change(name, lambda w: rearrange(w, "(h two e) i -> (h e two) i", two=2, h=heads))


def both(*faults: Callable[[Model], None]) -> Callable[[Model], None]:
    def fault(model: Model) -> None:
        for each in faults:
            each(model)

    return fault


def one_nan(w: Tensor) -> Tensor:
    w[3, 5] = torch.nan
    return w


def half_gone(w: Tensor) -> Tensor:
    w[len(w) // 2 :] = 0
    return w


def drawn(w: Tensor) -> Tensor:
    return 0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(7))


def of_eight_bits(w: Tensor) -> Tensor:
    groups = w.reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    return ((groups / scale).round() * scale).reshape(w.shape)


def same_layer(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.2."):
            at(model, name.replace("blocks.2.", "blocks.3.")).copy_(parameter)


def wrong_heads(w: Tensor) -> Tensor:
    """Keys of 4 heads whose pairs were brought into halves as those of 8."""
    pairs = rearrange(w, "(h two e) i -> (h e two) i", two=2, h=4)
    return rearrange(pairs, "(h e two) i -> (h two e) i", two=2, h=8)


def restrided(w: Tensor) -> Tensor:
    """The transpose, row by row, under the matrix's own shape."""
    return w.T.reshape(w.shape)


def everything(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.dim() == 2:
            parameter.copy_(restrided(parameter.clone()))


Q, K, V, OUT = (f"blocks.2.attn.{leaf}.weight" for leaf in ("q", "k", "v", "out"))
EVERY_Q, EVERY_K, EVERY_V = (each.replace("2", "*", 1) for each in (Q, K, V))
EVERY_OUT, EVERY_GATE = "blocks.*.attn.out.weight", "blocks.*.mlp.gate.weight"
ALL_LAYERS = "of layers 0, 1, 2, 3, 4"
UP, NORM = "blocks.2.mlp.up.weight", "blocks.2.norm1.weight"

FAULTS: dict[str, tuple[str, Callable[[Model], None], str]] = {
    "nan": ("llama", change(Q, one_nan), f"NaN or infinity in {Q}"),
    "zero": ("llama", change(V, torch.zeros_like), f"all zero: {V}"),
    "zero bias": (
        "gpt2",
        change("blocks.2.mlp.up.bias", torch.zeros_like),
        "all zero: blocks.2.mlp.up.bias",
    ),
    "one number": ("llama", change(V, lambda w: w * 0 + 0.02), f"one number throughout: {V}"),
    "norm of ones": ("llama", change(NORM, torch.ones_like), f"one number throughout: {NORM}"),
    "hole": ("llama", change(OUT, half_gone), f"a part is missing, and zeros are there: {OUT}"),
    "layer twice": ("llama", same_layer, "layers 2 and 3 hold the same numbers"),
    "tensor twice": (
        "llama",
        copied("blocks.1.attn.v.weight", V),
        "the same numbers in blocks.*.attn.v.weight of layers 1, 2",
    ),
    "random": ("llama", change(UP, drawn), f"never trained, as initialized: {UP}"),
    "random head": (
        "llama",
        change("head.weight", drawn),
        "never trained, as initialized: head.weight",
    ),
    "ten times": ("llama", change(OUT, lambda w: 10 * w), f"out of scale: {OUT}"),
    "a tenth": ("gpt2", change(UP, lambda w: w / 10), f"out of scale: {UP}"),
    "bfloat16": ("llama", change(UP, lambda w: w.bfloat16().float()), f"precision was lost: {UP}"),
    "float16": ("gpt2", change(K, lambda w: w.half().float()), f"precision was lost: {K}"),
    "int8": ("llama", change(OUT, of_eight_bits), f"precision was lost: {OUT}"),
    "transposed q": ("llama", change(Q, lambda w: w.T), f"transposed: {Q}"),
    "transposed out": ("gpt2", change(OUT, lambda w: w.T), f"transposed: {OUT}"),
    "transposed, all": (
        "bert",
        change(OUT.replace("2", "*"), lambda w: w.T),
        "transposed: blocks.*.attn.out.weight of layers 0, 1, 2, 3, 4",
    ),
    "transposed q and out, all": (
        "llama",
        both(change(EVERY_Q, lambda w: w.T), change(EVERY_OUT, lambda w: w.T)),
        f"transposed: {EVERY_OUT} {ALL_LAYERS}, {EVERY_Q} {ALL_LAYERS}",
    ),
    "re-strided": ("gemma2", change(UP, restrided), f"transposed and re-strided: {UP}"),
    "re-strided keys": ("llama", change(K, restrided), f"transposed and re-strided: {K}"),
    "re-strided gate, all": (
        "llama",
        change(EVERY_GATE, restrided),
        f"transposed and re-strided: {EVERY_GATE} {ALL_LAYERS}",
    ),
    "read by columns": (
        "llama",
        change(EVERY_GATE, lambda w: w.reshape(w.T.shape).T),
        f"transposed and re-strided: {EVERY_GATE} {ALL_LAYERS}",
    ),
    "re-strided embedding": (
        "neox",
        change("embed.weight", restrided),
        "transposed and re-strided: embed.weight",
    ),
    "everything re-strided": (
        "gpt2",
        everything,
        "transposed and re-strided: all matrices of all layers",
    ),
    "pairs": (
        "llama",
        both(side_by_side(EVERY_Q, 8), side_by_side(EVERY_K, 4)),
        "rotary rows of all queries and keys: pairs stand side by side and are read as halves",
    ),
    "pairs of keys": (
        "gemma2",
        side_by_side(EVERY_K, 4),
        "rotary rows of all keys: pairs stand side by side and are read as halves",
    ),
    "pairs of one layer": (
        "neox",
        side_by_side(Q, 8),
        f"rotary rows of {Q}: pairs stand side by side and are read as halves",
    ),
    "wrong heads": (
        "llama",
        change(EVERY_K, wrong_heads),
        "rotary rows of all keys: pairs were brought into halves as those of 8 heads",
    ),
    "keys are values": ("llama", exchange(EVERY_K, EVERY_V), "values and keys are exchanged"),
    "norms of one block": (
        "llama",
        exchange("blocks.2.norm1.weight", "blocks.2.norm2.weight"),
        "two norms are exchanged: blocks.2.norm1.weight, blocks.2.norm2.weight",
    ),
    "norms without one": (
        "llama",
        both(
            change("blocks.*.norm1.weight", lambda w: w - 1),
            change("blocks.*.norm2.weight", lambda w: w - 1),
            change("norm.weight", lambda w: w - 1),
        ),
        "norms lack the one that is added to them elsewhere",
    ),
    "norms with one twice": (
        "gemma2",
        both(
            *(
                change(f"blocks.*.{norm}.weight", lambda w: w.clamp(-0.9, 0.9) + 1)
                for norm in ("norm1", "norm1_out", "norm2", "norm2_out")
            ),
            change("norm.weight", lambda w: w.clamp(-0.9, 0.9) + 1),
        ),
        "one is added to norms that hold it already",
    ),
    "equal, not tied": (
        "llama",
        copied("embed.weight", "head.weight"),
        "not tied, and equal",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_alone(fault: str, tmp_path: Path) -> None:
    name, plant, expected = FAULTS[fault]
    diagnosis = planted(name, tmp_path, plant)
    assert [each.what for each in diagnosis.findings] == [expected], diagnosis.to_text()
    names = diagnosis.opened.checkpoint.tensors
    assert diagnosis.findings[0].where
    assert all(each in names for each in diagnosis.findings[0].where)
    assert diagnosis.findings[0].what in diagnosis.to_text()
    json.dumps(diagnosis.to_json(), allow_nan=False)


# --- a real file whose matrices lie transposed ---------------------------------------------------

WQ, WO, W1 = ("blocks.*.attn.q.weight", "blocks.*.attn.out.weight", "blocks.*.mlp.gate.weight")
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
REAL: dict[str, tuple[tuple[str, ...], str]] = {
    "wq": (("wq",), f"transposed: {WQ} {ALL_LAYERS}"),
    "wo": (("wo",), f"transposed: {WO} {ALL_LAYERS}"),
    "wq and wo": (("wq", "wo"), f"transposed: {WQ} {ALL_LAYERS}, {WO} {ALL_LAYERS}"),
    "w1": (("w1",), f"transposed and re-strided: {W1} {ALL_LAYERS}"),
    "all": (MATRICES, "transposed and re-strided: all matrices of all layers"),
    "all and the embedding": (
        (*MATRICES, "token_embedding_table"),
        "transposed and re-strided: all matrices of all layers, embed.weight",
    ),
}


def stories_with(fixtures: Path, place: Path, names: Sequence[str]) -> Path:
    """Stories260K with each matrix of these arrays as its transpose, row by row."""
    reader = Llama2cReader(fixtures / "stories260K" / "stories260K.bin")
    data = bytearray(reader.path.read_bytes())
    for name in names:
        start, end = reader.span(name) or (0, 0)
        data[start:end] = reader.tensor(name).mT.contiguous().numpy().tobytes()
    file = place / "stories260K.bin"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("case", REAL)
def test_transposed_kinds_of_a_real_file_are_told_by_numbers_alone(
    case: str, fixtures: Path, tmp_path: Path
) -> None:
    """Rows of wq and wk lie in another order in the file than in the model."""
    names, expected = REAL[case]
    diagnosis = zoo.diagnose(stories_with(fixtures, tmp_path, names))
    assert [each.what for each in diagnosis.findings] == [expected], diagnosis.to_text()
    assert set(diagnosis.findings[0].where) == set(names)


@pytest.mark.slow
def test_text_is_read_with_transposed_matrices_put_right(fixtures: Path, tmp_path: Path) -> None:
    file = stories_with(fixtures, tmp_path, ("wq", "wo"))
    shutil.copy(fixtures / "stories260K" / "tok512.bin", tmp_path / "tokenizer.bin")
    diagnosis = zoo.diagnose(file)
    assert [each.what for each in diagnosis.findings] == [REAL["wq and wo"][1]]
    assert "with these matrices transposed: perplexity 6.78" in diagnosis.notes[-1]


# --- faults of files -----------------------------------------------------------------------------

Files = tuple[dict[str, Tensor], dict[str, Any]]


def edited(place: Path, how: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A sound Llama whose tensors or config are other ones."""
    planted("llama", place)
    directory = place / "llama"
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    how(tensors, config)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def other_way_round(tensor: Tensor) -> Tensor:
    pieces = tensor.contiguous().view(torch.uint8).reshape(-1, tensor.element_size())
    return pieces.flip(1).contiguous().flatten().view(tensor.dtype).reshape(tensor.shape)


def whats(directory: Path) -> list[str]:
    return [each.what for each in zoo.diagnose(directory).findings]


def test_bytes_the_other_way_round(tmp_path: Path) -> None:
    def swap(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = other_way_round(tensors[name])

    assert whats(edited(tmp_path, swap)) == ["the bytes of every number are the other way round"]


def test_zeros_to_the_end_of_a_file(tmp_path: Path) -> None:
    last: list[str] = []

    def cut(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        last[:] = sorted(tensors)[-6:]
        for name in last:
            tensors[name] = torch.zeros_like(tensors[name])

    diagnosis = zoo.diagnose(edited(tmp_path, cut))
    assert [each.what for each in diagnosis.findings] == ["the file ends in zeros"]
    assert set(diagnosis.findings[0].where) == set(last)


def test_cut_off_at_the_largest_number(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def cut(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for each in tensors:
            tensors[each] = tensors[each].half()
        tensors[name][0, :3] = 65504

    diagnosis = zoo.diagnose(edited(tmp_path, cut))
    assert [each.where for each in diagnosis.findings] == [(name,)]
    assert "3 of 11,008 numbers are exactly 65504" in diagnosis.findings[0].seen


def test_what_does_not_load_is_looked_at_nevertheless(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        up = tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = up.T
        tensors["model.layers.3.self_attn.q_proj.weight"][0, 0] = torch.inf

    diagnosis = zoo.diagnose(edited(tmp_path, spoil))
    report = {each.what: each for each in diagnosis.findings}
    assert list(report) == [
        "NaN or infinity in blocks.3.attn.q.weight",
        "transposed by their shapes: 1 tensor",
        "it does not load",
    ]
    assert "1 tensor missing" in report["it does not load"].seen
    assert report["transposed by their shapes: 1 tensor"].where == (
        "model.layers.2.mlp.up_proj.weight",
    )
    assert "it does not load" in diagnosis.to_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 6), ("vocab_size", 500), ("num_attention_heads", 7), ("pruned_head", 1)],
)
def test_a_config_that_contradicts_the_tensors(field: str, value: int, tmp_path: Path) -> None:
    directory = edited(tmp_path, lambda tensors, config: config.update({field: value}))
    diagnosis = zoo.diagnose(directory)
    assert diagnosis.findings[0].what == "it does not load"
    assert {"num_hidden_layers": "5 found, 6 declared"}.get(field, field[:5]) in (
        diagnosis.findings[0].seen + str(diagnosis.findings[0].where)
    ).replace("embed_tokens", "vocab")


def test_heads_that_are_half_as_wide(tmp_path: Path) -> None:
    fewer = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    diagnosis = whats(edited(tmp_path, lambda tensors, config: config.update(fewer)))
    assert diagnosis == ["more heads than the config says: 8, and not 4"]


def test_tied_names_that_differ(tmp_path: Path) -> None:
    directory = edited(
        tmp_path, lambda tensors, config: config.update({"tie_word_embeddings": True})
    )
    assert whats(directory) == ["tied, and not equal"]


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    planted("llama", tmp_path)
    words = {f"t{n}": n for n in range(600)}
    tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **tokenizer}
    whole |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(whole))
    diagnosis = zoo.diagnose(tmp_path / "llama").findings
    assert [each.what for each in diagnosis] == ["more tokens than rows for them"]
    assert diagnosis[0].seen == "the tokenizer has 600 tokens, the embedding 512 rows"


# --- without an architecture ---------------------------------------------------------------------


def alone(directory: Path) -> Path:
    """The tensors, and nothing that says what they are."""
    file = directory.parent / "bare.safetensors"
    shutil.copy(directory / "model.safetensors", file)
    return file


def test_a_file_that_nobody_knows(tmp_path: Path) -> None:
    file = alone(edited(tmp_path, lambda tensors, config: None))
    diagnosis = zoo.diagnose(file)
    assert diagnosis.ok, diagnosis.to_text()
    assert "no architecture that zoo knows" in diagnosis.to_text()
    assert "model.layers.*.mlp.up_proj.weight" in diagnosis.to_text()


def test_its_layers_tell_of_each_other(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"

    def turn(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[name] = tensors[name].T

    assert whats(alone(edited(tmp_path, turn))) == [f"transposed: {name}"]


def test_layers_that_are_left_out(tmp_path: Path) -> None:
    def leave(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [each for each in tensors if ".layers.3." in each]:
            del tensors[name]

    assert whats(alone(edited(tmp_path, leave))) == ["layers are missing: model.layers.3"]


def test_a_pickle_that_nobody_knows(tmp_path: Path) -> None:
    torch.save({"net": {"0.weight": torch.ones(4, 4), "1.bias": torch.zeros(4)}}, tmp_path / "x.pt")
    diagnosis = zoo.diagnose(tmp_path / "x.pt")
    assert [each.what for each in diagnosis.findings] == ["one number throughout: net/0.weight"]


# --- the command ---------------------------------------------------------------------------------


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted("llama", tmp_path)
    assert app.main(["diagnose", str(tmp_path / "llama")]) == 0
    zoo.save(made("gpt2"), tmp_path / "new")
    assert app.main(["diagnose", str(tmp_path / "new")]) == 1
    capsys.readouterr()
    data = (tmp_path / "llama" / "model.safetensors").read_bytes()
    for name, content in (("cut", data[:-100]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        assert app.main(["diagnose", str(tmp_path / name)]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err
    assert app.main(["diagnose", str(tmp_path / "nowhere")]) == 2


def test_json_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted("llama", tmp_path, change(Q, lambda w: w.T))
    assert app.main(["diagnose", str(tmp_path / "llama"), "--json"]) == 1
    message = json.loads(capsys.readouterr().out)
    assert message["findings"][0]["where"] == ["model.layers.2.self_attn.q_proj.weight"]
    records = {each["name"]: each for each in message["tensors"]}
    weight = state("llama")["blocks.1.mlp.up.weight"]
    report = records["blocks.1.mlp.up.weight"]
    assert report["shape"] == [172, 64]
    assert report["bits"] == 23
    assert report["std"] == pytest.approx(float(weight.double().std(correction=0)), rel=1e-5)
    assert report["most"] == pytest.approx(float(weight.abs().max()))
    assert app.main(["diagnose", str(tmp_path / "llama"), "--tensors"]) == 1
    assert "blocks.1.mlp.up.weight" in capsys.readouterr().out


def test_what_no_file_says_may_be_given(tmp_path: Path) -> None:
    planted("gpt2", tmp_path)
    zoo.convert(tmp_path / "gpt2", tmp_path / "nano", to="nanogpt")
    (file,) = (tmp_path / "nano").glob("*.pt")
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors["model"], tmp_path / "bare.pt")
    diagnosis = zoo.diagnose(tmp_path / "bare.pt")
    assert diagnosis.ok, diagnosis.to_text()
    assert "n_head" in diagnosis.to_text()
    inputs = zoo.diagnose(tmp_path / "bare.pt", config={"n_head": 8})
    assert inputs.ok
    assert inputs.opened.model is not None
