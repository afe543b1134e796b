"""Reverse and weighed divergences, and those of an original known by its likeliest tokens, equal the dense textbook ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvlatent.jobs.recipe import Stage2
from kvlatent.model.divergences import TopTokens, divergence, top_tokens
from kvlatent.model.logit_loss import needs_teacher, stage2_loss
from tolerances import ROUNDING, assert_close_to_scale

pytestmark = pytest.mark.numerics

BATCH, POSITIONS, WIDTH, VOCABULARY = 2, 31, 16, 83


@pytest.fixture
def case():
    """Hidden states and head of a student, the same of an original, and labels with positions that do not count."""
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, POSITIONS, WIDTH, requires_grad=True)
    heads = nn.Linear(WIDTH, VOCABULARY), nn.Linear(2 * WIDTH, VOCABULARY)
    for head in heads:
        head.requires_grad_(False)
    labels = torch.randint(VOCABULARY, (BATCH, POSITIONS))
    labels[0, 3:9] = -100
    return hidden, heads[0], 3 * torch.randn(BATCH, POSITIONS, 2 * WIDTH), heads[1], labels


def shares(logits, temperature, ids=None):
    """Probabilities [N, V]; with ids [N, k] those of the ids and, last, 1 less their sum: [N, k + 1], in float64."""
    whole = F.softmax(logits.double() / temperature, dim=-1)
    if ids is None:
        return whole
    top = whole.gather(-1, ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1)


def dense(case, settings, ids=None):
    """The objective written out, in float64: sums over classes of p log(p / q), the mean over tokens that count."""
    hidden, head, teacher_hidden, teacher_head, labels = case
    counted = labels.flatten() != -100
    ids = None if ids is None else ids.flatten(0, 1)[counted]
    logits = head(hidden).flatten(0, 1)[counted]
    q = shares(logits, settings.temperature, ids)
    p = shares(teacher_head(teacher_hidden).flatten(0, 1)[counted], settings.temperature, ids)
    forward = (p * (p / q).log()).sum(-1).mean() * settings.temperature**2
    reverse = (q * (q / p).log()).sum(-1).mean() * settings.temperature**2
    tokens = F.cross_entropy(logits.double(), labels.flatten()[counted])
    if settings.objective == "mix":
        return settings.kl_weight * forward + (1 - settings.kl_weight) * tokens
    weight = {"kl": 0, "reverse_kl": 1, "mixed_kl": settings.reverse_weight}[settings.objective]
    return weight * reverse + (1 - weight) * forward


def gradient(loss, hidden):
    return torch.autograd.grad(loss, hidden)[0]


def stored(case, count, temperature):
    """The original's likeliest tokens at every position."""
    logits = case[3](case[2])
    found = top_tokens(logits.flatten(0, 1), count, temperature)
    return TopTokens(*(tensor.view(BATCH, POSITIONS, -1) for tensor in found))


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("objective", ["kl", "reverse_kl", "mixed_kl", "mix"])
def test_loss_and_gradient_are_the_dense_ones(case, objective, temperature, chunk_tokens):
    settings = Stage2(objective=objective, temperature=temperature, reverse_weight=0.3, kl_weight=0.7)
    hidden, head, *teacher, labels = case
    loss = stage2_loss(hidden, head, labels, settings, *teacher, chunk_tokens=chunk_tokens)
    expected = dense(case, settings)
    torch.testing.assert_close(loss, expected.float())
    assert_close_to_scale(gradient(loss, hidden), gradient(expected, hidden), ROUNDING)


@pytest.mark.parametrize("count", [1, 8, VOCABULARY - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("objective", ["kl", "reverse_kl", "mixed_kl", "mix"])
def test_likeliest_tokens_and_the_rest_have_the_dense_loss_and_gradient(case, objective, temperature, count):
    settings = Stage2(objective=objective, temperature=temperature, reverse_weight=0.3, kl_weight=0.7)
    hidden, head, *_, labels = case
    known = stored(case, count, temperature)
    loss = stage2_loss(hidden, head, labels, settings, stored=known, chunk_tokens=7)
    expected = dense(case, settings, known.ids)
    torch.testing.assert_close(loss, expected.float())
    assert_close_to_scale(gradient(loss, hidden), gradient(expected, hidden), ROUNDING)
    whole = dense(case, settings)
    assert count == VOCABULARY - 1 or abs(whole - expected) > 1e-3  # classes put together diverge less


def test_objectives_differ(case):
    hidden, head, *teacher, labels = case
    found = [
        stage2_loss(hidden, head, labels, Stage2(objective=name, reverse_weight=0.3), *teacher).item()
        for name in ("next_token", "kl", "reverse_kl", "mixed_kl", "mix")
    ]
    gaps = [abs(one - other) for i, one in enumerate(found) for other in found[:i]]
    assert min(gaps) > 1e-2
    assert [needs_teacher(Stage2(objective=name)) for name in ("next_token", "reverse_kl", "mixed_kl")] == [
        False,
        True,
        True,
    ]


def test_a_rest_of_next_to_nothing_has_a_finite_loss_and_gradient():
    """1 less the sum of the likeliest would be 0 in float32, and its logarithm infinite."""
    logits = torch.zeros(1, 9)
    logits[0, 2] = 60.0
    known = top_tokens(logits, 1, 1.0)
    assert -60 < known.log_shares[0, 1] < -57  # 8 e^-60
    for goal, student in ((known, torch.randn(1, 9)), (top_tokens(torch.randn(1, 9), 1, 1.0), 3 * logits)):
        for share in (0.0, 0.5, 1.0):
            loss, slope = divergence(student, goal, 1.0, share)
            assert loss.isfinite() and slope.isfinite().all()
            assert_close_to_scale(slope.sum(), torch.zeros(()), ROUNDING, 1.0)  # logits may all move alike


def test_what_is_given_is_left_as_it_is(case):
    known = stored(case, 5, 1.0)
    before = [tensor.clone() for tensor in known]
    logits = torch.randn(BATCH * POSITIONS, VOCABULARY)
    kept = logits.clone()
    divergence(logits, TopTokens(*(tensor.flatten(0, 1) for tensor in known)), 1.0, 0.5)
    divergence(logits, case[3](case[2]).flatten(0, 1), 1.0, 0.5)
    assert torch.equal(logits, kept)
    assert all(torch.equal(one, other) for one, other in zip(known, before, strict=True))
