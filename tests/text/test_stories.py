"""A trained model, stories260K: greedy text and logits as published."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stories import publish

import zoo
from zoo.components.model import Model


@pytest.fixture(scope="module")
def stories(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("stories260K")
    publish(fixtures / "stories260K" / "stories260K.bin", directory)
    return zoo.load(directory)


@torch.no_grad()
def test_greedy_ids(stories: Model, fixtures: Path) -> None:
    expected = json.loads((fixtures / "stories260K" / "EXPECTED.json").read_text())
    greedy = expected["greedy_ids_from_BOS"]
    ids = greedy[:1]
    while len(ids) < len(greedy):
        ids.append(int(stories(torch.tensor([ids]))[0, -1].argmax()))
    assert ids == greedy


@torch.no_grad()
def test_logits_equal_those_of_llama2c(stories: Model, fixtures: Path) -> None:
    place = fixtures / "stories260K"
    greedy = json.loads((place / "EXPECTED.json").read_text())["greedy_ids_from_BOS"]
    truth = torch.from_numpy(np.load(place / "ref_logits_64tok.npy"))
    logits = stories(torch.tensor([greedy[:64]]))
    # llama2.c's own error against the reference is 4.4e-5
    torch.testing.assert_close(logits.reshape(truth.shape), truth, atol=2e-4, rtol=0)
