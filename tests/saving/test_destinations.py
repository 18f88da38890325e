"""What a new checkpoint replaces at its destination, and what it never does."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build

import zoo
from converters import manifest
from converters.staging import publishing, stage
from converters.staging.destination import files_below
from zoo.components.model import Model
from zoo.errors import OutputExists, UsageError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model() -> Model:
    return build("gpt2").eval()


@pytest.fixture
def source(model: Model, tmp_path: Path) -> Path:
    return zoo.save(model, tmp_path / "in" / "source")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory of somebody's own: files, folders, links."""
    place = tmp_path / "work" / "project"
    (place / "notes" / "empty").mkdir(parents=True)
    (place / "train.py").write_text("mine")
    (place / "notes" / "a.md").write_text("mine too")
    (place / "notes.json").write_text("{}")
    (place / "latest").symlink_to("notes")
    (place / "run.sh").write_text("#!")
    (place / "run.sh").chmod(0o755)
    return place


def state(directory: Path) -> dict[str, Any]:
    """Every entry that is not a checkpoint's: inode and mode of a file, mode of a folder."""
    actual = dict[str, Any]()
    for name, is_directory in files_below(directory):
        status = (directory / name).lstat()
        actual[name] = status.st_mode if is_directory else (status.st_ino, status.st_mode)
    return actual


def is_kept(before: dict[str, Any], directory: Path) -> bool:
    return before.items() <= state(directory).items()


def beside(place: Path) -> list[str]:
    return sorted(os.listdir(place.parent))


@pytest.mark.parametrize("to", ["hf", "native", "gguf"])
def test_a_model_is_saved_again_over_its_own_output(to: str, model: Model, tmp_path: Path) -> None:
    place = zoo.save(model, tmp_path / "out", to=to)
    (place / "metrics.json").write_text("mine")
    (place / "runs").mkdir()
    zoo.save(model, place, to=to)
    assert (place / "metrics.json").read_text() == "mine"
    assert (place / "runs").is_dir()
    assert list(manifest.check(place)) == []
    assert beside(place) == ["out"]


