"""Recall beside the perplexity: copying of planted strings, what is kept of it, and what it may cost."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from fakes import FakeModel
from kvlatent.evaluation.copying import copied_tokens, copy_accuracy, copy_trials
from kvlatent.evaluation.evidence import LEAST
from kvlatent.evaluation.recall import MOST_TOKENS, compare_recall, measure_recall
from kvlatent.workflows.steps import EVALUATION_TOKENS

LENGTHS = {50: 130, 200: 280, 400: 480}  # 64 tokens before a string, its 16, and as far back as it lies


def copying(reach, context=512):
    """Gives the token that followed the last two tokens before, if that is at most `reach` tokens back."""

    def rule(ids):
        logits = torch.zeros(*ids.shape, 300)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(len(tokens) - 14, len(tokens)):
                for before in range(at - 1, max(0, at - reach - 1), -1):
                    if tokens[before - 1 : before + 1] == tokens[at - 1 : at + 1]:
                        logits[row, at, tokens[before + 1]] = 1.0
                        break
        return logits

    return FakeModel(rule, context=context)


def blocks(number, size=64):
    """Of tokens 5 to 9 only, so that a cue of two random tokens is seldom met by chance."""
    ids = torch.randint(5, 10, (number, size), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def measure(model, tokenizer, number=16, **options):
    return measure_recall(model, tokenizer, blocks(number), **options)


def test_a_model_recalls_what_it_can_reach(tiny_tokenizer):
    far = measure(copying(10_000), tiny_tokenizer)
    assert (far["copied"], far["distances"], far["trials"]) == (1.0, [50, 200, 400], 7)
    assert far["hits"] == [14] * 21
    near = measure(copying(210), tiny_tokenizer)
    assert near["hits"][:14] == [14] * 14 and sum(near["hits"][14:]) < 5
    assert near["copied"] == sum(near["hits"]) / (14 * 21)


def test_it_reads_a_tenth_of_what_the_perplexity_reads_by_default(tiny_tokenizer):
    told = []
    model = copying(1)
    measure(model, tiny_tokenizer, progress=lambda *each: told.append(each))
    assert sum(len(row) for row in model.seen) <= MOST_TOKENS <= EVALUATION_TOKENS / 10
    assert sum(len(row) for row in model.seen) > 0.9 * MOST_TOKENS
    assert told[0] == (0, 21) and told[-1] == (21, 21)


@pytest.mark.parametrize(
    ("context", "number", "distances"),
    [(480, 16, [50, 200, 400]), (479, 16, [50, 200]), (130, 16, [50]), (129, 16, None), (512, 4, [50, 200]), (512, 1, None)],
)  # fmt: skip
def test_a_short_context_or_text_takes_the_nearer_distances(tiny_tokenizer, context, number, distances):
    found = measure(copying(10_000, context), tiny_tokenizer, number)
    if distances is None:
        assert found is None
        return
    assert found["distances"] == distances and found["copied"] == 1
    assert found["trials"] == MOST_TOKENS // sum(LENGTHS[distance] for distance in distances)


def test_the_share_that_is_kept_and_its_paired_error():
    original = {"copied": 0.75, "hits": [14, 14, 7, 7]}
    latent = {"copied": 0.5, "hits": [14, 7, 7, 0]}
    figures = {"original": {"recall": original}, "converted": {}, "latent": {"loss": 1.0, "recall": latent}}
    compared = compare_recall(figures)
    assert compared["original"] == {"recall": original} and compared["converted"] == {}
    kept = compared["latent"]["recall"]
    # 28 of 42; residuals 14 - 2/3 * 14, ... as of a ratio estimator
    residuals = np.array([14 - 28 / 3, 7 - 28 / 3, 7 - 14 / 3, 0 - 14 / 3])
    assert kept["kept"] == pytest.approx(2 / 3) and compared["latent"]["loss"] == 1.0
    assert kept["kept_standard_error"] == pytest.approx(np.sqrt((residuals**2).sum() * 4 / 3) / 42)
    assert "kept" not in latent
    alike = compare_recall({"original": {"recall": original}, "latent": {"recall": original}})
    assert (alike["latent"]["recall"]["kept"], alike["latent"]["recall"]["kept_standard_error"]) == (1, 0)


def test_of_an_original_that_recalls_next_to_nothing_none_is_lost():
    def kept(copied):
        original = {"copied": copied, "hits": [1, 2]}
        latent = {"copied": 0.0, "hits": [0, 0]}
        return compare_recall({"original": {"recall": original}, "latent": {"recall": latent}})["latent"][
            "recall"
        ]

    assert (kept(LEAST)["kept"], kept(LEAST - 0.01)["kept"]) == (0, None)
    assert kept(0.0)["kept_standard_error"] is None and kept(0.0)["copied"] == 0
    assert compare_recall({}) == {}
    assert compare_recall({"original": {}, "latent": {"ratio": 2.0}})["latent"] == {"ratio": 2.0}


def test_sequences_begin_with_the_token_that_the_tokenizer_puts_there(tiny_tokenizer, monkeypatch):
    filler = blocks(16)["input_ids"][:].flatten().numpy()
    model = copying(10_000)
    monkeypatch.setattr("kvlatent.evaluation.copying.leading_ids", lambda _: [1])
    copied_tokens(model, tiny_tokenizer, filler, [50], 3)
    assert {row[0] for row in model.seen} == {1} and {len(row) for row in model.seen} == {129}
    plain = copy_trials(np.arange(5, 300), filler, 50, 3)
    assert plain.shape == (3, 130) and 1 not in plain[:, 0]


def test_copy_accuracy_is_the_mean_of_the_same_counts(tiny_tokenizer):
    filler = blocks(16)["input_ids"][:].flatten().numpy()
    model = copying(210)
    hits = copied_tokens(model, tiny_tokenizer, filler, [50, 300], 4)
    shares = copy_accuracy(model, tiny_tokenizer, [50, 300], trials=4, filler=filler)
    assert shares == {distance: counts.sum() / 56 for distance, counts in hits.items()}
    assert shares[50] == 1 and shares[300] < 0.2
    with pytest.raises(ValueError, match="distance 600 needs 680 positions, the model has 512"):
        copied_tokens(model, tiny_tokenizer, filler, [600], 1)
