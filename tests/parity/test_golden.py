"""Outputs that a checkpoint's authors published stand in for a reference."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo import registry
from zoo.cli.app import main
from zoo.errors import ConfigError, NotACheckpoint, UsageError
from zoo.parity import golden
from zoo.parity.golden import TOP, Golden


@pytest.fixture(scope="module")
def stories(fixtures: Path) -> Path:
    return fixtures / "stories260K" / "stories260K.bin"


def kept() -> Golden:
    stories = golden.find("stories260k", None)
    assert stories is not None
    return stories


def test_golden_file_equals_the_published_logits(fixtures: Path) -> None:
    place = fixtures / "stories260K"
    ids = json.loads((place / "EXPECTED.json").read_text())["greedy_ids_from_BOS"][:64]
    logits = torch.from_numpy(np.load(place / "ref_logits_64tok.npy")).reshape(64, -1)
    was = kept()
    made = Golden.of(logits, torch.tensor(ids), was.tolerance, was.about)
    file = Path(golden.__file__).with_name(registry.find("stories260k").golden)
    assert file.read_text() == made.to_text()


def test_verify_by_golden_outputs_alone(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = zoo.verify(stories, golden="stories260k")
    (row,) = report.rows
    assert (row.subject, row.check, row.limit) == (stories.name, "golden", kept().tolerance)
    assert 0 < row.value < row.limit
    assert main(["verify", str(stories), "--golden", "stories260k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["check"] == "golden"


@pytest.mark.slow
def test_reference_is_compared_too_if_it_can_load(stories: Path, tmp_path: Path) -> None:
    zoo.convert(stories, tmp_path / "hf", to="hf")
    checks = {row.check: row for row in zoo.verify(tmp_path / "hf", golden="stories260k").rows}
    assert {"golden", "fp64", "gradients"} <= checks.keys()
    assert checks["golden"].ok


def test_registry_name_uses_its_golden_file() -> None:
    golden_file = golden.find(None, "stories260k")
    assert golden_file is not None
    assert golden_file.logits.equal(kept().logits)
    assert golden.find(None, "gpt2") is None
    assert golden.find(None, Path("stories260k")) is None


class Model(torch.nn.Module):
    """Logits as they are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[None]


def test_row_measures_the_largest_difference() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    truth = Golden.of(logits, torch.arange(5), 1e-3, "a draw")

    def value(change: Any) -> float:
        changed = logits.clone()
        change(changed)
        return truth.row("x", Model(changed)).value

    assert value(lambda x: None) < 1e-6
    first, last, other = (int(logits[2].argsort(descending=True)[k]) for k in (0, TOP - 1, 30))
    assert value(lambda x: x[2, first].add_(0.01)) == pytest.approx(0.01, rel=1e-4)
    assert value(lambda x: x[2, other].copy_(x[2, last] + 0.5)) == pytest.approx(0.5, rel=1e-4)
    assert value(lambda x: x[2, other].sub_(3)) < 1e-6, "what is no likely token is not told"
    assert not truth.row("x", Model(logits.where(logits != logits[2, first], torch.nan))).ok
    assert not truth.row("x", Model(logits[:4])).ok
    beyond = replace(truth, ids=truth.ids.clone().fill_(40)).row("x", Model(logits))
    assert "with ids up to 40; the model's outputs are [5, 40]" in beyond.detail
    assert not truth.row("x", Model(logits[:, :10])).ok


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tolerance", 0, "tolerance: expected a positive number"),
        ("tolerance", 1e9, r"tolerance: 1e\+09, and logits lie within"),
        (
            "logits",
            [[*map(float, range(20))]] * 3,
            "after token 0, the most likely is not the first",
        ),
        ("tokens", [], "tokens: expected token ids"),
        ("ids", [[1, 2]], "ids: expected 20 after each"),
        ("about", 3, "about: expected a text"),
        ("more", 1, "missing or unknown: more"),
    ],
)
def test_invalid_golden_file_is_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    good = json.loads(Golden.of(torch.randn(3, 30), torch.arange(3), 1e-3, "a draw").to_text())
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(good))
    assert golden.read(path).ids.shape == (3, TOP)
    path.write_text(json.dumps({**good, field: value}))
    with pytest.raises(ConfigError, match=message):
        golden.read(path)


def test_wrong_golden_argument_is_refused() -> None:
    with pytest.raises(NotACheckpoint, match="has no outputs for it"):
        golden.find("gpt2", None)
    with pytest.raises(NotACheckpoint, match="Did you mean stories260k"):
        golden.find("stories26k", None)
    with pytest.raises(UsageError, match="of one checkpoint"):
        zoo.verify(all=True, golden="stories260k")
