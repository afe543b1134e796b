"""Families beyond the first five, once each: the identity, half the cache, ways to run, save, train and export it.

The first five go through every cross product of the other files. What these have besides (experts, norms behind the blocks,
multipliers, layers without rotation, parallel residuals, fused projections by head) stands here.
"""

import json
import math
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from transformers import DynamicCache

from calibration_setup import short_descent, text
from export_setup import difference, latent_toy
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.engines import gguf_export, openvino_ir, stock_checkpoint
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.facts import ENGINES, check_engine
from kvlatent.engines.openvino_graph import stateful_graph
from kvlatent.engines.serving_figures import serving_figures
from kvlatent.model.assembly import full_width
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import FAMILIES as ROWS
from kvlatent.model.families import attention_layers_of, effective_table, family_of
from kvlatent.model.head import Head
from kvlatent.model.hidden_states import embed, isolate_layer
from kvlatent.model.layer_parts import carried_share, final_norm, layer_output, parts_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.training.trainable import merged_copy, prepare_for_training, trainable_names
from test_hub import LOAD
from test_openvino import inputs, request, run
from tiny import CONVOLUTIONS, FAMILIES, HYBRIDS, MIXERS, MORE_FAMILIES, logits, padded, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale, assert_same_model
from training_setup import hashes, recipe
from training_setup import run as run_stage

BATCH = text(blocks=4, length=48)
EXACT = {"rtol": 0, "atol": 0}
ALL = FAMILIES | MORE_FAMILIES
FIRST = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def in_bfloat16(model):
    """As loaded in bfloat16, where upstream keeps its frequencies in float32."""
    decoder = model.bfloat16().get_decoder()
    if name := family_of(model.config).rotary:
        setattr(decoder, name, type(getattr(decoder, name))(model.config))
    return model


