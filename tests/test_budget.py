"""What a run will do: choices, widths or an open split, and every argument that cannot be."""

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvlatent.selection.choices import BLIND, NO_DATA, PRESETS
from kvlatent.workflows.run_plan import plan_run
from on_disk import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """Two layers, head width 16."""
    return write_checkpoint(tmp_path_factory.mktemp("budget") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny_tokenizer):
    """Head width 64, for engines."""
    return write_checkpoint(tmp_path_factory.mktemp("budget") / "wide", tiny_tokenizer, head_dim=64)


def plan(model, **options):
    return plan_run(model, stages="none", device="cpu", **options)


def test_by_default_half_of_the_cache_is_split_by_the_statistics(model):
    made = plan(model)
    assert made.choices == PRESETS["calibrated"] and made.calibrates
    assert made.widths is None and made.notes == ()
    summary = made.summary()
    assert (summary["d_qk"], summary["d_vo"], summary["share"]) == (None, None, 0.5)
    assert summary["cache_bytes_per_token"] == {"original": 512, "latent": 256, "dtype": "float32"}
    assert summary["calibration_blocks"] == 128 and summary["choices"]["table"] == "head"


def test_without_text_the_split_is_even_and_a_note_says_what_it_costs(model):
    made = plan(model, has_text=False)
    assert made.widths == (8, 8) and made.notes == (NO_DATA,)
    assert (made.choices.keys, made.choices.values, made.choices.align) == ("weights", "svd", 0)
    assert not made.calibrates and made.summary()["calibration_blocks"] == 0


@pytest.mark.parametrize("preset", ["paper", "own-frequency"])
def test_presets_that_look_at_no_text_split_evenly(model, preset):
    for has_text in (True, False):
        made = plan(model, preset=preset, has_text=has_text)
        assert made.widths == (8, 8) and not made.calibrates
        assert made.notes == (() if has_text else (BLIND,))


def test_widths_that_are_given_are_kept(model):
    made = plan(model, d_qk=6, d_vo=10)
    assert made.widths == (6, 10) and made.calibrates
    assert made.summary()["cache_bytes_per_token"]["latent"] == 256
    assert plan(model, d_qk=[8, 6]).widths == ((8, 6), 16)
    assert plan(model, d_qk=[8, 8]).widths == (8, 16)  # as the config of the result has it


def test_full_width_needs_no_text(model):
    for options in ({"kv": 1.0}, {"d_qk": 16}, {"d_qk": 16, "d_vo": 16}):
        made = plan(model, has_text=False, **options)
        assert made.widths == (16, 16) and made.notes == () and not made.calibrates


def test_options_are_recipe_keys(model):
    made = plan(
        model, table="layer", align=3, blocks=5, overrides=["conversion.align=9", "calibration.rows=4"]
    )
    assert (made.choices.table, made.choices.align) == ("layer", 3)
    assert (made.recipe.calibration.blocks, made.recipe.calibration.rows) == (5, 4)
    single = plan(
        model, overrides=["conversion.gains=false", "conversion.refit=false", "conversion.values=svd"]
    )
    assert not single.choices.gains and not single.choices.refit and single.choices.values == "svd"


def test_an_engine_decides_what_nobody_said(wide):
    made = plan(wide, engine="vllm")
    assert made.widths is None and made.choices.table == "model"
    assert plan(wide, engine="vllm", has_text=False).widths == (32, 32)
    assert plan(wide, engine="openvino").choices.table == "head"
    assert plan(wide, engine="openvino", table="model").choices.table == "model"
    assert plan(wide, engine="vllm", preset="paper").widths == (32, 32)
    assert plan(wide, engine="openvino", kv=0.45, has_text=False).widths == (24, 24)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv": 0.0}, "lies in .0, 1.: got 0; try 0.5"),
        ({"kv": 0.2}, "smallest widths are d_qk=4 and d_vo=4; try 0.25 or more"),
        ({"kv": 0.2, "has_text": False}, "smallest width 4; try 0.25 or more"),
        ({"kv": 0.5, "d_qk": 8}, "exclude each other"),
        ({"d_qk": 7}, "d_qk must be even"),
        ({"d_vo": 17}, "got d_vo=17, head_dim=16"),
        ({"d_qk": [8, 8, 8]}, "got 3 for 2 layers"),
        ({"d_qk": 6, "preset": "paper"}, "divisible by d_qk: got d_qk=6"),
        ({"d_qk": [8, 4], "table": "model"}, "needs one key width: got d_qk from 4 to 8; use --table layer"),
        ({"d_qk": 8, "per_layer": True}, "--per-layer lets a plan choose the widths.*got d_qk=8, d_vo=None"),
        ({"per_layer": True, "has_text": False}, "--per-layer needs statistics.*give --data FILE"),
        ({"per_layer": True, "preset": "paper"}, "--per-layer needs statistics"),
        ({"per_layer": True, "table": "model"}, "one d_qk for all layers.*use --table layer or head"),
        ({"engine": "vlm"}, "unknown engine 'vlm'; did you mean vllm"),
        ({"engine": "vllm"}, "smallest width of engine vllm is 32: got head_dim=16"),
        ({"engine": "mlx", "d_qk": 8, "d_vo": 12}, "needs d_qk = d_vo: got d_qk=8, d_vo=12; try 8 for both"),
        ({"engine": "mlx", "d_qk": 12, "d_vo": 12}, "multiples of 8: got d_qk=12; try 8"),
        (
            {"engine": "mlx", "table": "head"},
            "one rotary table per model: got one per head; use --table model",
        ),
        ({"engine": "mlx", "per_layer": True}, "the same widths in every layer"),
        ({"engine": "mlx", "kv": 0.4}, "smallest widths of engine mlx are d_qk=8 and d_vo=8; try 0.5"),
        ({"table": "all"}, "unknown table 'all'; choose one of head, layer, model"),
        ({"table": "head", "preset": "paper"}, "one table for the model: got table='head'"),
        ({"align": -1}, "recipe key conversion.align: .*got -1"),
        ({"blocks": 0}, "recipe key calibration.blocks: .*got 0"),
        ({"preset": "magic"}, "unknown preset 'magic'; choose one of calibrated, paper, own-frequency"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(model, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        plan(model, **options)
    assert "\n" not in str(caught.value)


def test_a_stride_or_a_slice_splits_evenly_even_with_text(model):
    for override in ("conversion.keys=stride", "conversion.values=slice"):
        made = plan(model, overrides=[override])
        assert made.widths == (8, 8) and made.calibrates


@pytest.fixture
def qwen3(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_family_that_the_engine_refuses(qwen3):
    for options in ({}, {"d_qk": 8, "d_vo": 8}):
        with pytest.raises(ValueError, match="engine mlx cannot run a qwen3 model"):
            plan(qwen3, engine="mlx", **options)


def test_a_sliced_norm_is_shared_by_all_heads(qwen3):
    sliced = ["conversion.qk_norm=sliced"]
    assert plan(qwen3, table="layer", overrides=sliced).widths is None
    for options in ({}, {"d_qk": 8}):
        with pytest.raises(ValueError, match="sliced QK-norm has one weight.*use --table layer or model"):
            plan(qwen3, overrides=sliced, **options)
    with pytest.raises(ValueError, match="unknown qk_norm 'magic'"):
        plan(qwen3, overrides=["conversion.qk_norm=magic"])
