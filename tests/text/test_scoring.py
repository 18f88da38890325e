"""perplexity, fill and embed: against the reference, and against plain implementations."""

import io
import json
import math
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import first_of
from sentence_models import checkpoint as sentence_checkpoint
from torch import Tensor

import zoo
from zoo import registry
from zoo.cli.app import main
from zoo.components.decoder import Decoder
from zoo.components.heads import MaskedLMHead
from zoo.components.model import Model
from zoo.errors import (
    ConfigError,
    InputError,
    SequenceTooLong,
    TokenIdError,
    UnsupportedArchitecture,
    UsageError,
    ZooError,
)
from zoo.parity.reference import Reference
from zoo.registry import Architecture
from zoo.text import perplexity
from zoo.text.embed import POOLINGS
from zoo.text.fill import Guess
from zoo.tokenizers import CharTokenizer, Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "fox", "##s", "capital", "is"]
WORDS += [*"abcdefghij", *(f"##{c}" for c in "abcdefghij"), ".", "'", "漢"]
TEXT = "The fox's capital is a Bad cabbage. 漢 of the"
TEXTS = ["the fox", "a", "foxs of the capital. " * 2, "the capital is a face", "bad", "the fox"]

ARCHITECTURES = list(registry.architectures().values())
VARIANTS = [(a, v) for a in ARCHITECTURES for v in a.variants]
FIRST = [(a, next(iter(a.variants))) for a in ARCHITECTURES]


def of_kind(cases: list[tuple[Architecture, str]], words: str) -> list[tuple[Architecture, str]]:
    return [(a, v) for a, v in cases if words in a.variants[v]["class"]]


DECODERS = of_kind(FIRST, "CausalLM") + of_kind(FIRST, "GPT2LMHead")
ONE_OF_EACH_MASKED = of_kind(FIRST, "MaskedLM")


def names(case: object) -> str | None:
    return case.name if isinstance(case, Architecture) else None


