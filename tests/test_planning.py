"""Plans against statistics whose best split is known, and against searches that try everything."""

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise, product

import numpy as np
import pytest
import torch

from kvlatent.planning.figure import draw_error_curve
from kvlatent.planning.layer_groups import GROUPS, group_layers
from kvlatent.planning.predicted_errors import ALIGNED_SHARE, predicted_errors
from kvlatent.planning.width_plan import SHARES, WidthPlan, error_curve, plan
from kvlatent.selection.statistics import LayerStatistics, Statistics

pytestmark = pytest.mark.numerics

HEAD_DIM, PAIRS = 32, 16


def layer_of(keys, values, *, energy=1.0, heads=2):
    """A layer whose pair j adds keys[j] to the squared output error of every head when dropped, on its own, and whose
    value channel r adds values[r]; so errors are sums over what is dropped, largest kept first."""
    keys, values = (torch.as_tensor(side, dtype=torch.float64) for side in (keys, values))
    tails = values.sort().values.cumsum(0).flip(0)
    gram = torch.diag(keys).expand(heads, -1, -1).clone()
    return LayerStatistics(
        output_gram=gram,
        outputs=torch.eye(HEAD_DIM, dtype=torch.float64).expand(heads, -1, -1),
        output_means=torch.zeros(heads, HEAD_DIM, dtype=torch.float64),
        query_energy=torch.ones(heads, PAIRS, dtype=torch.float64),
        key_energy=torch.ones(1, PAIRS, dtype=torch.float64),
        value_errors=torch.cat([tails, torch.zeros(1, dtype=torch.float64)]),
        output_energy=torch.tensor(energy, dtype=torch.float64),
        head_energy=gram.sum((1, 2)),
        **dict.fromkeys(
            ("gates", "unrotated_queries", "unrotated_keys"), torch.zeros(heads, 0, 0, dtype=torch.float64)
        ),
    )


def statistics_of(*layers):
    text = torch.zeros(1, 8, dtype=torch.int32)
    return Statistics(layers, text, text, "0" * 64, num_key_value_heads=1, head_dim=HEAD_DIM)


def decaying(rate, size, scale=1.0):
    return scale * rate ** np.arange(size)


def random_statistics(num_layers, seed=0):
    generator = np.random.default_rng(seed)
    return statistics_of(
        *(
            layer_of(
                decaying(generator.uniform(0.5, 0.95), PAIRS, generator.uniform(0.05, 0.5)),
                decaying(generator.uniform(0.6, 0.98), HEAD_DIM, generator.uniform(0.02, 0.2)),
                energy=generator.uniform(0.5, 2),
            )
            for _ in range(num_layers)
        )
    )


def tails(errors):
    return sorted(errors)[::-1]


def test_predicted_errors_by_hand():
    """Two layers, two heads: keys drop both heads' shares; both sides are divided by the layer's energy."""
    keys, values = decaying(0.5, PAIRS), decaying(0.9, HEAD_DIM)
    stats = statistics_of(layer_of(keys, values, energy=4.0), layer_of(keys[::-1].copy(), values, energy=8.0))
    errors = predicted_errors(stats, aligned=False)
    for layer, energy in enumerate((4.0, 8.0)):
        for kept in (0, 1, 5, PAIRS):
            assert errors.keys[layer, kept] == pytest.approx(2 * sum(tails(keys)[kept:]) / energy, abs=1e-8)
        for kept in (0, 7, HEAD_DIM):
            assert errors.values[layer, kept] == pytest.approx(sum(tails(values)[kept:]) / energy)
    aligned = predicted_errors(stats)
    torch.testing.assert_close(aligned.keys, ALIGNED_SHARE * errors.keys)
    torch.testing.assert_close(aligned.values, errors.values)