@cache
def half(name):
    """The original and half its cache, by text."""
    model = tiny_model(name)
    with short_descent():
        return model, convert(model, d_qk=16, d_vo=16, align=2, statistics=calibrate(model, BATCH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_full_width_is_the_original_bit_for_bit(name, dtype):
    model = tiny_model(name) if dtype == torch.float32 else in_bfloat16(tiny_model(name))
    twin, x = full_width(model), tokens()
    torch.testing.assert_close(logits(twin, x), logits(model, x), **EXACT)
    family, ours = family_of(model.config), twin.state_dict()
    for key, tensor in model.state_dict().items():
        before, inside, after = key.partition(f".{family.attention}.")
        assert (
            ours[before + inside + (family.latent_name(after) if inside else "")].data_ptr()
            == tensor.data_ptr()
        )


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_half_the_cache_costs_something_and_the_original_is_untouched(name):
    before = {key: tensor.clone() for key, tensor in tiny_model(name).state_dict().items()}
    model, latent = half(name)
    x = tokens()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.isfinite(logits(latent, x)).all()
    assert (logits(latent, x) - logits(model, x)).abs().max() > 1e-2
    cache = latent(x, use_cache=True).past_key_values
    kept = [layer for layer in cache.layers if hasattr(layer, "keys")]
    layers = attention_layers_of(model.config)
    assert [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in kept] == [(16, 16)] * len(layers)
    alone = convert(model, d_vo=16, preset="own-frequency")  # a side at full width stays the original's own
    assert latent_config_of(alone.config).keys == "full"
    for layer in layers:
        theirs = getattr(model.get_decoder().layers[layer], family_of(model.config).attention)
        ours = parts_of(alone.get_decoder(), layer).attention
        if not hasattr(ours, "qkv_proj"):
            assert ours.k_proj.weight.data_ptr() == theirs.k_proj.weight.data_ptr()


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_cached_padded_and_truncated_inputs_give_the_same_logits(name):
    latent, x = half(name)[1], tokens(length=24)
    latent.eval().set_attn_implementation("sdpa")
    expected = logits(latent, x)
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100 + 3
    assert_close_to_scale(logits(latent, changed)[:, :-1], expected[:, :-1], ROUNDING)
    ids, mask = padded(x)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # Upstream's mixers go on from a state with one token, and start anew with several.
    first = (12,) if name in MIXERS else (9, 3)
    for implementation in ("eager", "sdpa"):
        latent.set_attn_implementation(implementation)
        found = logits(latent, ids, attention_mask=mask, position_ids=positions)[:, 5:]
        assert_close_to_scale(found, expected, ROUNDING)
        kept, outputs, start = DynamicCache(config=latent.config), [], 0
        for size in (*first, *[1] * 12):
            now = slice(start, start := start + size)
            given = {"position_ids": positions[:, 5:][:, now], "past_key_values": kept}
            outputs.append(logits(latent, x[:, now], use_cache=True, **given))
        assert_close_to_scale(torch.cat(outputs, 1), expected, ROUNDING)


@pytest.mark.parametrize("choices", [{}, {"table": "model"}, {"preset": "paper"}], ids=str)
@pytest.mark.parametrize("name", ["smollm3", "olmo3", "stablelm", "gpt-neox"])
def test_tables_that_differ_by_layer_or_rotate_a_part(name, choices):
    """Kept pairs turn by the original's own frequencies, those of layers and channels without rotation not at all."""
    model = tiny_model(name)
    statistics = None if choices.get("preset") else calibrate(model, BATCH)
    latent = (
        convert(model, d_qk=16, align=0, refit=False, statistics=statistics, **choices)
        if statistics
        else (convert(model, d_qk=16, **choices, frequencies="own"))
    )
    config = latent_config_of(latent.config)
    for layer in range(3):
        original = effective_table(model.config, layer)
        for table in config.tables_at(layer):
            assert set(table.short) <= {*original.short, 0.0} and table.rotary_dim <= 16
            assert not original.rotary_dim <= 0 or not any(table.short)
    assert torch.isfinite(logits(latent, tokens())).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name in MORE_FAMILIES:
        folder, latent = tmp_path_factory.mktemp("more") / name, half(name)[1]
        latent.eval().set_attn_implementation("sdpa")
        save(latent, folder)
        torch.save((tokens(), logits(latent, tokens()), latent.state_dict()), folder / "expected.pt")
        folders[name] = folder
    return folders


def test_a_fresh_process_without_kvlatent_gives_the_same_logits(saved, tmp_path):
    """Through the checkpoint's own modelling file."""
    code = LOAD.format(prelude="", trust=", trust_remote_code=True")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, *(str(folder) for folder in saved.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for line, name in zip(done.stdout.splitlines(), saved, strict=True):
        same_weights, off, _, has_kvlatent = json.loads(line)
        assert same_weights and off <= ROUNDING and not has_kvlatent, name


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_originals_and_latent_models_are_loaded_from_disk(name, saved, tmp_path):
    """Upstream saves experts one by one, and loads them fused."""
    model, latent = half(name)
    model.save_pretrained(tmp_path / "original")
    assert_same_model(load_model(tmp_path / "original"), model, tokens())
    assert_same_model(load_model(saved[name]), latent, tokens())


@pytest.mark.parametrize("name", [*FIRST, *MORE_FAMILIES])
def test_both_stages_train_the_attention_and_leave_experts_alone(name, tmp_path):
    teacher = tiny_model(name)
    student = convert(teacher, d_qk=8, d_vo=8, preset="own-frequency")
    tokens_each = (
        1024 if name in HYBRIDS else 256
    )  # routing changes with every step, so that few of them are noise
    lengths = [
        f"stage{stage}.{key}" for stage in (1, 2) for key in (f"tokens={tokens_each}", "save_steps=99")
    ]
    settings = recipe("lora.rank=2", *lengths)
    before = hashes(teacher)
    names = prepare_for_training(student, settings)
    assert names == trainable_names(student) and any(".o_proj." in each for each in names)
    adapted = {each.split(".lora_")[0].rpartition(".")[2] for each in names if ".lora_" in each}
    assert adapted == set(family_of(teacher.config).ffn_modules) and "experts" not in str(names)
    for stage in (1, 2):
        summary = run_stage(student, teacher, stage, tmp_path / str(stage), settings)
        assert math.isfinite(summary["last_loss"])
        if stage == 1:  # of other blocks, and the second starts from what this one gained
            assert summary["last_loss"] < summary["first_loss"]
    assert hashes(teacher) == before
    merged = merged_copy(student)
    assert not any("lora" in each for each in merged.state_dict())
    assert torch.isfinite(logits(merged, tokens())).all()


@pytest.mark.parametrize("name", ALL)
def test_layer_by_layer_is_the_whole_model(name):
    """Embeddings, layers alone, the last norm and the head, each upstream's way."""
    model = tiny_model(name)
    twin, x = full_width(model), tokens()
    decoder, positions = twin.get_decoder(), torch.arange(x.shape[1])[None]
    with torch.no_grad():
        states = embed(decoder, x)
        for layer in range(len(decoder.layers)):
            call = {"inputs_embeds": states, "position_ids": positions, "use_cache": False}
            states = isolate_layer(decoder, layer)(**call).last_hidden_state
        found = Head.of_model(twin).logits(final_norm(decoder)(states))
    torch.testing.assert_close(found, logits(model, x), **EXACT)


@pytest.mark.parametrize("name", ALL)
def test_what_the_attention_can_make_up_for(name):
    """An error of the stream is gone once the attention's output has moved by the family's share of it."""
    model = tiny_model(name)
    decoder, share = model.get_decoder(), carried_share(model.config)
    generator = torch.Generator().manual_seed(0)
    hidden, error, attended = (
        0.3 * torch.randn(1, 6, model.config.hidden_size, generator=generator) for _ in range(3)
    )
    with torch.no_grad():
        expected = layer_output(decoder, 1, hidden, attended)
        moved = layer_output(decoder, 1, hidden - error, attended + share * error)
    assert share == {"granite": 2.5, "olmo2": 0, "olmo3": 0, "gemma3": 0}.get(name, 1)
    if share and not getattr(model.config, "use_parallel_residual", False):
        assert_close_to_scale(moved, expected, ROUNDING)
    else:
        assert (moved - expected).abs().max() > 1e-2


def test_the_slope_of_divided_logits_is_divided():
    weight, hidden = torch.randn(7, 5), torch.randn(3, 5, requires_grad=True)
    head = Head(weight, None, 2.5)
    slope = torch.randn(3, 7)
    (expected,) = torch.autograd.grad(head.logits(hidden), hidden, slope)
    torch.testing.assert_close(head.pull_back(slope), expected)
    torch.testing.assert_close(head.logits(hidden), hidden @ weight.T / 2.5)


PLAIN = {"ministral": "Qwen2ForCausalLM", "seed-oss": "LlamaForCausalLM"}


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_plain_checkpoints_hold_what_is_plain(name, tmp_path):
    latent = half(name)[1] if name in HYBRIDS else latent_toy(name)
    if name in PLAIN:
        _, off, ours = difference(stock_checkpoint, latent, tmp_path, tmp_path / "out", tokens())
        assert off <= 1e-5 * float(ours.abs().max())
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [PLAIN[name]]
        return
    family = family_of(latent.config)
    for exporter, engine in ((stock_checkpoint, "transformers-stock"), (gguf_export, "llama.cpp")):
        with pytest.raises(ValueError, match=f"(has {family.besides}|by its own table|activation silu)"):
            exporter.check_exportable(latent, ExportOptions())
        with pytest.raises(
            ValueError, match=f"a {family.model_type} model has {family.besides}; use --engine"
        ):
            check_engine(engine, 16, 16, "model", model_type=family.model_type)
    assert (
        check_engine("transformers", 16, 16, "head", model_type=family.model_type) is ENGINES["transformers"]
    )


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_openvino_computes_the_same_or_says_why_not(name):
    latent, x = half(name)[1], tokens()
    if name in HYBRIDS | CONVOLUTIONS | MIXERS:
        with pytest.raises(
            ValueError,
            match="caches keys and values alone, and a .* model has layers of (linear|short|state)",
        ):
            openvino_ir.check_exportable(latent, ExportOptions())
        return
    if family_of(latent.config).expert_parameters:
        with pytest.raises(ValueError, match="which experts a token of a .* model goes to would be fixed"):
            openvino_ir.check_exportable(latent, ExportOptions())
        return
    openvino_ir.check_exportable(latent, ExportOptions())
    latent.set_attn_implementation("sdpa")
    found = run(request(stateful_graph(latent)), inputs(x))
    assert_close_to_scale(found, logits(latent, x), 10 * ROUNDING)


@pytest.mark.parametrize("qk_norm", ["full", "sliced"])
@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_bytes_of_weights_by_counting(name, qk_norm):
    if name in HYBRIDS and qk_norm == "sliced":
        pytest.skip("refused: no stock engine has their gate")
    model = tiny_model(name)
    latent = convert(model, d_qk=16, d_vo=8, preset="paper", qk_norm=qk_norm)
    figures = serving_figures(model.config, 16, 8, element_size=1, qk_norm=qk_norm)
    for found, counted in ((figures.original, model), (figures.latent, latent)):
        assert found.weight_bytes == sum(parameter.numel() for parameter in counted.parameters())
    experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    embeddings = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    read = figures.original.weight_bytes - embeddings - experts // 2  # two of four experts a token
    assert figures.original.read_bytes == read


RENAMED = [
    ({"attention": "attn"}, "the module 'attn' (attention) in a GraniteDecoderLayer"),
    ({"attention_norm": "ln_1"}, "the module 'ln_1' (attention_norm) in a GraniteDecoderLayer"),
    ({"ffn": "ffw"}, "the module 'ffw' (ffn) in a GraniteDecoderLayer"),
    ({"final_norm": "ln_f"}, "the module 'ln_f' (final_norm) in a KVLatentGraniteModel"),
    ({"rotary": "rope"}, "the module 'rope' (rotary) in a KVLatentGraniteModel"),
    ({"query_scalar": "scale"}, "the config's field 'scale'"),
    ({"qk_norm": "head"}, "the modules q_norm, k_norm in a GraniteAttention"),
    ({"fused_qkv": "stacked"}, "the modules qkv_proj in a GraniteAttention"),
    ({"softmax_scale": "scale"}, "the config's field 'scale'"),
    ({"residual_multiplier": "scale"}, "the config's field 'scale'"),
    ({"logit_divisor": "scale"}, "the config's field 'scale'"),
    ({"output_dropout": "dropout"}, "the config's field 'dropout'"),
    ({"o_bias": "has_bias"}, "the config's field 'has_bias'"),
    ({"rotates": "no_rope"}, "the config's field 'no_rope'"),
    ({"embedding_multiplier": "scale"}, "the config's field 'scale'"),
    ({"prefix": "Granit"}, "the class GranitRotaryEmbedding in transformers.models.granite.modeling_granite"),
]


@pytest.mark.parametrize(("change", "what"), RENAMED, ids=lambda value: str(value)[:30])
def test_a_row_whose_modules_are_not_there(change, what, monkeypatch):
    """Upstream renamed them: one sentence, with the version and the next step."""
    import re
    from dataclasses import replace

    from kvlatent.model.classes import latent_classes

    model = tiny_model("granite")
    monkeypatch.setitem(ROWS, "granite", replace(ROWS["granite"], **change))
    latent_classes.cache_clear()
    try:
        sentence = re.escape(f"kvlatent's row of 'granite' names {what}, which transformers ")
        with pytest.raises(
            ValueError, match=sentence + ".* does not have; install a version between 5.23 and 6"
        ):
            convert(model, d_qk=16, d_vo=16, align=1, statistics=calibrate(model, BATCH))
    finally:
        latent_classes.cache_clear()
