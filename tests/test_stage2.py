"""The chunked losses equal the dense textbook ones, value and gradient, and never hold all logits."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvlatent.jobs.recipe import Stage2
from kvlatent.model.head import Head, token_losses, tokens_of_logits
from kvlatent.model.logit_loss import stage2_loss
from tolerances import ROUNDING, assert_close_to_scale

pytestmark = pytest.mark.numerics

BATCH, POSITIONS, WIDTH, VOCABULARY = 2, 37, 16, 97


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, POSITIONS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY)
    teacher_hidden = torch.randn(BATCH, POSITIONS, 2 * WIDTH)
    teacher_head = nn.Linear(2 * WIDTH, VOCABULARY)
    for parameter in (*head.parameters(), *teacher_head.parameters()):
        parameter.requires_grad_(False)
    labels = torch.randint(VOCABULARY, (BATCH, POSITIONS))
    labels[0, 5:19] = -100
    labels[1, -1] = -100
    return hidden, head, teacher_hidden, teacher_head, labels


def dense_kl(hidden, head, teacher_hidden, teacher_head, labels, temperature):
    """Equation 9 written out: sum over the vocabulary of p log(p / q), then the mean over the tokens that count."""
    q = F.softmax(head(hidden) / temperature, dim=-1)
    p = F.softmax(teacher_head(teacher_hidden) / temperature, dim=-1)
    return ((p * (p / q).log()).sum(-1) * (labels != -100)).sum() * temperature**2 / (labels != -100).sum()


def next_token(hidden, head, labels, **options):
    """Mean cross-entropy of the tokens that count."""
    return stage2_loss(hidden, head, labels, Stage2(objective="next_token"), **options)


def kl(hidden, head, teacher_hidden, teacher_head, labels, temperature=1.0, **options):
    """Mean divergence of the tokens that count."""
    settings = Stage2(objective="kl", temperature=temperature)
    return stage2_loss(hidden, head, labels, settings, teacher_hidden, teacher_head, **options)


def gradient(loss, hidden):
    return torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 10, 256])
def test_next_token_loss_is_the_dense_cross_entropy(case, chunk_tokens):
    hidden, head, *_, labels = case
    loss = next_token(hidden, head, labels, chunk_tokens=chunk_tokens)
    dense = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(gradient(loss, hidden), gradient(dense, hidden))
    assert abs(next_token(hidden, head, labels.clamp(min=0)) - loss) > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_tokens", [10, 256])
def test_kl_loss_is_the_dense_divergence(case, temperature, chunk_tokens):
    hidden, head, teacher_hidden, teacher_head, labels = case
    loss = kl(*case, temperature=temperature, chunk_tokens=chunk_tokens)
    dense = dense_kl(hidden, head, teacher_hidden, teacher_head, labels, temperature)
    torch.testing.assert_close(loss, dense)
    assert_close_to_scale(gradient(loss, hidden), gradient(dense, hidden), ROUNDING)
    reversed_kl = dense_kl(teacher_hidden, teacher_head, hidden, head, labels, temperature)
    assert abs(reversed_kl - loss) > 1e-4  # the direction matters: original first


def test_divergence_from_itself_is_zero_with_zero_gradient(case):
    hidden, head, *_, labels = case
    loss = kl(hidden, head, hidden.detach(), head, labels, temperature=3.0)
    assert loss.item() == 0.0
    found = gradient(
        loss, hidden
    )  # p - q, times T, times the weights, summed over the vocabulary: rounding only
    assert_close_to_scale(found, torch.zeros_like(found), ROUNDING, float(head.weight.detach().abs().max()))
    moved = kl(hidden + 0.1, head, hidden.detach(), head, labels, temperature=3.0)
    assert moved.item() > 0


def test_masked_positions_have_no_gradient_and_do_not_count(case):
    hidden, *_, labels = case
    for loss in (next_token(hidden, case[1], labels), kl(*case)):
        found = gradient(loss, hidden)
        assert found[labels == -100].abs().max() == 0
        assert (found[labels != -100].abs().sum(-1) > 0).all()


def test_no_tensor_of_all_tokens_by_vocabulary_is_ever_made(case):
    hidden, head, *_, labels = case
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(item.numel() for item in (result,) if isinstance(item, torch.Tensor))
            return result

    with Watch():
        (next_token(hidden, head, labels, chunk_tokens=8) + kl(*case, chunk_tokens=8)).backward()
    assert max(largest) == case[3].weight.numel()  # the wider head itself: 32 x 97
    with Watch():
        head(hidden)
    assert max(largest) == BATCH * POSITIONS * VOCABULARY


def test_nothing_of_the_vocabulary_is_kept_for_the_backward_pass(case):
    hidden, head, *_ = case
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda item: (kept.append(item.shape), item)[1], lambda x: x
    ):
        loss = next_token(hidden, head, case[-1]) + kl(*case)
    assert kept and not any(VOCABULARY in shape for shape in kept)
    loss.backward()


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products that involve the vocabulary."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += any(VOCABULARY in item.shape for item in args if isinstance(item, torch.Tensor))
        return function(*args, **(kwargs or {}))


def test_a_chunk_costs_one_product_a_model_and_one_for_the_gradient(case):
    with Products() as seen:
        kl(*case, chunk_tokens=256).backward()
    assert seen.count == 3  # dense: 3; with the logits computed again: 5
    with Products() as seen, torch.no_grad():
        kl(*case, chunk_tokens=256)
    assert seen.count == 2


@pytest.mark.parametrize("objective", ["next_token", "kl", "mix"])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 10])
def test_scaled_loss_has_the_dense_gradient(case, objective, chunk_tokens):
    hidden, head, teacher_hidden, teacher_head, labels = case
    settings = Stage2(objective=objective, kl_weight=0.3, temperature=2.5)
    loss = 3 * stage2_loss(
        hidden, head, labels, settings, teacher_hidden, teacher_head, chunk_tokens=chunk_tokens
    )
    tokens = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    divergence = dense_kl(*case[:4], labels, 2.5)
    share = {"next_token": 0, "kl": 1, "mix": 0.3}[objective]
    dense = 3 * (share * divergence + (1 - share) * tokens)
    torch.testing.assert_close(loss, dense)
    assert_close_to_scale(gradient(loss, hidden), gradient(dense, hidden), ROUNDING)


def test_bfloat16_autocast_has_the_gradient_of_float32(case):
    hidden = case[0]
    exact = gradient(kl(*case), hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kl(*case)
    found = gradient(loss, hidden)
    assert loss.dtype == found.dtype == torch.float32
    assert_close_to_scale(found, exact, 2e-2)  # eight bits in each of two products
    assert not torch.equal(found, exact)


def test_logits_are_held_by_memory_not_by_a_number_of_tokens(monkeypatch):
    small, large = (Head(torch.empty(size, 4, device="meta")) for size in (49_152, 2 * 49_152))
    assert tokens_of_logits(small) == 2 * tokens_of_logits(large) == 128  # 24 MiB
    assert tokens_of_logits(Head(torch.empty(10**9, 1, device="meta"))) == 1
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    weight = SimpleNamespace(device=torch.device("cuda"), shape=(128_256, 4096))
    assert tokens_of_logits(Head(weight)) == (80 << 30) // 64 // (128_256 * 4) == 2616


def test_mix_weighs_both_losses(case):
    hidden, head, teacher_hidden, teacher_head, labels = case
    settings = Stage2(objective="mix", kl_weight=0.25, temperature=2.0)
    tokens, divergence = next_token(hidden, head, labels), kl(*case, temperature=2.0)
    mixed = stage2_loss(hidden, head, labels, settings, teacher_hidden, teacher_head)
    torch.testing.assert_close(mixed, 0.25 * divergence + 0.75 * tokens)
    assert abs(divergence - tokens) > 0.1


def test_heads_may_be_layers_weights_or_pairs(case):
    hidden, head, *_, labels = case
    heads = head, (head.weight, head.bias), head.weight
    layer, pair, weight = (next_token(hidden, each, labels).item() for each in heads)
    assert layer == pair != weight


def test_bfloat16_autocast_still_sums_in_float32(case):
    hidden, head, *_, labels = case
    exact = next_token(hidden, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = next_token(hidden, head, labels)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=1e-3, atol=0)  # bf16 products of 16 terms, averaged over 59
    assert total.item() != exact.item()


def test_bfloat16_weights_still_sum_in_float32(case):
    hidden, head, *_, labels = case
    hidden, head = hidden.detach().bfloat16(), head.bfloat16()
    total = next_token(hidden, head, labels)
    counted = labels != -100
    logits = head(hidden[counted])  # the very product: one of more rows may round to other bfloat16 numbers
    exact = F.cross_entropy(logits.float(), labels[counted])
    torch.testing.assert_close(total, exact)
    low = F.cross_entropy(logits, labels[counted])
    assert abs(low.float() - exact) > 1e-3


def test_a_batch_without_labels_gives_zero_and_a_graph(case):
    hidden, head, *_ = case
    loss = next_token(hidden, head, torch.full((BATCH, POSITIONS), -100))
    assert loss.item() == 0
    assert gradient(loss, hidden).abs().max() == 0


def test_token_losses_are_per_position_without_graph(case):
    hidden, head, *_, labels = case
    losses = token_losses(hidden, head, labels, chunk_tokens=7)
    dense = F.cross_entropy(head(hidden).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, dense.detach())
    assert not losses.requires_grad
    assert dense.requires_grad


def test_a_head_that_would_learn_is_refused():
    hidden = torch.randn(BATCH, POSITIONS, WIDTH)
    labels = torch.zeros(BATCH, POSITIONS, dtype=torch.long)
    with pytest.raises(ValueError, match="got one that requires gradients; call requires_grad_.False. on it"):
        stage2_loss(hidden, nn.Linear(WIDTH, 11), labels, Stage2(objective="next_token"))
