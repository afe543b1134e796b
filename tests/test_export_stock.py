"""A plain checkpoint computes what the latent one does, loads without kvlatent, and says its table in every key."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from export_setup import (
    ONE_TABLE,
    config_of,
    difference,
    latent_directory,
    latent_toy,
    transformers_cache_bytes,
)
from kvlatent.engines import stock_checkpoint
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.shared_table import frequency_factors, share_table
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.table import RotaryTable
from kvlatent.selection.choices import Choices
from tiny import FAMILIES, SWITCH, tokens

CLASSES = {
    "mistral": "MistralForCausalLM",
    "phi3-window": "MistralForCausalLM",
    "qwen2-window": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-window": "Qwen3ForCausalLM",
}


@pytest.mark.numerics
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name, tmp_path, compatibility):
    latent = latent_toy(name)
    facts, off, ours = difference(stock_checkpoint, latent, tmp_path, tmp_path / "out", tokens())
    # Frequencies may be off by one bit of float32, and so are the logits' largest.
    assert off <= 1e-5 * float(ours.abs().max())
    written = config_of(tmp_path / "out")
    assert written["architectures"] == [CLASSES.get(name, "LlamaForCausalLM")]
    assert "auto_map" not in written and "kv_latent" not in written
    assert written["head_dim"] == 16
    assert facts["cache_bytes_per_token"] == 2 * 16 * 3 * latent.config.num_key_value_heads * 4
    record(compatibility, latent, name, facts, off, tmp_path / "out")


def record(compatibility, latent, name, facts, off, out, pad=""):
    """Keep it for the page, once the cache holds what is said."""
    said = transformers_cache_bytes(out, tokens()[:1, :15])
    assert said == facts["cache_bytes_per_token"]
    compatibility.computed(
        latent,
        name,
        engine=facts["engine"],
        command=f"kvlatent export DIR --to stock{pad} --out OUT",
        difference=off,
        said_bytes=said,
        formula_bytes=facts["cache_bytes_per_token"],
    )


def test_the_table_decides(tmp_path):
    """Without the factors the logits are far off: the check of an export would see it."""
    latent = latent_toy("llama")
    _, off, ours = difference(stock_checkpoint, latent, tmp_path, tmp_path / "out", tokens())
    written = config_of(tmp_path / "out")
    for name in ("rope_parameters", "rope_scaling"):
        written[name] = {"rope_type": "default", "rope_theta": 1e4}
    (tmp_path / "out" / "config.json").write_text(json.dumps(written))
    with torch.no_grad():
        theirs = stock_checkpoint.read_logits(tmp_path / "out", tokens()[:1])
    assert off < 1e-4 < 0.1 * float(ours.std()) < float((ours - theirs).abs().max())


def test_every_key_says_the_table_alike(tmp_path):
    difference(stock_checkpoint, latent_toy("llama"), tmp_path, tmp_path / "out", tokens())
    written = config_of(tmp_path / "out")
    rope = written["rope_parameters"]
    assert written["rope_theta"] == rope["rope_theta"] == 1e4
    assert written["rope_scaling"] == {name: rope[name] for name in rope if name != "rope_theta"}
    assert rope["rope_type"] == "longrope" and rope["short_factor"] == rope["long_factor"]
    assert rope["original_max_position_embeddings"] == written["max_position_embeddings"] == 256
    assert rope["attention_factor"] == rope["factor"] == 1.0


def test_full_width_goes_out_too(tmp_path):
    _, off, ours = difference(
        stock_checkpoint, latent_toy("phi3", 32, 32), tmp_path, tmp_path / "out", tokens()
    )
    assert off <= 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize(
    ("name", "d_qk", "d_vo"), [("llama", 8, 16), ("llama", 16, 8), ("phi3", 8, 24), ("qwen3", 16, 8)]
)
@pytest.mark.refused_by("transformers (--to stock)")
def test_unequal_widths_are_padded_when_asked(name, d_qk, d_vo, tmp_path, compatibility):
    latent = latent_toy(name, d_qk, d_vo)
    with pytest.raises(ValueError, match=f"got d_qk={d_qk} and d_vo={d_vo}; convert with .*--d-vo .*--pad"):
        stock_checkpoint.check_exportable(latent, ExportOptions())
    facts, off, ours = difference(stock_checkpoint, latent, tmp_path, tmp_path / "out", tokens(), pad=True)
    assert off <= 1e-5 * float(ours.abs().max())
    width = max(d_qk, d_vo)
    assert f"filled up with zeros to {width}" in facts["changes"][0]
    assert (
        f"{width / 32:.1%} of the original's and not the latent {(d_qk + d_vo) / 64:.1%}"
        in facts["changes"][0]
    )
    assert facts["cache_bytes_per_token"] == 2 * width * 3 * 2 * 4
    record(compatibility, latent, name, facts, off, tmp_path / "out", " --pad")


@pytest.mark.refused_by("transformers (--to stock)")
def test_layers_of_different_widths_are_padded(tmp_path):
    latent = latent_toy(
        "llama", (8, 16, 16), (16, 8, 16), Choices()
    )  # a stride of 4 keeps pairs that one of 2 keeps
    _, off, ours = difference(stock_checkpoint, latent, tmp_path, tmp_path / "out", tokens(), pad=True)
    assert off <= 1e-5 * float(ours.abs().max())
    with pytest.raises(ValueError, match="got d_qk=8 to 16 and d_vo=8 to 16"):
        stock_checkpoint.check_exportable(latent, ExportOptions())


@pytest.mark.refused_by("transformers (--to stock)")
def test_keys_under_a_norm_are_not_padded():
    with pytest.raises(
        ValueError, match="cannot be filled up with zeros, and a plain checkpoint needs keys of width 16"
    ):
        stock_checkpoint.check_exportable(latent_toy("qwen3", 8, 16), ExportOptions(pad=True))


def reordered(latent):
    """The same model with the pairs of every head of every layer in another order, queries and keys alike."""
    config = latent_config_of(latent.config)
    pairs = config.d_qk // 2
    tables, channels = [], []
    for layer, module in enumerate(latent.model.layers):
        orders = [
            torch.randperm(pairs, generator=torch.Generator().manual_seed(7 * layer + h)) for h in range(2)
        ]
        old = config.tables_at(layer)[0]
        tables.append(tuple(old.subset(order.tolist()) for order in orders))
        rows = [torch.cat([order, order + pairs]) for order in orders]
        channels.append(tuple(tuple(config.channels_at(layer)[0][i] for i in row) for row in rows))
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            for parameter in getattr(module.self_attn, part).parameters():
                split = parameter.data.unflatten(0, (heads, -1))
                parameter.data = torch.cat([split[h][rows[h // (heads // 2)]] for h in range(heads)])
    fields = {**vars(config), "tables": tuple(tables), "channels": tuple(channels)}
    latent.config.kv_latent = LatentConfig(**fields).to_dict()
    return type(latent)(latent.config).eval(), latent.state_dict()


def test_orders_of_one_set_of_frequencies_are_free(tmp_path):
    latent = latent_toy("llama")
    with torch.no_grad():
        before = latent(tokens()[:1]).logits
    per_head, state = reordered(latent)
    per_head.load_state_dict(state)
    assert not latent_config_of(per_head.config).one_table
    _, off, ours = difference(stock_checkpoint, per_head, tmp_path, tmp_path / "out", tokens())
    torch.testing.assert_close(ours, before, rtol=0, atol=1e-4)  # the reordered model is still that model
    assert off <= 1e-5 * float(ours.abs().max())


@pytest.mark.refused_by("transformers (--to stock)")
def test_heads_with_other_frequencies_are_refused():
    latent = latent_toy("llama", choices=Choices(keys="weights", table="head"))
    with pytest.raises(
        ValueError, match=r"one set of 8 rotary frequencies .* --engine transformers-stock --d-qk 16"
    ):
        stock_checkpoint.check_exportable(latent, ExportOptions())


@pytest.mark.refused_by("transformers (--to stock)")
def test_a_norm_before_the_selection_is_refused():
    from kvlatent.conversion.convert_model import convert
    from tiny import tiny_model

    latent = convert(tiny_model("qwen3"), d_qk=16, d_vo=16, choices=ONE_TABLE)
    with pytest.raises(ValueError, match=r"at 32 before it keeps 16; .* --set conversion.qk_norm=sliced"):
        stock_checkpoint.check_exportable(latent, ExportOptions())


def test_a_changing_table_bounds_the_context(tmp_path):
    facts, *_ = difference(
        stock_checkpoint, latent_toy("phi3-longrope"), tmp_path, tmp_path / "out", tokens()
    )
    assert facts["context"] == config_of(tmp_path / "out")["max_position_embeddings"] == SWITCH
    assert f"the context is cut to {SWITCH} tokens" in facts["changes"][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_stored_dtype_is_kept(dtype, tmp_path):
    latent = latent_toy("llama").to(getattr(torch, dtype)).float()
    facts, off, ours = difference(
        stock_checkpoint, latent, tmp_path, tmp_path / "out", tokens(), stored_dtype=dtype
    )
    assert off <= 1e-5 * float(ours.abs().max())  # rows are moved, not changed
    assert config_of(tmp_path / "out")["dtype"] == dtype
    assert facts["cache_bytes_per_token"] == 2 * 16 * 3 * 2 * 2


def test_factors_are_finite_and_a_still_pair_stands_still():
    factors = frequency_factors((1.0, 0.0, 1e-4, 0.25))
    assert all(0 < factor < 3e38 / 1e4 for factor in factors)
    assert torch.tensor(factors).bfloat16().isfinite().all()
    plain = 1e4 ** (torch.arange(0, 8, 2) / 8)
    found = 1 / (torch.tensor(factors) * plain)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1e-4, 0.25]), rtol=2e-7, atol=1e-17)
    assert float(found[1]) * 2**20 < 1e-11  # radians at a million tokens


def test_a_table_with_too_many_frequencies_does_not_fit():
    config = LatentConfig(
        d_qk=4,
        d_vo=4,
        tables=((RotaryTable((1.0, 0.5)),), (RotaryTable((1.0, 0.25)),)),
        channels=(((0, 1, 2, 3),), ((0, 1, 2, 3),)),
        original_head_dim=8,
        original_model_type="llama",
    )
    assert share_table(config, 2, 2) is None
    shared = share_table(config, 2, 3)
    assert shared is not None and shared.frequencies == (1.0, 0.5, 0.25)
    assert shared.channels == (((0, 1, None, 2, 3, None),), ((0, None, 1, 2, None, 3),))


LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist(), "kvlatent" in sys.modules)
"""


def test_it_loads_and_generates_without_kvlatent(tmp_path, tiny_tokenizer):
    latent_directory(tmp_path / "latent", tiny_tokenizer)
    latent = AutoModelForCausalLM.from_pretrained(tmp_path / "latent", trust_remote_code=False)
    difference(stock_checkpoint, latent, tmp_path / "latent", tmp_path / "out", tokens())
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADS, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    ids = tiny_tokenizer("Once upon a time", return_tensors="pt").input_ids
    ours = latent.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    assert done.stdout.strip() == f"{ours} False"
