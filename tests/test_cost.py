"""Byte accounting, against numbers worked out by hand and against counting."""

from itertools import pairwise

import pytest
from torch import nn

from kvlatent.engines.roofline import attention_parameters, decode_speedup, maximum_context
from kvlatent.model.cache_bytes import cache_bytes, layer_cache_bytes
from kvlatent.planning.candidates import equal_widths, share_at_least


def test_equal_widths():
    assert equal_widths(0.5, 64) == 32
    assert equal_widths(0.28, 64) == 16  # 17.92 channels hold 16
    assert equal_widths(1, 90) == 90


@pytest.mark.parametrize("kv", [0, -0.1, 1.01, float("nan")])
def test_a_share_lies_between_0_and_1(kv):
    with pytest.raises(ValueError, match=r"lies in \(0, 1\]: got .*; try 0.5"):
        equal_widths(kv, 64)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 112, 192, 256])
def test_the_share_that_an_error_suggests_is_enough(head_dim):
    with pytest.raises(ValueError, match="smallest width 4") as caught:
        equal_widths(3.9 / head_dim, head_dim)
    suggested = float(str(caught.value).split("try ")[1].split()[0])
    assert equal_widths(suggested, head_dim) == 4
    assert suggested == share_at_least(4 / head_dim) < 4 / head_dim + 1e-4


def test_cache_bytes_of_llama_3_1_8b():
    """32 layers, 8 key-value heads of 128, two bytes: 128 KiB a token, 16 GiB at 128 Ki tokens."""
    full = layer_cache_bytes(128, 128, 32, 8, 2)
    assert len(full) == 32 and sum(full) == 131_072
    assert cache_bytes(131_072, full) == 16 * 2**30
    assert sum(layer_cache_bytes(80, 48, 32, 8, 2)) == 65_536


def test_widths_may_differ_by_layer_and_numbers_may_take_half_a_byte():
    assert layer_cache_bytes((8, 4), (4, 2), 2, 3, 0.5) == (18, 9)
    assert layer_cache_bytes((8, 4), 4, 2, 1, 1) == (12, 8)


def test_a_windowed_layer_stops_growing():
    assert cache_bytes(3, (10, 100), (4, None)) == 330
    assert cache_bytes(6, (10, 100), (4, None)) == 640


@pytest.mark.parametrize("windows", [None, (None, None, None), (5, None, 9), (5, 5, 9)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory", [100, 101, 160, 333, 1000])
def test_maximum_context_by_counting(windows, batch, memory):
    sizes, weights, far = (3, 4, 5), 100, 400

    def fits(context):
        return weights + batch * cache_bytes(context, sizes, windows) <= memory

    found = maximum_context(memory, weights, sizes, windows, batch)
    if found is None:
        assert fits(far)
    else:
        assert fits(found) and not fits(found + 1)


def test_maximum_context_by_hand():
    """24 GB less 16 GB of weights is 8e9 bytes, over 131,072 a token: 61,035."""
    sizes = layer_cache_bytes(128, 128, 32, 8, 2)
    assert maximum_context(24e9, 16e9, sizes) == 61_035
    assert maximum_context(24e9, 16e9, sizes, batch=8) == 7629
    assert maximum_context(16e9, 16e9, sizes) == 0


def test_a_memory_too_small_for_the_weights():
    with pytest.raises(ValueError, match=r"got 8 GB for weights of 16\.06 GB; give a larger memory"):
        maximum_context(8e9, 16.06e9, (1,))


def test_decode_speedup_by_hand():
    """W = 16, C = 4; W' = 15, C' = 2: (16 + 4) / (15 + 2), and (16 + 32) / (15 + 16) for a batch of 8."""
    assert decode_speedup(16, 4, 15, 2) == pytest.approx(20 / 17)
    assert decode_speedup(16, 4, 15, 2, batch=8) == pytest.approx(48 / 31)
    assert decode_speedup(16, 4, 16, 4, batch=32) == 1
    ascending = [decode_speedup(16, 4, 16, 2, batch=b) for b in (1, 2, 4, 1000)]
    assert all(low < high < 2 for low, high in pairwise(ascending))


@pytest.mark.parametrize("bias", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("projected", [None, 16])
def test_attention_parameters_by_counting(bias, projected):
    hidden, heads, groups, d_qk, d_vo = 48, 6, 2, 12, 8
    width = projected or d_qk
    layers = [
        nn.Linear(hidden, heads * width, bias=bias[0]),
        nn.Linear(hidden, groups * width, bias=bias[0]),
        nn.Linear(hidden, groups * d_vo, bias=bias[0]),
        nn.Linear(heads * d_vo, hidden, bias=bias[1]),
    ]
    counted = sum(p.numel() for layer in layers for p in layer.parameters())
    counted += heads * d_qk * projected if projected else 0
    assert counted == attention_parameters(
        hidden, heads, groups, d_qk, d_vo, qkv_bias=bias[0], o_bias=bias[1], projected=projected
    )
