"""How the next token is drawn: a temperature as upstream's `generate` takes it.

Why: upstream divides the logits by whatever it is given, which at a tiny temperature leaves the numbers that float32 has.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["sampling_options"]

_LEAST = 1e-5  # as in vLLM; below it only the likeliest token has a probability


def sampling_options(temperature: float) -> dict[str, Any]:
    """Arguments of `generate`: the likeliest token each time at (next to) 0, sampling above.

    Raises:
        ValueError: negative, infinite or no number.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"a temperature is 0 or more: got {temperature}; try 0 or 0.8")
    if temperature < _LEAST:
        return {"do_sample": False, "temperature": 1.0}
    return {"do_sample": True, "temperature": temperature}
