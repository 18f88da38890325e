"""The KV cache as users call it: text in parts, cutting it back, and what it refuses."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import build, hot
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from converters.spec import load_spec
from zoo import Cache, registry
from zoo.errors import InputError, MaskError, SequenceTooLong, ZooError

IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[0, :2] = 0
DECODERS = ("gpt2", "llama", "mistral", "neox", "gemma2", "mixtral", "bloom", "falcon")


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return hot(build("llama", vocab=50)).double()


def begun(model: Any, count: int = 3, size: int = 16) -> Cache:
    cache = Cache(size)
    model(IDS[:, :count], cache=cache)
    return cache


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("mask", [None, LEFT], ids=["", "left"])
def test_text_in_parts_equals_the_whole(name: str, mask: Tensor | None) -> None:
    """Parts of any size, some cut off again; masks of the new tokens, or of all."""
    model, draw = hot(build(name, vocab=50)).double(), random.Random(1)
    want = model(IDS, mask)
    real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    for _ in range(6):
        cache, logits, at = Cache(IDS.shape[1]), torch.empty_like(want[:, :0]), 0
        while at < IDS.shape[1]:
            end = min(at + draw.choice((1, 2, 5)), IDS.shape[1]) if at else draw.choice((3, 7))
            part_mask = None if mask is None else mask[:, draw.choice((0, at)) : end]
            logits = torch.cat((logits, model(IDS[:, at:end], part_mask, cache=cache)), dim=1)
            at = end
            if draw.random() < 0.3:
                at = draw.randint(3, at)
                cache.cut(at)
                logits = logits[:, :at]
        torch.testing.assert_close(logits[real], want[real], rtol=0, atol=1e-10)


def padded_mask(*rows: tuple[int, int, int]) -> Tensor:
    """(b, s) from (padding on the left, on the right, one gap) of each row."""
    mask = torch.ones(len(rows), IDS.shape[1], dtype=torch.int64)
    for row, (left, right, gap) in zip(mask, rows, strict=True):
        row[:left] = row[len(row) - right :] = 0
        if gap:
            row[gap] = 0
    return mask


PADDED = {
    "left": padded_mask((9, 0, 0), (0, 0, 0), (4, 0, 0)),
    "right": padded_mask((0, 9, 0), (0, 0, 0), (0, 4, 0)),
    "mixed": padded_mask((8, 0, 0), (0, 8, 0), (5, 3, 6)),
}


def decoders() -> Iterator[Any]:
    for name, entry in registry.architectures().items():
        for variant, data in entry.variants.items():
            if data["class"].endswith(("CausalLM", "LMHeadModel")):
                yield pytest.param(entry, data["config"], id=f"{name}-{variant}")


@pytest.mark.parametrize(("entry", "published"), list(decoders()))
def test_padded_rows_in_chunks_equal_the_whole(entry: Any, published: Any) -> None:
    """Also where a chunk is all padding for a row, at its beginning or its end."""
    torch.manual_seed(0)
    fields, _ = load_spec(entry.spec).dialect("hf").read_config(published)
    model = hot(entry.model(entry.config_class(**fields))).double()
    ids = IDS.repeat(2, 1)[:3] % model.config.vocab
    limit = model.config.limit_cached or ids.shape[1]
    for mask in PADDED.values():
        ids, mask, real = ids[:, :limit], mask[:, :limit], mask[:, :limit].bool()
        alive = real.any(dim=1)  # of few positions, a row may be cut to nothing
        ids, mask, real = ids[alive], mask[alive], real[alive]
        want = model(ids, mask)
        for size in (2, 5):
            cache, parts = Cache(ids.shape[1]), range(0, ids.shape[1], size)
            logits = [
                model(ids[:, n : n + size], mask[:, n : n + size], cache=cache) for n in parts
            ]
            torch.testing.assert_close(torch.cat(logits, 1)[real], want[real], rtol=0, atol=1e-10)


def test_padded_answers_in_chunks_equal_the_whole() -> None:
    model = hot(build("t5", vocab=50)).double()
    ids = IDS.repeat(2, 1)[:3]
    for mask in PADDED.values():
        want = model(ids, mask, decoder_input_ids=ids, decoder_attention_mask=mask)
        for size in (1, 5):
            cache, logits = Cache(ids.shape[1]), []
            for n in range(0, ids.shape[1], size):
                answer = ids[:, n : n + size], mask[:, n : n + size]
                more = dict(
                    zip(("decoder_input_ids", "decoder_attention_mask"), answer, strict=True)
                )
                logits.append(model(ids, mask, cache=cache, **more))
            real = mask.bool()
            torch.testing.assert_close(torch.cat(logits, 1)[real], want[real], rtol=0, atol=1e-10)


def test_row_without_any_token_is_refused(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with pytest.raises(MaskError, match="row 1 is all zeros"):
        model(IDS, mask)
    with pytest.raises(MaskError, match="row 1 is all zeros"):
        model.generate(IDS, mask)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "bloom"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["", "left"])
def test_compiled_once_for_the_prompt_and_once_for_a_token(name: str, mask: Tensor | None) -> None:
    model, counted = hot(build(name, vocab=50)).double(), CompileCounter()
    compiled: Any = torch.compile(model, backend=counted, fullgraph=True)
    want = model(IDS, mask)
    for _ in range(2):
        cache, parts = Cache(IDS.shape[1]), [slice(0, 4), *(slice(n, n + 1) for n in range(4, 12))]
        inputs = [(IDS[:, part], None if mask is None else mask[:, part]) for part in parts]
        logits = torch.cat(
            [compiled(ids, part_mask, cache=cache) for ids, part_mask in inputs], dim=1
        )
        real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(logits[real], want[real], rtol=0, atol=1e-10)
    assert counted.frame_count == 2


def deeper(model: Any, cache: Cache) -> Tensor:
    return hot(build("llama", vocab=50, layers=9)).double()(IDS, cache=cache)


def with_gradients(model: Any, cache: Cache) -> Tensor:
    with torch.enable_grad():
        return model(IDS[:, 3:], cache=cache)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda m, c: m(IDS[:1], cache=c), InputError, "1 rows, and the cache holds 2"),
        (lambda m, c: m(IDS.repeat(1, 2), cache=c), SequenceTooLong, "room for 16"),
        (lambda m, c: hot(build("llama", vocab=50))(IDS, cache=c), InputError, "torch.float64"),
        (lambda m, c: hot(build("gpt2", vocab=50)).double()(IDS, cache=c), InputError, "another"),
        (with_gradients, InputError, "no gradients"),
        (lambda m, c: m(IDS[:, 3:], LEFT, cache=c), MaskError, "of the 3 tokens"),
        (lambda m, c: m(IDS[:, 3:], LEFT[:, 1:], cache=c), MaskError, "attention_mask"),
        (lambda m, c: m(IDS[:, 3:] + 50, cache=c), InputError, "outside"),
        (lambda m, c: c.cut(4), InputError, "cannot cut 3 tokens to 4"),
        (lambda m, c: c.cut(1.5), InputError, "cannot cut 3 tokens to 1.5"),
    ],
)
def test_refused_call_leaves_the_cache_unchanged(
    model: Any, use: Callable[[Any, Cache], Any], error: type[ZooError], message: str
) -> None:
    cache = begun(model)
    with pytest.raises(error, match=message):
        use(model, cache)
    assert cache.length == 3
    logits = model(IDS[:, 3:], cache=cache)
    torch.testing.assert_close(logits, model(IDS)[:, 3:], rtol=0, atol=1e-10)


def test_refused_first_call_leaves_the_cache_empty(model: Any) -> None:
    """A call that is refused for its gradients fills nothing: the next call is the first."""
    cache = Cache(16)
    with torch.enable_grad(), pytest.raises(InputError, match="no gradients"):
        model(IDS, cache=cache)
    torch.testing.assert_close(model(IDS, cache=cache), model(IDS), rtol=0, atol=1e-10)


def test_cache_of_a_model_with_fewer_layers_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"another model's: it has \d layers, and this one more"):
        deeper(model, begun(model))


@pytest.mark.parametrize("wrong", [{}, [], 12, True])
def test_anything_but_a_cache_is_refused(model: Any, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"expected a zoo\.Cache"):
        model(IDS, cache=wrong)


def test_cache_of_another_question_is_refused() -> None:
    model, start = hot(build("t5", vocab=50)).double(), torch.zeros(2, 1).long()
    cache, other = Cache(16), IDS.flip(1)
    model(IDS, decoder_input_ids=start, cache=cache)
    for question in (other, IDS[:1], IDS[:, :5]):
        with pytest.raises(InputError, match="another question"):
            model(question, decoder_input_ids=start[: len(question)], cache=cache)
    cache.cut(0)
    logits = model(other, decoder_input_ids=start, cache=cache)
    torch.testing.assert_close(logits, model(other, decoder_input_ids=start), rtol=0, atol=1e-10)
