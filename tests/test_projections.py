"""The closed-form narrow weights, by what they do: logits are gains times kept pairs, values are least squares."""

import dataclasses
from dataclasses import replace
from functools import cache

import pytest
import torch

from calibration_setup import (
    PAIRS,
    layer_inputs,
    output_weights,
    projected,
    realistic_model,
    short_descent,
    slow_rows,
    text,
    turned,
)
from kvlatent.conversion.attention_weights import kept_pairs
from kvlatent.conversion.convert_model import convert
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import effective_table
from kvlatent.model.rotary import apply_rotary
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.pair_search import pair_gains
from kvlatent.selection.pairs import choose_pairs
from kvlatent.selection.paper_rules import pairs_to_channels, stride_channels
from kvlatent.selection.value_bases import best_outputs, output_error, value_basis
from tiny import FAMILIES, HEAD_DIM, tiny_model
from tolerances import assert_close_to_scale

pytestmark = pytest.mark.numerics

CLOSED_FORM = {"align": 0, "refit": False}
BATCH = text(blocks=5, length=40)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with short_descent():
        yield


def gathered(model):
    return calibrate(model, BATCH, rows=12)


@cache
def source(name):
    """A realistic model and its statistics, made once; conversions do not change it."""
    model = realistic_model(name)
    return model, gathered(model)


