import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlatent.model.families import effective_table
from kvlatent.model.rotary import (
    LatentRotary,
    apply_rotary,
    attenuation,
    frequency_aware_exponents,
    frequency_aware_table,
    standard_exponents,
)
from kvlatent.model.table import RotaryTable
from tiny import tiny_model
from tolerances import ROUNDING, assert_close_to_scale

pytestmark = pytest.mark.numerics

THETA = 1e4


def inv_freq(exponents, theta=THETA):
    return torch.tensor([theta**-e for e in exponents], dtype=torch.float64)


def test_exponents_of_the_code_and_appendix_d2():
    # Paper section 3.3 with the index restarted in the second half; d = 16.
    assert frequency_aware_exponents(16) == (0.25, 0.375, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375)
    literal_equation_11 = (0.25, 0.375, 0.5, 0.625, 1.0, 1.0625, 1.125, 1.1875)
    assert frequency_aware_exponents(16) != literal_equation_11
    assert standard_exponents(16) == tuple(j / 8 for j in range(8))


# Share of positions below zero, minimum, RMSE to the ideal (d = 1e5) curve; theta 1e4, positions 0..4095.
# Computed for the reference notes on the paper from equation 10, normalised by d.
GOLDEN = {
    (8, "standard"): (56.1, -0.963, 0.373),
    (8, "aware"): (36.4, -0.611, 0.285),
    (16, "standard"): (39.0, -0.656, 0.227),
    (16, "aware"): (20.8, -0.396, 0.213),
    (32, "standard"): (25.4, -0.386, 0.142),
    (32, "aware"): (8.2, -0.199, 0.177),
    (64, "standard"): (17.9, -0.244, 0.093),
    (64, "aware"): (5.3, -0.146, 0.168),
    (128, "standard"): (10.2, -0.131, 0.060),
    (128, "aware"): (2.2, -0.052, 0.165),
}


@pytest.fixture(scope="module")
def ideal_curve():
    positions = torch.arange(4096)
    return positions, attenuation(inv_freq([u / 4000 for u in range(4000)]), positions)


@pytest.mark.parametrize(("d", "kind"), GOLDEN)
def test_attenuation_curve_against_golden_values(d, kind, ideal_curve):
    positions, ideal = ideal_curve
    exponents = frequency_aware_exponents(d) if kind == "aware" else standard_exponents(d)
    curve = attenuation(inv_freq(exponents), positions)
    negative, minimum, rmse = GOLDEN[d, kind]
    assert 100 * (curve < 0).double().mean() == pytest.approx(negative, abs=0.06)
    assert curve.min() == pytest.approx(minimum, abs=6e-4)
    assert (curve - ideal).square().mean().sqrt() == pytest.approx(rmse, abs=1.5e-3)


@given(st.sampled_from([4, 8, 12, 16, 24, 32, 48, 64, 96, 128]))
def test_frequency_aware_exponents_rise_from_a_quarter(d):
    exponents = frequency_aware_exponents(d)
    assert len(exponents) == d // 2
    assert exponents[0] == 0.25 and exponents[-1] == 1 - 1 / d
    assert all(a < b for a, b in itertools.pairwise(exponents))


def test_a_width_not_divisible_by_4_is_refused():
    with pytest.raises(ValueError, match="divisible by 4: got 6; try 4 or 8"):
        frequency_aware_exponents(6)


def test_scaled_models_keep_their_scaling():
    plain = RotaryTable(tuple(THETA**-e for e in standard_exponents(32)))
    assert frequency_aware_table(plain, 16, THETA).short == tuple(
        THETA**-e for e in frequency_aware_exponents(16)
    )
    # A linear factor 4 divides every frequency by 4, on the new grid as well.
    linear = RotaryTable(tuple(f / 4 for f in plain.short))
    for scaled, unscaled in zip(
        frequency_aware_table(linear, 16, THETA).short,
        frequency_aware_table(plain, 16, THETA).short,
        strict=True,
    ):
        assert scaled == pytest.approx(unscaled / 4, rel=1e-12)
    both = RotaryTable(plain.short, linear.short, switch=8, attention_factor=1.2)
    table = frequency_aware_table(both, 16, THETA)
    assert (table.switch, table.attention_factor) == (8, 1.2) and table.long[0] == pytest.approx(
        table.short[0] / 4
    )
    # On grid points shared with the original, the effective frequency itself comes back (matched pairs).
    llama3 = effective_table(tiny_model("llama-3.1").config)
    assert frequency_aware_table(llama3, 16, THETA).short[-1] == pytest.approx(llama3.short[15], rel=1e-5)


def rotate_slowly(x, position, frequencies):
    """Oracle: turn each half-split pair as a complex number."""
    half = len(frequencies)
    out = x.clone()
    for j, frequency in enumerate(frequencies):
        pair = torch.complex(x[j], x[j + half]) * torch.polar(
            torch.tensor(1.0), torch.tensor(position * frequency)
        )
        out[j], out[j + half] = pair.real, pair.imag
    return out


def test_rotation_against_complex_numbers_with_tables_per_head():
    tables = (RotaryTable((1.0, 0.1)), RotaryTable((0.5, 0.01)))
    # 4 query heads of 6 channels, 4 of them rotated
    x = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    cos, sin = LatentRotary(tables)(x, torch.arange(5)[None])
    rotated = apply_rotary(x, cos, sin)
    for head in range(4):
        for position in range(5):
            expected = x[0, head, position].clone()
            expected[:4] = rotate_slowly(expected[:4], position, tables[head // 2].short)
            torch.testing.assert_close(rotated[0, head, position], expected)
    assert not torch.equal(rotated, x)


def test_scores_depend_on_the_distance_only():
    rotary = LatentRotary((RotaryTable((1.0, 0.2, 0.03)),))
    q, k = torch.randn(2, 1, 1, 1, 6, generator=torch.Generator().manual_seed(1)).unbind(0)

    def score(query_position, key_position):
        rotated = [
            apply_rotary(x, *rotary(x, torch.tensor([[p]])))
            for x, p in ((q, query_position), (k, key_position))
        ]
        return (rotated[0] * rotated[1]).sum()

    assert_close_to_scale(score(9, 4), score(105, 100), ROUNDING, float(q.norm() * k.norm()))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


def test_the_long_table_starts_after_the_switch():
    table = RotaryTable((1.0,), (0.25,), switch=8, attention_factor=2.0)
    rotary = LatentRotary((table,))
    x = torch.zeros(1, 1, 2)
    assert rotary.inv_freq(x.device, torch.tensor(8)).item() == 1.0
    assert rotary.inv_freq(x.device, torch.tensor(9)).item() == 0.25
    cos, _ = rotary(x, torch.arange(3)[None])
    torch.testing.assert_close(cos[0, :, 0], 2 * torch.cos(torch.arange(3.0)))
    assert not list(rotary.buffers()) and not list(rotary.parameters())


@pytest.mark.parametrize(
    ("width", "fitting"), [(2, "try 4$"), (3, "try 4$"), (6, "try 4 or 8$"), (10, "try 8 or 12$")]
)
def test_widths_that_fit_are_named_once(width, fitting):
    with pytest.raises(ValueError, match=f"got {width}; {fitting}"):
        frequency_aware_exponents(width)
