"""The calibrated conversion of every family: the identity, half the cache, and the ways to run and save the result."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from calibration_setup import attention_errors, digest, divergence, realistic_model, short_descent, text
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.calibrate import calibrate
from test_hub import LOAD
from tiny import FAMILIES, HEAD_DIM, SWITCH, logits, padded, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale

BATCH = text(blocks=6, length=48)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with short_descent():
        yield


@pytest.fixture(scope="module")
def made():
    """Of every family: the original, its statistics, its bytes before, and half its cache with a table per head."""
    models = {}
    for name in FAMILIES:
        model = realistic_model(name)
        before = digest(model)
        statistics = calibrate(model, BATCH)
        latent = convert(model, d_qk=16, d_vo=16, align=4, statistics=statistics)
        models[name] = model, statistics, before, latent
    return models


@pytest.fixture
def narrow(made):
    """The narrow models, each test starting from sdpa in evaluation mode."""
    for *_, latent in made.values():
        latent.eval().set_attn_implementation("sdpa")
    return {name: latent for name, (*_, latent) in made.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_full_width_is_the_original_bit_for_bit(name, made):
    model, statistics, _, _ = made[name]
    latent = convert(model, d_qk=HEAD_DIM, d_vo=HEAD_DIM, align=3, statistics=statistics)
    assert type(latent).__name__.startswith("KVLatent")
    for length in (SWITCH - 4, SWITCH + 8):  # both sides of the longrope switch
        x = tokens(length=length)
        torch.testing.assert_close(logits(latent, x), logits(model, x), **EXACT)
    ours = latent.state_dict()
    for key, tensor in model.state_dict().items():
        assert ours[key].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_side_at_full_width_stays_the_originals_own(name, made):
    model, statistics, _, _ = made[name]
    sides = (
        (convert(model, d_qk=16, align=2, statistics=statistics), ("v_proj", "o_proj"), slice(6 * 16, None)),
        (convert(model, d_vo=16, align=2, statistics=statistics), ("q_proj", "k_proj"), slice(6 * HEAD_DIM)),
    )
    for latent, projections, rows in sides:
        for ours, theirs in zip(latent.model.layers, model.model.layers, strict=True):
            ours, theirs = ours.self_attn, theirs.self_attn
            for key, tensor in theirs.state_dict().items():
                if key.split(".")[0] in projections:
                    assert ours.state_dict()[key].data_ptr() == tensor.data_ptr()
            if "phi3" in name:
                original = slice(6 * HEAD_DIM, None) if rows.stop is None else rows
                assert torch.equal(ours.qkv_proj.weight[rows], theirs.qkv_proj.weight[original])
        assert not torch.equal(logits(latent, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_is_untouched_and_the_rest_is_shared(name, made):
    model, statistics, before, latent = made[name]
    config = model.config.to_dict()
    convert(model, d_qk=[16, 8, HEAD_DIM], d_vo=[HEAD_DIM, 8, 12], align=1, statistics=statistics)
    assert digest(model) == before and model.config.to_dict() == config
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    ours = latent.state_dict()
    for key, tensor in model.state_dict().items():
        if ".self_attn." not in key:
            assert ours[key].data_ptr() == tensor.data_ptr()
    tied = latent.lm_head.weight is latent.model.embed_tokens.weight
    assert tied == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_the_cache_is_closer_to_the_original_than_the_paper_in_every_layer(name, made):
    model, statistics, _, latent = made[name]
    paper = convert(model, d_qk=16, d_vo=16, preset="paper")
    assert latent.config.qk_head_dim == latent.config.v_head_dim == HEAD_DIM // 2
    other = text(blocks=4, length=48, seed=7)
    ours, theirs = attention_errors(model, [latent, paper], other)
    assert (ours < theirs).all(), (ours, theirs)
    assert divergence(model, latent, other) < divergence(model, paper, other)
    without = convert(model, d_qk=16, d_vo=16, align=0, refit=False, statistics=statistics)
    ours, theirs = attention_errors(model, [without, paper], other)
    assert (ours < theirs).all(), (ours, theirs)  # and the closed form alone


@pytest.mark.parametrize("name", ["llama-mha", "qwen3"])
def test_gains_pay_and_shared_tables_cost_with_enough_text(name, made):
    model = made[name][0]
    statistics = calibrate(model, text(blocks=24, length=48), rows=48)
    closed = {"d_qk": 12, "align": 0, "refit": False, "statistics": statistics}
    options = ({}, {"gains": False}, {"table": "layer"}, {"table": "model"})
    latents = [convert(model, **closed, **each) for each in options]
    best, plain, layer, shared = attention_errors(model, latents, text(seed=7, length=48)).mean(1)
    assert best < plain and best < layer < shared


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_padded_and_truncated_inputs_give_the_same_logits(name, narrow):
    latent, x = narrow[name], tokens(length=24)
    expected = logits(latent, x)
    assert_close_to_scale(logits(latent, x[:, :20]), expected[:, :20], ROUNDING)  # no look ahead
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100 + 3
    torch.testing.assert_close(logits(latent, changed)[:, :-1], expected[:, :-1], **EXACT)
    for implementation in ("eager", "sdpa"):
        latent.set_attn_implementation(implementation)
        ids, mask = padded(x)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits(latent, ids, attention_mask=mask, position_ids=positions)[:, 5:]
        assert_close_to_scale(found, expected, ROUNDING)
        cache, outputs, start = DynamicCache(config=latent.config), [], 0
        for size in (9, 3, *[1] * 12):
            now = slice(start, start := start + size)
            inputs = {"position_ids": positions[:, 5:][:, now], "past_key_values": cache}
            outputs.append(logits(latent, x[:, now], use_cache=True, **inputs))
        assert_close_to_scale(torch.cat(outputs, 1), expected, ROUNDING)


@pytest.mark.parametrize("name", ["llama", "phi3-longrope"])
def test_packed_documents_do_not_see_each_other(name, narrow):
    latent, x = narrow[name], tokens(batch=1, length=24)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    packed = logits(latent, x, position_ids=positions, use_cache=False)
    assert_close_to_scale(packed[:, 10:], logits(latent, x[:, 10:]), ROUNDING)


SAVED = {
    "llama": {"table": "head"},
    "qwen3": {"table": "head", "d_qk": [16, 32, 8]},
    "phi3-longrope": {"table": "head"},
    "qwen2-window": {"table": "layer"},
    "qwen3-window": {"table": "layer", "qk_norm": "sliced"},
    "mistral": {"table": "model"},
    "llama-tied": {"table": "model", "d_vo": [8, 16, 32]},
}


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    """Calibrated checkpoints with a table per head, per layer and for the model; expected logits; their tables."""
    folders = {}
    for name, options in SAVED.items():
        model, statistics, _, _ = made[name]
        latent = convert(model, **{"d_qk": 16, "d_vo": 8, "align": 2, "statistics": statistics, **options})
        folder = tmp_path_factory.mktemp("calibrated") / name
        save(latent, folder)
        torch.save((tokens(), logits(latent, tokens()), latent.state_dict()), folder / "expected.pt")
        config = latent_config_of(latent.config)
        layers = config.tables if config.one_table else [config.tables_at(i) for i in range(3)]
        folders[name] = folder, [torch.tensor([t.short for t in ts]).flatten().tolist() for ts in layers]
    return folders


def test_a_fresh_process_without_kvlatent_gives_the_same_logits_and_tables(saved, tmp_path):
    """Through the checkpoint's own modelling file."""
    code = LOAD.format(prelude="", trust=", trust_remote_code=True")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, *(str(folder) for folder, _ in saved.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for line, (name, (_, tables)) in zip(done.stdout.splitlines(), saved.items(), strict=True):
        same_weights, difference, loaded, has_kvlatent = json.loads(line)
        assert same_weights and difference <= ROUNDING, name  # a mapped file rounds otherwise: tolerances.py
        assert loaded == tables, name
        assert not has_kvlatent


def test_a_saved_model_loads_with_the_same_logits(saved):
    for folder, _ in saved.values():
        ids, expected, weights = torch.load(folder / "expected.pt")
        loaded = load_model(folder)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
        assert_close_to_scale(logits(loaded, ids), expected, ROUNDING)


def test_what_a_checkpoint_says_about_its_conversion(saved):
    for name, (folder, _) in saved.items():
        latent = latent_config_of(load_model(folder).config)
        scope = SAVED[name]["table"]
        heads = tiny_model(name).config.num_key_value_heads
        narrow = [layer for layer in latent.tables if len(layer[0].short) < HEAD_DIM // 2]
        assert (latent.keys, latent.values, latent.frequencies) == ("gram", "whitened", "own")
        assert len(latent.tables) == (1 if scope == "model" else 3)
        assert {len(layer) for layer in narrow} == {heads if scope == "head" else 1}
    names = set(load_model(saved["qwen3"][0]).state_dict()) - set(tiny_model("qwen3").state_dict())
    assert names == {f"model.layers.{i}.self_attn.q_map" for i in (0, 2)}  # layer 1 is at full width


@pytest.mark.parametrize("name", ["qwen3-window", "phi3-longrope"])
def test_the_same_seeds_give_the_same_bytes_from_the_text_on(name, made):
    model, _, _, latent = made[name]
    again = convert(model, d_qk=16, d_vo=16, align=4, statistics=calibrate(model, BATCH))
    assert digest(again) == digest(latent) and again.config.kv_latent == latent.config.kv_latent


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_bfloat16_models_are_converted_in_bfloat16(name):
    model = realistic_model(name).bfloat16()
    latent = convert(model, d_qk=16, d_vo=16, align=2, statistics=calibrate(model, BATCH))
    paper = convert(model, d_qk=16, d_vo=16, preset="paper")
    assert {p.dtype for p in latent.parameters()} == {torch.bfloat16}
    assert divergence(model, latent, BATCH) < divergence(model, paper, BATCH)
