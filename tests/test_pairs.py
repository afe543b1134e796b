"""The search for pairs and the gains against least squares, brute force and a slow oracle."""

import dataclasses
from itertools import combinations

import pytest
import torch

from kvlatent.selection.pair_search import pair_gains, search
from kvlatent.selection.pairs import SCOPES, choose_pairs, key_errors, scope_errors, strongest_pairs
from kvlatent.selection.statistics import LayerStatistics, Statistics

pytestmark = pytest.mark.numerics

P = 8


def gram(seed, pairs=P, samples=40, members=1):
    """Random positive definite matrices [M, P, P] with correlated, unequal pairs, and their roots X: G = X^T X."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(members, samples, pairs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(pairs, pairs, generator=generator, dtype=torch.float64)
    x = x * torch.exp(0.7 * torch.randn(members, 1, pairs, generator=generator, dtype=torch.float64))
    return x.mT @ x, x


def least_error(matrix, kept):
    """min over a supported on `kept` of (1 - a)^T G (1 - a), by least squares."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(0).sqrt()[:, None] * vectors.T
    target = root.sum(1, keepdim=True)
    if not kept:
        return float(target.square().sum())
    inner = root[:, list(kept)]
    return float((target - inner @ torch.linalg.lstsq(inner, target).solution).square().sum())


def summed(grams, kept):
    return sum(least_error(one, kept) for one in grams)


def brute_force(grams, number):
    return min(summed(grams, kept) for kept in combinations(range(grams.shape[-1]), number))


def slow_exchanges(grams, kept):
    """Exchanges of one pair, the best of all first, while one helps."""
    while True:
        now = summed(grams, kept)
        options = [
            ([k for k in kept if k != out] + [new])
            for out in kept
            for new in range(grams.shape[-1])
            if new not in kept
        ]
        best = min(options, key=lambda option: summed(grams, option))
        if summed(grams, best) >= now - 1e-7 * summed(grams, []):
            return sorted(kept)
        kept = best


@pytest.mark.parametrize("kept", [(1,), (0, 3, 6), (0, 1, 2, 4, 5, 6, 7)])
def test_gains_are_the_ridge_regression_towards_one(kept):
    grams, x = gram(3, members=3)
    grams, x = grams / 1e3, x / 1e3**0.5
    found = pair_gains(grams, kept)
    assert found.shape == (3, len(kept))
    for member in range(3):
        inner = x[member][:, list(kept)]
        ridge = 1e-3 * inner.square().sum(0).mean()
        penalty = ridge.sqrt() * torch.eye(len(kept), dtype=torch.float64)
        target = torch.cat([x[member].sum(1), ridge.sqrt() * torch.ones(len(kept), dtype=torch.float64)])
        expected = torch.linalg.lstsq(torch.cat([inner, penalty]), target[:, None]).solution[:, 0]
        torch.testing.assert_close(found[member], expected.clamp(-4, 4), rtol=1e-6, atol=1e-9)


def test_gains_come_close_to_the_smallest_possible_error():
    for seed in range(10):
        grams, _ = gram(seed)
        kept = search(grams, 4)[0]
        change = torch.ones(P, dtype=torch.float64)
        change[kept] -= pair_gains(grams, tuple(kept))[0]
        left = float(change @ grams[0] @ change)
        dropped = [j for j in range(P) if j not in kept]
        without = float(grams[0][dropped][:, dropped].sum())
        assert least_error(grams[0], kept) <= left <= min(without, 1.05 * least_error(grams[0], kept))


def test_gains_are_one_where_nothing_is_dropped_or_nothing_happens():
    grams, _ = gram(0, members=2)
    assert torch.equal(pair_gains(grams, tuple(range(P))), torch.ones(2, P, dtype=torch.float64))
    for zero in (torch.zeros(2, P, P, dtype=torch.float64), torch.diag(torch.ones(P).double())[None]):
        assert (pair_gains(zero, (1, 2)) == 1).all()


def test_gains_are_limited():
    x = torch.tensor([[0.1, 1.0], [0.0, 0.1]]).double()
    assert pair_gains((x.T @ x)[None], (0,)).item() == 4
    x[0, 1] = -1
    assert pair_gains((x.T @ x)[None], (0,)).item() == -4


@pytest.mark.parametrize("members", [1, 3])
def test_the_greedy_path_adds_the_best_pair_each_time(members):
    for seed in range(5):
        grams, _ = gram(seed, members=members)
        path, expected, kept = search(grams, P, exchange=False)[1], [summed(grams, [])], []
        for _ in range(P):
            kept.append(min((j for j in range(P) if j not in kept), key=lambda j: summed(grams, [*kept, j])))
            expected.append(summed(grams, kept))
        scale = expected[0]
        assert path == pytest.approx(expected, rel=1e-4, abs=1e-6 * scale)
        for number in (1, 3, 5):
            assert search(grams, number, exchange=False)[1] == pytest.approx(path[: number + 1], rel=1e-6)


