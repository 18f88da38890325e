"""Runs: a model learns, its directory loads, and a resumed run is the same bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from converters.formats.safetensors import SafetensorsReader
from zoo import registry
from zoo.errors import InputError, NonFinite, OutputExists, UsageError
from zoo.training import loop
from zoo.training.recipe import Recipe
from zoo.training.run import RunDirectory
from zoo.training.start import run

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "the", "sun"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of few characters, which a model learns quickly."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = (" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 9)) for n in range(1, 400))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def settings(text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run with dropout, several parts a batch, and several evaluations."""
    return {
        "data": str(text_file),
        "tokenizer": "char",
        "config": {"layers": 2, "heads": 2, "dim": 16},
        "dropout": 0.1,
        "context": 16,
        "batch": 8,
        "accumulate": 2,
        "steps": 12,
        "warmup": 4,
        "eval_every": 4,
        "eval_batches": 2,
        "log_every": 1,
        "out": str(tmp_path / "run"),
    }


def weights_of(place: Path) -> dict[str, torch.Tensor]:
    reader = SafetensorsReader(place / "model.safetensors")
    return {name: reader.tensor(name) for name in reader.tensors}


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights, moments and losses, bit for bit."""
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        assert (one / "last" / name).read_bytes() == (other / "last" / name).read_bytes(), name
    losses = [
        [(each["step"], each.get("loss"), each.get("val_loss")) for each in lines]
        for lines in (RunDirectory(one).metrics(), RunDirectory(other).metrics())
    ]
    assert losses[0] == losses[1]


def test_run_learns_and_its_directory_writes_text(settings: dict[str, Any]) -> None:
    result = run(Recipe.of({**settings, "steps": 60, "lr": 0.01, "dropout": 0.0}))
    assert result.tokenizer is not None
    assert result.losses[0] == pytest.approx(math.log(result.tokenizer.vocab_size), rel=0.05)
    assert result.losses[-1] < result.losses[0] - 1
    model = zoo.load(settings["out"])
    assert zoo.generate(model, "the", max_new_tokens=4)
    assert result.val_loss == result.evaluations[-1][1]


def test_run_writes_recipe_metrics_and_checkpoints(settings: dict[str, Any]) -> None:
    run(Recipe.of(settings))
    place = Path(settings["out"])
    assert Recipe.read(place / "recipe.yaml").steps == 12
    names = {path.name for path in (place / "last").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "characters.json"),
        *("optimizer.safetensors", "training.json", "zoo-manifest.json"),
    }
    lines = RunDirectory(place).metrics()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        *("step", "loss", "lr", "grad_norm"),
        *("tokens", "seconds", "tokens_per_second", "mfu"),
    }
    assert steps[-1]["tokens"] == 12 * 8 * 16
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 12]


def test_best_is_the_checkpoint_of_the_lowest_evaluation(settings: dict[str, Any]) -> None:
    result = run(Recipe.of({**settings, "lr": 1.0, "warmup": 0, "schedule": "constant", "clip": 0}))
    place = Path(settings["out"])
    record = json.loads((place / "best" / "training.json").read_text())
    number, loss = min(result.evaluations, key=lambda each: each[1])
    assert (record["step"], record["best"]) == (number, loss)
    assert zoo.load(place).provenance.directory == place / "best"


@pytest.mark.parametrize("stop", [1, 4, 5, 11])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_is_bit_equal(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
    optimizer: str,
) -> None:
    settings |= {"optimizer": optimizer, "save_every": 1}
    whole = {**settings, "out": str(tmp_path / "whole")}
    run(Recipe.of(whole))

    class Stopped(Exception):
        pass

    take = loop.take_step

    def stopping(state: loop.State) -> loop.StepReport:
        if state.step == stop:
            raise Stopped
        return take(state)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", stopping)
        with pytest.raises(Stopped):
            run(Recipe.of(settings))
    run(RunDirectory(settings["out"]).resumed({}), resume=True)
    assert_same_run(tmp_path / "whole", Path(settings["out"]))


@pytest.mark.slow
def test_killed_run_resumes_bit_equal(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"steps": 40, "save_every": 1, "eval_every": 10}
    run(Recipe.of({**settings, "out": str(tmp_path / "whole")}))
    recipe, place = tmp_path / "recipe.yaml", Path(settings["out"])
    recipe.write_text(Recipe.of(settings).to_yaml())
    command = [sys.executable, "-m", "zoo", "train"]
    child = subprocess.Popen([*command, str(recipe)], stderr=subprocess.DEVNULL)
    while child.poll() is None and not (place / "last" / "training.json").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    child.kill()
    child.wait()
    if not (place / "last" / "training.json").exists():  # it was faster than the kill
        pytest.fail("the run left no checkpoint")
    subprocess.run([*command, "--resume", str(place)], check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", place)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"steps": 100_000, "eval_every": 0}
    recipe, place = tmp_path / "recipe.yaml", Path(settings["out"])
    recipe.write_text(Recipe.of(settings).to_yaml())
    with (tmp_path / "err").open("w+") as errors:
        child = subprocess.Popen([sys.executable, "-m", "zoo", "train", str(recipe)], stderr=errors)
        while child.poll() is None and not (place / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(child.pid, signal.SIGINT)
        child.wait(timeout=600)
    err = (tmp_path / "err").read_text()
    assert child.returncode == 130
    assert f"zoo train --resume {place}" in err
    record = json.loads((place / "last" / "training.json").read_text())
    assert record["step"] == RunDirectory(place).metrics()[-1]["step"]


def test_longer_resumed_run_goes_on_where_it_was(settings: dict[str, Any]) -> None:
    run(Recipe.of(settings))
    result = run(RunDirectory(settings["out"]).resumed({"steps": 15}), resume=True)
    assert len(result.losses) == 3
    assert [n for n, _ in result.evaluations] == [15]


def test_model_in_memory_is_trained_on_ids() -> None:
    from zoo.models.llama import Config, Model

    model = Model(Config(vocab=7, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=32))
    ids = torch.arange(700) % 7
    result = zoo.train(model, ids, steps=40, context=8, batch=4, lr=0.02, warmup=2)
    assert result.model is model and not model.training
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.directory is None


def test_loaded_model_is_trained_on_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    run(Recipe.of(settings))
    model = zoo.load(settings["out"])
    before = model.embed.weight.detach().clone()
    result = zoo.train(
        model, ["the cat sat on a mat\n" * 20], steps=2, batch=2, out=tmp_path / "tuned"
    )
    assert result.recipe.context == 16  # the model has no more positions
    assert not torch.equal(model.embed.weight, before)
    assert zoo.load(tmp_path / "tuned").tokenizer.decode([1]) == model.tokenizer.decode([1])


def test_factors_alone_are_trained_and_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    run(Recipe.of(settings))
    base = {"from": f"{settings['out']}/last", "data": settings["data"], "lora": ["c_attn"]}
    how = {
        **base,
        "rank": 2,
        "context": 16,
        "steps": 6,
        "batch": 4,
        "eval_every": 3,
        "log_every": 1,
    }
    result = run(Recipe.of({**how, "out": str(tmp_path / "tuned")}))
    trained = [n for n, p in result.model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith((".a", ".b")) for name in trained)
    names = {path.name for path in (tmp_path / "tuned" / "last").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json"} <= names
    resumed = run(RunDirectory(tmp_path / "tuned").resumed({"steps": 8}), resume=True)
    assert len(resumed.losses) == 2


# --- refusals ------------------------------------------------------------------------------------


def test_loss_that_is_no_number_stops_before_the_weights_change(settings: dict[str, Any]) -> None:
    from zoo.models.gpt2 import Config, Model

    model = Model(Config(vocab=7, dim=8, layers=1, heads=2, positions=16))
    model.norm.weight.data[0] = float("inf")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFinite, match="step 0: the loss is"):
        zoo.train(model, torch.arange(100) % 7, steps=2, context=8, batch=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_directory_with_files_is_never_written_to(settings: dict[str, Any]) -> None:
    place = Path(settings["out"])
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="exists already"):
        run(Recipe.of(settings))
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none.txt"}, "none.txt: No such file"),
        ({"context": 100_000}, "a sequence has 100,001"),
        ({"tokenizer": None}, "tokenizer: missing; char reads any text"),
        ({"arch": "gpt3"}, "arch: 'gpt3' is not one of .* Did you mean gpt2"),
        ({"device": "cuda"}, "device cuda: .* Use --device cpu"),
        (
            {"head": "none"},
            "head none of gpt2: only decoders with head lm, encoders with head masked_lm",
        ),
        ({"device": "tpu"}, "device 'tpu': expected auto"),
        ({"batch": 1, "accumulate": 1, "data": None}, "no data to train on"),
    ],
)
def test_misfits_are_refused_and_leave_no_directory(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=message):
        run(Recipe.of({**settings, **changes}))
    assert not Path(settings["out"]).exists()


def test_character_outside_the_vocabulary_is_an_error(settings: dict[str, Any]) -> None:
    result = run(Recipe.of(settings))
    assert result.tokenizer is not None
    with pytest.raises(InputError, match="'é'"):
        result.tokenizer.encode("café")


# --- other objectives ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "t5"])
def test_encoders_learn_masked_words_and_encoder_decoders_spans(
    settings: dict[str, Any], arch: str
) -> None:
    how = {"arch": arch, "steps": 60, "lr": 0.02, "dropout": 0.0, "accumulate": 1, "eval_every": 0}
    result = run(Recipe.of({**settings, **how}))
    assert sum(result.losses[-5:]) / 5 < 0.95 * result.losses[0]
    assert zoo.load(settings["out"]).config == result.model.config


@pytest.mark.slow
@pytest.mark.parametrize("arch", registry.architectures())
def test_every_architecture_trains_from_scratch_and_its_directory_loads(
    settings: dict[str, Any], arch: str
) -> None:
    result = run(Recipe.of({**settings, "arch": arch, "steps": 4}))
    vocab = result.model.config.vocab
    # T5's head is its embedding, whose rows are drawn large
    assert result.losses[0] == pytest.approx(math.log(vocab), rel=0.5 if arch == "t5" else 0.1)
    model, ids = zoo.load(settings["out"]), torch.arange(8)[None]
    more = {"decoder_input_ids": ids} if arch == "t5" else {}
    with torch.no_grad():
        assert model(ids, **more).shape == (1, 8, vocab)
