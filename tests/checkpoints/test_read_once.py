"""One load reads each config file once, finds its architecture once and builds its config once."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sentence_models import checkpoint

import zoo
from zoo.registry import Architecture

WATCH: list[Counter[str]] = []  # of one load: the files it opens, by name below its directory


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCH and isinstance(arguments[0], str | bytes | os.PathLike):
        WATCH[-1][os.fsdecode(arguments[0])] += 1


sys.addaudithook(_count)  # stays for good, and counts while WATCH holds something


class Counted:
    """A config's class whose calls are counted."""

    def __init__(self, kind: Any, calls: list[str]) -> None:
        self._kind, self._calls = kind, calls

    def __call__(self, **fields: Any) -> Any:
        self._calls.append(fields["head"])
        return self._kind(**fields)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)


class Load:
    """What one load did."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.configs, self.searches = list[str](), list[str]()
        real = Architecture.config_class.fget  # type: ignore[attr-defined]
        counted = property(lambda entry: Counted(real(entry), self.configs))
        with monkeypatch.context() as patch:
            patch.setattr(Architecture, "config_class", counted)
            for target in (
                "zoo.checkpoints.config_file.architecture_for",
                "converters.dialects.find",
            ):
                self._count(patch, target)
            WATCH.append(Counter())
            try:
                self.model = zoo.load(place, **options)
            finally:
                opened = WATCH.pop()
        self.all_opened = opened
        root = place if place.is_dir() else place.parent
        names = {str(path): path.relative_to(root) for path in root.rglob("*")}
        self.opened = {str(names[path]): n for path, n in opened.items() if path in names}

    def _count(self, patch: pytest.MonkeyPatch, target: str) -> None:
        module, _, name = target.rpartition(".")
        real = getattr(zoo.verbs.resolve(module), name)

        def counting(*arguments: Any, **named: Any) -> Any:
            self.searches.append(name)
            return real(*arguments, **named)

        patch.setattr(target, counting)

    @property
    def texts(self) -> dict[str, int]:
        """How often each JSON file was opened."""
        return {name: n for name, n in self.opened.items() if name.endswith(".json")}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Load]]:
    yield lambda place, **options: Load(place, monkeypatch, **options)


def test_directory_is_read_once(made: Callable[..., Path], load: Callable[..., Load]) -> None:
    it = load(made("gpt2"))
    assert it.texts == {"config.json": 1}
    assert it.searches == ["architecture_for"]
    assert it.configs == ["lm"]
    assert it.model.config is it.model.provenance.config


def test_sharded_directory_is_read_once(
    tmp_path: Path, made: Callable[..., Path], load: Callable[..., Load]
) -> None:
    zoo.save(zoo.load(made("gpt2")), tmp_path / "shards", max_shard_size=4096)
    it = load(tmp_path / "shards")
    assert it.texts.pop("config.json") == 1
    index = "model.safetensors.index.json"
    assert {name: n for name, n in it.texts.items() if name != "zoo-manifest.json"} == {
        "config.json": 1,
        index: 1,
    }
    assert (it.searches, it.configs) == (["architecture_for"], ["lm"])


def test_changed_fields_build_one_more_config(
    made: Callable[..., Path], load: Callable[..., Load]
) -> None:
    it = load(made("gpt2"), config={"eps": 1e-3})
    assert (it.texts, it.configs) == ({"config.json": 1}, ["lm", "lm"])


def test_config_without_a_class_is_read_once(
    tmp_path: Path, made: Callable[..., Path], load: Callable[..., Load]
) -> None:
    """The tensors tell: the files are opened for that, and not again."""
    config = json.loads((made("gpt2") / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(made("gpt2") / "model.safetensors"), tmp_path / "model.safetensors")
    it = load(tmp_path)
    assert it.opened == load(made("gpt2")).opened
    assert sorted(it.configs) == sorted({*it.configs})


def test_native_directory_is_read_once(
    tmp_path: Path, made: Callable[..., Path], load: Callable[..., Load]
) -> None:
    zoo.convert(made("gpt2"), tmp_path / "native", to="native")
    it = load(tmp_path / "native")
    assert it.texts == {"zoo.json": 1, "zoo-manifest.json": 1} or it.texts == {"zoo.json": 1}
    assert (it.searches, it.configs) == ([], ["lm"])


def test_gguf_file_is_read_once(
    tmp_path: Path, made: Callable[..., Path], load: Callable[..., Load]
) -> None:
    zoo.convert(made("llama"), tmp_path / "gguf", to="gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    it = load(file)
    assert (it.searches, it.configs) == (["find"], ["lm"])


def test_sentence_embedding_directory_is_read_once(
    tmp_path: Path, load: Callable[..., Load]
) -> None:
    it = load(checkpoint(tmp_path, "mean_tokens", dense=5))
    texts = {"config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json"}
    assert it.texts == dict.fromkeys(texts, 1)
    assert it.searches == ["architecture_for"]
    assert sorted(it.configs) == sorted({*it.configs})  # one for each head that was tried


def test_adapter_is_read_once(
    tmp_path: Path, made: Callable[..., Path], load: Callable[..., Load]
) -> None:
    zoo.load(made("llama")).add_adapter(["q_proj"]).save_adapter(tmp_path / "adapter")
    it = load(made("llama"), adapter=tmp_path / "adapter")
    assert it.texts == {"config.json": 1}
    assert (it.searches, it.configs) == (["architecture_for"], ["lm"])
    assert it.all_opened[str(tmp_path / "adapter" / "adapter_config.json")] == 1