def latent_logits(latent, hidden, positions, layer):
    """q^T k times the scale of one layer, before masks: [N, T, T]."""
    attention = latent.model.layers[layer].self_attn
    with torch.no_grad():
        query, key, *_ = attention.project(hidden[None])
        rotary = attention.rotary or latent.model.rotary_emb
        cos, sin = rotary(hidden[None], positions[None])
        query, key = apply_rotary(query, cos, sin)[0], apply_rotary(key, cos, sin)[0]
    return query @ key.repeat_interleave(len(query) // len(key), 0).mT * attention.scaling


OTHER_CHOICES = [
    {"table": "layer"},
    {"table": "model", "gains": False},
    {"preset": "own-frequency", "gains": True},
    {"preset": "own-frequency", "keys": "matched", "gains": True},
]


@pytest.mark.parametrize(
    ("name", "choices"),
    [(name, {"table": "head"}) for name in FAMILIES]
    + [(name, c) for name in ("llama", "llama-yarn", "qwen3-window", "phi3-longrope") for c in OTHER_CHOICES],
)
def test_logits_are_gains_times_kept_pairs_at_the_original_scale(name, choices):
    model, statistics = source(name)
    named = {**CLOSED_FORM, **choices}
    chosen = replace(resolve_choices(named.pop("preset", "calibrated"), **named), unrotated="selected")
    latent = convert(model, d_qk=16, statistics=statistics, choices=chosen)
    config, table = latent_config_of(latent.config), effective_table(model.config)
    layer, groups = 1, model.config.num_attention_heads // model.config.num_key_value_heads
    hidden, positions = layer_inputs(model, BATCH, layer)[0], BATCH["position_ids"][0]
    q, k, _ = projected(model, hidden, layer)
    q, k = turned(q, positions, table), turned(k, positions, table)
    found = latent_logits(latent, hidden, positions, layer)
    for head in range(q.shape[1]):
        sets = config.channels_at(layer)
        channels = sets[head // groups % len(sets)]
        pairs = sorted({_pair(c, table.rotary_dim) for c in channels})
        both = pairs_to_channels(tuple(pairs), table.rotary_dim, HEAD_DIM)
        assert len(pairs) == 8 and sorted(channels) == sorted(both)
        a = torch.zeros(PAIRS).double()
        grams = statistics.layers[layer].output_gram[head, None]
        a[pairs] = pair_gains(grams, tuple(pairs))[0] if choices.get("gains", True) else 1.0
        expected = torch.einsum("tp,p,sp->ts", q[:, head], a.to(q.dtype), k[:, head // groups].conj()).real
        assert_close_to_scale(found[head].double(), expected * HEAD_DIM**-0.5, 1e-4)


def _pair(channel, rotary_dim):
    if channel < rotary_dim:
        return channel % (rotary_dim // 2)
    return rotary_dim // 2 + (channel - rotary_dim) % ((HEAD_DIM - rotary_dim) // 2)


def test_the_pair_behind_a_channel_in_both_layouts():
    pairs = (1, 5, 6, 9)  # six rotated pairs, four that pass
    assert kept_pairs(pairs_to_channels(pairs, 12, 20), 12, 20) == (1, 5, 6, 9, 1, 5, 6, 9)
    assert kept_pairs(tuple(range(12)), 12, 12) == (*range(6), *range(6))
    stride = (*pairs_to_channels((0, 3), 12), *(12 + c for c in stride_channels("d_qk", 4, 8)))
    assert kept_pairs(stride, 12, 20) == (0, 3, 0, 3, 6, 8, 6, 8)


def test_gains_of_a_sliced_qk_norm_are_shared_and_sit_in_the_norm():
    model, statistics = source("qwen3")
    wide, narrow = (
        convert(
            model, d_qk=16, table="layer", qk_norm="sliced", gains=g, statistics=statistics, **CLOSED_FORM
        )
        for g in (False, True)
    )
    for layer in range(3):
        before, after = (m.model.layers[layer].self_attn for m in (wide, narrow))
        (channels,) = latent_config_of(narrow.config).channels_at(layer)
        grams = statistics.layers[layer].output_gram.sum(0, keepdim=True)
        gains = pair_gains(grams, channels[:8])[0].repeat(2).float()
        torch.testing.assert_close(after.q_norm.weight, before.q_norm.weight * gains)
        assert torch.equal(after.q_proj.weight, before.q_proj.weight)
        assert torch.equal(after.k_norm.weight, before.k_norm.weight)


def reads(model, layer):
    """What enters the output projection of the original: y, [tokens, N, d] in float64."""
    rows = sorted(slow_rows(model, BATCH, layer), key=lambda r: (r.block, r.position, r.head))
    heads = model.config.num_attention_heads
    return torch.stack([row.weights @ row.values for row in rows]).unflatten(0, (-1, heads))


def narrow_pieces(latent, layer, model):
    """P x W_V [K, d_vo, D], value bias [K, d_vo] or None, W_O' [N, D, d_vo] of a converted layer, in float64."""
    attention = latent.model.layers[layer].self_attn
    state = {name: tensor.double() for name, tensor in attention.state_dict().items()}
    if "qkv_proj.weight" in state:
        state["v_proj.weight"] = state["qkv_proj.weight"].split(attention.widths)[2]
    bias = state.get("v_proj.bias")
    return (
        state["v_proj.weight"].unflatten(0, (-1, attention.d_vo)),
        None if bias is None else bias.unflatten(0, (-1, attention.d_vo)),
        state["o_proj.weight"].unflatten(1, (-1, attention.d_vo)).transpose(0, 1),
    )


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "qwen3-window", "phi3"])
def test_values_keep_a_basis_and_outputs_read_it_by_least_squares(name):
    (model, statistics), layer = source(name), 1
    latent = convert(model, d_vo=12, statistics=statistics, **CLOSED_FORM)
    value, bias, output = narrow_pieces(latent, layer, model)
    w_o, one = output_weights(model, layer), statistics.layers[layer]
    groups = len(w_o) // len(value)
    hidden = layer_inputs(model, BATCH, layer).double().flatten(0, 1)
    _, _, v = projected(model, hidden, layer)
    moments = one.outputs
    if latent.model.layers[layer].self_attn.o_proj.bias is not None:
        moments = moments - one.output_means[:, :, None] * one.output_means[:, None]
    for head in range(len(value)):
        group = slice(groups * head, groups * (head + 1))
        basis = value_basis(w_o[group], moments[group], 12)
        kept = hidden @ value[head].T + (0 if bias is None else bias[head])
        assert_close_to_scale(kept, v[:, head] @ basis.T, 1e-4)
        expected = best_outputs(w_o[group], moments[group], basis)
        assert_close_to_scale(output[group], expected, 1e-3)


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "phi3-window"])
@pytest.mark.parametrize("width", [4, 24])
def test_the_predicted_value_errors_are_what_happens_on_the_text(name, width):
    (model, statistics), layer = source(name), 2
    latent = convert(model, d_vo=width, statistics=statistics, **CLOSED_FORM)
    value, _, output = narrow_pieces(latent, layer, model)
    w_o, y, one = output_weights(model, layer), reads(model, layer), statistics.layers[layer]
    groups, total = len(w_o) // len(value), 0.0
    for head in range(len(w_o)):
        group = slice(head // groups * groups, head // groups * groups + groups)
        basis = value_basis(w_o[group], one.outputs[group], width)
        left = y[:, head] @ w_o[head].T - y[:, head] @ basis.T @ output[head].T
        error = float(left.square().sum(1).mean())
        metric = w_o[head, None].mT @ w_o[head, None]
        predicted = float(output_error(basis, metric, one.outputs[head, None]))
        assert error == pytest.approx(predicted, rel=0.05)
        total += error
    predicted = float(one.value_errors[width])
    assert 0.5 * predicted < total <= 1.02 * predicted  # the descent of a group may do better


@pytest.mark.parametrize("name", ["llama", "qwen3-window"])
def test_an_output_bias_takes_the_mean(name):
    model, statistics = source(name)
    latent = convert(model, d_vo=4, statistics=statistics, **CLOSED_FORM)
    for layer in (0, 1, 2):
        attention, original = latent.model.layers[layer].self_attn, model.model.layers[layer].self_attn
        y, (_, _, output) = reads(model, layer), narrow_pieces(latent, layer, model)
        w_o, groups = output_weights(model, layer), 2
        # P from what it does to W_V; y' = P y holds for averages as for values.
        value = attention.v_proj.weight.double().unflatten(0, (-1, 4))
        w_v = original.v_proj.weight.double().unflatten(0, (-1, HEAD_DIM))
        left = original.o_proj.bias.double() - attention.o_proj.bias.double()
        for head in range(4):
            basis = torch.linalg.lstsq(w_v[head // groups].T, value[head // groups].T).solution.T
            left = left + (y[:, head] @ w_o[head].T - y[:, head] @ basis.T @ output[head].T).mean(0)
        scale = (y.mean(0)[:, None] @ w_o.mT).sum(0).norm()
        assert not torch.equal(attention.o_proj.bias, original.o_proj.bias) and left.norm() < 1e-3 * scale


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "phi3"])
def test_no_output_bias_is_made_where_the_architecture_has_none(name):
    model = tiny_model(name)
    latent = convert(model, d_vo=4, statistics=gathered(model), **CLOSED_FORM)
    assert latent.model.layers[0].self_attn.o_proj.bias is None
    assert set(latent.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "qwen3"])
def test_a_head_that_does_nothing_stays_finite(name):
    model = realistic_model(name)
    with torch.no_grad():
        attention = model.model.layers[1].self_attn
        fused = hasattr(attention, "qkv_proj")
        rows = attention.qkv_proj.weight[-HEAD_DIM:] if fused else attention.v_proj.weight[-HEAD_DIM:]
        rows.zero_()
        if not fused and attention.v_proj.bias is not None:
            attention.v_proj.bias[-HEAD_DIM:].zero_()
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    for choices in (CLOSED_FORM, {"align": 2}):
        latent = convert(model, d_qk=16, d_vo=16, statistics=gathered(model), **choices)
        assert all(p.isfinite().all() for p in latent.parameters())
        with torch.no_grad():
            assert latent(**BATCH).logits.isfinite().all()


def test_an_attention_that_always_gives_the_same_weighs_nothing():
    model = realistic_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()  # the bias is left
    statistics = gathered(model)
    energies = [float(layer.output_energy) for layer in statistics.layers]
    assert 0 < energies[1] < 1e-6 * min(energies[0], energies[2])
    pairs = choose_pairs(statistics, 16, "model")
    others = tuple(layer for i, layer in enumerate(statistics.layers) if i != 1)
    assert pairs == choose_pairs(dataclasses.replace(statistics, layers=others), 16, "model")
    latent = convert(model, d_qk=16, d_vo=16, table="model", align=2, statistics=statistics)
    with torch.no_grad():
        assert latent(**BATCH).logits.isfinite().all()


def test_low_precision_weights_are_rounded_once():
    model = realistic_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # both models then hold the same numbers
    exact = convert(model, d_qk=16, d_vo=8, statistics=gathered(model), **CLOSED_FORM)
    low = model.bfloat16()
    statistics = gathered(model.float())
    object.__setattr__(statistics, "fingerprint", gathered(low.bfloat16()).fingerprint)
    rounded = convert(low, d_qk=16, d_vo=8, statistics=statistics, **CLOSED_FORM)
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name
