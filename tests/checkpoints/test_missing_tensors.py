"""Which tensors a class needs follows from its config, never from what happens to be missing."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from converters.checkpoint import Checkpoint
from zoo import registry
from zoo.checkpoints.handle import Located
from zoo.checkpoints.locate import locate
from zoo.checkpoints.plan import prove
from zoo.errors import ConfigError, MissingTensors

# The reference writes these where they differ from the embedding, and its config is the same where
# they do not: a file without them is one that it writes.
OPTIONAL = {("t5", "gated-own-head"): {"lm_head.weight"}}
LATER = re.compile(r"\.[1-9]\d*\.")  # of layers alike the first stands for all


def cases() -> Iterator[object]:
    """A variant of each class that has one; the others are long."""
    for entry in registry.architectures().values():
        classes = set[str]()
        for variant, data in entry.variants.items():
            long = data["class"] in classes and (entry.name, variant) not in OPTIONAL
            classes.add(data["class"])
            marks = [pytest.mark.long] if long else []
            yield pytest.param(entry.name, variant, marks=marks, id=f"{entry.name}-{variant}")


def without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    left = {n: info for n, info in checkpoint.tensors.items() if n not in names}
    return replace(checkpoint, tensors=left)


def lacks(located: Located, checkpoint: Checkpoint) -> bool:
    try:
        prove(located, checkpoint, {})
    except MissingTensors:
        return True
    return False


def test_base_model_is_saved_with_a_whole_pooler_or_none(made: Callable[..., Path]) -> None:
    entry = registry.architectures()["bert"]
    variant = next(v for v, data in entry.variants.items() if data["class"] == "BertModel")
    located = locate(made("bert", variant))
    checkpoint = located.checkpoint()
    pooler = [name for name in checkpoint.tensors if "pooler" in name]
    model, _ = prove(located, without(checkpoint, *pooler), {})
    assert len(pooler) == 2 and model.config.head == "none"
    with pytest.raises(MissingTensors, match=r"1 tensor missing: pooler\.dense\.bias"):
        prove(located, without(checkpoint, "pooler.dense.bias"), {})


@pytest.mark.parametrize(("name", "variant"), list(cases()))
def test_missing_tensor_is_refused(made: Callable[..., Path], name: str, variant: str) -> None:
    located = locate(made(name, variant))
    checkpoint = located.checkpoint()
    assert not lacks(located, checkpoint)
    first = [tensor for tensor in checkpoint.tensors if not LATER.search(tensor)]
    optional = {tensor for tensor in first if not lacks(located, without(checkpoint, tensor))}
    assert optional == OPTIONAL.get((name, variant), set())


def test_missing_untied_head_is_not_replaced_by_the_embedding(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    """The published config of T5 v1.1 and Flan, which the installed reference does not write."""
    directory = tmp_path / "published"
    shutil.copytree(made("t5", "gated-own-head"), directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["scale_decoder_outputs"]
    path.write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    located = locate(directory)
    checkpoint = located.checkpoint()
    assert located.heads == ("lm",) and not lacks(located, checkpoint)
    for name in ("lm_head.weight", "shared.weight"):
        assert lacks(located, without(checkpoint, name)), name
    with pytest.raises(ConfigError, match="tie_word_embeddings: false, so the head"):
        locate(directory, head="shared_lm")
