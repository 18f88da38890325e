"""Graphs that run without zoo: ONNX and .pt2 against the model, at sizes that were not traced."""

import copy
import json
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import first_of
from onnx import numpy_helper
from safetensors.torch import save_file
from tiny import build
from torch import Tensor

import zoo
from converters import manifest
from converters.output import Shard
from converters.spec import load_spec
from zoo import registry
from zoo.checkpoints.build import native_of
from zoo.checkpoints.sentences import Normalize, Pooling, SentenceModel
from zoo.cli import app
from zoo.components import dual_chunk
from zoo.errors import (
    LossyExport,
    MissingDependency,
    NonFinite,
    OutputExists,
    OverflowOnCast,
    UsageError,
    ZooError,
)
from zoo.saving import graphs
from zoo.saving.outputs import item_of

ARCHITECTURES = registry.architectures()
# tracing takes seconds: of one architecture in `make test`, of all in `make test-all`, of every
# variant in `make graphs`
QUICK = list(ARCHITECTURES)[:1]
each_graph = pytest.mark.parametrize("to", first_of(sorted(graphs.GRAPHS, reverse=True), 1))
VARIANTS = [
    pytest.param(name, variant, marks=() if n == 0 and name in QUICK else pytest.mark.long)
    for name, entry in sorted(ARCHITECTURES.items())
    for n, variant in enumerate(entry.variants)
    if n == 0 or os.environ.get("ZOO_GRAPHS") == "all"
]
RELATIVE = 1e-4  # of the root mean square; onnxruntime sums in an order of its own
EXACT = 1e-12  # in fp64


def made(name: str, variant: str) -> Any:
    """The model of a variant, every parameter redrawn so that all of them count."""
    entry = ARCHITECTURES[name]
    data = entry.variants[variant]
    fields, problems = load_spec(entry.spec).dialect("hf").read_config(data["config"])
    assert not problems
    if data.get("untied"):
        fields["tied"] = False
    model = entry.model(entry.config_class(**{**fields, "head": entry.heads[data["class"]][0]}))
    model.architecture = name
    return redrawn(model)


