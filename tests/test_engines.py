"""Which engine takes which widths and tables, and the sentence when one does not."""

import pytest

from kvlatent.engines.facts import ENGINES, TABLE_SCOPES, check_engine, engines_for
from kvlatent.selection import pairs


def test_equal_widths_and_one_table_run_everywhere():
    assert set(engines_for(32, 32, "model")) == set(ENGINES)
    for name in ENGINES:
        assert check_engine(name, 64, 64, "model").name == name


def test_what_asymmetry_and_finer_tables_cost():
    assert engines_for(40, 24, "model") == ("transformers", "llama.cpp-step35", "openvino")
    assert engines_for(40, 24, "layer") == ("transformers", "openvino")
    assert engines_for(40, 24, "head") == ("transformers", "openvino")
    assert engines_for(36, 28, "model") == ("transformers", "openvino")
    assert engines_for((40, 32), (24, 32), "model") == ("transformers",)
    assert engines_for((32, 32), (32, 32), "model") == engines_for(32, 32, "model")
    assert "vllm" not in engines_for(16, 16, "model") and "mlx" in engines_for(16, 16, "model")
    assert engines_for(18, 7, "head") == ("transformers", "openvino")


def test_vllm_takes_layers_of_three_sizes_each_symmetric():
    three = (32, 48, 64, 32)
    assert engines_for(three, three, "layer") == ("transformers", "vllm")
    assert "vllm" not in engines_for(three, (32, 48, 48, 32), "layer")
    assert "vllm" not in engines_for(
        (32, 48), (48, 32), "layer"
    )  # the same widths, but not in the same layer
    four = (32, 48, 64, 40)
    assert engines_for(four, four, "layer") == ("transformers",)


def test_the_table_that_an_engine_takes_first():
    assert [ENGINES[name].scope() for name in ("transformers", "vllm", "openvino", "mlx")] == [
        "head", "model", "head", "model",
    ]  # fmt: skip
    assert [ENGINES[name].scope(per_layer=True) for name in ("transformers", "vllm", "mlx")] == [
        "head", "layer", "model",
    ]  # fmt: skip


@pytest.mark.refused_by("planning (--engine)")
def test_families_that_cannot_carry_their_table():
    assert "llama.cpp" not in engines_for(32, 32, "model", model_type="qwen3")
    assert "llama.cpp" in engines_for(32, 32, "model", model_type="qwen2")
    with pytest.raises(ValueError, match="llama.cpp cannot run a qwen3 model .*; use --engine transformers"):
        check_engine("llama.cpp", 32, 32, "model", model_type="qwen3")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("vlm", 32, 32, "model"), r"unknown engine 'vlm'; did you mean vllm\? choose one of transformers, "),
        (("llamacpp", 32, 32, "model"), r"did you mean llama\.cpp"),
        (("OpenVINO", 32, 32, "model"), r"did you mean openvino\?"),
        (("zzz", 32, 32, "model"), r"unknown engine 'zzz'; choose one of"),
        (("vllm", 32, 32, "row"), "unknown table 'row'; choose one of head, layer, model"),
        (("mlx", 32, 32, "head"), "mlx takes one rotary table per model: got one per head; use --table model"),
        (("vllm", (32, 48), (48, 48), "layer"), "needs d_qk = d_vo in every layer: got d_qk=32, d_vo=48; try 40 for both"),
        (("vllm", (32, 40, 48, 56), (32, 40, 48, 56), "layer"), "layers of at most 3 different sizes: got 4; let --kv with"),
        (("vllm", 40, 24, "model"), "vllm needs d_qk = d_vo in every layer: got d_qk=40, d_vo=24; try 32 for both"),
        (("llama.cpp-step35", 40, 24, "layer"), "one rotary table per model: got one per layer; use --table model"),
        (("mlx", 28, 28, "model"), "mlx needs widths that are multiples of 8: got d_qk=28; try 24"),
        (("llama.cpp-step35", 40, 20, "model"), "step35 needs widths that are multiples of 8: got d_vo=20; try 16"),
        (("vllm", 16, 16, "model"), "vllm needs widths of at least 32: got d_qk=16; try 32"),
        (("llama.cpp-step35", (32, 40), (32, 24), "model"), "same widths in every layer: got 2 different d_qk and 2 "),
    ],
)  # fmt: skip
@pytest.mark.refused_by("planning (--engine)")
def test_refusals(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        check_engine(*arguments)
    assert "\n" not in str(caught.value)


def test_one_list_of_scopes():
    assert TABLE_SCOPES == pairs.SCOPES
