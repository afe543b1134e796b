"""What to say where a share of the cache has no widths: which shares and which widths do, and never a width that nobody
gave.

Some choices fit some widths only (a stride takes divisors of the head), so a share that is split evenly may have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cost import share_at_least

__all__ = ["share_without_widths"]

Fits = Callable[[int, int], bool]
"""Whether a conversion can have these d_qk and d_vo."""


def share_without_widths(
    what: str, kv: float | None, widths: Sequence[int], head_dim: int, fits: Fits
) -> str | None:
    """One sentence: what fits instead of an even split of `kv`; None where nothing does, so the widths are not at fault.

    Args:
        what: that has no such widths, in words.
        kv: share of the cache to keep; None is half, by default.
        widths: that an even split may have, in channels, ascending.
        head_dim: original head width, channels.
        fits: see `Fits`.
    """
    share = 0.5 if kv is None else kv
    even = [width for width in widths if fits(width, width)]
    below = [width for width in even if width <= share * head_dim]
    above = [width for width in even if width > share * head_dim]
    near = [f"--kv {share_at_least(width / head_dim):g}" for width in (*below[-1:], *above[:1])]
    uneven = _uneven(share, widths, head_dim, fits)
    if uneven and sum(uneven) > 2 * max(below, default=0):
        kept = sum(uneven) / (2 * head_dim)
        near.append(f"--d-qk {uneven[0]} --d-vo {uneven[1]}, which keep {kept:.4g} of the cache")
    if not near:
        return None
    given = f"--kv {share:g}{' (the default)' if kv is None else ''}"
    return (
        f"{what} fits only some widths of a head, and none of them keeps {given} of both keys and values: got "
        f"head_dim={head_dim}; try {', or '.join(near)}"
    )


def _uneven(share: float, widths: Sequence[int], head_dim: int, fits: Fits) -> tuple[int, int] | None:
    """Different widths that keep the most of a share, neither side less than half of it; keys are the wider in a draw."""
    room, least = 2 * share * head_dim, share * head_dim / 2
    keys = [width for width in widths if width >= least and fits(width, head_dim)]
    values = [width for width in widths if width >= least and fits(head_dim, width)]
    pairs = [(d_qk, d_vo) for d_qk in keys for d_vo in values if d_qk != d_vo and d_qk + d_vo <= room + 1e-6]
    pairs.sort(key=lambda pair: (-sum(pair), abs(pair[0] - pair[1]), -pair[0]))
    return next((pair for pair in pairs if fits(*pair)), None)