@pytest.fixture(scope="session")
def hot(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a variant with random weights, and a small vocabulary of words."""

    @cache
    def write(architecture: str, variant: str = "") -> Path:
        root = tmp_path_factory.mktemp("hot") / "x"
        shutil.copytree(made(architecture, variant), root)
        (root / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
        return root

    return write


def some_ids(count: int, vocab: int = 100) -> list[int]:
    random = torch.Generator().manual_seed(0)
    return torch.randint(4, vocab, (count,), generator=random).tolist()


# --- perplexity ----------------------------------------------------------------------------------


def expected(reference: Any, ids: list[int], window: int, stride: int) -> float:
    """The sum of the reference's losses in nats, with labels at tokens not scored before."""
    total, scored = 0.0, 1
    while scored < len(ids):
        end = len(ids) if scored == 1 and len(ids) <= window else 0
        end = end or min(window if scored == 1 else scored + stride, len(ids))
        start = max(0, end - window)
        labels = [id if start + n >= scored else -100 for n, id in enumerate(ids[start:end])]
        with torch.no_grad():
            out = reference(torch.tensor([ids[start:end]]), labels=torch.tensor([labels]))
        total += out.loss.item() * (end - scored)
        scored = end
    return total


@pytest.mark.parametrize(("entry", "variant"), DECODERS, ids=names)
def test_perplexity_matches_the_reference(hot: Any, entry: Architecture, variant: str) -> None:
    """In fp32 on both sides; the noise of a mean of logarithms is below 1e-6."""
    root = hot(entry.name, variant)
    reference = Reference(root, entry.variants[variant]["class"], torch.float32).model
    model, ids = zoo.load(root), some_ids(50)
    for window, stride in ((20, 10), (20, 1), (17, 16), (50, 7)):
        score = zoo.perplexity(model, ids, window=window, stride=stride)
        assert score.tokens == 49
        wanted = expected(reference, ids, window, stride) / 49
        assert score.nll == pytest.approx(wanted, rel=2e-6)
        assert score.perplexity == math.exp(score.nll)


@pytest.mark.parametrize(("entry", "variant"), first_of(DECODERS), ids=names)
def test_logits_in_chunks_score_like_all_at_once(
    hot: Any, entry: Architecture, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = zoo.load(hot(entry.name, variant), dtype="float64"), some_ids(45)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)
    wanted = -logits[range(44), ids[1:]].mean().item()
    for window in (45, 50, None):
        assert zoo.perplexity(model, ids, window=window).nll == pytest.approx(wanted, rel=1e-12)
    windows = {w: zoo.perplexity(model, ids, window=w, stride=3).nll for w in (11, 24)}
    assert abs(windows[11] - windows[24]) > 1e-6
    for most in (1, 7, 43):
        monkeypatch.setattr(perplexity, "LOGITS", most * model.config.vocab)
        assert zoo.perplexity(model, ids).nll == pytest.approx(wanted, rel=1e-12)
        for window, nll in windows.items():
            again = zoo.perplexity(model, ids, window=window, stride=3).nll
            assert again == pytest.approx(nll, rel=1e-12)


def test_perplexity_keeps_one_chunk_of_logits_in_memory(
    hot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No logits are computed for tokens that are not scored."""
    model = zoo.load(hot("gpt2"))
    monkeypatch.setattr(perplexity, "LOGITS", 6 * model.config.vocab)
    seen: dict[str, list[int]] = {"embed": [], "head": []}
    for name, lengths in seen.items():
        part = getattr(model, name)
        part.register_forward_hook(lambda m, i, out, to=lengths: to.append(out.shape[1]))
    zoo.perplexity(model, some_ids(200), window=50)
    assert max(seen["embed"]) == max(seen["head"]) == 6
    assert sum(seen["head"]) == 199
    assert sum(seen["embed"]) == 7 * 49


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 31, 57])
@pytest.mark.parametrize(("window", "stride"), [(10, 5), (10, 9), (10, 1), (2, 1)])
def test_each_token_is_scored_once(length: int, window: int, stride: int) -> None:
    scored: list[int] = []
    for start, new, end in perplexity._windows(length, window, stride):
        assert 0 <= start < new < end <= length
        assert end - start == min(window, length)
        assert start == 0 or new - start >= window - stride
        scored += range(new, end)
    assert scored == list(range(1, length))


def test_windows_of_models_without_a_position_limit(
    hot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic rotary embedding scores beyond its positions too, without a cache."""
    model = zoo.load(hot("llama", "rope-dynamic"), dtype="float64")
    positions = model.config.positions
    assert (model.config.limit, model.config.limit_cached) == (None, positions)
    ids = some_ids(positions + 9)
    assert perplexity._sizes(model, None, None)[0] == positions
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(dim=-1)
    wanted = -logits[range(len(ids) - 1), ids[1:]].mean().item()
    monkeypatch.setattr(perplexity, "LOGITS", 7 * model.config.vocab)
    nll = zoo.perplexity(model, ids, window=len(ids)).nll
    assert nll == pytest.approx(wanted, rel=1e-12)
    with torch.no_grad():  # the last window, in which two tokens are new
        logits = model(torch.tensor([ids[2:-1]]))[0, -2:].log_softmax(dim=-1)
    wanted = (-logits[range(2), ids[-2:]].sum()).item()
    nll = zoo.perplexity(model, ids, window=len(ids) - 2, stride=2).nll * (len(ids) - 1)
    before = zoo.perplexity(model, ids[:-2], window=len(ids) - 2).nll * (len(ids) - 3)
    assert nll - before == pytest.approx(wanted, rel=1e-9)
    assert perplexity._sizes(zoo.load(hot("bloom")), None, None) == (2048, 1024)


class Letters(CharTokenizer):
    """A character tokenizer with a begin token."""

    @classmethod
    def begun(cls, text: str, *, custom: bool) -> Tokenizer:
        engine = cls.of(text)._engine
        return Tokenizer(engine, roles={"bos": 0}, before=[0] if custom else [])


def test_bytes_per_token_leave_out_the_unscored_first_token(hot: Any) -> None:
    text = "héllo wörld, 漢字"
    model = zoo.load(hot("gpt2"), dtype="float64")
    size = len(text.encode())
    for custom, bos, count, first in ((True, None, 15, 0), (False, None, 14, 1)):
        model.tokenizer = Letters.begun("\0" + text, custom=custom)
        score = zoo.perplexity(model, text, bos=bos)
        ids = model.tokenizer.encode(text)
        alone = zoo.perplexity(model, ids)
        assert (score.tokens, score.nll, score.bytes) == (count, alone.nll, size - first)
        assert alone.bytes is alone.bits_per_byte is None
        assert score.bits_per_byte == pytest.approx(
            count * score.nll / math.log(2) / (size - first)
        )
        forced = zoo.perplexity(model, text, bos=True)
        assert (forced.tokens, forced.bytes) == (15, size)
        assert forced.nll == zoo.perplexity(model, [0, *ids[-15:]]).nll
        begun = zoo.perplexity(model, "\0" + text, bos=bos)
        assert begun.bytes == size + 1 - first  # a text may begin with the bos token itself
    assert zoo.perplexity(model, torch.tensor(ids)) == alone
    assert zoo.perplexity(model, torch.tensor(ids, dtype=torch.int32)) == alone


def test_a_model_in_training_mode_is_scored_without_dropout(hot: Any) -> None:
    model, ids = zoo.load(hot("gpt2")), some_ids(30)
    score = zoo.perplexity(model, ids)
    model.train()
    model.blocks[0].eval()
    assert zoo.perplexity(model, ids) == score
    assert model.training and model.blocks[1].training and not model.blocks[0].training


def test_perplexity_of_random_weights_is_near_the_vocabulary(hot: Any) -> None:
    bound = pytest.approx(100, rel=0.5)
    model = zoo.load(hot("gpt2"), weights="random")
    assert zoo.perplexity(model, some_ids(200)).perplexity == bound
    assert perplexity.Score(3, 1000.0).perplexity == math.inf


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"window": 1}, UsageError, "2 or more"),
        ({"window": 2.5}, UsageError, "2 or more"),
        ({"window": 54}, SequenceTooLong, "53 positions"),
        ({"window": 10, "stride": 10}, UsageError, "expected 1 to 9"),
        ({"stride": 0}, UsageError, "expected 1 to 52"),
        ({"bos": True}, UsageError, "bos=True: only for a text"),
        ({"text": []}, InputError, "nothing to score"),
        ({"text": ""}, InputError, "nothing to score"),
        ({"text": [3]}, InputError, "nothing to score"),
        ({"text": [[3, 4]]}, InputError, r"found shape \[1, 2\]"),
        ({"text": [3.0, 4.0]}, InputError, "float32"),
        ({"text": ["a", "b"]}, InputError, "text or its ids"),
        ({"text": [3, 4, 999]}, TokenIdError, "999"),
        ({"text": [3, 999, 4]}, TokenIdError, "999"),
        ({"text": [3, -100]}, TokenIdError, "-100"),
        ({"model": 3}, UsageError, "found int"),
        ({"model": "no/such/directory"}, ZooError, "no/such/directory"),
    ],
)
def test_wrong_arguments_of_perplexity_are_refused(
    hot: Any, options: dict[str, Any], error: type[ZooError], says: str
) -> None:
    arguments = {"model": zoo.load(hot("gpt2")), "text": some_ids(60), **options}
    with pytest.raises(error, match=says):
        zoo.perplexity(arguments.pop("model"), arguments.pop("text"), **arguments)


