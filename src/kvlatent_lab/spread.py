"""How sure a mean over repetitions is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["standard_error"]


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, s / sqrt(n), with s the sample standard deviation; None of fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
