"""Hybrids: layers of gated attention are converted, layers of linear attention stay, and their states are upstream's."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from kvlatent import convert
from kvlatent.checkpoints.save import save
from kvlatent.evaluation.branches import can_branch
from kvlatent.evaluation.checks.fidelity import fidelity
from kvlatent.model.assembly import full_width
from kvlatent.model.cache_bytes import live_cache_bytes
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of, family_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.statistics import Statistics
from kvlatent.selection.value_bases import gated_metric, metric_root
from tiny import HEAD_DIM, HYBRIDS, logits, padded, tiny_model, tokens
from tolerances import assert_close_to_scale

LAYERS = (1, 3)
EXACT = {"rtol": 0, "atol": 0}
TEXT = {"input_ids": tokens(8, 64), "position_ids": torch.arange(64).expand(8, -1)}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name) for name in HYBRIDS}


@pytest.fixture(scope="module")
def statistics(models):
    return {name: calibrate(model, TEXT) for name, model in models.items()}


@pytest.mark.parametrize("name", HYBRIDS)
def test_full_width_is_the_identity_to_the_bit(models, name):
    model, ids = models[name], tokens()
    latent = full_width(model)
    assert latent_config_of(latent.config).layers == attention_layers_of(model.config) == LAYERS
    torch.testing.assert_close(logits(latent, ids), logits(model, ids), **EXACT)
    left, mask = padded(ids)
    torch.testing.assert_close(
        logits(latent, left, attention_mask=mask), logits(model, left, attention_mask=mask), **EXACT
    )


@pytest.mark.parametrize("widths", [{"d_qk": 16}, {"d_vo": 16}, {"d_qk": [8, 16], "d_vo": [24, 12]}])
@pytest.mark.parametrize("name", HYBRIDS)
def test_narrow_layers_take_half_the_cache_and_the_others_stay(models, statistics, name, widths):
    model, ids = models[name], tokens()
    latent = convert(model, **widths, statistics=statistics[name], align=2, global_steps=2)
    for index, (ours, theirs) in enumerate(zip(latent.model.layers, model.model.layers, strict=True)):
        assert hasattr(ours, "self_attn") == (index in LAYERS)
        if index not in LAYERS:
            own, original = ours.linear_attn.state_dict(), theirs.linear_attn.state_dict()
            assert all(own[key].data_ptr() == original[key].data_ptr() for key in original)
    assert (logits(latent, ids) - logits(model, ids)).abs().max() > 0.01
    with torch.no_grad():
        cache = latent(ids, use_cache=True).past_key_values
    per_layer = latent_config_of(latent.config).widths.per_layer(2)
    for index, (d_qk, d_vo) in zip(LAYERS, per_layer, strict=True):
        assert (cache.layers[index].keys.shape[-1], cache.layers[index].values.shape[-1]) == (d_qk, d_vo)
    channels = sum(map(sum, per_layer)) * model.config.num_key_value_heads
    assert live_cache_bytes(cache) == ids.numel() * channels * 4


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_cache_changes_nothing_and_keeps_the_states_of_linear_layers(models, statistics, name):
    latent = convert(models[name], d_qk=16, d_vo=16, statistics=statistics[name], align=0)
    ids = tokens()
    whole, parts = logits(latent, ids), []
    cache = None
    with torch.no_grad():
        for piece in (ids[:, :30], *ids[:, 30:].split(1, dim=1)):
            output = latent(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_close_to_scale(torch.cat(parts, dim=1), whole, 1e-4)
    states = cache.layers[0].recurrent_states[0]
    assert states is not None and states.abs().max() > 0
    cache.layers[0].recurrent_states[0] = torch.zeros_like(states)
    with torch.no_grad():
        last = latent(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert (last[:, -1] - whole[:, -1]).abs().max() > 1e-3 * whole.std()  # so they are read


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_saved_hybrid_is_the_same_in_a_fresh_process(models, statistics, name, tmp_path):
    latent = convert(models[name], d_qk=16, d_vo=16, statistics=statistics[name], align=2)
    save(latent, tmp_path / "latent")
    ids = tokens(1, 20)
    script = (
        "import sys, json, torch\n"
        "from kvlatent.checkpoints.load import load_model\n"
        f"model = load_model({str(tmp_path / 'latent')!r})\n"
        f"print(json.dumps(model(torch.tensor({ids.tolist()})).logits.flatten().tolist()))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    assert_close_to_scale(given, logits(latent, ids).flatten(), 1e-5)


def test_statistics_of_a_hybrid_survive_the_file_and_those_without_gates_are_read(statistics, tmp_path):
    given = statistics["qwen3.5"]
    given.save(tmp_path / "s.safetensors")
    read = Statistics.load(tmp_path / "s.safetensors")
    assert len(read.layers) == len(LAYERS) and read.layers[0].gates.shape == (4, HEAD_DIM, HEAD_DIM)
    torch.testing.assert_close(read.layers[1].gates, given.layers[1].gates, **EXACT)
    llama = calibrate(tiny_model("llama"), TEXT)
    assert llama.layers[0].gates.shape == (4, 0, 0)


def test_moments_are_those_before_the_gate_and_of_the_gate(models, statistics):
    """Against a pass that keeps everything: what heads average, and the sigmoids that multiply it."""
    model, layer = models["qwen3.5"], statistics["qwen3.5"].layers[0]
    attention = model.model.layers[1].self_attn
    entered = []
    hooks = [
        attention.register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
        ),
        attention.o_proj.register_forward_hook(lambda m, args, output: entered.append(args[0])),
    ]
    with torch.no_grad():
        model(TEXT["input_ids"])
    for hook in hooks:
        hook.remove()
    hidden, gated = entered
    gates = torch.sigmoid(attention.q_proj(hidden).view(8, 64, 4, 2 * HEAD_DIM)[..., HEAD_DIM:]).double()
    averaged = gated.view_as(gates) / gates
    for head in range(4):
        flat, opened = averaged[:, :, head].flatten(0, 1), gates[:, :, head].flatten(0, 1)
        assert_close_to_scale(layer.outputs[head], flat.T @ flat / len(flat), 1e-4)
        assert_close_to_scale(layer.gates[head], opened.T @ opened / len(opened), 1e-5)


def test_the_gated_metric_is_what_an_independent_error_costs():
    generator = torch.Generator().manual_seed(0)
    w_o = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    gates = torch.rand(2000, 3, generator=generator, dtype=torch.float64)
    error = torch.randn(3, generator=generator, dtype=torch.float64)
    metric = gated_metric((w_o.T @ w_o)[None], (gates.T @ gates / 2000)[None])[0]
    slow = ((gates * error) @ w_o.T).square().sum(1).mean()
    torch.testing.assert_close(error @ metric @ error, slow)
    root = metric_root(metric[None])[0]
    torch.testing.assert_close(root.T @ root, metric)


def test_fidelity_compares_the_layers_with_attention(models, statistics):
    model = models["qwen3.5"]
    latent = convert(model, d_qk=16, d_vo=16, statistics=statistics["qwen3.5"], align=0)
    labels = TEXT["input_ids"]

    class Blocks(dict):
        def __len__(self):
            return len(labels)

        def __getitem__(self, part):
            if isinstance(part, slice):
                return {
                    "input_ids": labels[part],
                    "position_ids": TEXT["position_ids"][part],
                    "labels": labels[part],
                }
            return super().__getitem__(part)

    measured = fidelity(model, latent, Blocks())
    assert [layer["layer"] for layer in measured["layers"]] == list(LAYERS)
    assert measured["kl"] > 0 and all(layer["relative_error"] > 0 for layer in measured["layers"])


def test_branches_of_a_prompt_are_run_one_by_one(models):
    """A mask hides a branch from attention, and not from a layer that reads token after token."""
    assert not can_branch(models["qwen3.5"])
    assert can_branch(tiny_model("llama"))


def test_what_a_hybrid_cannot_have_is_refused(models):
    model = models["qwen3.5"]
    with pytest.raises(ValueError, match="none runs 'qwen3_5_text' with a narrow cache"):
        convert(model, d_qk=16, preset="own-frequency", qk_norm="sliced")
    with pytest.raises(ValueError, match=r"one width per layer: got 4 for 2 layers"):
        convert(model, d_qk=[16] * 4, preset="own-frequency")
    config = type(model.config)(**{**model.config.to_dict(), "layer_types": ["linear_attention"] * 4})
    with pytest.raises(ValueError, match="none of the 4 layers has attention"):
        attention_layers_of(config)
    latent = convert(model, d_qk=16, preset="own-frequency")
    fields = latent.config.to_dict() | {"layer_types": ["full_attention", "linear_attention"] * 2}
    with pytest.raises(
        ValueError, match=r"attention in the layers \[0, 2\] but kv_latent was made for \[1, 3\]"
    ):
        latent_config_of(type(latent.config)(**fields))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AutoConfig.for_model("falcon_h1"),
            "'falcon_h1': its attention and a state-space mixer read a layer's input",
        ),
        (AutoConfig.for_model("gemma4_text"), "'gemma4_text': its layers have heads of two widths"),
        (
            AutoConfig.for_model("gemma3_text", final_logit_softcapping=30.0),
            "'gemma3_text': its logits are soft-capped behind the head",
        ),
        (
            AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True),
            "'gemma3_text': its tokens see those behind them",
        ),
        (
            AutoConfig.for_model("qwen3_5"),
            "'qwen3_5': it holds a language model of type 'qwen3_5_text' beside",
        ),
        (
            AutoConfig.for_model("qwen3_5_moe"),
            "holds a language model of type 'qwen3_5_moe_text' beside other",
        ),
    ],
    ids=lambda value: str(getattr(value, "model_type", "")),
)
def test_other_hybrids_and_wrappers_are_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        family_of(config)


def test_without_text_values_are_factored_and_sliced_before_the_gate(models):
    model, ids = models["qwen3.5"], tokens()
    far = [
        float(
            (
                logits(convert(model, d_vo=16, preset="own-frequency", values=values), ids)
                - logits(model, ids)
            ).std()
        )
        for values in ("slice", "svd")
    ]
    assert far[1] < far[0]
    assert family_of(model.config).gates_output