def redrawn(model: Any) -> Any:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            wide = 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(wide * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.eval()


def asked(model: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """Arguments of forward; some rows are padded on the left, some on the right."""
    random = torch.Generator().manual_seed(tokens)
    inputs = {}
    for name in graphs.input_names(model):  # an answer is long where the question is short
        length = 24 - tokens % 24 if name.startswith("decoder_") else tokens
        if name.endswith("mask"):
            mask = torch.ones(rows, length, dtype=torch.int64)
            for row in range(rows):
                mask[row, : row % 3 * length // 4] = 0
                mask[row, length - (row % 2 * length // 3) :] = 0
            inputs[name] = mask
        else:
            most = model.config.types if name == "token_type_ids" else model.config.vocab
            inputs[name] = torch.randint(0, most, (rows, length), generator=random)
    return inputs


def sizes(model: Any) -> Iterator[tuple[int, int]]:
    yield from [(1, 1), (5, 1), (1, 2), (5, 2), (3, 12), (2, 23), (5, 30)]
    limit = model.config.limit or 70
    yield from [(1, limit), (5 if limit < 100 else 2, limit)]


@torch.no_grad()
def answered(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = model(**inputs)
    return list(out) if isinstance(out, tuple) else [out]


def session(directory: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(directory / graphs.ONNX)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def apart(x: Tensor, y: Tensor) -> float:
    """The worst distance, in root mean squares of the second."""
    return ((x - y).abs().max() / y.square().mean().sqrt()).item()


def compared(model: Any, run: Callable[[dict[str, Tensor]], list[Tensor]], limit: float) -> None:
    """Within the limit, or in what the model's own dtype does to it where that is more."""
    exact = copy.deepcopy(model).double()
    for rows, tokens in sizes(model):
        inputs = asked(model, rows, tokens)
        outputs = zip(run(inputs), answered(model, inputs), answered(exact, inputs), strict=True)
        for x, y, truth in outputs:
            assert x.shape == y.shape
            # hot weights at 800 positions: two orders of fp32 sums, each as far from the truth
            assert apart(x, y) <= max(limit, 4 * apart(y, truth)), (rows, tokens)


def in_runtime(directory: Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    runtime = session(directory)

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        actual = runtime.run(None, {name: x.numpy() for name, x in inputs.items()})
        return [torch.from_numpy(x) for x in actual]

    return run


def in_torch(directory: Path) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    program = torch.export.load(directory / graphs.PT2).module()

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(program(inputs["input_ids"], **rest(inputs)).values())

    return run


def rest(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name != "input_ids"}


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_onnxruntime_computes_the_same(name: str, variant: str, tmp_path: Path) -> None:
    model = made(name, variant)
    zoo.save(model, tmp_path / "g", to="onnx")
    onnx.checker.check_model(str(tmp_path / "g" / graphs.ONNX), full_check=True)
    compared(model, in_runtime(tmp_path / "g"), RELATIVE)
    weights_are_the_models(model, tmp_path / "g")


def weights_are_the_models(model: Any, directory: Path) -> None:
    graph = onnx.load(str(directory / graphs.ONNX)).graph
    tensors = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    own = dict(model.named_parameters(remove_duplicate=False))
    native = native_of(model)
    assert tensors.keys() & own.keys()
    for name in tensors.keys() & own.keys():
        assert np.array_equal(tensors[name], own[name].detach().numpy()), name
    named = {native.ties.get(name, name) for name in tensors.keys() & own.keys()}
    unused = native.shapes.keys() - named
    # a lone bias that untied files hold, and nothing reads
    assert all(name.endswith("bias") for name in unused), unused
    largest = max((x.size for name, x in tensors.items() if name not in own), default=0)
    assert largest <= 128, "a weight under another name"


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_pt2_computes_the_same(name: str, variant: str, tmp_path: Path) -> None:
    model = made(name, variant).double()
    zoo.save(model, tmp_path / "g", to="pt2")
    compared(model, in_torch(tmp_path / "g"), EXACT)
    state = torch.export.load(tmp_path / "g" / graphs.PT2).state_dict
    for key, x in model.state_dict().items():
        assert torch.equal(state[key], x), key


@pytest.mark.slow
@pytest.mark.parametrize("to", graphs.GRAPHS)
def test_a_padded_row_equals_the_row_alone(to: str, tmp_path: Path) -> None:
    model = made("llama", "base")
    zoo.save(model, tmp_path / "g", to=to)
    run = (in_runtime if to == "onnx" else in_torch)(tmp_path / "g")
    ids = torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    (alone,) = run({"input_ids": ids, "attention_mask": real})
    rows = torch.stack([torch.nn.functional.pad(ids[0], pad) for pad in ((4, 0), (0, 4))])
    mask = torch.stack([torch.nn.functional.pad(real[0], pad) for pad in ((4, 0), (0, 4))])
    (padded,) = run({"input_ids": rows, "attention_mask": mask})
    torch.testing.assert_close(padded[0, 4:], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1, :9], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", graphs.GRAPHS)
def test_dual_chunks_at_any_length(to: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Eager code takes queries in turns, and a graph all at once."""
    monkeypatch.setattr(dual_chunk, "ROWS", 4)
    sizes = {"chunk_size": 16, "local_size": 4, "original_max_position_embeddings": 12}
    model = redrawn(build("qwen2", dual_chunk=dual_chunk.DualChunk(**sizes)))
    zoo.save(model, tmp_path / "g", to=to)
    run = (in_runtime if to == "onnx" else in_torch)(tmp_path / "g")
    compared(model, run, RELATIVE)


@each_graph
def test_a_sentence_model_gives_its_vector(to: str, tmp_path: Path) -> None:
    steps = [Pooling(("mean_tokens", "lasttoken")), Normalize()]
    model = SentenceModel(redrawn(build("bert", head="none")), steps, ["1", "2"]).eval()
    zoo.save(model, tmp_path / "g", to=to)
    compared(model, (in_runtime if to == "onnx" else in_torch)(tmp_path / "g"), RELATIVE)
    if to == "onnx":
        assert [x.name for x in session(tmp_path / "g").get_outputs()] == ["sentence_embedding"]


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "inputs", "outputs"),
    first_of(
        [
            ("llama", "lm", "input_ids attention_mask", "logits"),
            ("gpt2", "none", "input_ids attention_mask", "last_hidden_state"),
            (
                *("bert", "pretraining", "input_ids attention_mask token_type_ids"),
                "prediction_logits seq_relationship_logits",
            ),
            (
                "roberta",
                "question_answering",
                "input_ids attention_mask",
                "start_logits end_logits",
            ),
            ("distilbert", "none", "input_ids attention_mask", "last_hidden_state"),
            (
                *("t5", "lm"),
                "input_ids attention_mask decoder_input_ids decoder_attention_mask",
                "logits",
            ),
            ("t5", "encoder", "input_ids attention_mask", "last_hidden_state"),
        ],
        1,
    ),
)
def test_names_and_axes(name: str, head: str, inputs: str, outputs: str, tmp_path: Path) -> None:
    model = build(name, head=head).eval()
    zoo.save(model, tmp_path / "g", to="onnx")
    runtime = session(tmp_path / "g")
    shapes = {x.name: x.shape for x in runtime.get_inputs()}
    assert list(shapes) == inputs.split()
    for key, shape in shapes.items():
        length = "decoder_sequence" if key.startswith("decoder_") else "sequence"
        assert shape == ["batch", length]
    assert [x.name for x in runtime.get_outputs()] == outputs.split()
    graph = onnx.load(str(tmp_path / "g" / graphs.ONNX), load_external_data=False).graph
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    zoo.save(model, tmp_path / "p", to="pt2")
    program, arguments = torch.export.load(tmp_path / "p" / graphs.PT2).module(), asked(model, 2, 5)
    assert list(arguments) == inputs.split()
    assert list(program(arguments["input_ids"], **rest(arguments))) == outputs.split()


# --- from files to files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 as the hub has it: its matrices lie turned, so that they are read as views."""
    place = tmp_path_factory.mktemp("source") / "gpt2"
    zoo.save(made("gpt2", "base"), place)
    (place / "vocab.json").write_text("{}")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("to", graphs.GRAPHS)
def test_converted_on_the_command_line(
    to: str, source: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["convert", str(source), "--to", to]) == 0
    out = Path(f"gpt2-{to}")
    files = {graphs.ONNX, graphs.DATA} if to == "onnx" else {graphs.PT2}
    assert {p.name for p in out.iterdir()} == files | {"config.json", "vocab.json", manifest.NAME}
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    model = zoo.load(source)
    assert any(not p.is_contiguous() for p in model.parameters())
    compared(model, (in_runtime if to == "onnx" else in_torch)(out), RELATIVE)
    assert app.main(["check", str(out)]) == 0
    capsys.readouterr()
    path = out / (graphs.DATA if to == "onnx" else graphs.PT2)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert app.main(["check", str(out)]) == 1


@each_graph
def test_dtype_and_head_are_the_callers(to: str, source: Path, tmp_path: Path) -> None:
    zoo.convert(source, tmp_path / "g", to=to, dtype="float64", head="none")
    model = zoo.load(source, dtype="float64", head="none")
    compared(model, (in_runtime if to == "onnx" else in_torch)(tmp_path / "g"), 1e-6)


@each_graph
def test_a_dry_run_says_sizes_and_reads_no_weights(
    to: str, source: Path, in_tmp: Path, capsys: Any, monkeypatch: Any
) -> None:
    zoo.convert(source, in_tmp / "g", to=to)
    sizes = {path.name: path.stat().st_size for path in (in_tmp / "g").iterdir()}
    sizes.pop(manifest.NAME)
    monkeypatch.setattr("converters.checkpoint.Checkpoint.tensor", None)
    monkeypatch.setattr("converters.checkpoint.Checkpoint.lazy", None)
    assert app.main(["convert", str(source), "--to", to, "--dry-run"]) == 0
    output = capsys.readouterr().out.split(f"to be written ({to}):")[1].split("\n")
    assert {line.strip() for line in output if line} == {
        f"{n}: {s:,} bytes" for n, s in sizes.items()
    }
    assert [path.name for path in in_tmp.iterdir()] == ["g"]


MAKE = """
import sys, zoo
sys.path.insert(0, sys.argv[3])
from tiny import build
zoo.save(build("falcon").eval(), sys.argv[1], to=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", graphs.GRAPHS)
def test_an_export_is_deterministic(to: str, tmp_path: Path) -> None:
    """In another process, with other hashes; and no word of the machine that made them."""
    zoo.save(build("falcon").eval(), tmp_path / "a", to=to)
    here = str(Path(__file__).parents[1] / "support")
    command = [sys.executable, "-c", MAKE, str(tmp_path / "b"), to, here]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(here).parents[1])
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "a").iterdir():
        text = path.read_bytes()
        assert text == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert b"site-packages" not in text
        assert str(Path(zoo.__file__).parent).encode() not in text


def test_a_pt2_names_no_machines_folders(tmp_path: Path) -> None:
    """Its parts may be deflated: looked at one by one."""
    zoo.save(build("llama").eval(), tmp_path / "g", to="pt2")
    with zipfile.ZipFile(tmp_path / "g" / graphs.PT2) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"scaled_dot_product_attention" in text for text in texts.values())
    assert [n for n, text in texts.items() if str(Path(zoo.__file__).parent).encode() in text] == []


def test_an_export_does_not_change_the_model(tmp_path: Path) -> None:
    model = build("gpt2").train()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    zoo.save(model, tmp_path / "g", to="pt2")
    assert model.training
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())
    compared(model.eval(), in_torch(tmp_path / "g"), RELATIVE)  # dropout is not in it


def test_without_an_hf_config_there_is_none(tmp_path: Path) -> None:
    model = build("gpt2", bias=False).eval()  # HF has no word for it
    zoo.save(model, tmp_path / "g", to="pt2")
    assert not (tmp_path / "g" / "config.json").exists()


# --- as the engine writes all files --------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def sharded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded") / "gpt2"
    zoo.convert(source, place, to="hf", max_shard_size=60_000)
    assert len(list(place.glob("*.safetensors"))) > 2
    return place


def test_a_pt2_holds_what_torch_would_write(tmp_path: Path) -> None:
    """Record by record, but for a digest that counts no weights of ours."""
    model = made("gpt2", "base")
    assert native_of(model).ties
    zoo.save(model, tmp_path / "g", to="pt2")
    torch.export.save(torch.export.load(tmp_path / "g" / graphs.PT2), tmp_path / "model.pt2")
    ours, torchs = (records(tmp_path / name) for name in ("g/model.pt2", "model.pt2"))
    assert torchs.pop(".data/serialization_id")
    places = "data/weights/model_weights_config.json"
    assert json.loads(ours.pop(places)) == json.loads(torchs.pop(places))
    assert ours == torchs


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every CRC
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
@each_graph
def test_a_converted_graph_equals_a_saved_one(to: str, sharded: Path, tmp_path: Path) -> None:
    """In whatever pieces, from several files, in parts: the same weights in the same places."""
    zoo.save(zoo.load(sharded), tmp_path / "saved", to=to)
    zoo.convert(sharded, tmp_path / "whole", to=to, memory=1)
    whole, saved = contents(tmp_path / "whole"), contents(tmp_path / "saved")
    del whole[manifest.NAME], saved[manifest.NAME]
    assert whole == saved
    zoo.convert(sharded, tmp_path / "parts", to=to, part="2/2")
    assert not (tmp_path / "parts").exists()
    zoo.convert(sharded, tmp_path / "parts", to=to, part="1/2")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    of = json.loads((tmp_path / "parts" / manifest.NAME).read_text())["sources"]
    assert of.keys() == {path.name for path in sharded.glob("*.safetensors")}


KILL = """
import os, signal, sys, zoo
seen = []
def tell(event):
    seen.append(event["event"])
    if seen.count("tensor") == 9:
        os.kill(os.getpid(), signal.SIGKILL)
zoo.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], threads=1, tell=tell)
"""


@pytest.mark.slow
@each_graph
def test_a_killed_graph_conversion_resumes(to: str, sharded: Path, tmp_path: Path) -> None:
    zoo.convert(sharded, tmp_path / "whole", to=to)
    command = [sys.executable, "-c", KILL, str(sharded), str(tmp_path / "g"), to]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(zoo.__file__).parents[1]
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "g").exists()
    events: list[dict[str, Any]] = []
    zoo.convert(sharded, tmp_path / "g", to=to, tell=events.append)
    sizes = sorted((x.nbytes for x in zoo.load(sharded).parameters()), reverse=True)
    assert events[-1]["resumed"] == sum(sizes[:9])  # the largest go first
    assert contents(tmp_path / "g") == contents(tmp_path / "whole")


@each_graph
def test_overflow_and_nan_are_refused_in_a_graph(to: str, source: Path, tmp_path: Path) -> None:
    model = zoo.load(source)
    with torch.no_grad():
        model.norm.weight[3] = 1e6
    zoo.save(model, tmp_path / "large")
    with pytest.raises(OverflowOnCast, match=r"norm\.weight\[3\] is 1e\+06"):
        zoo.convert(tmp_path / "large", tmp_path / "g", to=to, dtype="float16")
    with torch.no_grad():
        model.norm.weight[3] = torch.inf
    zoo.save(model, tmp_path / "odd", allow_nonfinite=True)
    with pytest.raises(NonFinite, match=r"norm\.weight\[3\] is inf"):
        zoo.convert(tmp_path / "odd", tmp_path / "g", to=to)
    zoo.convert(tmp_path / "odd", tmp_path / "g", to=to, allow_nonfinite=True)


@pytest.mark.slow
@each_graph
def test_sentences_from_files(to: str, tmp_path: Path) -> None:
    """The model, and layers of its own in files of their own."""
    inner = made("bert", "bare")
    zoo.save(inner, tmp_path / "s")
    steps = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3"}
    width, kinds = (
        inner.config.dim,
        [{"type": f"models.{kind}", "path": path} for kind, path in steps.items()],
    )
    configs = {
        "modules.json": kinds,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": width, "out_features": 7, "bias": True},
    }
    for name, data in configs.items():
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_text(json.dumps(data))
    layer = {"linear.weight": torch.randn(7, width), "linear.bias": torch.randn(7)}
    save_file(layer, tmp_path / "s" / "2_Dense" / "model.safetensors")
    model = zoo.load(tmp_path / "s")
    assert isinstance(model, SentenceModel)
    run = in_runtime if to == "onnx" else in_torch
    zoo.convert(tmp_path / "s", tmp_path / "g", to=to)
    compared(model, run(tmp_path / "g"), RELATIVE)
    zoo.convert(tmp_path / "s", tmp_path / "h", to=to, dtype="float64")
    fields = json.loads((tmp_path / "h" / manifest.NAME).read_text())["files"]
    weights = fields[graphs.DATA if to == "onnx" else graphs.PT2]["tensors"]
    assert {each["cast"] for each in weights.values()} == {"F32 -> F64"}
    zoo.save(model, tmp_path / "saved", to=to)
    converted, saved = contents(tmp_path / "g"), contents(tmp_path / "saved")
    del converted[manifest.NAME], saved[manifest.NAME]
    assert converted == saved
    zoo.convert(tmp_path / "s", tmp_path / "alone", to=to, head="none")
    compared(zoo.load(tmp_path / "s", head="none"), run(tmp_path / "alone"), RELATIVE)


@each_graph
def test_from_blocks_of_eight_bits(to: str, tmp_path: Path) -> None:
    zoo.save(redrawn(build("gpt2", dim=64, hidden=96, heads=4)), tmp_path / "s")
    zoo.convert(tmp_path / "s", tmp_path / "q", to="gguf", dtype="q8_0")
    (blocks,) = (tmp_path / "q").glob("*.gguf")
    zoo.convert(blocks, tmp_path / "g", to=to)
    compared(zoo.load(blocks), (in_runtime if to == "onnx" else in_torch)(tmp_path / "g"), RELATIVE)
    data = json.loads((tmp_path / "g" / manifest.NAME).read_text())
    assert data["quantised"]["blocks.0.mlp.up.weight"] == "Q8_0"


# --- beyond 2 and 4 GB: what no 32 bits can say, in files that are holes but for a few bytes ------

HUGE = 15_000_000  # rows of the embedding, 288 bytes each


def huge(model: Any, to: str, directory: Path) -> tuple[Shard, dict[str, bytes]]:
    """`model` with an embedding that ends as it begins; nobody asks for a row between."""
    with torch.device("meta"):
        large = build("llama", head="none", vocab=HUGE)
    items = {name: item_of(name, p.detach()) for name, p in model.named_parameters()}
    items["embed.weight"] = item_of("embed.weight", large.embed.weight.detach())
    shard, texts = graphs.files(large, to, items)
    raw = {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}
    crcs = {name: zlib.crc32(data) for name, data in raw.items()}  # but not of the large one
    first, *others = shard.items
    assert first.name == "embed.weight" and all(shard.start(x) > 1 << 32 for x in others)
    with (directory / shard.name).open("wb") as file:
        file.truncate(shard.size)
        for item in shard.items:
            file.seek(shard.start(item))
            file.write(raw[item.name])
        file.seek(shard.start(first) + first.nbytes - len(raw[first.name]))
        file.write(raw[first.name])
        file.seek(0)
        file.write(shard.layout.head)
        for place, data in shard.layout.seal(crcs) if shard.layout.seal else ():
            file.seek(place)
            file.write(data)
    for name, text in texts.items():
        (directory / name).write_bytes(text)
    return shard, texts


@pytest.mark.slow
def test_an_onnx_beyond_4_gb(tmp_path: Path) -> None:
    model = redrawn(build("llama", head="none"))
    _, texts = huge(model, "onnx", tmp_path)
    assert len(texts[graphs.ONNX]) < 100_000
    onnx.checker.check_model(str(tmp_path / graphs.ONNX))
    run, inputs = in_runtime(tmp_path), asked(model, 2, 9)
    (wanted,) = answered(model, inputs)
    assert apart(run(inputs)[0], wanted) < RELATIVE
    last = inputs | {"input_ids": inputs["input_ids"] + (HUGE - model.config.vocab)}
    assert apart(run(last)[0], wanted) < RELATIVE


@pytest.mark.slow
def test_a_pt2_beyond_4_gb(tmp_path: Path) -> None:
    model = redrawn(build("llama", head="none"))
    shard, _ = huge(model, "pt2", tmp_path)
    reader = torch._C.PyTorchFileReader(str(tmp_path / graphs.PT2))
    names = [f"data/weights/weight_{n}" for n in range(len(shard.items))]
    assert reader.get_record_size(names[0]) == HUGE * 288
    with zipfile.ZipFile(tmp_path / graphs.PT2) as archive:
        for name, (key, parameter) in zip(names, model.named_parameters(), strict=True):
            if key != "embed.weight":
                raw = parameter.detach().numpy().tobytes()
                assert reader.get_record(name) == archive.read(f"model/{name}") == raw


# --- what is refused -----------------------------------------------------------------------------


@each_graph
def test_other_files_at_the_destination_are_kept(to: str, tmp_path: Path) -> None:
    model, place = build("gpt2").eval(), tmp_path / "g"
    place.mkdir()
    (place / "mine").write_text("kept")
    with pytest.raises(OutputExists):
        zoo.save(model, place, to=to)
    assert (place / "mine").read_text() == "kept"
    zoo.save(model, place, to=to, force=True)
    assert (place / "mine").read_text() == "kept"


@each_graph
def test_nothing_is_half_written(to: str, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("zoo.checkpoints.publish.finish", fail)
    with pytest.raises(ZooError, match="not written"):
        zoo.save(build("gpt2").eval(), tmp_path / "g", to=to)
    assert list(tmp_path.iterdir()) == []


@each_graph
def test_values_that_are_not_finite(to: str, tmp_path: Path) -> None:
    model = build("gpt2").eval()
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    with pytest.raises(NonFinite, match=r"norm\.weight"):
        zoo.save(model, tmp_path / "g", to=to)
    zoo.save(model, tmp_path / "g", to=to, allow_nonfinite=True)


@pytest.mark.parametrize("choice", [{"max_shard_size": 1 << 20}, {"layout": {"a": 1}}])
def test_options_that_a_graph_lacks_are_refused(
    choice: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=next(iter(choice))):
        zoo.convert(source, tmp_path / "g", to="onnx", **choice)


def test_a_file_as_destination_of_a_graph_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        zoo.convert(source, tmp_path / "model.onnx", to="onnx")


def test_a_source_is_not_replaced(source: Path) -> None:
    with pytest.raises(OutputExists):
        zoo.convert(source, source, to="pt2", force=True)
    assert (source / "model.safetensors").exists()


def test_a_model_on_meta_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build("gpt2")
    with pytest.raises(UsageError, match="meta"):
        zoo.save(model, tmp_path / "g", to="pt2")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"onnx, onnxscript.*zoo-weights\[onnx\]"):
        zoo.save(build("gpt2").eval(), tmp_path / "g", to="onnx")
    zoo.save(build("gpt2").eval(), tmp_path / "h", to="pt2")


def test_another_torchs_archive_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(graphs, "_VERSION", b"1")
    with pytest.raises(MissingDependency, match=r"torch \d.*does not know"):
        zoo.save(build("gpt2").eval(), tmp_path / "g", to="pt2")


def test_what_cannot_be_traced_is_refused_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    model = build("gpt2").eval()
    forward = type(model).forward

    def counts(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return forward(self, input_ids, attention_mask) * int(input_ids.sum())

    monkeypatch.setattr(type(model), "forward", counts)
    with pytest.raises(LossyExport, match=r"gpt2, head lm: torch\.export"):
        zoo.save(model, tmp_path / "g", to="onnx")
    assert list(tmp_path.iterdir()) == []


@each_graph
def test_a_graph_is_written_and_not_read(to: str, source: Path, tmp_path: Path) -> None:
    zoo.convert(source, tmp_path / "g", to=to)
    with pytest.raises(ZooError):
        zoo.load(tmp_path / "g")
    data = json.loads((tmp_path / "g" / manifest.NAME).read_text())
    assert data["to"] == to
