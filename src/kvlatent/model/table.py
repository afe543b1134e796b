"""One rotary table as data: the frequencies of the rotated channel pairs, stored and never recomputed.

No torch here: a table is a tuple of Python floats, exact images of the fp32 values the original model used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["RotaryTable"]


@dataclass(frozen=True)
class RotaryTable:
    """Frequencies of the rotated channel pairs of one key-value head.

    Args:
        short: `inv_freq`, radians per position, one per rotated pair.
        long: the table for sequences longer than `switch` (longrope), or None.
        switch: the longest sequence, in tokens, that still uses `short`; None without `long`.
        attention_factor: multiplies cosine and sine (yarn, longrope).

    Raises:
        ValueError: `long` has another length than `short`, or comes without `switch`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...] | None = None
    switch: int | None = None
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.long is not None and len(self.long) != len(self.short):
            raise ValueError(
                f"the long rotary table must have as many frequencies as the short one: got {len(self.long)} "
                f"and {len(self.short)}; select both by the same pairs"
            )
        if not all(math.isfinite(f) for f in (*self.short, *(self.long or ()), self.attention_factor)):
            raise ValueError(
                "a rotary table holds finite frequencies: got NaN or infinity; convert the model again"
            )
        if (self.long is None) != (self.switch is None):
            raise ValueError(
                f"a long rotary table and its switch length come together: got long={self.long is not None}, "
                f"switch={self.switch}; give both or neither"
            )

    @property
    def rotary_dim(self) -> int:
        """Rotated channels: two per frequency."""
        return 2 * len(self.short)

    def subset(self, pairs: Sequence[int]) -> RotaryTable:
        """The table that keeps `pairs` (indices of channel pairs), each at its own frequency.

        Indices beyond the table are pairs of channels that no rotation touches: their frequency is 0.
        """

        def taken(table: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(table[i] if i < len(table) else 0.0 for i in pairs)

        long = None if self.long is None else taken(self.long)
        return RotaryTable(taken(self.short), long, self.switch, self.attention_factor)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; floats keep all digits, so the fp32 table survives a round trip exactly."""
        return {
            "short": list(self.short),
            "long": None if self.long is None else list(self.long),
            "switch": self.switch,
            "attention_factor": self.attention_factor,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RotaryTable:
        """Inverse of `to_dict`."""
        long = data.get("long")
        return cls(
            tuple(float(f) for f in data["short"]),
            None if long is None else tuple(float(f) for f in long),
            data.get("switch"),
            float(data.get("attention_factor", 1.0)),
        )