# --- other files are kept ------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("how", ["save", "convert", "parts"])
def test_force_keeps_every_file_that_is_no_checkpoints(
    how: str,
    exchange: bool,
    model: Model,
    source: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    before = state(project)
    for _ in range(2):  # into files of somebody's own, then over an earlier output beside them
        if how == "save":
            zoo.save(model, project, force=True)
        elif how == "convert":
            zoo.convert(source, project, to="native", force=True)
        else:
            for part in ("1/2", "2/2"):
                how_much = {"max_shard_size": 60_000, "restart": True}
                zoo.convert(source, project, to="native", force=True, part=part, **how_much)
                how_much["restart"] = False
        assert is_kept(before, project)
        assert beside(project) == ["project"]
    assert list(manifest.check(project)) == []
    zoo.load(project)


def test_without_force_nothing_is_written_beside_other_files(model: Model, project: Path) -> None:
    before = state(project)
    with pytest.raises(OutputExists, match=r"force=True.*other files are kept"):
        zoo.save(model, project)
    assert state(project) == before


def test_a_published_checkpoint_is_replaced_with_its_index_and_companions(
    model: Model, tmp_path: Path
) -> None:
    """Without a manifest: by its index and by the usual names, and by no others."""
    place = zoo.save(model, tmp_path / "out", max_shard_size=60_000)
    (place / manifest.NAME).unlink()
    names = ("tokenizer.json", "vocab.json", "generation_config.json")
    for name in (*names, "notes.json", "notes.txt", "LICENSE", "optimizer.pt"):
        (place / name).write_text("{}")
    torch.save({"x": torch.ones(2)}, place / "pytorch_model.bin")
    zoo.save(model, place, force=True)
    mine = {"notes.json", "notes.txt", "LICENSE", "optimizer.pt"}
    assert set(os.listdir(place)) == mine | {"config.json", WEIGHTS, manifest.NAME}


def test_an_adapter_and_a_model_do_not_replace_each_other(source: Path, tmp_path: Path) -> None:
    base = zoo.load(source)
    base.add_adapter(["c_attn"])
    before = state(source)
    with pytest.raises(OutputExists, match=r"holds a model, .*: model\.safetensors"):
        base.save_adapter(source, force=True)
    assert state(source) == before
    adapter = tmp_path / "adapter"
    for _ in range(2):
        base.save_adapter(adapter)
    before = state(adapter)
    for write in (zoo.save, lambda model, out, **how: zoo.convert(source, out, to="hf", **how)):
        with pytest.raises(OutputExists, match=r"holds an adapter, .*adapter_config\.json"):
            write(zoo.load(source), adapter, force=True)
    assert state(adapter) == before


def test_files_with_the_names_of_weights_that_hold_something_else_are_kept(
    model: Model, tmp_path: Path
) -> None:
    place = zoo.save(model, tmp_path / "out")
    (place / manifest.NAME).unlink()
    (place / "config.json").write_text('{"port": 8080}')
    before = state(place)
    with pytest.raises(OutputExists, match=r"would overwrite .*: config\.json"):
        zoo.save(model, place, force=True)
    zoo.save(model, place, force=True, to="native")
    assert (place / "config.json").read_text() == '{"port": 8080}'
    (place / "pytorch_model.bin").write_text("notes")
    zoo.save(model, place, force=True, to="native")
    assert (place / "pytorch_model.bin").read_text() == "notes"
    assert before["config.json"] == state(place)["config.json"]


@pytest.mark.parametrize("name", ["config.json", WEIGHTS + "/inner", "zoo.json"])
def test_a_file_that_would_be_overwritten_and_is_no_checkpoints_is_named(
    name: str, model: Model, project: Path
) -> None:
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text('{"port": 80}')
    before = state(project)
    with pytest.raises(OutputExists, match=f"would overwrite .*: {name}"):
        zoo.save(model, project, force=True, to="native" if name == "zoo.json" else "hf")
    assert state(project) == before
    assert beside(project) == ["project"]


def test_files_that_cannot_be_kept_are_named_before_the_conversion(
    source: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def refuse(src: Any, dst: Any, **options: Any) -> None:
        if str(src).endswith(".py"):
            raise OSError(18, "Invalid cross-device link")
        link(src, dst, **options)

    monkeypatch.setattr(os, "link", refuse)
    events = list[dict[str, Any]]()
    with pytest.raises(OutputExists, match=r"cannot be kept.*: train\.py \(Invalid cross"):
        zoo.convert(source, project, to="native", force=True, tell=events.append)
    assert events == []
    assert beside(project) == ["project"]


def test_a_file_that_appears_during_the_exchange_is_kept(
    model: Model, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = publishing._exchange

    def late(one: Path, other: Path) -> bool:
        (project / "late.log").write_text("late")
        (project / "notes" / "late.md").write_text("late")
        (project / "train.py").unlink()
        (project / "train.py").write_text("edited")
        return exchange(one, other)

    monkeypatch.setattr(publishing, "_exchange", late)
    with pytest.warns(UserWarning, match=r"kept: .*late"):
        zoo.save(model, project, force=True)
    assert (project / "late.log").read_text() == (project / "notes/late.md").read_text() == "late"
    assert (project / "train.py").read_text() == "mine"
    assert (project / "train.py.zoo-kept-1").read_text() == "edited"
    assert beside(project) == ["project"]


@pytest.mark.parametrize("at", ["linked", "exchanged", "half removed"])
def test_a_kill_while_replacing_loses_no_file(
    at: str, model: Model, source: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, exchange, retire = state(project), publishing._exchange, publishing._retire

    class Killed(BaseException):
        pass

    def killed_before(one: Path, other: Path) -> bool:
        if at == "exchanged":
            exchange(one, other)
        raise Killed

    def killed_after(old: Path, place: Path, replaced: Any) -> None:
        (old / "train.py").unlink()
        (old / "late.log").write_text("late")
        raise Killed

    child = os.fork()
    if child == 0:
        if at == "half removed":
            publishing._retire = killed_after  # type: ignore[assignment]
        else:
            publishing._exchange = killed_before  # type: ignore[assignment]
        stage._give_up = lambda *_: os._exit(9)  # type: ignore[assignment]
        try:
            zoo.save(model, project, force=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert publishing._retire is retire
    assert is_kept(before, project)
    assert beside(project) != ["project"]
    if at == "half removed":
        with pytest.warns(UserWarning, match=r"late\.log"):
            zoo.convert(source, project, to="native", force=True)
        assert (project / "late.log").read_text() == "late"
    else:
        zoo.convert(source, project, to="native", force=True)
    assert is_kept(before, project)
    assert beside(project) == ["project"]


def test_an_interrupt_after_the_exchange_loses_no_file(
    model: Model, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(old: Path, place: Path, replaced: Any) -> None:
        (old / "late.log").write_text("late")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_retire", interrupt)
        with pytest.raises(KeyboardInterrupt):
            zoo.save(model, project, force=True)
    assert beside(project) != ["project"]
    with pytest.warns(UserWarning, match=r"late\.log"):
        zoo.save(model, project, force=True)
    assert (project / "late.log").read_text() == "late"
    assert beside(project) == ["project"]


# --- never replaced ------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_home_and_working_directories_are_never_replaced(
    full: bool, force: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    if full:
        (place / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    for variable in ("cwd", "HOME"):
        with monkeypatch.context() as patch:
            if variable == "cwd":
                patch.chdir(place)
            else:
                patch.setenv("HOME", str(place))
            for path in (place, place / "..", tmp_path / "link", tmp_path / "link" / ".." / "b"):
                with pytest.raises(OutputExists, match=r"never replaced\. Give a directory inside"):
                    zoo.save(model, path, force=force)
    with monkeypatch.context() as patch:
        patch.chdir(place)
        for spelling in (".", "../b", "../../link"):
            with pytest.raises(OutputExists, match="the working directory"):
                zoo.save(model, spelling, force=force)
        zoo.save(model, "inside")
    assert sorted(p for p in tmp_path.rglob("*") if "inside" not in p.parts) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_directory_that_holds_git_is_never_replaced(
    kind: str, model: Model, source: Path, tmp_path: Path
) -> None:
    place = zoo.save(model, tmp_path / "repo")
    (place / ".git").mkdir() if kind == "folder" else (place / ".git").write_text("gitdir: x")
    for write in (
        lambda: zoo.save(model, place),
        lambda: zoo.save(model, place, force=True),
        lambda: zoo.convert(source, place, to="native", force=True),
    ):
        with pytest.raises(OutputExists, match=r"holds \.git"):
            write()
    assert (place / WEIGHTS).exists()


def test_a_deleted_working_directory_is_reported(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="working directory is gone"):
        zoo.save(model, "out")


def test_force_replaces_a_file_only_if_it_is_a_checkpoint(model: Model, tmp_path: Path) -> None:
    thesis, link = tmp_path / "thesis.md", tmp_path / "link"
    thesis.write_text("mine")
    with pytest.raises(OutputExists, match="no whole checkpoint"):
        zoo.save(model, thesis, force=True)
    link.symlink_to(thesis)
    with pytest.raises(OutputExists):
        zoo.save(model, link)
    zoo.save(model, link, force=True)
    assert link.is_dir()
    assert not link.is_symlink()
    assert thesis.read_text() == "mine"
    torch.save({"x": torch.ones(1)}, tmp_path / "old.pt")
    zoo.save(model, tmp_path / "old.pt", force=True)
    assert (tmp_path / "old.pt" / WEIGHTS).exists()


# --- saving again --------------------------------------------------------------------------------


def test_shards_of_an_earlier_save_are_removed(tmp_path: Path) -> None:
    model, place = build("gpt2").eval(), tmp_path / "out"
    for dtype, most in ((torch.float32, 60_000), (torch.bfloat16, 30_000), (torch.float32, None)):
        model.to(dtype)
        model.save_pretrained(place, max_shard_size=most)
        assert list(manifest.check(place)) == []
        assert next(zoo.load(place).parameters()).dtype == dtype
    assert sorted(os.listdir(place)) == ["config.json", WEIGHTS, manifest.NAME]


def test_a_training_loop_saves_where_it_loaded(model: Model, tmp_path: Path) -> None:
    place = zoo.save(model, tmp_path / "out")
    (place / "tokenizer_config.json").write_text('{"mine": 1}')  # a tokenizer saved beside it
    trained = zoo.load(place)
    for step in range(3):
        with torch.no_grad():
            trained.norm.weight.fill_(step)
        trained.save_pretrained(place)
        assert zoo.load(place).norm.weight.eq(step).all()
        text = json.dumps({"mine": step})
        assert "mine" in (place / "tokenizer_config.json").read_text()
        (place / "tokenizer_config.json").write_text(text)
    assert json.loads((place / "tokenizer_config.json").read_text()) == {"mine": 2}


def test_a_tokenizer_that_was_changed_beside_an_output_is_kept(
    model: Model, tmp_path: Path
) -> None:
    source = zoo.save(model, tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{}")
    trained = zoo.load(source)
    place = zoo.save(trained, tmp_path / "out")
    assert (place / "tokenizer_config.json").read_text() == "{}"
    (place / "tokenizer_config.json").write_text('{"mine": 1}')
    zoo.save(trained, place)
    assert (place / "tokenizer_config.json").read_text() == '{"mine": 1}'
    assert list(manifest.check(place)) == []
    zoo.save(trained, place, force=True)
    assert (place / "tokenizer_config.json").read_text() == "{}"


def flipped(place: Path) -> None:
    with (place / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights changed": (flipped, f"{WEIGHTS} was changed since"),
    "config changed": (
        lambda p: (p / "config.json").write_text("{}"),
        r"config\.json was changed since",
    ),
    "weights of others": (
        lambda p: (p / "pytorch_model.bin").touch(),
        r"pytorch_model\.bin was not written with the others",
    ),
    "no manifest": (lambda p: (p / manifest.NAME).unlink(), "exists already"),
    "a manifest of others": (lambda p: (p / manifest.NAME).write_text("{}"), "exists already"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_output_that_others_changed_needs_force(case: str, model: Model, tmp_path: Path) -> None:
    place = zoo.save(model, tmp_path / "out")
    change, message = OTHERS[case]
    change(place)
    before = state(place)
    with pytest.raises(OutputExists, match=rf"{message}.*force=True"):
        zoo.save(model, place)
    assert state(place) == before
    zoo.save(model, place, force=True)
    zoo.load(place)


def test_what_another_writer_made_needs_force(model: Model, source: Path, tmp_path: Path) -> None:
    place = zoo.convert(source, tmp_path / "out", to="hf")
    with pytest.raises(OutputExists, match="force=True"):
        zoo.save(model, place)
    place = zoo.save(model, tmp_path / "own")
    with pytest.raises(OutputExists, match="force=True"):
        zoo.convert(source, place, to="hf")
    for again in (
        lambda: zoo.save(model, place, to="native"),
        lambda: zoo.save(build("bert").eval(), place),
    ):
        with pytest.raises(OutputExists, match="force=True"):
            again()


@pytest.mark.parametrize("part", [None, "1/1"])
def test_a_conversion_that_was_published_is_not_taken_for_another(
    part: str | None,
    model: Model,
    source: Path,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was replaced could not be removed, so the journal of the first conversion is there."""
    other = zoo.save(build("gpt2", layers=1).eval(), tmp_path / "other")

    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_retire", busy)
        zoo.convert(source, project, to="native", force=True, part=part)
    assert zoo.load(project).config.layers == model.config.layers
    zoo.convert(other, project, to="native", force=True, part=part, restart=part is not None)
    assert zoo.load(project).config.layers == 1
    assert beside(project) == ["project"]


def test_a_kept_file_that_is_a_link_of_the_source_is_no_change_of_it(
    source: Path, project: Path
) -> None:
    os.link(source / "model.safetensors", project / "notes" / "copy.safetensors")
    zoo.convert(source, project, to="native", force=True)
    assert (project / "notes" / "copy.safetensors").samefile(source / "model.safetensors")