def test_a_shared_table_costs_more():
    """Heads of a layer here agree and layers do not, so only the table for the model has a price."""
    keys, values = decaying(0.5, PAIRS), decaying(0.9, HEAD_DIM)
    stats = statistics_of(layer_of(keys, values), layer_of(keys[::-1].copy(), values))
    head, layer, model = (predicted_errors(stats, table).keys.mean(0) for table in ("head", "layer", "model"))
    torch.testing.assert_close(head, layer, atol=1e-7, rtol=0)
    assert (model[1:-1] > 1.4 * head[1:-1]).all()
    assert model[0] == pytest.approx(float(head[0])) and model[-1] == 0
    assert plan(stats, 0.5, table="model").error > plan(stats, 0.5).error


@pytest.mark.parametrize("kv", [0.125, 0.28, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_split_by_trying_all(kv, aligned):
    stats = random_statistics(3)
    errors = predicted_errors(stats, aligned=aligned)
    found = plan(stats, kv, aligned=aligned)
    widths = range(4, HEAD_DIM + 1, 4)
    least = min(
        float((errors.keys[:, d_qk // 2] + errors.values[:, d_vo]).mean())
        for d_qk, d_vo in product(widths, widths)
        if d_qk + d_vo <= kv * 2 * HEAD_DIM and 3 * d_vo <= 5 * d_qk and 3 * d_qk <= 5 * d_vo
    )
    assert found.error == pytest.approx(least)
    assert found.share <= kv and found.d_qk % 4 == found.d_vo % 4 == 0
    assert found.key_error == pytest.approx(float(errors.keys[:, found.d_qk // 2].mean()))
    assert found.value_error == pytest.approx(float(errors.values[:, found.d_vo].mean()))


def test_the_side_that_matters_gets_the_room():
    flat, steep = decaying(0.99, HEAD_DIM, 0.1), decaying(0.3, HEAD_DIM, 0.1)
    for_keys = plan(statistics_of(layer_of(flat[:PAIRS], steep)), 0.5)
    assert (for_keys.d_qk, for_keys.d_vo) == (20, 12)  # not 28 and 4: see candidates.py
    for_values = plan(statistics_of(layer_of(steep[:PAIRS], flat)), 0.5)
    assert for_values.d_qk < 16 < for_values.d_vo


def test_ties_go_to_the_symmetric_split():
    nothing = statistics_of(layer_of(np.zeros(PAIRS), np.zeros(HEAD_DIM)))
    assert (plan(nothing, 0.5).d_qk, plan(nothing, 0.5).d_vo) == (16, 16)
    assert (plan(nothing, 0.6).d_qk, plan(nothing, 0.6).d_vo) == (16, 16)  # 38.4 channels: 19.2 each


def test_the_whole_cache_has_no_error():
    whole = plan(random_statistics(2), 1)
    assert (whole.d_qk, whole.d_vo, whole.error, whole.share) == (HEAD_DIM, HEAD_DIM, 0, 1)


def test_an_engine_changes_the_plan():
    stats = statistics_of(layer_of(decaying(0.99, PAIRS, 0.1), decaying(0.3, HEAD_DIM, 0.1)))
    free = plan(stats, 0.5)
    assert free.d_qk % 8 and free.table == "head"
    own = plan(stats, 0.5, engine="transformers")
    assert own.d_qk % 8 == own.d_vo % 8 == 0 and own.table == "head"
    stock = plan(stats, 0.5, engine="mlx")
    assert (stock.d_qk, stock.d_vo, stock.table) == (16, 16, "model")
    assert "mlx" in stock.engines()["model"] and stock.engines()["head"] == ("transformers", "openvino")
    assert plan(stats, 0.5, engine="openvino").table == "head"
    assert plan(stats, 0.5, engine="openvino", table="model").table == "model"
    assert plan(stats, 1, engine="vllm").d_qk == 32
    assert plan(stats, 0.5, symmetric=True).d_qk == plan(stats, 0.5, symmetric=True).d_vo == 16
    assert plan(stats, 0.5, multiple=6).d_qk % 6 == 0


def test_error_falls_with_the_budget_and_the_best_split_leads():
    stats = random_statistics(3)
    curve = error_curve(stats)
    assert [point.kv for point in curve] == list(SHARES)
    for before, after in pairwise(curve):
        assert after.best.error <= before.best.error and after.symmetric.error <= before.symmetric.error
    for point in curve:
        assert point.best == plan(stats, point.kv) and point.best.error <= point.symmetric.error
        assert point.symmetric == plan(stats, point.kv, symmetric=True)
        assert point.symmetric.d_qk == point.symmetric.d_vo
    assert any(point.best.error < 0.9 * point.symmetric.error for point in curve)
    assert min(point.kv for point in error_curve(stats, engine="mlx")) == 0.25  # 8 of 32 channels
    assert [point.kv for point in error_curve(stats, [0.3, 0.6])] == [0.3, 0.6]


@pytest.mark.parametrize("num_layers", [1, 4, 9])
@pytest.mark.parametrize("kv", [0.25, 0.5, 0.8])
def test_layers_may_differ(num_layers, kv):
    stats = random_statistics(num_layers, seed=num_layers)
    uniform, mixed = plan(stats, kv), plan(stats, kv, per_layer=True)
    keys, values = ([w] * num_layers if isinstance(w, int) else list(w) for w in (mixed.d_qk, mixed.d_vo))
    assert len(set(zip(keys, values, strict=True))) <= 3
    assert sum(keys) + sum(values) <= kv * 2 * HEAD_DIM * num_layers
    assert mixed.share == (sum(keys) + sum(values)) / (2 * HEAD_DIM * num_layers) <= kv
    assert all(uniform.d_qk <= 2 * width <= 4 * uniform.d_qk and width % 4 == 0 for width in keys)
    assert all(uniform.d_vo <= 2 * width <= 4 * uniform.d_vo and width % 4 == 0 for width in values)
    errors = predicted_errors(stats)
    summed = sum(errors.keys[i, keys[i] // 2] + errors.values[i, values[i]] for i in range(num_layers))
    assert mixed.error == pytest.approx(float(summed) / num_layers)
    if num_layers == 9:
        assert mixed.error < 0.95 * uniform.error
        assert mixed.engines()["head"] == ("transformers",)
    assert mixed.error <= uniform.error


def test_equal_layers_stay_equal():
    layer = layer_of(decaying(0.8, PAIRS, 0.1), decaying(0.9, HEAD_DIM, 0.1))
    assert plan(statistics_of(layer, layer, layer), 0.5, per_layer=True) == plan(
        statistics_of(layer, layer, layer), 0.5
    )


def test_layers_may_differ_and_stay_symmetric():
    mixed = plan(random_statistics(5), 0.5, per_layer=True, symmetric=True)
    assert isinstance(mixed.d_qk, tuple) and mixed.d_qk == mixed.d_vo


@pytest.mark.parametrize("num_layers", [2, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_grouping_by_trying_all(num_layers, seed):
    """The brute force assigns every set of three options by a knapsack over costs; nothing is cut or moved."""
    generator = np.random.default_rng(seed)
    costs = [4, 8, 8, 12, 20]
    errors = np.sort(generator.random((num_layers, 5)) * generator.uniform(0.1, 3, (num_layers, 1)))[:, ::-1]
    room = 9 * num_layers
    least = np.inf
    for options in combinations_with_replacement(range(5), GROUPS):
        table = {0: 0.0}
        for row in errors:
            grown: dict[int, float] = {}
            for (spent, error), option in product(table.items(), set(options)):
                cost = spent + costs[option]
                grown[cost] = min(grown.get(cost, np.inf), error + row[option])
            table = grown
        least = min([least, *(error for spent, error in table.items() if spent <= room)])
    chosen = group_layers(errors, costs, room)
    assert len(set(chosen)) <= GROUPS and sum(costs[option] for option in chosen) <= room
    found = sum(row[option] for row, option in zip(errors, chosen, strict=True))
    assert found == pytest.approx(least) if num_layers < 7 else found <= 1.02 * least


def test_grouping_without_room():
    with pytest.raises(ValueError, match="3 layers cost at least 4 each, 12 in all: got room for 11"):
        group_layers(np.ones((3, 2)), [4, 8], 11)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kv": 0}, r"--kv is the share of the cache to keep and lies in \(0, 1\]: got 0; try 0.5"),
        ({"kv": 1.5}, r"lies in \(0, 1\]: got 1.5; try 0.5"),
        ({"kv": 0.1}, r"--kv 0.1 of head_dim=32 leaves 6.4 channels .* smallest widths are d_qk=4 and d_vo=4; try 0.125 or"),
        ({"kv": 0.2, "engine": "mlx"}, r"smallest widths of engine mlx are d_qk=8 and d_vo=8; try 0.25 or more"),
        ({"kv": 0.5, "engine": "vllm"}, r"smallest widths of engine vllm are d_qk=32 and d_vo=32; try 1 or more"),
        ({"engine": "vlm"}, r"unknown engine 'vlm'; did you mean vllm\?"),
        ({"engine": "mlx", "table": "head"}, "one rotary table per model: got one per head; use --table model"),
        ({"table": "row"}, "unknown table 'row'; choose one of head, layer, model"),
        ({"engine": "mlx", "table": "model", "per_layer": True}, "mlx needs the same widths in every layer.*leave --per-layer out"),
        ({"table": "model", "per_layer": True}, "one rotary table for the model needs one d_qk .*use --table layer or head"),
        ({"multiple": 3}, "a multiple of widths is a positive even number up to head_dim=32: got 3; try 4"),
        ({"multiple": 64}, "up to head_dim=32: got 64; try 4"),
        ({"multiple": 4, "engine": "mlx"}, "mlx needs widths that are multiples of 8: got multiples of 4; try 8"),
    ],
)  # fmt: skip
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        plan(random_statistics(1), **arguments)
    assert "\n" not in str(caught.value)


def test_a_head_too_narrow_for_the_engine():
    narrow = replace(random_statistics(1), head_dim=16)
    with pytest.raises(
        ValueError, match="smallest width of engine vllm is 32: got head_dim=16; choose another"
    ):
        plan(narrow, 1, engine="vllm")


@pytest.mark.parametrize("damage", ["energy", "gram", "values"])
def test_statistics_that_say_nothing(damage):
    sound = layer_of(decaying(0.5, PAIRS), decaying(0.9, HEAD_DIM))
    damaged = {
        "energy": replace(sound, output_energy=torch.tensor(0.0, dtype=torch.float64)),
        "gram": replace(sound, output_gram=sound.output_gram * float("nan")),
        "values": replace(sound, value_errors=sound.value_errors * float("inf")),
    }[damage]
    with pytest.raises(
        ValueError, match=r"above 0: got energy [01] in layer 1; calibrate again, on other text"
    ):
        plan(statistics_of(sound, damaged))


def test_summary():
    summary = WidthPlan(0.5, (8, 12), 4, 0.1, 0.2, 16).summary("llama")
    assert summary["d_qk"] == [8, 12] and summary["d_vo"] == 4
    assert summary["share"] == (10 + 4) / 32
    assert summary["predicted_error"]["total"] == pytest.approx(0.3)
    assert summary["engines"] == {scope: ["transformers"] for scope in ("head", "layer", "model")}


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    curve = error_curve(random_statistics(2))
    first = draw_error_curve(curve, tmp_path / "curve.svg", title="toy").read_bytes()
    assert b"<svg" in first and "best split" in first.decode()
    assert draw_error_curve(curve, tmp_path / "again.svg", title="toy").read_bytes() == first
    assert draw_error_curve(curve, tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="choose another name or pass overwrite"):
        draw_error_curve(curve, tmp_path / "curve.svg")
    draw_error_curve(curve, tmp_path / "curve.svg", overwrite=True)
    with pytest.raises(ValueError, match="needs a budget with an error above 0: got 1 budgets, 0 with one"):
        draw_error_curve(curve[-1:], tmp_path / "none.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.svg", "curve.png", "curve.svg"]


def test_picture_refusals(tmp_path, monkeypatch):
    curve = error_curve(random_statistics(1), [0.5])
    with pytest.raises(ValueError, match=r"one of svg, png, pdf: got 'curve.jpg'; try curve.svg"):
        draw_error_curve(curve, tmp_path / "curve.jpg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs matplotlib; pip install 'kvlatent\[lab\]'"):
        draw_error_curve(curve, tmp_path / "curve.svg")
