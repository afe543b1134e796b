"""The value basis against the truncated SVD, least squares and brute force."""

import pytest
import torch

from kvlatent.selection.value_bases import best_outputs, output_error, value_basis, value_errors
from tolerances import assert_close_to_scale

pytestmark = pytest.mark.numerics

D, SIZE, SAMPLES = 20, 12, 200


def problem(heads, seed=0, samples=SAMPLES, rank=SIZE):
    """Output weights [G, D, d], samples y [G, samples, d] with a decaying spectrum, and their moments [G, d, d]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w_o = draw(heads, D, SIZE) * torch.exp(-torch.arange(SIZE) / 5)
    decay = torch.exp(-torch.arange(SIZE) / 3.0)
    decay[rank:] = 0
    turns = torch.linalg.qr(draw(heads, SIZE, SIZE)).Q
    y = (draw(heads, samples, SIZE) * decay) @ turns
    return w_o, y, y.mT @ y / samples


def error(w_o, y, basis):
    """Mean squared output error when P y is read by least squares, from the samples themselves."""
    total = 0.0
    for weight, sample in zip(w_o, y, strict=True):
        wanted, kept = sample @ weight.T, sample @ basis.T
        fitted = kept @ torch.linalg.lstsq(kept, wanted).solution
        total += float((wanted - fitted).square().sum()) / len(sample)
    return total


@pytest.mark.parametrize("width", [1, 4, 11])
def test_one_head_is_the_truncated_svd_of_its_outputs(width):
    w_o, y, moments = problem(1)
    basis = value_basis(w_o, moments, width)
    assert basis.shape == (width, SIZE) and basis.is_contiguous()
    torch.testing.assert_close(basis @ basis.T, torch.eye(width, dtype=torch.float64))
    tail = torch.linalg.svdvals(y[0] @ w_o[0].T)[width:].square().sum() / SAMPLES  # Eckart-Young
    assert error(w_o, y, basis) == pytest.approx(float(tail), rel=1e-6)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(width, SIZE, generator=generator, dtype=torch.float64)
        assert error(w_o, y, other) > float(tail)
        assert error(w_o, y, basis + 0.05 * other) > float(tail)


def test_the_error_formula_is_the_error_of_the_samples():
    w_o, y, moments = problem(3)
    energy = float((y @ w_o.mT).square().sum()) / SAMPLES
    for width in (1, 5, SIZE):
        basis = torch.randn(width, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = output_error(basis, w_o.mT @ w_o, moments)
        expected = torch.tensor(
            error(w_o, y, basis), dtype=torch.float64
        )  # 0 at full width, where all cancels
        assert_close_to_scale(found, expected, 1e-9, energy)


def test_outputs_are_the_least_squares_of_the_samples():
    w_o, y, moments = problem(3)
    basis = value_basis(w_o, moments, 5)
    found = best_outputs(w_o, moments, basis)
    assert found.shape == (3, D, 5)
    for head in range(3):
        kept = y[head] @ basis.T
        expected = torch.linalg.lstsq(kept, y[head] @ w_o[head].T).solution.T
        torch.testing.assert_close(found[head], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_a_group_descends_from_the_closed_form_and_ends_where_nothing_near_is_better(seed):
    w_o, y, moments = problem(3, seed)
    for width in (2, 6):
        start = _closed_form(w_o, moments, width)
        basis = value_basis(w_o, moments, width)
        best = error(w_o, y, basis)
        assert best < error(w_o, y, start)
        torch.testing.assert_close(basis @ basis.T, torch.eye(width, dtype=torch.float64))
        for trial in range(10):
            generator = torch.Generator().manual_seed(trial)
            other = torch.randn(width, SIZE, generator=generator, dtype=torch.float64)
            assert error(w_o, y, basis + 1e-2 * other) > best * (1 - 1e-6)


def _closed_form(w_o, moments, width):
    values, vectors = torch.linalg.eigh((w_o.mT @ w_o).sum(0))
    root = (vectors * values.sqrt()) @ vectors.T
    return torch.linalg.eigh(root @ moments.mean(0) @ root).eigenvectors.flip(1)[:, :width].T @ root


def test_a_descent_that_ends_higher_is_thrown_away(monkeypatch):
    w_o, y, moments = problem(3)

    class Worse(torch.optim.LBFGS):
        def step(self, closure):
            with torch.no_grad():
                self.param_groups[0]["params"][0].normal_(generator=torch.Generator().manual_seed(0))

    best = error(w_o, y, value_basis(w_o, moments, 4))
    monkeypatch.setattr(torch.optim, "LBFGS", Worse)
    kept = error(w_o, y, value_basis(w_o, moments, 4))
    assert kept == pytest.approx(error(w_o, y, _closed_form(w_o, moments, 4)), rel=1e-6) and best < kept


def test_heads_that_see_the_same_values_share_the_closed_form():
    w_o, _, moments = problem(1)
    twice = value_basis(w_o.repeat(2, 1, 1), moments.repeat(2, 1, 1), 4)
    once = value_basis(w_o, moments, 4)
    torch.testing.assert_close(twice.T @ twice, once.T @ once, rtol=1e-4, atol=1e-5)  # the same subspace


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rank", [0, 3])
def test_moments_without_full_rank_lose_nothing_once_the_rank_is_kept(heads, rank):
    w_o, y, moments = problem(1, rank=rank)
    w_o, y, moments = (x.repeat(heads, 1, 1) for x in (w_o, y, moments))
    basis = value_basis(w_o, moments, 4)
    outputs = best_outputs(w_o, moments, basis)
    assert basis.isfinite().all() and outputs.isfinite().all()
    left = (y @ w_o.mT - (y @ basis.T) @ outputs.mT).square().sum()
    assert left <= 1e-9 * (y @ w_o.mT).square().sum()


def test_errors_of_every_width():
    w_o, y, moments = problem(4)
    errors = value_errors(w_o, moments, 2)
    assert errors.shape == (SIZE + 1,) and errors[-1] == 0 and (errors.diff() <= 0).all()
    assert float(errors[0]) == pytest.approx(float((y @ w_o.mT).square().sum()) / SAMPLES, rel=1e-4)
    for width in (1, 5, 11):
        expected = sum(
            error(w_o[pair], y[pair], _closed_form(w_o[pair], moments[pair], width))
            for pair in (slice(0, 2), slice(2, 4))
        )
        assert float(errors[width]) == pytest.approx(expected, rel=1e-2)
    alone = value_errors(w_o, moments, 1)  # a value head for every query head is never worse
    assert (alone <= errors * (1 + 1e-9)).all()
