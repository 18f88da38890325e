"""Objectives: what a model is shown of a window, and what it has to foresee."""

import pytest
import torch

from zoo.training.data import Windows
from zoo.training.objectives import IGNORED, CausalLM, LabeledBatch, MaskedLM, Spans, cost

VOCAB, LENGTH = 50, 40
TOKENS = (torch.arange(4000) * 7 % 37).to(torch.uint16)


@pytest.fixture
def windows() -> Windows:
    """Random windows of a text of 37 tokens."""
    return Windows(TOKENS, LENGTH, 64, seed=3)


def test_causal_labels_are_the_next_tokens(windows: Windows) -> None:
    batch = CausalLM(windows, windows).batch(5)
    ids, labels = batch.inputs["input_ids"], batch.labels["logits"]
    assert torch.equal(ids, windows(5)[:, :-1]) and torch.equal(labels, windows(5)[:, 1:])


def test_batch_depends_on_the_seed_and_the_step_alone(windows: Windows) -> None:
    assert torch.equal(windows(7), Windows(TOKENS, LENGTH, 64, seed=3)(7))
    assert not torch.equal(windows(7), windows(8))
    assert not torch.equal(windows(7), Windows(TOKENS, LENGTH, 64, seed=4)(7))


def test_masked_words_are_hidden_replaced_and_kept_in_their_shares(windows: Windows) -> None:
    batches = [MaskedLM(windows, windows, VOCAB - 1, VOCAB).batch(n) for n in range(40)]
    labels = torch.cat([batch.labels["logits"] for batch in batches])
    shown = torch.cat([batch.inputs["input_ids"] for batch in batches])
    chosen = labels != IGNORED
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    hidden = (shown == VOCAB - 1)[chosen].float().mean().item()
    kept = (shown == labels)[chosen].float().mean().item()
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.02)
    whole = torch.cat([windows(n) for n in range(40)])
    assert torch.equal(shown[~chosen], whole[~chosen])
    assert torch.equal(labels[chosen], whole[chosen])


def test_spans_and_what_is_left_give_back_the_window(windows: Windows) -> None:
    batch = Spans(windows, windows, start=0, vocab=VOCAB).batch(2)
    questions, answers = batch.inputs["input_ids"], batch.labels["logits"]
    assert torch.equal(batch.inputs["decoder_input_ids"][:, 1:], answers[:, :-1])
    assert (batch.inputs["decoder_input_ids"][:, 0] == 0).all()
    for question, answer, window in zip(questions, answers, windows(2), strict=True):
        spans, whole = dict[int, list[int]](), list[int]()
        for id in answer.tolist():
            if id > 36:
                spans[id] = []
            else:
                spans[min(spans)].append(id)
        for id in question.tolist():
            whole += spans[id] if id > 36 else [id]
        assert whole == window.tolist()
        assert list(spans) == [VOCAB - 1 - n for n in range(len(spans))]


def test_parts_of_a_batch_add_up_to_its_cost() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 11), torch.randint(11, (6, 5))
    labels[0, 1:] = IGNORED  # parts of different lengths
    batch = LabeledBatch({"input_ids": labels}, {"logits": labels})
    whole = cost(logits, batch, batch.counts)
    parts = [
        cost(logits[part], batch.rows(part), batch.counts)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(whole, reference)