@pytest.mark.parametrize("members", [1, 2])
def test_exchanges_never_lose_and_mostly_find_the_best_set(members):
    hits, better = 0, 0
    for seed in range(24):
        grams, _ = gram(seed, members=members)
        greedy, before = search(grams, 3, exchange=False)
        found, errors = search(grams, 3)
        assert found == sorted(set(found)) and len(found) == 3 and len(errors) == 4
        assert errors[:3] == before[:3]  # the path is the greedy one; the last is that of the set
        assert errors[3] == pytest.approx(summed(grams, found), rel=1e-4, abs=1e-6 * errors[0])
        assert errors[3] <= before[3] * (1 + 1e-9)
        assert summed(grams, found) == pytest.approx(summed(grams, slow_exchanges(grams, greedy)), rel=1e-6)
        best = brute_force(grams, 3)
        assert summed(grams, found) >= best * (1 - 1e-9)
        hits += summed(grams, found) <= best * (1 + 1e-6)
        better += errors[3] < before[3] * (1 - 1e-6)
    assert hits >= 20 and better >= 3


def test_degenerate_matrices_are_searched_without_numerical_accidents():
    zero = torch.zeros(1, P, P, dtype=torch.float64)
    for number in (0, 3, P):
        found, errors = search(zero, number)
        assert len(found) == number and max(errors) < 1e-12
    grams, _ = gram(1)
    with_dead_head = search(torch.cat([grams, zero]), 3)
    assert with_dead_head[0] == search(grams, 3)[0]
    one = torch.ones(1, P, P, dtype=torch.float64)  # all pairs do the same: one suffices
    found, errors = search(one, 2)
    assert len(set(found)) == 2 and errors[1] < 1e-6 * errors[0]
    rank_two, _ = gram(2, samples=2)
    found, errors = search(rank_two, 4)
    assert len(set(found)) == 4 and 0 <= errors[-1] < 1e-5 * errors[0]


LAYERS, HEADS, KV_HEADS = 3, 4, 2


def statistics(seed=0, energies=(1.0, 5.0, 0.01)):
    """Random Gram matrices for a model of 3 layers, 4 query heads and 2 key-value heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    layers = []
    for layer, energy in enumerate(energies):
        grams, _ = gram(10 * seed + layer, members=HEADS)
        layers.append(
            LayerStatistics(
                output_gram=grams * energy / grams.sum(),
                outputs=torch.zeros(HEADS, 2 * P, 2 * P),
                output_means=torch.zeros(HEADS, 2 * P),
                query_energy=draw(HEADS, P),
                key_energy=draw(KV_HEADS, P),
                value_errors=torch.zeros(2 * P + 1),
                output_energy=torch.tensor(energy, dtype=torch.float64),
                head_energy=energy * draw(HEADS),
                **dict.fromkeys(("gates", "unrotated_queries", "unrotated_keys"), torch.zeros(HEADS, 0, 0)),
            )
        )
    ids = torch.zeros(1, 8, dtype=torch.int32)
    return Statistics(tuple(layers), ids, ids, "none", KV_HEADS, 2 * P)


def relative(layer):
    return layer.output_gram / layer.output_energy


def weighted(layer):
    """Every head's matrix as shares of its sum, times what the head puts out, one head at a time."""
    pairs = zip(layer.output_gram, layer.head_energy, strict=True)
    return torch.stack([energy * gram / float(gram.sum()) for gram, energy in pairs])


def test_each_head_searches_the_matrices_of_its_group():
    found = choose_pairs(statistics(), 6)
    assert [len(layer) for layer in found] == [KV_HEADS] * LAYERS
    for layer, kept in zip(statistics().layers, found, strict=True):
        for head in range(KV_HEADS):
            group = weighted(layer)[2 * head : 2 * head + 2]
            assert list(kept[head]) == search(group, 3)[0]
    assert len({kept for layer in found for kept in layer}) > 1


def test_a_layer_or_the_model_shares_one_set():
    layers = statistics().layers
    for layer, kept in zip(layers, choose_pairs(statistics(), 6, "layer"), strict=True):
        assert [list(one) for one in kept] == [search(weighted(layer), 3)[0]]
    found = choose_pairs(statistics(), 6, "model")
    together = torch.cat([weighted(layer) for layer in layers])  # all layers write to one stream
    assert found == ((tuple(search(together, 3)[0]),),)
    assert found != choose_pairs(dataclasses.replace(statistics(), layers=layers[:1]), 6, "model")


