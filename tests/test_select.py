import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlatent.model.rotary import frequency_aware_exponents, standard_exponents
from kvlatent.selection.paper_rules import (
    latent_rotary_dim,
    matched_pairs,
    nearest,
    pairs_to_channels,
    product_svd,
    stride_channels,
    stride_pairs,
)

pytestmark = pytest.mark.numerics


def test_stride_is_the_papers_equation_5():
    assert stride_channels("d_qk", 4, 16) == (0, 4, 8, 12)
    assert stride_channels("d_vo", 8, 16) == tuple(range(0, 16, 2))


@given(st.sampled_from([(64, 32), (64, 16), (128, 64), (96, 48), (128, 8)]))
def test_stride_keeps_whole_pairs(sizes):
    head_dim, d = sizes
    pairs = stride_pairs(head_dim // 2, d // 2)
    assert pairs_to_channels(pairs, head_dim) == stride_channels("d_qk", d, head_dim)
    kept = set(pairs_to_channels(pairs, head_dim))
    assert all((c + head_dim // 2) % head_dim in kept for c in kept)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_matched_pairs_own_the_frequency_aware_frequencies(head_dim, ratio):
    d = head_dim // ratio
    if d % 4:
        with pytest.raises(ValueError, match="matched pairs need"):
            matched_pairs(head_dim, d, head_dim, d)
        return
    pairs = matched_pairs(head_dim, d, head_dim, d)
    own = [standard_exponents(head_dim)[pair] for pair in pairs]
    assert own == pytest.approx(frequency_aware_exponents(d), abs=1e-12)


def test_matched_example_of_width_128():
    assert matched_pairs(128, 64, 128, 64) == (*range(16, 48, 2), *range(48, 64))


def test_impossible_widths_name_the_nearest():
    with pytest.raises(ValueError, match="divisible by d_qk: got d_qk=24, head_dim=64; try 16 or 32"):
        stride_channels("d_qk", 24, 64, 2)
    with pytest.raises(ValueError, match="d_qk=6, head_dim=80; try 4 or 8"):
        stride_channels("d_qk", 6, 80, 2)
    with pytest.raises(ValueError, match="d_qk=12, head_dim=80; try 8 or 16"):
        stride_channels("d_qk", 12, 80, 4)
    with pytest.raises(ValueError, match="d_qk=48, head_dim=64 .48 of 64 rotated.; try 32"):
        matched_pairs(64, 48, 64, 48)
    with pytest.raises(ValueError, match="use keys=stride"):
        matched_pairs(8, 4, 4, 2)
    with pytest.raises(ValueError, match="d_qk=10 of head_dim=32 with 16 rotated gives 5; try 8 or 12"):
        latent_rotary_dim(32, 16, 10)
    assert latent_rotary_dim(32, 16, 8) == 4
    assert nearest(5, [1, 4, 8]) == "try 4 or 8"


def test_product_svd_is_the_best_low_rank_product():
    generator = torch.Generator().manual_seed(0)
    w_v, w_o = torch.randn(8, 20, generator=generator), torch.randn(40, 8, generator=generator)
    product = (w_o.double() @ w_v.double()).numpy()
    singular = torch.linalg.svdvals(torch.from_numpy(product))
    for d_vo in (8, 5, 2):
        new_v, _, new_o = product_svd(w_v, None, w_o, d_vo)
        error = torch.linalg.norm(torch.from_numpy(product) - new_o @ new_v)
        torch.testing.assert_close(error, singular[d_vo:].square().sum().sqrt(), rtol=1e-8, atol=1e-8)
        assert new_v.shape == (d_vo, 20) and new_o.shape == (40, d_vo)


@pytest.mark.parametrize("rank", [0, 3])
def test_product_svd_of_heads_that_lack_directions(rank):
    generator = torch.Generator().manual_seed(2)
    w_v = torch.randn(8, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    w_o = torch.randn(40, 8, generator=generator)
    for d_vo in (8, 4, rank or 1):
        new_v, new_b, new_o = product_svd(w_v, torch.ones(8), w_o, d_vo)
        assert new_b.isfinite().all()
        torch.testing.assert_close(new_o @ new_v, w_o.double() @ w_v.double(), rtol=0, atol=1e-5)


def test_product_svd_carries_the_bias_through_the_same_map():
    generator = torch.Generator().manual_seed(1)
    w_v, b_v, w_o = (torch.randn(*s, generator=generator) for s in ((6, 10), (6,), (12, 6)))
    new_v, new_b, new_o = product_svd(w_v, b_v, w_o, 6)
    x = torch.randn(10, generator=generator).double()
    expected = w_o.double() @ (w_v.double() @ x + b_v.double())
    torch.testing.assert_close(new_o @ (new_v @ x + new_b), expected)
