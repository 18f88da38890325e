"""`zoo generate` and `zoo chat`: as functions, through pipes, and at a terminal with Ctrl-C."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from tiny import build, hot

import zoo
from zoo.cli.app import main
from zoo.cli.chat import Dialogue
from zoo.errors import (
    InputError,
    OutputExists,
    SequenceTooLong,
    SourceChanged,
    TemplateError,
    UsageError,
)
from zoo.text import speculative
from zoo.text.generate import generate
from zoo.tokenizers import CharTokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyzAU:.\n"
WARM = {"temperature": 1.0, "seed": 4}
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that spells."""
    place = tmp_path_factory.mktemp("chat") / "speller"
    zoo.save(hot(build("llama", vocab=len(LETTERS), positions=20_000)), place)
    CharTokenizer.of(LETTERS).save(place)
    return place


@pytest.fixture
def model(place: Path) -> Any:
    return zoo.load(place)


# --- generate ------------------------------------------------------------------------------------


def test_generate_prints_what_python_returns(
    place: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(place), "abc", "--max-new-tokens", "40", "--temperature", "1"]
    more = ["--seed", "4", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.001"]
    options = {"max_new_tokens": 40, "top_k": 20, "top_p": 0.9, "min_p": 0.001, **WARM}
    text = zoo.generate(model, "abc", **options)
    for how in ((), ("--stream",), ("--no-stream",)):
        assert main([*asked, *more, *how]) == 0
        assert capsys.readouterr().out == text + "\n"
    stop = text[9:11]
    assert main([*asked, *more, "--stop", stop, "--stop", "☃"]) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"
    assert main([*asked, *more, "--stream", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == text and len(report["ids"]) == len(report["logprobs"]) == 40
    assert report["tokens_per_second"] == pytest.approx(40 / report["seconds"])
    assert model.tokenizer.decode(report["ids"]) == text
    assert main([*asked, *more, "--num-return-sequences", "2", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)["samples"]
    assert both[0]["text"] == text != both[1]["text"]
    assert main([*asked[:5], "--beams", "2"]) == 0
    beam = zoo.generate(model, "abc", max_new_tokens=40, num_beams=2)
    assert capsys.readouterr().out == beam + "\n"


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """Smaller, and often of the same mind: the large one's own first layers."""
    model = zoo.load(place)
    small = build("llama", vocab=len(LETTERS), positions=20_000, layers=model.config.layers - 1)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(model.get_parameter(name))
    small = zoo.save(small, place.parent / "small")
    CharTokenizer.of(LETTERS).save(small)
    return Path(small)


def test_an_assistant_changes_no_text(
    place: Path, small: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(place), "abc", "--max-new-tokens", "60"]
    text = zoo.generate(model, "abc", max_new_tokens=60)
    for assistant in (small, place):
        for how in ((), ("--no-stream",)):
            assert main([*asked, *how, "--assistant", str(assistant)]) == 0
            assert capsys.readouterr().out == text + "\n"
        assert main([*asked, "--json", "--assistant", str(assistant)]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text


def test_the_assistant_guesses_ahead(
    place: Path, small: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds: list[int] = []
    before = speculative._round

    def counted(*arguments: Any) -> Any:
        tokens = before(*arguments)
        rounds.append(len(tokens))
        return tokens

    monkeypatch.setattr(speculative, "_round", counted)
    asked = ["generate", str(place), "abc", "--max-new-tokens", "60"]
    assert main([*asked, "--assistant", str(place)]) == 0
    assert sum(rounds) == 59 and set(rounds[:-1]) == {6}  # five guesses that hold, and one more
    rounds.clear()
    assert main([*asked, "--assistant", str(small)]) == 0
    assert sum(rounds) >= 59 and len(rounds) < 59


@pytest.mark.parametrize("command", ("generate", "chat"))
def test_an_assistant_of_another_vocabulary_is_refused(
    place: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [command, str(place), *(["abc"] if command == "generate" else [])]
    zoo.save(build("llama", vocab=7), tmp_path / "sized")
    assert main([*asked, "--assistant", str(tmp_path / "sized")]) == 2
    error = capsys.readouterr().err
    assert (
        f"--assistant {tmp_path / 'sized'}: expected a vocabulary of {len(LETTERS)} tokens" in error
    )
    zoo.save(build("gpt2", vocab=len(LETTERS)), tmp_path / "worded")
    CharTokenizer.of(LETTERS.replace("b", "ß")).save(tmp_path / "worded")
    assert main([*asked, "--assistant", str(tmp_path / "worded")]) == 2
    error = capsys.readouterr().err
    assert f"--assistant {tmp_path / 'worded'}: another vocabulary: id " in error
    assert main([*asked, "--assistant", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    if command == "generate":
        assert main([*asked, "--assistant", str(place), "--beams", "2"]) == 2
        assert "beams do not guess ahead" in capsys.readouterr().err


def test_bad_options_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in (["generate", "nothing", "abc"], ["chat", "nothing"]):
        assert main([*command, "--top-p", "7"]) == 2
        assert "--top-p 7.0: must be > 0 and ≤ 1" in capsys.readouterr().err
        assert main(command) == 2
        assert "nothing" in capsys.readouterr().err


# --- a dialogue ----------------------------------------------------------------------------------


def answer_to(dialogue: Dialogue, text: str) -> str:
    return "".join(dialogue.answer(text))


def fresh(model: Any, messages: list[dict[str, str]], text: str) -> str:
    """The answer without a cache: the whole dialogue as one prompt."""
    turns = [("User" if m["role"] == "user" else "Assistant", m) for m in messages]
    prompt = "".join(f"{name}: {m['content']}\n" for name, m in turns)
    options = {"max_new_tokens": 30, "stop_strings": "\nUser:", **WARM}
    return str(zoo.generate(model, f"{prompt}User: {text}\nAssistant:", **options)).lstrip()


def test_a_turn_reads_only_what_is_new(model: Any) -> None:
    dialogue, calls = Dialogue(model, max_new_tokens=30, **WARM), []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    for n, text in enumerate(("hello", "how are you", "good bye " * 200, "so")):
        want = fresh(model, dialogue.messages, text)
        calls.clear()
        assert answer_to(dialogue, text) == want
        new = len(f"{want}\nUser: {text}\nAssistant:")
        # two thousand characters are more than the first cache had room for
        assert calls[0] < new + 9 if n != 2 else calls[0] > 1800
        assert set(calls[1:]) == {1}
    assert [m["role"] for m in dialogue.messages] == ["user", "assistant"] * 4


def test_an_answer_that_is_left_early_is_remembered(model: Any) -> None:
    dialogue = Dialogue(model, max_new_tokens=30, **WARM)
    pieces = dialogue.answer("hello")
    begun = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert dialogue.messages[-1] == {"role": "assistant", "content": begun.strip()}
    before = dialogue.messages
    assert answer_to(dialogue, "go on") == fresh(model, before, "go on")
    dialogue.reset()
    assert dialogue.messages == []
    assert answer_to(dialogue, "hello") == fresh(model, [], "hello")


def test_the_assistant_reads_only_what_is_new(model: Any, small: Path) -> None:
    guesser, read = zoo.load(small), {"model": 0, "guesser": 0}
    dialogue = Dialogue(model, max_new_tokens=30, assistant_model=guesser)
    alone = Dialogue(zoo.load(model.provenance.directory), max_new_tokens=30)

    def count(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            read[name] += args[0].shape[1]

        return hook

    model.register_forward_pre_hook(count("model"))
    guesser.register_forward_pre_hook(count("guesser"))
    for n, text in enumerate(("hello", "how are you", "good bye " * 200, "so", "well")):
        read.update(model=0, guesser=0)
        if n == 3:  # left in the middle, between two tokens
            for each in (dialogue, alone):
                pieces = each.answer(text)
                _ = next(pieces), next(pieces)
                pieces.close()  # type: ignore[attr-defined]
            continue
        assert answer_to(dialogue, text) == answer_to(alone, text)
        if n in (1, 4):  # the prompt's new part, and what was guessed: not the whole dialogue
            most = len(f"\nUser: {text}\nAssistant:") + 40 + 6 * 30
            assert max(read.values()) < most < len(str(dialogue.messages)) + 6 * 30
    assert dialogue.messages == alone.messages


def test_a_dialogue_longer_than_the_assistants_positions_is_refused(model: Any) -> None:
    short = build("llama", vocab=len(LETTERS), positions=40).eval()
    dialogue = Dialogue(model, assistant_model=short)
    assert len(answer_to(dialogue, "hello")) <= 40 + 1 - len("User: hello\nAssistant:")
    with pytest.raises(SequenceTooLong, match="its assistant 40 positions: /reset"):
        answer_to(dialogue, "more than there are places for")


def test_a_chat_template_makes_the_prompt(model: Any) -> None:
    model.tokenizer.templates["default"] = TEMPLATE
    dialogue = Dialogue(model, max_new_tokens=12, **WARM)
    for _ in range(2):
        before = [*dialogue.messages, {"role": "user", "content": "hello"}]
        ids = model.tokenizer.encode(model.tokenizer.chat(before))
        row = generate(model, torch.tensor([ids]), max_new_tokens=12, **WARM)[0, len(ids) :]
        assert answer_to(dialogue, "hello") == model.tokenizer.decode(row).lstrip()
    model.tokenizer.templates["default"] = "{{ raise_exception('no') }}"
    with pytest.raises(TemplateError):
        answer_to(dialogue, "hello")
    assert len(dialogue.messages) == 4  # as before
    vars(model.tokenizer)["special_tokens"] = {"<|end|>": 3}
    with pytest.raises(InputError, match=r"<\|end\|> is a special token"):
        answer_to(dialogue, "what does <|end|> mean")


@pytest.mark.parametrize("role", ["model", "assistant"])
def test_a_file_that_changed_between_two_turns_is_refused(
    place: Path, tmp_path: Path, role: str
) -> None:
    shutil.copytree(place, tmp_path / "x")
    changed, other = zoo.load(tmp_path / "x"), zoo.load(place)
    model, guesser = (changed, None) if role == "model" else (other, changed)
    dialogue = Dialogue(model, max_new_tokens=3, assistant_model=guesser)
    list(dialogue.answer("abc"))
    os.utime(tmp_path / "x" / "model.safetensors", ns=(0, 0))
    with pytest.raises(SourceChanged, match=r"model\.safetensors: was written to"):
        list(dialogue.answer("abc"))
    assert len(dialogue.messages) == 2


def test_a_dialogue_longer_than_the_positions_is_refused() -> None:
    place = build("llama", vocab=len(LETTERS), positions=60).eval()
    place.tokenizer = CharTokenizer.of(LETTERS)
    dialogue = Dialogue(place, **WARM)
    assert len(answer_to(dialogue, "hello")) <= 60 + 1 - len("User: hello\nAssistant:")
    with pytest.raises(SequenceTooLong, match="60 positions: /reset"):
        answer_to(dialogue, "and a lot more than there are places for")
    assert len(dialogue.messages) == 2
    dialogue.reset()
    assert answer_to(dialogue, "hello")


def test_models_and_options_without_a_dialogue_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one answer"):
        Dialogue(model, num_beams=2)
    with pytest.raises(UsageError, match="each question for itself"):
        Dialogue(build("t5"))
    with pytest.raises(UsageError, match="bert is an encoder"):
        Dialogue(build("bert"))
    with pytest.raises(UsageError, match="'none' cannot generate text"):
        Dialogue(build("gpt2", head="none"))
    with pytest.raises(InputError, match="No such file or directory"):
        Dialogue(model).save(str(tmp_path / "nowhere" / "x"))
    (tmp_path / "there").touch()
    with pytest.raises(OutputExists):
        Dialogue(model).save(str(tmp_path / "there"))


# --- as a program --------------------------------------------------------------------------------

COMMAND = [sys.executable, "-X", "utf8", "-m", "zoo", "chat"]
ALWAYS = ["--temperature", "1", "--seed", "4"]


def test_a_piped_dialogue_prints_answers_and_goes_on_after_mistakes(
    place: Path, model: Any, root: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "dialogue.json"
    lines = ["hello", '"""', "two", "lines", '"""', "a\\", "b", "/save", "/sing"]
    lines += [f"/save {saved}", f"/save {saved}", "/reset", "hello", "/help", "é"]
    done = subprocess.run(
        [*COMMAND, str(place), *ALWAYS, "--max-new-tokens", "30"],
        cwd=root,
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=True,
    )
    messages = json.loads(saved.read_text())
    assert [m["content"] for m in messages[::2]] == ["hello", "two\nlines", "a\nb"]
    dialogue = Dialogue(model, max_new_tokens=30, **WARM)
    answers = [answer_to(dialogue, m["content"]) for m in messages[::2]]
    assert [m["content"] for m in messages[1::2]] == [answer.strip() for answer in answers]
    note = f"saved in {saved}\n" * 2
    assert done.stdout.startswith("".join(f"{a}\n" for a in answers) + note + answers[0] + "\n")
    assert "Ctrl-D leaves" in done.stdout
    errors = done.stderr.splitlines()
    assert [line.partition("error: ")[2][:6] for line in errors] == ["/save ", "/sing:", "charac"]


@pytest.mark.parametrize("typed", ['"""\nhello', "hello\\", "hello"], ids=["block", "more", "line"])
def test_a_text_ends_where_the_input_does(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["chat", str(place), "--max-new-tokens", "9"]) == 0
    want = answer_to(Dialogue(zoo.load(place), max_new_tokens=9), "hello")
    assert capsys.readouterr().out == want + "\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_full_disk_ends_the_dialogue(place: Path, root: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, str(place)],
            cwd=root,
            input=b"hello\n/help\n",
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
        )
    assert done.returncode == 1 and done.stderr.count(b"No space left") == 1


@pytest.fixture
def terminal(place: Path, root: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    master, slave = pty.openpty()
    program = subprocess.Popen(
        [*COMMAND, str(place), *ALWAYS, "--max-new-tokens", "15000"],
        cwd=root,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "dumb"},
        start_new_session=True,
        # the terminal's own Ctrl-C goes to the group in front
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    yield program, master
    program.kill()
    program.wait()
    os.close(master)


def read_until(master: int, pattern: str, seconds: float = PATIENCE) -> str:
    screen, end = "", time.monotonic() + seconds
    while not re.search(pattern, screen):
        ready = select.select([master], [], [], max(0, end - time.monotonic()))[0]
        assert ready, f"no {pattern!r} in {screen!r}"
        screen += os.read(master, 4096).decode()
    return screen


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(
    terminal: tuple[subprocess.Popen[bytes], int],
) -> None:
    program, master = terminal
    read_until(master, r"Ctrl-D leaves\s+> ")
    time.sleep(0.5)  # what comes before input() looks for signals, it sees with the next key
    os.write(master, b"\x03")  # at the prompt: nothing but a new one
    read_until(master, r"> ")
    for _ in range(2):
        os.write(master, b"hello\n")
        read_until(master, r"hello\s+.{5}")  # the answer has begun, and would take a minute
        os.write(master, b"\x03")
        read_until(master, r"> $", seconds=20)
        assert program.poll() is None
    os.write(master, b"/help\n")
    read_until(master, r"(?s)/save FILE.*> $")
    os.write(master, b"\x04")
    assert program.wait(timeout=PATIENCE) == 0


def test_an_interrupt_stops_the_answer_of_a_piped_dialogue(place: Path, root: Path) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("what runs in the background ignores interrupts, and so do its programs")
    program = subprocess.Popen(
        [*COMMAND, str(place), *ALWAYS, "--max-new-tokens", "15000"],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdin is not None and program.stdout is not None
    try:
        program.stdin.write(b"hello\n")
        program.stdin.flush()
        os.read(program.stdout.fileno(), 5)
        program.send_signal(signal.SIGINT)
        program.stdin.write(b"/help\n")
        out, _ = program.communicate(timeout=PATIENCE)
    finally:
        program.kill()
        program.wait()
    assert b"/save FILE" in out and program.returncode == 0