def test_a_sharp_head_counts_by_what_it_puts_out_not_by_its_vanishing_variance():
    """The variance under nearly one-hot attention is next to 0: a set shared with such a head keeps its pairs all the same."""
    given = statistics()
    sharp, loud = given.layers[0].output_gram[0], given.layers[0].output_gram[1]
    alone = search(sharp[None], 3)[0]
    layer = dataclasses.replace(
        given.layers[0],
        output_gram=torch.stack([1e-9 * sharp, loud, *given.layers[0].output_gram[2:]]),
        head_energy=torch.tensor([1e6, 1.0, *[1.0] * (HEADS - 2)], dtype=torch.float64),
    )
    found = choose_pairs(dataclasses.replace(given, layers=(layer,)), 6)[0][0]
    assert list(found) == alone != search(torch.stack([1e-9 * sharp, loud]), 3)[0]


def test_widths_differ_by_layer():
    found = choose_pairs(statistics(), (4, 16, 8))
    assert [[len(kept) for kept in layer] for layer in found] == [[2, 2], [8, 8], [4, 4]]
    assert found[1][0] == tuple(range(P))
    uniform = choose_pairs(statistics(), 8)
    assert found[2] == uniform[2]
    assert [len(layer) for layer in choose_pairs(statistics(), (4, 16, 8), "layer")] == [1, 1, 1]
    assert choose_pairs(statistics(), (6, 6, 6), "model") == choose_pairs(statistics(), 6, "model")
    with pytest.raises(
        ValueError, match="one rotary table for the model needs one key width: got d_qk from 4 to 16; use "
    ):
        choose_pairs(statistics(), (4, 16, 8), "model")


def test_unknown_scopes_and_rules_are_refused():
    for rule in ("gram", "energy"):
        with pytest.raises(ValueError, match="unknown table scope 'room'; choose one of head, layer, model"):
            choose_pairs(statistics(), 6, "room", rule)
    with pytest.raises(ValueError, match="unknown pair rule 'luck'; choose one of gram, energy"):
        choose_pairs(statistics(), 6, rule="luck")


def test_the_energy_rule_is_the_2_norm_rule_of_mha2mla():
    given = statistics()
    energies = [
        torch.stack(
            [
                sum(layer.query_energy[h] * layer.key_energy[k] for h in (2 * k, 2 * k + 1))
                for k in range(KV_HEADS)
            ]
        )
        for layer in given.layers
    ]
    for scope in SCOPES:
        found = choose_pairs(given, 6, scope, "energy")
        assert found == strongest_pairs(energies, 6, scope)
        for layer, sets in enumerate(found):
            for head, kept in enumerate(sets):
                layer_sum, model_sum = energies[layer].sum(0), sum(energies).sum(0)
                mine = {"head": energies[layer][head], "layer": layer_sum, "model": model_sum}[scope]
                assert list(kept) == sorted(kept)
                assert mine[list(kept)].min() >= mine[[j for j in range(P) if j not in kept]].max()


def test_key_errors_are_those_of_the_greedy_path_of_every_head():
    given = statistics()
    errors = key_errors(given)
    assert errors.shape == (LAYERS, P + 1) and errors.dtype == torch.float64
    assert (errors.diff(dim=1) <= 0).all() and (errors[:, -1] <= 1e-6 * errors[:, 0]).all()
    for layer, row in zip(given.layers, errors, strict=True):
        groups = layer.output_gram.split(2)
        assert float(row[0]) == pytest.approx(float(layer.output_gram.sum()), rel=1e-6)
        for number in (1, 4):
            kept = [search(group, number, exchange=False)[0] for group in groups]
            expected = sum(summed(*pair) for pair in zip(groups, kept, strict=True))
            assert float(row[number]) == pytest.approx(expected, rel=1e-3, abs=1e-6 * float(row[0]))


@pytest.mark.parametrize("d_qk", [6, (4, 16, 8)])
def test_scope_errors_are_those_of_the_chosen_sets_and_sharing_costs(d_qk):
    given = statistics()
    found = scope_errors(given, d_qk)
    assert list(found) == (["head", "layer", "model"] if d_qk == 6 else ["head", "layer"])
    for scope, price in found.items():
        sets = choose_pairs(given, d_qk, scope)
        expected = 0.0
        for index, layer in enumerate(given.layers):
            kept = sets[index % len(sets)]
            for head, grams in enumerate(relative(layer).split(2)):
                expected += summed(grams, kept[head % len(kept)]) / LAYERS
        assert price == pytest.approx(expected, rel=1e-3, abs=1e-7)
    prices = list(found.values())
    assert prices == sorted(prices) and prices[0] < prices[-1]


def test_a_layer_that_puts_out_nothing_breaks_nothing():
    given = statistics()
    dead = dataclasses.replace(
        given.layers[1],
        output_gram=torch.zeros_like(given.layers[1].output_gram),
        output_energy=torch.zeros((), dtype=torch.float64),
        head_energy=torch.zeros(HEADS, dtype=torch.float64),
    )
    given = dataclasses.replace(given, layers=(given.layers[0], dead, given.layers[2]))
    for scope in SCOPES:
        assert all(len(kept) == 3 for layer in choose_pairs(given, 6, scope) for kept in layer)
    assert key_errors(given).isfinite().all() and all(price >= 0 for price in scope_errors(given, 6).values())