@pytest.mark.parametrize(("entry", "variant"), VARIANTS, ids=names)
def test_only_decoders_are_scored_and_only_masked_lms_fill(
    entry: Architecture, variant: str
) -> None:
    """Each variant does at most one of the two, depending on its head."""
    fields = entry.variants[variant]
    head = entry.heads[fields["class"]][0]
    from converters.spec import load_spec

    read, _ = load_spec(entry.spec).dialect("hf").read_config(fields["config"])
    with torch.device("meta"):
        model = entry.model(entry.config_class(**{**read, "head": head}))
    model.architecture = entry.name
    decodes = isinstance(model, Decoder) and head == "lm"
    masked = any(isinstance(part, MaskedLMHead) for part in model.modules())
    assert not (decodes and masked)
    if not decodes:
        with pytest.raises(UsageError, match=f"{entry.name} with head '{head}'"):
            zoo.perplexity(model, [3, 4, 5])
    if not masked:
        with pytest.raises(UsageError, match=f"{entry.name} with head '{head}'"):
            zoo.fill(model, "[MASK]")


# --- gaps ----------------------------------------------------------------------------------------

GAPS = (
    "[MASK]",
    "the capital of [MASK] is [MASK].",
    "[MASK] fox[MASK][MASK] the",
    "x [SEP] [MASK]",
)


