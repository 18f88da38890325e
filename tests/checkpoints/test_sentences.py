"""Sentence embeddings: what modules.json names, step by step, against plain readings of each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_models import KIND, checkpoint, write
from torch import Tensor

import zoo
from zoo.checkpoints.sentences import WAYS, SentenceModel
from zoo.errors import ConfigError, MissingTensors, UnsafePath, UnsupportedArchitecture, ZooError
from zoo.parity.checks import differences

IDS = torch.randint(4, 90, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0  # right
MASK[1, :4] = 0  # left


def pooled(x: Tensor, way: str) -> Tensor:
    """(s, d) of one row's real tokens, one vector."""
    match way:
        case "cls_token":
            return x[0]
        case "max_tokens":
            return x.max(dim=0).values
        case "mean_tokens":
            return x.mean(dim=0)
        case "mean_sqrt_len_tokens":
            return x.sum(dim=0) / len(x) ** 0.5
        case "weightedmean_tokens":
            weights = torch.arange(1, len(x) + 1, dtype=x.dtype)
            return (weights[:, None] * x).sum(dim=0) / weights.sum()
        case _:
            return x[-1]


@pytest.mark.parametrize("ways", [*((way,) for way in WAYS), tuple(WAYS)], ids=str)
def test_pooling_matches_the_reference(ways: tuple[str, ...], tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "s", *ways, normal=False)
    model = zoo.load(root, dtype="float64")
    body = zoo.load(root, head="none", dtype="float64")
    assert isinstance(model, SentenceModel)
    with torch.no_grad():
        out = model(IDS, MASK)
        for row in range(3):
            hidden = body(IDS[row : row + 1, MASK[row].bool()])[0]
            wanted = torch.cat([pooled(hidden, way) for way in WAYS if way in ways])
            torch.testing.assert_close(out[row], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [("bert", "bare"), ("roberta", "masked-lm"), ("t5", "encoder"), ("t5", "tied")],
)
def test_dense_layer_and_normalization(architecture: str, variant: str, tmp_path: Path) -> None:
    """The hidden states are used even if the class has a head for another task."""
    root = checkpoint(
        tmp_path / "s", "mean_tokens", dense=5, architecture=architecture, variant=variant
    )
    model = zoo.load(root, dtype="float64")
    body = zoo.load(root, head="encoder" if architecture == "t5" else "none", dtype="float64")
    layer = load_file(root / "2_Dense" / "model.safetensors")
    with torch.no_grad():
        out = model(IDS)
        hidden = body(IDS).mean(dim=1)
    wanted = (hidden @ layer["linear.weight"].double().T + layer["linear.bias"].double()).tanh()
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    assert out.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])


def test_sentence_model_is_saved_unchanged(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "s", "mean_tokens", dense=5)
    zoo.save(zoo.load(root), tmp_path / "saved")
    zoo.convert(root, tmp_path / "native", to="native")
    zoo.convert(tmp_path / "native", tmp_path / "back")
    for copy in ("saved", "back"):
        for folder in ("", "1_Pooling", "2_Dense"):
            assert differences(root / folder, tmp_path / copy / folder) == []
    out = [zoo.load(path)(IDS, MASK) for path in (root, tmp_path / "native", tmp_path / "back")]
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


def test_trained_dense_layer_is_saved(tmp_path: Path) -> None:
    model = zoo.load(checkpoint(tmp_path / "s", "cls_token", dense=5))
    torch.nn.init.ones_(model.steps[1].linear.weight)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(zoo.load(tmp_path / "saved")(IDS), model(IDS))


def test_modules_can_be_omitted(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "s", "mean_tokens")
    for options in ({"head": "pooler"}, {"modules": False}):
        assert not isinstance(zoo.load(root, **options), SentenceModel)
    assert not isinstance(zoo.models.bert.Model.from_pretrained(root), SentenceModel)


def broken(root: Path, how: str) -> None:
    modules = json.loads((root / "modules.json").read_text())
    pooling = json.loads((root / "1_Pooling" / "config.json").read_text())
    match how:
        case "unknown module":
            modules[1]["type"] = KIND + "WordWeights"
        case "outside":
            modules[1]["path"] = "../1_Pooling"
        case "no path":
            del modules[1]["path"]
        case "not first":
            modules.reverse()
        case "no way":
            pooling["pooling_mode_mean_tokens"] = False
        case "unknown way":
            pooling["pooling_mode_median"] = True
        case "width":
            pooling["word_embedding_dimension"] = 5
        case "layer":
            path = root / "2_Dense" / "model.safetensors"
            save_file({"linear.weight": load_file(path)["linear.weight"]}, path)
    write(root, "modules.json", modules)
    write(root, "1_Pooling/config.json", pooling)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("unknown module", UnsupportedArchitecture, "WordWeights"),
        ("outside", UnsafePath, "../1_Pooling"),
        ("no path", ConfigError, "a type and a path"),
        ("not first", ConfigError, "begins with"),
        ("no way", ConfigError, "no way to pool"),
        ("unknown way", ConfigError, "median"),
        ("width", ConfigError, "5, and what comes before gives"),
        ("layer", MissingTensors, "linear.bias"),
    ],
)
def test_wrong_module_files_are_refused(
    how: str, error: type[ZooError], says: str, tmp_path: Path
) -> None:
    root = checkpoint(tmp_path / "s", "mean_tokens", dense=5)
    broken(root, how)
    with pytest.raises(error, match=says):
        zoo.load(root)
