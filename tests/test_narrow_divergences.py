"""What one narrow side of one layer costs the whole model: against whole conversions, and as curves for a plan."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from calibration_setup import realistic_model, short_descent, text
from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.narrow_divergences import SIDES, narrow_divergences
from kvlatent.planning.layer_groups import best_options
from kvlatent.planning.predicted_errors import MEASURED, measured_errors
from kvlatent.planning.width_plan import plan
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import resolve_choices
from kvlatent.text.recall_blocks import held_out_blocks
from tiny import FAMILIES, HEAD_DIM

pytestmark = pytest.mark.numerics

BATCH = text(blocks=18, length=40)
CHOICES = resolve_choices("calibrated")


def measured_of(name, choices=CHOICES):
    model = realistic_model(name).requires_grad_(False)
    model.get_output_embeddings().weight *= 5
    statistics = calibrate(model, BATCH)
    with short_descent():
        return model, statistics, narrow_divergences(model, statistics, choices)


def divergence(model, latent, block):
    ids, positions = BATCH["input_ids"][block, None], BATCH["position_ids"][block, None]
    with torch.no_grad():
        goal, given = (
            log_softmax(each(input_ids=ids, position_ids=positions, use_cache=False).logits.double(), -1)
            for each in (model, latent)
        )
    return float(kl_div(given, goal, reduction="sum", log_target=True)) / ids.numel()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_costs_what_a_conversion_of_that_layer_alone_costs(name):
    model, statistics, found = measured_of(name)
    (block,) = held_out_blocks(18)
    assert set(found) == set(SIDES) and set(found["keys"]) == {8, 12, 16, 24}
    for side, width, layer in (("keys", 8, 1), ("values", 16, 0), ("keys", 24, 2)):
        widths = [width if index == layer else HEAD_DIM for index in range(3)]
        given = {"d_qk": widths} if side == "keys" else {"d_vo": widths}
        with short_descent():
            alone = convert(model, **given, statistics=statistics, align=0, refit=False)
        assert found[side][width][layer] == pytest.approx(divergence(model, alone, block), rel=1e-3, abs=1e-7)


def test_layers_that_share_a_table_are_turned_by_it():
    model, statistics, found = measured_of("llama", resolve_choices("calibrated", table="model"))
    with short_descent():
        whole = convert(model, d_qk=8, statistics=statistics, align=0, refit=False, table="model")
        first = narrow_divergences(
            model, statistics, resolve_choices("calibrated", table="model"), per_layer=False
        )
    (block,) = held_out_blocks(18)
    assert first["keys"][8][0] == pytest.approx(divergence(model, whole, block), rel=1e-3)
    assert len(found["keys"][8]) == 3 and all(each >= 0 for each in found["keys"][8])


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
def test_all_layers_cost_what_a_conversion_costs(name):
    model, statistics, _ = measured_of(name)
    with short_descent():
        found = narrow_divergences(model, statistics, CHOICES, per_layer=False)
        whole = convert(model, d_qk=12, statistics=statistics, align=0, refit=False)
    (block,) = held_out_blocks(18)
    assert {len(each) for side in found.values() for each in side.values()} == {1}
    assert found["keys"][12][0] == pytest.approx(divergence(model, whole, block), rel=1e-3)


def test_the_model_is_left_as_it_was():
    model = realistic_model("llama").requires_grad_(False)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = calibrate(model, BATCH)
    with short_descent():
        narrow_divergences(model, statistics, CHOICES)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_curves_go_through_what_was_measured_and_end_at_nothing():
    found = {"keys": {8: [0.4, 0.2], 16: [0.1, 0.02]}, "values": {8: [0.3, 0.3], 24: [0.03, 0.1]}}
    errors = measured_errors(found, 32, "head")
    assert errors.unit == MEASURED and not errors.aligned
    assert errors.keys.shape == (2, 17) and errors.values.shape == (2, 33)
    assert errors.keys[:, 4].tolist() == pytest.approx([0.4, 0.2])
    assert errors.keys[:, 8].tolist() == pytest.approx([0.1, 0.02])
    assert errors.values[:, 24].tolist() == pytest.approx([0.03, 0.1])
    assert errors.keys[0, 6] == pytest.approx(0.2)  # halfway, on a logarithmic scale
    assert errors.values[0, 16] == pytest.approx((0.3 * 0.03) ** 0.5)
    assert errors.keys[0, 12] == pytest.approx(0.1 / 4)  # the line goes on
    assert (errors.keys[:, -1] == 0).all() and (errors.values[:, -1] == 0).all()
    assert (errors.keys.diff() <= 0).all()


def test_a_plan_gives_a_layer_what_it_was_measured_to_need():
    model = realistic_model("llama")
    statistics = calibrate(model, BATCH)
    found = {
        "keys": {8: [0.01, 0.9, 0.01], 24: [0.001, 0.09, 0.001]},
        "values": {8: [0.02, 0.02, 0.02], 24: [0.002, 0.002, 0.002]},
    }
    errors = measured_errors(found, HEAD_DIM, "head")
    planned = plan(statistics, 0.5, per_layer=True, measured=errors)
    assert planned.d_qk[1] > planned.d_qk[0] and planned.share <= 0.5
    assert planned.summary()["predicted_error"]["unit"] == MEASURED
    with pytest.raises(ValueError, match="got table=head for a plan with table=layer"):
        plan(statistics, 0.5, table="layer", measured=errors)


@pytest.mark.parametrize("room", [12, 20, 31, 60])
def test_the_best_options_are_those_of_trying_all(room):
    errors = np.random.default_rng(room).random((4, 5))
    costs = [3, 6, 9, 12, 15]
    errors.sort(axis=1)
    errors = errors[:, ::-1].copy()
    chosen = best_options(errors, costs, room)
    assert sum(costs[option] for option in chosen) <= room
    fitting = (c for c in product(range(5), repeat=4) if sum(costs[o] for o in c) <= room)
    least = min(sum(errors[layer, o] for layer, o in enumerate(c)) for c in fitting)
    assert sum(errors[layer, o] for layer, o in enumerate(chosen)) == pytest.approx(least)


def test_no_options_fit_too_little_room():
    with pytest.raises(ValueError, match="4 layers cost at least 3 each, 12 in all: got room for 11"):
        best_options(np.ones((4, 2)), [3, 6], 11)
