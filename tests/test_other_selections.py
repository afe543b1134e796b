"""Other papers' selections against slow, obvious ones."""

from itertools import product

import pytest
import torch

from kvlatent.model.families import attention_layers_of, key_value_heads_of
from kvlatent_lab.study.other_selections import (
    add_greedily,
    fisher_scores,
    order_pairs_by_fisher,
    order_pairs_by_scores,
    score_grams,
)
from tiny import tiny_model, tokens
from tolerances import assert_close_to_scale

BLOCKS, LENGTH = 3, 24


def packed():
    """Blocks of two documents, with labels; the last token of a document predicts nothing: as columns, and one by one."""
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]).expand(BLOCKS, -1)
    ids = tokens(BLOCKS, LENGTH)
    labels = torch.cat([ids[:, 1:], torch.full((BLOCKS, 1), -100)], 1)
    labels[:, 9] = -100
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return columns, [{name: column[i, None] for name, column in columns.items()} for i in range(BLOCKS)]


def test_fisher_scores_are_squared_gradients_times_squared_weights():
    model, (blocks, each) = tiny_model("llama"), packed()
    scores = fisher_scores(model, each)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())  # as it was
    heads, groups, size = 4, 2, 32
    for layer, score in zip(model.model.layers, scores, strict=True):
        expected = torch.zeros(heads // groups, size // 2)
        attention = layer.self_attn
        for block in range(BLOCKS):
            for weight, per_head in ((attention.q_proj.weight, groups), (attention.k_proj.weight, 1)):
                weight.requires_grad_(True)
                logits = model(
                    blocks["input_ids"][block, None],
                    position_ids=blocks["position_ids"][block, None],
                    use_cache=False,
                ).logits[0]
                labels = blocks["labels"][block]
                chances = logits.log_softmax(-1)
                counted = [t for t in range(LENGTH) if labels[t] >= 0]
                loss = -sum(chances[t, labels[t]] for t in counted) / len(counted)
                (gradient,) = torch.autograd.grad(loss, weight)
                weight.requires_grad_(False)
                for row in range(len(weight)):
                    head, pair = row // size // per_head, row % size % (size // 2)
                    expected[head, pair] += (gradient[row] * weight[row]).square().sum() / BLOCKS
        assert_close_to_scale(score.float(), expected, 1e-4)


def test_score_grams_are_products_of_what_pairs_add_to_the_logits():
    model, (blocks, each) = tiny_model("llama"), packed()
    grams = score_grams(model, each, rows=LENGTH)
    attention, caught = model.model.layers[0].self_attn, []
    hook = attention.register_forward_pre_hook(
        lambda m, a, kwargs: caught.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model(input_ids=blocks["input_ids"], position_ids=blocks["position_ids"], use_cache=False)
    hook.remove()
    heads, size, half = 4, 32, 16
    with torch.no_grad():
        query = attention.q_proj(caught[0]).unflatten(-1, (heads, size)).double()
        key = attention.k_proj(caught[0]).unflatten(-1, (2, size)).double()
    inv_freq = model.model.rotary_emb.inv_freq.double()
    expected, seen = torch.zeros(heads, half, half, dtype=torch.float64), 0
    for block, t, s in product(range(BLOCKS), range(LENGTH), range(LENGTH)):
        place = blocks["position_ids"][block]
        if s > t or (t >= 10) != (s >= 10):
            continue
        seen += 1
        turn = torch.polar(torch.ones(half, dtype=torch.float64), inv_freq * float(place[t] - place[s]))
        for head in range(heads):
            q, k = query[block, t, head], key[block, s, head // 2]
            added = (torch.complex(q[:half], q[half:]) * torch.complex(k[:half], k[half:]).conj() * turn).real
            expected[head] += torch.outer(added, added) / size
    assert_close_to_scale(grams[0], expected / seen, 1e-4)


def test_fewer_rows_are_a_sample_of_the_same_sum():
    model, (_, each) = tiny_model("llama"), packed()
    whole, some = (score_grams(model, each, rows=rows)[1] for rows in (LENGTH, 8))
    assert not torch.equal(whole, some)
    ratio = some.diagonal(dim1=1, dim2=2).sum(1) / whole.diagonal(dim1=1, dim2=2).sum(1)
    assert ratio.min() > 0.5 and ratio.max() < 2


def test_greedy_adds_what_lowers_the_error_most():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64) + 0.5
    grams = features.transpose(1, 2) @ features

    def error(kept):
        rest = [pair for pair in range(8) if pair not in kept]
        return float(features[:, :, rest].sum(-1).square().sum())

    kept: list[int] = []
    for number in range(1, 9):
        kept.append(min((p for p in range(8) if p not in kept), key=lambda p: error([*kept, p])))
        assert add_greedily(grams)[:number] == kept
    assert sorted(kept[:3]) != sorted(grams.sum(0).diagonal().argsort(descending=True)[:3].tolist())


def test_orders_hold_every_pair_of_every_head_the_best_first():
    model, (_, each) = tiny_model("llama"), packed()
    rows = [{name: column[0].tolist() for name, column in block.items()} for block in each]
    scores, grams = fisher_scores(model, each), score_grams(model, each)
    by_fisher, by_scores = order_pairs_by_fisher(model, rows), order_pairs_by_scores(model, rows)
    for layer in range(2):
        for head in range(2):
            sorted_scores = scores[layer][head][by_fisher[layer][head]]
            assert sorted_scores.tolist() == sorted(scores[layer][head].tolist(), reverse=True)
            assert by_scores[layer][head] == add_greedily(grams[layer][2 * head : 2 * head + 2])
            assert sorted(by_fisher[layer][head]) == sorted(by_scores[layer][head]) == list(range(16))


@pytest.mark.parametrize("name", ["phi3", "gpt-neox", "olmo3", "lfm2", "qwen3.5"])
def test_orders_of_families_with_other_parts(name):
    """Fused projections, tables a layer, layers without attention, output gates: the orders are of all heads and pairs."""
    model, (_, each) = tiny_model(name), packed()
    rows = [{name: column[0].tolist() for name, column in block.items()} for block in each]
    layers, heads = attention_layers_of(model.config), key_value_heads_of(model.config)
    for order in (order_pairs_by_fisher(model, rows), order_pairs_by_scores(model, rows)):
        assert [len(layer) for layer in order] == [heads] * len(layers)
        assert all(sorted(pairs) == list(range(16)) for layer in order for pairs in layer)
