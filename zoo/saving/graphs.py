"""Export a model as a graph that runs without zoo: ONNX or torch.export's .pt2.

The traced function is `forward` itself, for any batch and length, always with an attention mask, so
that padding has no effect.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from converters.formats import Layout, stored_zip, torch_dtype
from converters.output import Item, Shard
from zoo.checkpoints.build import native_of
from zoo.checkpoints.sentences import SentenceModel
from zoo.components.model import Model
from zoo.errors import LossyExport, MissingDependency, UsageError, listing
from zoo.version import VERSION

if TYPE_CHECKING:
    from torch.export import ExportedProgram

GRAPHS = ("onnx", "pt2")
ONNX, DATA, PT2 = "model.onnx", "model.onnx.data", "model.pt2"
OPSET = 20  # the first with Gelu
_NEEDED = ("onnx", "onnxscript")
_PAGE = 4096  # alignment of each tensor, so that a runtime can map it
_TRACED = (2, 17)  # rows and tokens of the example, which leave no trace; the decoder has two more

# the reference's names; a single output is logits, or the last hidden states
_OUTPUTS = {
    "pooler": ("last_hidden_state", "pooler_output"),
    "pretraining": ("prediction_logits", "seq_relationship_logits"),
    "question_answering": ("start_logits", "end_logits"),
}


def check(to: str) -> None:
    """Check that the packages for this kind of graph are installed."""
    lacking = [name for name in _NEEDED if find_spec(name) is None] if to == "onnx" else []
    if lacking:
        raise MissingDependency(
            f"to='onnx' needs {listing(lacking)}. Install them: pip install 'zoo-weights[onnx]'"
        )


def input_names(model: Model) -> tuple[str, ...]:
    """Return the arguments of `forward`, except the cache and those that the model ignores."""
    if isinstance(model, SentenceModel):
        return ("input_ids", "attention_mask")
    unused = {"self", "cache"}
    if getattr(model.config, "types", 0) < 2:
        unused.add("token_type_ids")
    names = [name for name in signature(type(model).forward).parameters if name not in unused]
    answers = model.config.head != "encoder"
    return tuple(name for name in names if answers or not name.startswith("decoder_"))


def output_names(model: Model) -> tuple[str, ...]:
    """Return the names of the outputs, as the reference calls them."""
    if isinstance(model, SentenceModel):
        return ("sentence_embedding",)
    head = model.config.head
    alone = "last_hidden_state" if head in type(model).headless else "logits"
    return _OUTPUTS.get(head, (alone,))


def files(model: Model, to: str, items: Mapping[str, Item]) -> tuple[Shard, dict[str, bytes]]:
    """Return (the file of weights, other files).

    `items` are the model's arrays; none of their values is read.
    """
    ordered = {name: items[name] for name, _ in model.named_parameters()}
    return {"onnx": _onnx, "pt2": _pt2}[to](model, ordered)


def _traced(model: Model, items: Mapping[str, Item]) -> ExportedProgram:
    """Return the model's function with named outputs and weights without values."""
    from torch.export import Dim, export
    from torch.utils._pytree import tree_structure

    rows, tokens = _TRACED
    limit = model.config.limit
    tokens = min(tokens, limit or tokens)
    batch = Dim("batch")
    asked: dict[int, Any] = {0: batch, 1: Dim("sequence", max=limit)}
    answered: dict[int, Any] = {0: batch, 1: Dim("decoder_sequence", max=limit)}
    inputs, axes = dict[str, Tensor](), dict[str, Any]()
    for name in input_names(model):
        answer = name.startswith("decoder_")
        inputs[name] = torch.ones(rows, tokens + 2 * answer, dtype=torch.int64)
        axes[name] = answered if answer else asked
    ids = inputs.pop("input_ids")
    try:
        with torch.no_grad():
            program = export(_weightless(model, items), (ids,), inputs, dynamic_shapes=axes)
    except Exception as error:  # its tracer raises errors of any kind
        raise _refused(model, "torch.export cannot follow what it computes", error) from error
    names = dict.fromkeys(output_names(model), 0)
    # a NamedTuple of ours could be unpacked only where zoo is installed
    program.module_call_graph[0].signature.out_spec = tree_structure(names)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths
    return program


def _refused(model: Model, why: str, error: Exception) -> LossyExport:
    """Return an error with the first line of its original cause."""
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    reason = next((line for line in str(first).splitlines() if line), type(first).__name__)
    name = model.architecture or type(model).__module__
    return LossyExport(f"{name}, head {model.config.head}: {why}: {reason}")