@pytest.mark.parametrize(("entry", "variant"), ONE_OF_EACH_MASKED, ids=names)
def test_fill_matches_the_references_pipeline(hot: Any, entry: Architecture, variant: str) -> None:
    import transformers

    root = hot(entry.name, variant)
    reference = Reference(root, entry.variants[variant]["class"], torch.float32).model
    tokenizer = transformers.BertTokenizer(vocab=str(root / "vocab.txt"))
    pipe = transformers.FillMaskPipeline(model=reference, tokenizer=tokenizer, device="cpu")
    model = zoo.load(root)
    for text in GAPS:
        # the tokenizer has no tokens for the last rows of the embedding
        guesses, expected = zoo.fill(model, text, top=7), pipe(text, top_k=model.config.vocab)
        expected = expected if isinstance(expected[0], list) else [expected]
        assert len(guesses) == text.count("[MASK]")
        for mine, theirs in zip(guesses, expected, strict=True):
            valid = [guess for guess in theirs if guess["token"] < len(WORDS)]
            for guess, its in zip(mine, valid[:7], strict=True):
                assert (guess.id, guess.text) == (its["token"], its["token_str"])
                assert guess.probability == pytest.approx(its["score"], rel=1e-5)


def test_every_masked_lm_head_fills(hot: Any) -> None:
    root = hot("bert", "pretraining")
    gaps = zoo.fill(root, GAPS[1])
    assert gaps == zoo.fill(zoo.load(root, head="masked_lm"), GAPS[1])
    assert [len(gap) for gap in gaps] == [5, 5]
    assert isinstance(gaps[0][0], Guess)
    with pytest.raises(UsageError, match="Load it with head='masked_lm'"):
        zoo.fill(zoo.load(root, head="none"), GAPS[1])
    assert len(zoo.fill(hot("deberta", "predictions"), GAPS[1])) == 2


