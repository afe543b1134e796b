"""Tolerances that hold on every processor: relative to the magnitudes that enter, not to what comes out.

Kernels differ in the order of their sums, so a result is uncertain by some roundings of the terms. Where terms cancel,
what comes out is smaller than they are by any factor: an absolute bound, or one relative to the result, then holds by
the luck of one processor.
"""

import torch

# For float32 models of a few layers and logits of either way to run them: 80 roundings of the largest. Measured:
# 4e-6 of 3.5 between float32 and float64, three times that with every kernel rounding as badly as it may.
ROUNDING = 1e-5


def assert_close_to_scale(actual, expected, tolerance, scale=None) -> None:
    """Every entry differs by at most `tolerance` times `scale`, which is the largest entry of `expected` unless given.

    Args:
        actual, expected: tensors of one shape and dtype, or two numbers.
        scale: the magnitude (or energy) that the computation sums up, where the result may cancel down to 0.
    """
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    scale = float(expected.abs().max() if scale is None else scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
