"""The ladder: each rung runs and learns, the last one is zoo's GPT-2, and the pages quote it.

On the play that the examples write, 300 steps of 12 × 64 characters with seed 0 end at these
validation losses: bigram 2.08, MLP 1.14, one head 1.16, four heads 0.87, blocks 0.68.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch

from zoo.models import gpt2

RUNGS = ("1_bigram", "2_mlp", "3_attention", "4_heads", "5_blocks", "6_gpt")
LINES = 80
STEPS = 300
RATE = 5e-3  # of rungs 3 to 5 on the play, which is learned faster than Shakespeare


@pytest.fixture(scope="module")
def ladder(root: Path) -> Iterator[Callable[[str], ModuleType]]:
    """A file of the ladder as a module. They import each other by bare names, like scripts."""
    folder, before, threads = root / "examples/ladder", set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(folder))
    yield import_module
    torch.set_num_threads(threads)
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(ladder: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """A rung trained by its own command line, once for each set of arguments."""
    runs: dict[tuple[str, ...], Any] = {}

    def train(rung: str, *arguments: str) -> Any:
        if (rung, *arguments) not in runs:
            runs[rung, *arguments] = ladder(rung).main(list(arguments))
        return runs[rung, *arguments]

    return train


def entropy(run: Any, window: int) -> float:
    """Nats a character of the validation text, where its last `window` characters are known.

    The frequencies are those of the validation text itself: no model of such a window has a lower
    loss on it, however long it was trained.
    """
    ids, targets = run.text.test()
    padded = torch.nn.functional.pad(ids, (window - 1, 0)).unfold(1, window, 1).flatten(0, 1)
    windows = [tuple(row) for row in padded.tolist()]
    of_window = Counter(windows)
    pairs = Counter(zip(windows, targets.flatten().tolist(), strict=True))
    return -sum(n * math.log(n / of_window[w]) for (w, _), n in pairs.items()) / len(windows)


# --- files ---------------------------------------------------------------------------------------


def test_files_fit_on_a_page(root: Path) -> None:
    files = {path.stem: path for path in (root / "examples/ladder").glob("*.py")}
    assert set(RUNGS) | {"loop", "play", "text"} == set(files)
    long = {
        name: count
        for name, path in files.items()
        if (count := path.read_text(encoding="utf-8").count("\n")) > LINES
    }
    assert long == {}


def test_the_play_is_the_same_each_time(ladder: Callable[[str], ModuleType]) -> None:
    play = ladder("play").write()
    assert play == ladder("play").write() != ladder("play").write(seed=1)
    assert len(play) > 50_000


def test_text_splits_and_refuses(ladder: Callable[[str], ModuleType]) -> None:
    text = ladder("text").Text("abcdefghij" * 100)
    assert (len(text.training), len(text.validation)) == (900, 100)
    assert text.decode(text.encode("badge")) == "badge"
    ids, targets = text.batch(torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (12, 64)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match=r"does not have: \['é'\]"):
        text.encode("café")
    with pytest.raises(ValueError, match="30 characters: expected more than 650"):
        ladder("text").Text("abc" * 10)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_begins_at_ln_v_and_learns(
    rung: str, trained: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(rung, "--steps", "20")
    assert run.losses[0] == pytest.approx(math.log(run.text.vocab), rel=0.02)
    assert fmean(run.losses[-5:]) < run.losses[0] - 0.5
    assert "step    20  validation" in capsys.readouterr().out


def test_rung_reads_a_file(
    tmp_path: Path, trained: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("so long, and so on; " * 100, encoding="utf-8")
    run = trained("1_bigram", str(file), "--steps", "3", "--seed", "1", "--rate", "0.1")
    assert run.text.itos == sorted(set("so long, and so on; "))
    assert capsys.readouterr().out.startswith("10 characters, 100 parameters\n")


def test_no_rung_sees_the_future(trained: Callable[..., Any]) -> None:
    for rung in RUNGS:
        run = trained(rung, "--steps", "20")
        ids = run.text.validation[None, :32].clone()
        with torch.no_grad():
            before = run.model(ids)
            ids[:, 20:] = 0
            after = run.model(ids)
        torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-6)
        assert rung == "1_bigram" or not torch.equal(after[:, 20:], before[:, 20:])


@pytest.mark.slow
def test_each_rung_reaches_what_a_lower_one_cannot(trained: Callable[..., Any]) -> None:
    """After the same steps. Only one head is not below the MLP yet: see docs/learn."""
    steps = ("--steps", str(STEPS))
    rate = (*steps, "--rate", str(RATE))
    bigram, mlp = trained("1_bigram", *steps), trained("2_mlp", *steps)
    head, heads, blocks = (trained(rung, *rate) for rung in ("3_attention", "4_heads", "5_blocks"))
    losses = [round(run.validation, 2) for run in (bigram, mlp, head, heads, blocks)]
    after_one, after_two = entropy(bigram, 1), entropy(bigram, 2)  # 1.98 and 0.95
    # what no model of one character reaches, and no model of two
    assert after_one < bigram.validation < after_one + 0.2, losses
    assert after_two < mlp.validation < after_one - 0.6, losses
    assert head.validation < after_one - 0.6, losses
    assert heads.validation < min(after_two, head.validation - 0.15), losses
    assert blocks.validation < min(after_two - 0.15, heads.validation - 0.08), losses


# --- zoo -----------------------------------------------------------------------------------------


def test_the_last_rung_is_gpt2(trained: Callable[..., Any]) -> None:
    """Its parameters load by name into zoo's model, and both give the same logits."""
    run = trained("6_gpt", "--steps", "20")
    config = gpt2.Config(vocab=run.text.vocab, dim=128, layers=4, heads=4, positions=64)
    model = gpt2.Model(config).eval()
    model.load_state_dict(run.model.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in run.model.named_parameters()]
    ids = run.text.validation[None, :64]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), run.model(ids), rtol=0, atol=1e-6)


def test_the_last_rung_starts_like_gpt2(ladder: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(0)
    gpt = ladder("6_gpt").GPT(65)
    model = gpt2.Model(gpt2.Config(vocab=65, dim=128, layers=4, heads=4, positions=64))
    for name, parameter in gpt.named_parameters():
        other = model.get_parameter(name)
        assert parameter.shape == other.shape, name
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.05), name
        assert parameter.mean().item() == pytest.approx(other.mean().item(), abs=2e-3), name


# --- pages ---------------------------------------------------------------------------------------


def test_the_pages_quote_the_files(root: Path) -> None:
    """A page a rung; each block of code stands line by line in the file that is named above it."""
    pages = root / "docs/learn"
    assert {path.stem for path in pages.glob("*.md")} == {"README", *RUNGS}
    wrong = []
    for page in (pages / f"{rung}.md" for rung in RUNGS):
        quoted = page.read_text(encoding="utf-8").split("<!-- from ")[1:]
        assert quoted, page.name
        for part in quoted:
            file = root / part.split(" -->")[0]
            block = part.split("```python\n")[1].split("```")[0]
            if block not in file.read_text(encoding="utf-8"):
                wrong.append(f"{page.name}: not in {file.name}:\n{block}")
    assert wrong == []
