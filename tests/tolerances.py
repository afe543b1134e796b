"""Tolerances that hold on every processor: relative to the magnitudes that enter, not to what comes out.

Kernels differ in the order of their sums, so a result is uncertain by some roundings of the terms. Where terms cancel,
what comes out is smaller than they are by any factor: an absolute bound, or one relative to the result, then holds by
the luck of one processor.
"""

import torch

from tiny import logits

# For float32 models of a few layers and logits of either way to run them: 80 roundings of the largest. Measured:
# 4e-6 of 3.5 between float32 and float64, three times that with every kernel rounding as badly as it may.
ROUNDING = 1e-5


def assert_close_to_scale(actual, expected, tolerance, scale=None) -> None:
    """Every entry differs by at most `tolerance` times `scale`, which is the largest entry of `expected` unless given.

    Args:
        actual, expected: tensors of one shape and dtype.
        scale: the magnitude (or energy) that the computation sums up, where the result may cancel down to 0.
    """
    if scale is None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_same_model(loaded, model, input_ids) -> None:
    """Weights are equal bit for bit, logits but for rounding: both models in the same mode.

    Products depend on where in memory a weight lies, and a mapped file lies wherever its header ends: on MKL the logits
    of one token differ in the last bits between a model and its own checkpoint.
    """
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_close_to_scale(logits(loaded, input_ids), logits(model, input_ids), ROUNDING)