def _weightless(model: Model, items: Mapping[str, Item]) -> Model:
    """Return a copy for inference on the CPU whose parameters are shapes and dtypes only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    models = [m for m in model.modules() if isinstance(m, Model)]
    memo: dict[int, Any] = {id(m.provenance): None for m in models}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in model.named_parameters():
            info = items[name].info
            blank = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            memo[id(parameter)] = nn.Parameter(blank, requires_grad=False)
    return copy.deepcopy(model, memo).eval()


# --- torch.export's own file ---------------------------------------------------------------------

_FOLDER = "data/weights"
_PLACES = f"{_FOLDER}/model_weights_config.json"
_VERSION = b"0"  # of the archives whose records these are


def _pt2(model: Model, items: Mapping[str, Item]) -> tuple[Shard, dict[str, bytes]]:
    """Write what torch.export.save writes for empty weights, and leave room for theirs."""
    from torch.export import save

    archive = io.BytesIO()
    save(_traced(model, items), archive)
    with zipfile.ZipFile(archive) as read:
        records = {name.partition("/")[2]: read.read(name) for name in read.namelist()}
    records.pop(".data/serialization_id", None)  # a digest without the weights
    empty = [name for name, data in records.items() if not data]
    strange = [name for name in empty if not name.startswith(f"{_FOLDER}/")]
    if records.get("archive_version") != _VERSION or _PLACES not in records or strange:
        raise MissingDependency(
            f"to='pt2': torch {torch.__version__} writes its archives in a way that this zoo does "
            "not know; use a version of torch that it was tested with (constraints.txt)"
        )
    config, ties = json.loads(records[_PLACES]), native_of(model).ties
    places: dict[str, str] = {}
    for name, entry in config[
        "config"
    ].items():  # without addresses, torch takes all weights for one
        entry["path_name"] = places.setdefault(ties.get(name, name), f"weight_{len(places)}")
    records[_PLACES] = json.dumps(config).encode()
    small = {name: data for name, data in records.items() if name not in empty}
    tensors = {name: (f"{_FOLDER}/{place}", items[name].nbytes) for name, place in places.items()}
    layout = stored_zip.lay_out("model", small, tensors, {})
    return Shard(PT2, tuple(items[name] for name in places), layout), {}


# --- ONNX ----------------------------------------------------------------------------------------


def _onnx(model: Model, items: Mapping[str, Item]) -> tuple[Shard, dict[str, bytes]]:
    """Return the weights under the model's names, and the graph, which says where each is."""
    import onnx_ir as ir

    graph_model = _translated(model, items)
    graph = graph_model.graph
    ties = native_of(model).ties
    values = {value.name: value for value in graph.inputs if _owner(value.name, ties) in items}
    used = {_owner(name, ties) for name, value in values.items() if value.uses()}
    shard = _data([item for name, item in items.items() if name in used])
    for name, value in values.items():
        graph.inputs.remove(value)
        if value.uses():
            item = items[_owner(name, ties)]
            start = shard.start(item)
            value.const_value = ir.ExternalTensor(
                DATA, start, item.nbytes, value.dtype, shape=value.shape, name=name, base_dir=""
            )
            graph.register_initializer(value)
    for part in _everything(graph_model):  # remove this machine's paths and the history
        part.metadata_props.clear()
        part.doc_string = None
    graph.name = model.architecture or "model"
    graph_model.producer_name, graph_model.producer_version = "zoo", VERSION
    return shard, {ONNX: ir.to_proto(graph_model).SerializeToString(deterministic=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter logs about itself and optional packages."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _owner(name: str | None, ties: Mapping[str, str]) -> str:
    return ties.get(name or "", name or "")


def _translated(model: Model, items: Mapping[str, Item]) -> Any:
    """Return an onnx_ir model whose weights are inputs, so that no pass can change them."""
    program = _traced(model, items)
    outputs = output_names(model)
    sizes = {
        name: {0: "batch", 1: "decoder_sequence" if name.startswith("decoder_") else "sequence"}
        for name in input_names(model)
    }
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                input_names=list(sizes),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamic_shapes=sizes,
                optimize=False,
                verbose=False,
            )
            assert made is not None
            graph, names = made.model.graph, native_of(model)
            for name in list(graph.initializers):
                if name in names.shapes or name in names.ties:
                    value = graph.initializers.pop(name)
                    value.const_value = None
                    graph.inputs.append(value)
            made.optimize()
    except Exception as error:  # its translator raises errors of any kind
        raise _refused(model, "ONNX cannot express what it computes", error) from error
    return made.model


def _data(items: list[Item]) -> Shard:
    starts, end = dict[str, int](), 0
    for item in items:
        starts[item.name] = end = -(-end // _PAGE) * _PAGE
        end += item.nbytes
    return Shard(DATA, tuple(items), Layout(b"", starts, end))


def _everything(model: Any) -> Iterator[Any]:
    import onnx_ir as ir

    yield model
    yield model.graph
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield node
        yield from node.outputs


def check_file(place: Path) -> None:
    """Refuse a file as destination: a graph is written as a directory."""
    if place.suffix in {f".{name}" for name in GRAPHS}:
        raise UsageError(
            f"{place}: a graph is written as a directory with its tokenizer and weights: "
            f"give {place.with_suffix('')}"
        )
