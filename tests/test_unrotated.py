"""Key channels that no rotation touches, factored: the maps, what is counted, what is cached, and what they cost."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from calibration_setup import text
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.alignment import key_parameters
from kvlatent.conversion.convert_model import convert
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import PRESETS, Choices, resolve_choices, without_statistics
from kvlatent.selection.moment_sums import _TEMPER
from kvlatent.selection.unrotated import unrotated_maps
from tiny import HEAD_DIM, logits, tiny_model, tokens
from tolerances import assert_close_to_scale

BATCH = text(blocks=8, length=48)
CLOSED = replace(PRESETS["calibrated"], align=0, refit=False, global_steps=0, unrotated="selected")
ROTATED = {"qwen3.5": 8, "stablelm-parallel": 16, "gpt-neox-sequential": 16}
"""Toys with partial rotary, after a QK-norm and without, and how many channels rotate."""


@pytest.fixture(scope="module")
def seen():
    models = {name: tiny_model(name) for name in ROTATED}
    return {name: (model, calibrate(model, BATCH, rows=48)) for name, model in models.items()}


def factored(model, statistics, **changes):
    return convert(
        model, d_qk=16, statistics=statistics, choices=replace(CLOSED, unrotated="factored", **changes)
    )


def error_of(layer, keys, queries, groups=2):
    """sum_h tr C_q,h (1 - A^T B) C_k,h (1 - A^T B)^T, head by head."""
    total = 0.0
    for head in range(len(layer.unrotated_queries)):
        left = torch.eye(keys.shape[-1], dtype=torch.float64) - queries[head].T @ keys[head // groups]
        total += float((layer.unrotated_queries[head] * (left @ layer.unrotated_keys[head] @ left.T)).sum())
    return total


def test_maps_are_better_than_any_selection_of_channels_and_whole_at_full_width(seen):
    layer = seen["qwen3.5"][1].layers[0]
    unrotated = HEAD_DIM - ROTATED["qwen3.5"]
    whole = unrotated_maps(layer, 2, unrotated)
    product = whole.queries.transpose(1, 2) @ whole.keys.repeat_interleave(2, dim=0)
    assert_close_to_scale(product, torch.eye(unrotated, dtype=torch.float64).expand_as(product), 1e-6)
    maps = unrotated_maps(layer, 2, 6)
    found = error_of(layer, maps.keys, maps.queries)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        kept = torch.eye(unrotated, dtype=torch.float64)[torch.randperm(unrotated, generator=generator)[:6]]
        moments = layer.unrotated_keys @ kept.T
        best = torch.linalg.solve(kept @ moments, moments.transpose(1, 2))  # the queries' best for those
        assert found < error_of(layer, kept.expand(2, -1, -1), best)


def test_no_descent_from_the_maps_of_one_query_head_finds_better_ones():
    model = tiny_model("qwen3.5", num_key_value_heads=4)
    layer = calibrate(model, BATCH).layers[0]
    maps = unrotated_maps(layer, 1, 6)
    start = error_of(layer, maps.keys, maps.queries, groups=1)
    keys = maps.keys.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([keys], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        kept = layer.unrotated_keys @ keys.transpose(1, 2)
        queries = torch.linalg.solve(keys @ kept, kept.transpose(1, 2))
        left = torch.eye(keys.shape[-1], dtype=torch.float64) - queries.transpose(1, 2) @ keys
        loss = (layer.unrotated_queries * (left @ layer.unrotated_keys @ left.transpose(1, 2))).sum()
        loss.backward()
        return loss

    assert float(optimiser.step(closure).detach()) == pytest.approx(start, rel=1e-3)
    assert float(closure().detach()) > start * (1 - 1e-3)


def test_moments_are_those_of_a_slow_pass_over_every_row():
    """All rows of one document, so that nothing is sampled."""
    model = tiny_model("qwen3.5")
    ids, size = tokens(4, 40), 40
    blocks = {"input_ids": ids, "position_ids": torch.arange(size).expand(4, -1)}
    layer = calibrate(model, blocks, rows=size).layers[0]
    attention, hidden, turned = model.model.layers[1].self_attn, [], []

    def note(module, args, kwargs):
        hidden.append(kwargs["hidden_states"])
        turned.append(kwargs["position_embeddings"])

    hook = attention.register_forward_pre_hook(note, with_kwargs=True)
    logits(model, ids)
    hook.remove()
    with torch.no_grad():
        query = attention.q_norm(attention.q_proj(hidden[0]).view(4, size, 4, -1)[..., :HEAD_DIM]).transpose(
            1, 2
        )
        key = attention.k_norm(attention.k_proj(hidden[0]).view(4, size, 2, HEAD_DIM)).transpose(1, 2)
        query, key = (x.double() for x in apply_rotary_pos_emb(query, key, *turned[0]))
    for head in range(4):
        seen_queries, seen_keys = (torch.zeros(24, 24, dtype=torch.float64) for _ in range(2))
        for block in range(4):
            for row in range(size):
                q, keys = query[block, head, row], key[block, head // 2, : row + 1]
                weights = (_TEMPER * keys @ q / math.sqrt(HEAD_DIM)).softmax(0)
                idle = keys[:, 8:]
                centred = idle - weights @ idle
                seen_keys += centred.T @ (weights[:, None] * centred)
                seen_queries += torch.outer(q[8:], q[8:])
        assert_close_to_scale(layer.unrotated_keys[head], seen_keys / (4 * size), 1e-4)
        assert_close_to_scale(layer.unrotated_queries[head], seen_queries / (4 * size), 1e-4)


@pytest.mark.parametrize("table", ["head", "layer", "model"])
@pytest.mark.parametrize("name", ROTATED)
def test_factoring_costs_less_than_selecting(seen, name, table):
    model, statistics = seen[name]
    ids = tokens(seed=9)
    wanted, costs = logits(model, ids).log_softmax(-1), []
    for unrotated in ("selected", "factored"):
        latent = convert(
            model, d_qk=16, statistics=statistics, choices=replace(CLOSED, table=table, unrotated=unrotated)
        )
        given = logits(latent, ids).log_softmax(-1)
        costs.append(float((wanted.exp() * (wanted - given)).sum(-1).mean()))
    assert costs[1] < 0.95 * costs[0]


@pytest.mark.parametrize("name", ROTATED)
def test_what_is_cached_is_a_map_of_what_the_original_would_cache(seen, name):
    model, statistics = seen[name]
    latent = factored(model, statistics)
    ids, rotated = tokens(1, 20), ROTATED[name]
    config = latent_config_of(latent.config)
    layer = (config.layers or range(3))[1]
    with torch.no_grad():
        ours, theirs = (m(ids, use_cache=True).past_key_values.layers[layer].keys for m in (latent, model))
    turning = config.tables_at(layer)[0].rotary_dim
    maps = unrotated_maps(
        statistics.layers[1], len(statistics.layers[1].gates) // ours.shape[1], 16 - turning
    ).keys
    before = torch.einsum("krh,bkth->bktr", maps, theirs[..., rotated:].double())
    after = ours[..., turning:].double()
    if name == "qwen3.5":  # layers below change the inputs of the second attention a little
        error = (after - before).square().sum() / before.square().sum()
        assert error < 0.1
        first = config.layers[0]
        turning = config.tables_at(first)[0].rotary_dim
        with torch.no_grad():
            ours, theirs = (
                m(ids, use_cache=True).past_key_values.layers[first].keys for m in (latent, model)
            )
        maps = unrotated_maps(statistics.layers[0], 2, 16 - turning).keys
        before = torch.einsum("krh,bkth->bktr", maps, theirs[..., rotated:].double())
        assert_close_to_scale(ours[..., turning:].double(), before, 1e-5)
    assert ours.shape[-1] == 16


def test_maps_beside_a_qk_norm_are_tuned_saved_and_read(seen, tmp_path):
    model, statistics = seen["qwen3.5"]
    start = factored(model, statistics)
    tuned = factored(model, statistics, align=8)
    attention = tuned.model.layers[1].self_attn
    assert {id(p) for p, _ in key_parameters(attention)} == {id(attention.q_map), id(attention.k_map)}
    assert attention.k_map.shape == (2, 16 - attention.kept.index(torch.device("cpu")).shape[1], 24)
    assert not torch.equal(attention.k_map, start.model.layers[1].self_attn.k_map)
    save(tuned, tmp_path / "latent")
    read = load_model(tmp_path / "latent")
    assert latent_config_of(read.config).unrotated == "factored"
    assert torch.equal(logits(read, tokens()), logits(tuned, tokens()))


def test_layers_without_any_rotation_cache_maps_alone():
    model = tiny_model("smollm3")
    statistics = calibrate(model, BATCH)
    latent = factored(model, statistics)
    config = latent_config_of(latent.config)
    assert [config.tables_at(layer)[0].rotary_dim for layer in range(3)] == [16, 0, 16]
    assert config.channels_at(1)[0] == tuple(range(16))


def test_where_nothing_can_be_factored_it_is_selected():
    llama = tiny_model("llama")
    statistics = calibrate(llama, BATCH)
    assert latent_config_of(factored(llama, statistics).config).unrotated == "selected"
    smollm3 = tiny_model("smollm3")  # one table for layers that rotate and layers that do not
    latent = factored(smollm3, calibrate(smollm3, BATCH), table="model")
    assert latent_config_of(latent.config).unrotated == "selected"


def test_choices_that_cannot_factor_are_refused():
    with pytest.raises(ValueError, match="factored by statistics, beside rotated pairs .* got keys='energy'"):
        Choices(keys="energy", unrotated="factored")
    with pytest.raises(ValueError, match="unknown unrotated 'rotated'; choose one of selected, factored"):
        Choices(unrotated="rotated")
    assert resolve_choices("calibrated", keys="energy").unrotated == "selected"
    assert without_statistics(replace(CLOSED, unrotated="factored")).unrotated == "selected"


def test_a_config_says_that_channels_are_factored(seen):
    config = latent_config_of(factored(*seen["qwen3.5"]).config)
    assert LatentConfig.from_dict(config.to_dict()) == config and config.unrotated == "factored"
    with pytest.raises(ValueError, match="unrotated is one of selected, factored: got 'folded'"):
        replace(config, unrotated="folded")


def test_maps_need_statistics_of_those_channels(seen):
    model, statistics = seen["qwen3.5"]
    config = latent_config_of(factored(model, statistics).config)
    empty = torch.zeros(4, 0, 0, dtype=torch.float64)
    bare = [replace(layer, unrotated_queries=empty, unrotated_keys=empty) for layer in statistics.layers]
    with pytest.raises(
        ValueError, match="got none for layer 1; calibrate again, or convert with unrotated=selected"
    ):
        convert(model, config, statistics=replace(statistics, layers=tuple(bare)), choices=CLOSED)


def test_a_family_without_rotation_caches_maps_alone_and_they_cost_less(tmp_path):
    model = tiny_model("jamba")
    statistics = calibrate(model, BATCH)
    selected = convert(model, d_qk=16, statistics=statistics, choices=CLOSED)
    latent = factored(model, statistics)
    assert [table.rotary_dim for table in latent_config_of(latent.config).tables_at(1)] == [0, 0]
    far = [float((logits(each, tokens()) - logits(model, tokens())).std()) for each in (latent, selected)]
    assert far[0] < 0.8 * far[1]
    save(latent, tmp_path / "latent")
    assert_close_to_scale(logits(load_model(tmp_path / "latent"), tokens()), logits(latent, tokens()), 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("qwen3.5", {}, "factored"),
        ("stablelm-parallel", {}, "factored"),
        ("llama", {}, "selected"),
        ("qwen3.5", {"keys": "energy"}, "selected"),
        ("qwen3", {"qk_norm": "sliced", "table": "layer"}, "selected"),
    ],
)
def test_a_calibrated_conversion_factors_where_it_can(name, options, expected):
    model = tiny_model(name)
    latent = convert(model, d_qk=16, align=0, refit=False, statistics=calibrate(model, BATCH), **options)
    assert latent_config_of(latent.config).unrotated == expected
