"""Widths of keys and of values: one number for all layers or one per layer, normalised and checked here alone.

No torch here: configs are readable without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Width", "Widths", "width_per_layer"]

Width = int | Sequence[int]
"""Of keys or of values, in channels per head, as users give it: one number for all layers, or one per layer."""


class Widths(NamedTuple):
    """Cached widths of a model, in channels per head.

    Args:
        d_qk: of keys, one number for all layers or one per layer.
        d_vo: of values, likewise.
    """

    d_qk: int | tuple[int, ...]
    d_vo: int | tuple[int, ...]

    @classmethod
    def check(cls, d_qk: Any, d_vo: Any, head_dim: int, num_layers: int | None = None) -> Widths:
        """The widths, once they are known to fit heads of `head_dim` channels and so many layers.

        Lists become tuples; where the number of layers is known, one number where all of them agree.

        Raises:
            ValueError: a width is not a positive integer or exceeds the head, d_qk is odd, or a list has another
                length than the model has layers.
        """
        return cls(
            *(
                _check_side(name, width, head_dim, num_layers)
                for name, width in (("d_qk", d_qk), ("d_vo", d_vo))
            )
        )

    def check_layers(self, num_layers: int) -> None:
        """Raise `ValueError` unless lists have one entry per layer."""
        for name, width in self._asdict().items():
            if not isinstance(width, int):
                _check_length(name, width, num_layers)

    def to_dict(self) -> dict[str, int | list[int]]:
        """JSON form."""
        return {
            name: width if isinstance(width, int) else list(width) for name, width in self._asdict().items()
        }

    def per_layer(self, num_layers: int) -> list[tuple[int, int]]:
        """(d_qk, d_vo) of every layer."""
        sides = (width_per_layer(width, num_layers) for width in self)
        return list(zip(*sides, strict=True))

    def share(self, head_dim: int, num_layers: int) -> float:
        """Of the cache of as many layers of whole heads."""
        return sum(map(sum, self.per_layer(num_layers))) / (2 * head_dim * num_layers)


def width_per_layer(width: Width, num_layers: int = 1) -> tuple[int, ...]:
    """One width for each of so many layers; a list stays what it is, whatever its length."""
    return (width,) * num_layers if isinstance(width, int) else tuple(width)


def _check_side(name: str, width: Any, head_dim: int, num_layers: int | None) -> int | tuple[int, ...]:
    """A validated number, or a validated tuple."""
    if not isinstance(width, list | tuple):
        _check_width(name, width, head_dim)
        return width
    if num_layers is not None:
        _check_length(name, width, num_layers)
    for one in width:
        _check_width(name, one, head_dim)
    return width[0] if num_layers is not None and len(set(width)) == 1 else tuple(width)


def _check_width(name: str, width: Any, head_dim: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or width <= 0:
        raise ValueError(
            f"{name} must be a positive integer: got {name}={width}, head_dim={head_dim}; try {head_dim // 2}"
        )
    if width > head_dim:
        raise ValueError(
            f"{name} cannot exceed head_dim: got {name}={width}, head_dim={head_dim}; try {head_dim // 2}"
        )
    if name == "d_qk" and width % 2:
        raise ValueError(
            f"d_qk must be even, since rotary channels come in pairs: got d_qk={width}, head_dim={head_dim}; "
            f"try {f'{width - 1} or ' if width > 1 else ''}{width + 1}"
        )


def _check_length(name: str, widths: Sequence[int], num_layers: int) -> None:
    if len(widths) != num_layers:
        raise ValueError(
            f"a list of {name} needs one width per layer: got {len(widths)} for {num_layers} layers; "
            "give one number for all layers or one per layer"
        )
