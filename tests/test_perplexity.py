"""Perplexity against dense logits, its standard error against simulation, and the paired ratio."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from kvlatent.evaluation.perplexity import perplexity, perplexity_ratio, summarise


@pytest.fixture
def blocks():
    """Five blocks of 24 tokens, each of two documents that are kept apart."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (5, 24), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[:, [9, 23]] = -100
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(5, -1)
    columns = {"input_ids": ids.tolist(), "position_ids": positions.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(columns).with_format("torch")


def dense_losses(model, blocks):
    """Every document alone through the whole model, summed per block: nothing packed, nothing chunked."""
    sums = []
    for row in blocks:
        total = 0.0
        for document in (slice(0, 10), slice(10, 24)):
            ids = row["input_ids"][document]
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            total += F.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum").item()
        sums.append(total)
    return sums


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_dense_logits_of_separate_documents(tiny_llama, blocks, batch_size):
    expected = sum(dense_losses(tiny_llama, blocks)) / (5 * 22)
    found = perplexity(tiny_llama, blocks, batch_size=batch_size)
    assert found.tokens == 5 * 22
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    merged = blocks.map(lambda row: {"position_ids": torch.arange(24)})
    assert abs(perplexity(tiny_llama, merged).loss - expected) > 1e-3  # documents seeing each other


def test_standard_error_is_the_spread_over_resampled_corpora():
    generator = np.random.default_rng(0)

    def corpus():
        counts = generator.integers(20, 200, size=60)
        level = 2 + 0.5 * generator.standard_normal(60)  # one per block: its tokens hang together
        return summarise((level * counts).tolist(), counts.tolist())

    corpora = [corpus() for _ in range(600)]
    spread = np.std([found.perplexity for found in corpora])
    claimed = np.mean([found.standard_error for found in corpora])
    assert claimed == pytest.approx(spread, rel=0.1)  # 600 corpora know their spread to 3 %
    one = corpora[0]
    independent = one.perplexity * 0.5 / math.sqrt(one.tokens)
    assert claimed > 5 * independent  # what treating tokens as independent would have claimed


def test_ratio_pairs_blocks(tiny_llama, blocks):
    reference = perplexity(tiny_llama, blocks)
    same, error = perplexity_ratio(reference, reference)
    assert (same, error) == (1.0, 0.0)
    worse = summarise([1.1 * loss for loss in reference.block_losses], reference.block_tokens)
    ratio, error = perplexity_ratio(worse, reference)
    assert ratio == pytest.approx(worse.perplexity / reference.perplexity)
    assert error is not None
    assert reference.standard_error is not None
    unpaired = ratio * math.sqrt(2) * reference.standard_error / reference.perplexity
    assert 0 < error < unpaired / 5


def test_one_block_has_no_standard_error(tiny_llama, blocks):
    found = perplexity(tiny_llama, blocks.select([0]))
    assert found.standard_error is None
    assert perplexity_ratio(found, found) == (1.0, None)


def test_mode_is_restored_and_nothing_is_learned(tiny_llama, blocks):
    tiny_llama.train()
    seen = []
    perplexity(tiny_llama, blocks, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert tiny_llama.training
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_broken_weights_are_refused(tiny_llama, blocks):
    with torch.no_grad():
        tiny_llama.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="finite and below 700 nats per token: got nan over 110 tokens"):
        perplexity(tiny_llama, blocks)


def test_nothing_to_measure_is_refused(tiny_llama, blocks):
    with pytest.raises(ValueError, match="0 blocks hold 0"):
        perplexity(tiny_llama, blocks.select([]))
    with pytest.raises(ValueError, match="got batch_size=0"):
        perplexity(tiny_llama, blocks, batch_size=0)


def test_ratio_over_different_blocks_is_refused():
    with pytest.raises(ValueError, match="got 2 blocks of 20 tokens and 1 of 10"):
        perplexity_ratio(summarise([20.0, 21.0], [10, 10]), summarise([20.0], [10]))
