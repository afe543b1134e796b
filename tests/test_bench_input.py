"""What the bench refuses: one sentence each, before anything is measured."""

from types import SimpleNamespace

import pytest
import torch

from bench_setup import make_pair
from kvlatent.evaluation.speed import variants as cells
from kvlatent.evaluation.speed.bench_run import bench
from kvlatent.evaluation.speed.caches import check_caches
from tiny import tiny_model


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "batches are numbers of 1 or more, at least one: got 0; try 1"),
        ({"batches": ()}, "at least one: got none"),
        ({"contexts": (8, -1)}, "contexts are numbers of 1 or more, at least one: got 8, -1"),
        ({"contexts": (8, 8)}, "contexts are measured once each: got 8, 8"),
        ({"new_tokens": 0}, "got new_tokens=0; try 16"),
        ({"repeats": 2}, "needs 3 rounds or more: got repeats=2; try 5"),
        ({"contexts": (250,)}, "context of 256 tokens: got 250 . 16; give contexts of 240 or less"),
        ({"caches": ()}, "at least one: got none; try dynamic"),
        ({"caches": ("dynamic", "dynamic")}, "different kinds of cache"),
        ({"caches": ("quantised-int4",)}, "unknown cache 'quantised-int4'; did you mean quantized-int4 or"),
        ({"caches": ("paged",)}, "unknown cache 'paged'; choose from dynamic, static"),
        ({"attention": "flex"}, "unknown attention 'flex'; did you mean flex_attention"),
        ({"attention": "x"}, "unknown attention 'x'; choose one of eager, sdpa"),
        ({"compile": True, "caches": ("quantized-fp8",)}, "dynamic and static: got quantized-fp8"),
        ({"memory": 1000.0}, "the memory must hold the weights"),
    ],
)
def test_bad_input_is_one_sentence(pair, options, message):
    with pytest.raises(ValueError, match=message) as error:
        bench(pair[1], pair[0], **{"caches": ("dynamic",), "contexts": (8,), **options})
    assert "\n" not in str(error.value)


def test_models_that_do_not_belong_together(pair):
    options = {"caches": ("dynamic",), "contexts": (8,)}
    other = tiny_model("llama", vocab_size=64)
    with pytest.raises(
        ValueError, match="the same tokens: got vocab_size 64 and 128; compare with the model"
    ):
        bench(pair[1], other, **options)
    with pytest.raises(ValueError, match="the same dtype: got dtype torch.bfloat16 and torch.float32"):
        bench(pair[1], tiny_model("llama").bfloat16(), **options)
    with pytest.raises(ValueError, match="the same device: got device meta and cpu"):
        bench(pair[1], tiny_model("llama").to("meta"), **options)


def test_windows_and_quantised_caches_do_not_go_together():
    with pytest.raises(
        ValueError, match="got 3 of 3 layers with a window of 16 tokens; measure dynamic or static"
    ):
        bench(tiny_model("mistral"), caches=("quantized-fp8",), contexts=(8,))
    with pytest.raises(ValueError, match="got 2 of 3 layers"):
        bench(tiny_model("qwen3-window"), caches=("quantized-fp8",), contexts=(8,))


@pytest.mark.parametrize(
    ("kind", "package"), [("quantized-int4", "optimum-quanto"), ("quantized-int8-hqq", "hqq")]
)
def test_a_missing_package_is_named(pair, monkeypatch, kind, package):
    name = {"optimum-quanto": "is_optimum_quanto_available", "hqq": "is_hqq_available"}[package]
    monkeypatch.setattr(f"transformers.cache_utils.{name}", lambda *_: False)
    with pytest.raises(ValueError, match=f"run `pip install --upgrade {package}`, or measure quantized-fp8"):
        bench(pair[1], caches=(kind,), contexts=(8,))


def test_a_package_that_cannot_build_its_code_is_refused_first(pair, monkeypatch):
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=broken))
    monkeypatch.setattr(cells, "run", None)
    with pytest.raises(ValueError, match=r"does not work on cpu: no compiler; its package .* C\+\+ compiler"):
        bench(pair[1], caches=("dynamic", "quantized-int4"), contexts=(8,))


def broken(*_):
    raise RuntimeError("no compiler\nand many more lines")


def test_an_attention_that_transformers_cannot_run(pair, monkeypatch):
    original = tiny_model("llama").train()

    def refuse(name):
        if name != "sdpa":
            raise ImportError("FlashAttention2 cannot be used.\nMore.")

    monkeypatch.setattr(original, "set_attn_implementation", refuse)
    with pytest.raises(
        ValueError, match="flash_attention_2 does not work here: FlashAttention2 cannot be used; try sdpa"
    ):
        bench(original, caches=("dynamic",), contexts=(8,), attention="flash_attention_2")
    assert original.training


def test_every_kind_is_checked_against_every_model(pair):
    configs = [model.config for model in pair]
    check_caches(("dynamic", "static", "quantized-fp8"), configs, torch.device("cpu"))
    check_caches(("dynamic", "static"), configs, torch.device("cpu"), compiled=True)