def test_mask_tokens_of_other_names_are_read(hot: Any) -> None:
    """RoBERTa writes <mask>."""
    model = zoo.load(hot("roberta"))
    settings = {"mask_token": {"content": "<mask>", "lstrip": True}, "unk_token": "[UNK]"}
    root = model.provenance.directory
    words = [*WORDS, "<mask>"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        with pytest.raises(InputError, match="no <mask> in the text"):
            zoo.fill(model, "the [MASK]")
        assert len(zoo.fill(model, "the <mask> of <mask>")) == 2
    finally:
        (root / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
        (root / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("text", "top", "error", "says"),
    [
        ("the fox", 5, InputError, r"no \[MASK\] in the text"),
        ("", 5, InputError, "no .MASK. in the text"),
        ("[MASK]", 0, UsageError, "from 1 to 34"),
        ("[MASK]", 35, UsageError, "from 1 to 34"),
        ("[MASK]", True, UsageError, "from 1 to 34"),
        ("[MASK] " * 60, 5, SequenceTooLong, "53 positions"),
        (3, 5, InputError, "expected a text"),
    ],
)
def test_wrong_arguments_of_fill_are_refused(
    hot: Any, text: Any, top: int, error: type[ZooError], says: str
) -> None:
    with pytest.raises(error, match=says):
        zoo.fill(zoo.load(hot("bert")), text, top=top)


def test_fill_without_a_mask_token_is_refused(hot: Any) -> None:
    model = zoo.load(hot("bert"))
    model.tokenizer = CharTokenizer.of("abc")
    with pytest.raises(InputError, match="has no mask token"):
        zoo.fill(model, "a")


# --- vectors -------------------------------------------------------------------------------------


def states(body: Model, text: str) -> Tensor:
    """(s, d) hidden states of a text alone."""
    with torch.no_grad():
        return body(torch.tensor([body.tokenizer.encode(text)]))[0]


PLAIN = {
    "mean": lambda x: x.mean(dim=0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
    "max": lambda x: x.amax(dim=0),
}


@pytest.mark.parametrize(("entry", "variant"), FIRST, ids=names)
def test_an_embedding_does_not_depend_on_its_batch(
    hot: Any, entry: Architecture, variant: str
) -> None:
    """In any batch and order, with any head, to 1e-12 in fp64."""
    root = hot(entry.name, variant)
    model = zoo.load(root, dtype="float64")
    body = zoo.load(root, head=entry.model.headless[0], dtype="float64")
    hidden = [states(body, text) for text in TEXTS]
    assert len({len(x) for x in hidden}) > 3
    for pooling, plain in PLAIN.items():
        wanted = torch.stack([plain(x) for x in hidden])
        for size in (1, 2, 32):
            vectors = zoo.embed(model, TEXTS, pooling=pooling, batch_size=size)
            torch.testing.assert_close(vectors, wanted, rtol=0, atol=1e-12)
    vectors = zoo.embed(model, TEXTS)
    torch.testing.assert_close(vectors, zoo.embed(model, TEXTS, pooling="mean"), rtol=0, atol=0)
    units = zoo.embed(model, TEXTS[::-1], normalize=True).flip(0)
    length = vectors.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(units, vectors / length, rtol=0, atol=1e-12)
    assert model.config.head == zoo.load(root).config.head


def test_pooling_is_done_in_fp32(hot: Any) -> None:
    model = zoo.load(hot("bert"), dtype="bfloat16")
    assert zoo.embed(model, TEXTS).dtype == torch.float32
    assert set(POOLINGS) == set(PLAIN)


def test_texts_of_similar_length_share_a_batch(hot: Any) -> None:
    """This saves padding."""
    model = zoo.load(hot("bert", "bare"))
    seen: list[tuple[int, ...]] = []
    model.embed.register_forward_hook(lambda m, i, out: seen.append(tuple(i[0].shape)))
    zoo.embed(model, ["a a a a a", "a", "b b b b b", "b"], batch_size=2)
    assert seen == [(2, 3), (2, 7)]


def test_embed_follows_modules_json(tmp_path: Path) -> None:
    root = sentence_checkpoint(tmp_path / "s", "mean_tokens", "cls_token", dense=5)
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    model = zoo.load(root)
    with torch.no_grad():
        alone = [model(torch.tensor([model.tokenizer.encode(text)])) for text in TEXTS]
    vectors = zoo.embed(root, TEXTS, batch_size=4)
    torch.testing.assert_close(vectors, torch.cat(alone), rtol=0, atol=1e-6)
    for options in ({"pooling": "mean"}, {"normalize": True}):
        with pytest.raises(UsageError, match="modules=False"):
            zoo.embed(model, TEXTS, **options)
    assert zoo.embed(zoo.load(root, modules=False), TEXTS, pooling="max").shape == (6, 44)


def test_sentence_bert_config_limits_and_lowercases(tmp_path: Path) -> None:
    """Its max_seq_length and do_lower_case are obeyed."""
    root = sentence_checkpoint(tmp_path / "s", "mean_tokens")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (root / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    file = root / "sentence_bert_config.json"
    with pytest.raises(SequenceTooLong, match="model takes 53"):
        zoo.embed(root, ["a " * 60])
    file.write_text('{"max_seq_length": 6, "do_lower_case": true}')
    with pytest.raises(SequenceTooLong, match=r"text 1 has 7 tokens, .* takes 6"):
        zoo.embed(root, ["a b", "a b c d e"])
    vectors = zoo.embed(root, ["a b c d e", "The fox", "a b c d"], truncate=True)
    assert torch.equal(vectors[0], vectors[2])
    torch.testing.assert_close(vectors[1:2], zoo.embed(root, ["the fox"]), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="expected a text, found int"):
        zoo.embed(root, [3])
    file.write_text('{"max_seq_length": 600}')
    assert not torch.allclose(vectors[1], zoo.embed(root, ["The fox"]), rtol=0, atol=1e-3)
    with pytest.raises(SequenceTooLong, match="model takes 53"):
        zoo.embed(root, ["a " * 60])
    for wrong in ('{"max_seq_length": "6"}', '{"max_seq_length": 0}', '{"do_lower_case": 1}'):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="expected max_seq_length"):
            zoo.embed(root, ["a"])
    file.unlink()
    prompts = '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    (root / "config_sentence_transformers.json").write_text(prompts)
    with pytest.raises(UnsupportedArchitecture, match=r"'query': prompts .* modules=False"):
        zoo.embed(root, ["a"])
    zoo.embed(zoo.load(root, modules=False), ["a"])


def test_embed_limit_follows_the_loaded_head(hot: Any) -> None:
    """DeBERTa's enhanced mask decoder has a limit of positions; the model without it has none."""
    root = hot("deberta-v2")
    model = zoo.load(root, head="enhanced_masked_lm", weights="random")
    model.tokenizer = zoo.tokenizer(root)
    with pytest.raises(SequenceTooLong, match="takes 53"):
        zoo.embed(model, ["a " * 60])
    assert zoo.embed(root, ["a " * 60]).shape == (1, 42)


def test_long_texts_are_refused_or_truncated(hot: Any) -> None:
    model = zoo.load(hot("bert", "bare"), dtype="float64")
    texts = ["a", "b a " * 50, "the fox", "c " * 60]
    with pytest.raises(SequenceTooLong, match=r"text 1 has 102 .* text 3 has 62 .*truncate=True"):
        zoo.embed(model, texts)
    vectors = zoo.embed(model, texts, truncate=True)
    fits = [texts[0], ("b a " * 26)[:-3], texts[2], "c " * 51]
    assert torch.equal(vectors, zoo.embed(model, fits))
    assert zoo.embed(hot("t5"), texts).shape == (4, 48)


@pytest.mark.parametrize(
    ("texts", "options", "error", "says"),
    [
        ("a", {}, UsageError, "found str"),
        ([], {}, UsageError, "one text or more"),
        (["a", 3], {}, InputError, "expected a text"),
        (["a"], {"pooling": "men"}, UsageError, "Did you mean mean"),
        (["a"], {"batch_size": 0}, UsageError, "positive"),
    ],
)
def test_wrong_arguments_of_embed_are_refused(
    hot: Any, texts: Any, options: dict[str, Any], error: type[ZooError], says: str
) -> None:
    with pytest.raises(error, match=says):
        zoo.embed(zoo.load(hot("bert")), texts, **options)


def test_texts_without_tokens_are_refused(hot: Any) -> None:
    model = zoo.load(hot("gpt2"))
    model.tokenizer = CharTokenizer.of("abc")
    with pytest.raises(InputError, match="no tokens: 1, 3, counted from 0"):
        zoo.embed(model, ["a", "", "b", ""])


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        return main([str(a) for a in arguments]), *capsys.readouterr()

    return call


def test_score_command(run: Any, hot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, path = hot("llama"), tmp_path / "text"
    path.write_text(TEXT * 3, encoding="utf-8")
    score = zoo.perplexity(root, TEXT * 3, window=20, stride=4)
    code, out, err = run("score", root, path, "--window", 20, "--stride", 4, "--json")
    assert (code, err, json.loads(out)) == (0, "", score.to_json())
    assert json.loads(out).keys() == {"tokens", "nll", "perplexity", "bits_per_byte"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((TEXT * 3).encode())))
    code, out, _ = run("score", root, "-", "--window", 20, "--stride", 4)
    assert code == 0
    assert f"perplexity    {score.perplexity:.4f}" in out
    assert f"bits a byte   {score.bits_per_byte:.4f}" in out


def test_score_command_refuses_files_that_are_no_text(run: Any, hot: Any, tmp_path: Path) -> None:
    root, path = hot("llama"), tmp_path / "text"
    assert run("score", root, path) == (
        1,
        "",
        f"zoo: error: {path}: no such file\n",
    )
    for data, says in ((b"", "is empty"), (b"abc\xffd", "not UTF-8 at byte 3")):
        path.write_bytes(data)
        assert run("score", root, path) == (1, "", f"zoo: error: {path}: {says}\n")
    path.write_text("a a")
    assert run("score", hot("bert"), path)[0] == 2


def test_fill_command(run: Any, hot: Any) -> None:
    root = hot("bert")
    gaps = zoo.fill(root, GAPS[1], top=2)
    code, out, _ = run("fill", root, GAPS[1], "--top", 2, "--json")
    assert code == 0
    assert [[Guess(**guess) for guess in gap] for gap in json.loads(out)] == gaps
    lines = run("fill", root, GAPS[1], "--top", 2)[1].splitlines()
    shown = [f"{guess.probability:.4f}  {guess.text}" for gap in gaps for guess in gap]
    assert lines == ["mask 1", *shown[:2], "mask 2", *shown[2:]]
    assert run("fill", root, "[MASK]", "--top", 1)[1].count("\n") == 1
    assert run("fill", root, "the")[2] == "zoo: error: no [MASK] in the text\n"


def test_embed_command(run: Any, hot: Any, tmp_path: Path) -> None:
    root, path = hot("bert", "bare"), tmp_path / "texts"
    wanted = zoo.embed(root, TEXTS[:3], pooling="max", normalize=True)
    asked = ("--pooling", "max", "--normalize")
    code, out, err = run("embed", root, *TEXTS[:3], *asked, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err, [row["text"] for row in rows]) == (0, "", TEXTS[:3])
    assert torch.equal(torch.tensor([row["embedding"] for row in rows]), wanted)
    path.write_bytes("\r\n".join(TEXTS[:3]).encode() + b"\n")
    rows = [
        json.loads(line)
        for line in run("embed", root, "--file", path, "--json")[1].split("\n")[:-1]
    ]
    assert [row["text"] for row in rows] == TEXTS[:3]
    out = run("embed", root, "--file", path, *asked)[1]
    numbers = torch.tensor([[float(n) for n in line.split()] for line in out.splitlines()])
    torch.testing.assert_close(numbers, wanted, rtol=1e-6, atol=0)
    for arguments in ((), ("a", "--file", path)):
        assert "expected texts or --file FILE, and not both" in run("embed", root, *arguments)[2]
