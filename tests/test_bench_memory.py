"""Bytes of caches, weights and runs, against formulas worked out by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig

from bench_setup import FULL, HEADS, LAYERS, make_pair
from kvlatent.evaluation.speed import memory
from kvlatent.evaluation.speed.bench_run import bench
from kvlatent.evaluation.speed.caches import group_size, make_cache
from kvlatent.evaluation.speed.lines import bench_lines
from kvlatent.evaluation.speed.memory import held_bytes, memory_rise, read_bytes, token_bytes, weight_bytes
from kvlatent.model.cache_bytes import live_cache_bytes
from kvlatent_lab.model_shapes import random_pair
from tiny import SIZES, tiny_model, tokens


@pytest.fixture(scope="module")
def pair():
    return make_pair()


def filled(kind, model, batch=2, length=13, room=20):
    """A cache of this kind after a prompt."""
    cache = make_cache(kind, model.config, room)
    with torch.no_grad():
        model(input_ids=tokens(batch, length), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(("index", "width"), [(0, FULL + FULL), (1, 16 + 8)])
def test_plain_caches_hold_what_the_formula_says(pair, index, width):
    dynamic, static = (filled(kind, pair[index]) for kind in ("dynamic", "static"))
    assert held_bytes(dynamic) == live_cache_bytes(dynamic) == 4 * 2 * LAYERS * HEADS * 13 * width
    assert held_bytes(static) == 4 * 2 * LAYERS * HEADS * 20 * width
    for cache in (dynamic, static):
        assert token_bytes(cache, 2, 13) == (4 * HEADS * width,) * LAYERS


@pytest.mark.parametrize(("index", "widths"), [(0, (FULL, FULL)), (1, (16, 8))])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("kind", "bits"), [("quantized-int4", 4), ("quantized-int2", 2)])
def test_quanto_caches_hold_packed_numbers_scales_and_shifts(pair, index, widths, batch, kind, bits):
    pytest.importorskip("optimum.quanto")
    cache, group = filled(kind, pair[index], batch), (64, 16)[index]
    assert group_size(kind, pair[index].config) == group
    expected = 0
    for width in widths:
        groups = batch * HEADS * 13 * width // group
        expected += math.ceil(groups * bits / 8) * group  # whole rows of groups are packed together
        expected += 2 * 4 * groups  # a scale and a shift, fp32
    assert held_bytes(cache) == LAYERS * expected
    assert token_bytes(cache, batch, 13) == (expected / (batch * 13),) * LAYERS


@pytest.mark.parametrize(("kind", "bits"), [("quantized-int8-hqq", 8), ("quantized-int4-hqq", 4)])
def test_hqq_caches_hold_packed_numbers_scales_and_zeros(pair, kind, bits):
    pytest.importorskip("hqq")
    cache = filled(kind, pair[1], batch=1)
    numbers = [HEADS * 13 * width for width in (16, 8)]
    size = group_size(kind, pair[1].config)
    expected = sum(number * bits // 8 + 2 * 4 * number // size for number in numbers)
    assert held_bytes(cache) == LAYERS * expected


def test_fp8_caches_hold_a_byte_a_number_and_one_scale_a_side(pair):
    assert held_bytes(filled("quantized-fp8", pair[1])) == LAYERS * (2 * HEADS * 13 * 24 + 2 * 4)


def test_quantised_and_narrow_caches_work_together(pair):
    for model in pair:
        exact, rounded = (filled(kind, model) for kind in ("dynamic", "quantized-fp8"))
        following = tokens(2, 1, seed=3)
        with torch.no_grad():
            logits = [model(following, past_key_values=cache).logits for cache in (exact, rounded)]
        error = (logits[1] - logits[0]).norm() / logits[0].norm()
        assert 1e-6 < error < 0.1


def test_group_size_divides_heads_times_width_of_every_layer():
    def of(kind, heads, head_dim):
        config = LlamaConfig(num_key_value_heads=heads, head_dim=head_dim, num_hidden_layers=2)
        return group_size(kind, config)

    assert of("quantized-int4", 8, 128) == 64
    assert of("quantized-int4", 2, 20) == 40
    assert of("quantized-int4-hqq", 2, 20) == 20  # an even number of groups a token
    assert of("quantized-int2-hqq", 2, 20) == 10
    assert of("quantized-fp8", 2, 20) is of("dynamic", 2, 20) is None
    with pytest.raises(
        ValueError, match=r"got 6 as the largest common divisor, so groups of 6.*multiples of 8"
    ):
        of("quantized-int4", 1, 6)
    layers = random_pair({**SIZES, "head_dim": 32}, [32, 20, 12], [8, 32, 32], dtype="float32")[1]
    assert group_size("quantized-int4", layers.config) == 8


def test_weights_that_a_step_reads():
    tied, untied = tiny_model("llama-tied"), tiny_model("llama")
    embeddings = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    assert read_bytes(tied) == weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    assert weight_bytes(untied) - read_bytes(untied) == embeddings


@pytest.mark.skipif(not memory._RESET.exists(), reason="needs Linux's counters")
def test_memory_rise_sees_what_was_freed_again():
    def call():
        torch.ones(16, 2**20).sum()  # 64 MiB

    call()
    rise, method = memory_rise(call, torch.device("cpu"))
    assert method == "cpu"
    assert abs(rise - 2**26) < 2**22  # the kernel's counters lag by some pages
    assert memory_rise(lambda: None, torch.device("cpu"))[0] < 2**22


def test_memory_that_cannot_be_measured_is_none(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path / "missing" / "file")
    found = bench(pair[1], caches=("dynamic",), contexts=(8,), new_tokens=1, repeats=3)
    assert found["rows"][0]["peak_bytes"] is None
    assert found["peak_memory"].startswith("not measured")
    assert bench_lines(found)
