"""Which widths a plan may choose from: by the head, by the engine that must run them, and by the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvlatent.engines.facts import Engine, check_engine, engine_named
from kvlatent.engines.kv_dtypes import KVDtype

__all__ = ["Candidates", "candidates_for", "equal_widths", "share_at_least"]

_MULTIPLE, _ENGINE_MULTIPLE = 4, 8
_LEAST, _MOST = 3 / 8, 5 / 8
"""Share of a split that the keys get. Beyond it the predicted errors, which are of first order, called splits best that
measured far worse than equal widths (docs/log.md, 2026-11-22)."""


def equal_widths(kv: float, head_dim: int) -> int:
    """Largest multiple of 4 that, as both d_qk and d_vo, keeps at most the share `kv` of the original cache.

    Args:
        kv: share of the original cache to keep, in (0, 1].
        head_dim: original head width, channels.

    Raises:
        ValueError: the share is outside (0, 1] or too small for a width of 4.
    """
    _check_share(kv)
    if kv == 1:
        return head_dim
    width = int(kv * head_dim + 1e-9) // 4 * 4
    if width == 0:
        raise ValueError(
            f"--kv {kv:g} of head_dim={head_dim} is less than the smallest width 4; "
            f"try {share_at_least(4 / head_dim):g} or more"
        )
    return width


def _check_share(kv: float) -> None:
    """Raise `ValueError` unless `kv` lies in (0, 1]."""
    if not 0 < kv <= 1:
        raise ValueError(f"--kv is the share of the cache to keep and lies in (0, 1]: got {kv:g}; try 0.5")


def share_at_least(share: float) -> float:
    """`share` rounded up to four decimals, so that what an error suggests is enough."""
    return math.ceil(share * 1e4 - 1e-6) / 1e4


@dataclass(frozen=True)
class Candidates:
    """Widths that keys and values may have.

    Args:
        widths: in channels, ascending; for keys and for values alike.
        head_dim: original head width.
        table: scope of the rotary table.
        symmetric: d_qk must equal d_vo.
        engine: that asked for it, or None; kv_dtype: that the cache is to have, or None.
    """

    widths: tuple[int, ...]
    head_dim: int
    table: str
    symmetric: bool
    engine: str | None = None
    kv_dtype: str | None = None

    def room(self, kv: float, num_layers: int = 1) -> int:
        """Channels that keys and values of so many layers may have together at a share `kv` of the cache."""
        return int(2 * kv * self.head_dim * num_layers + 1e-6)

    def meets(self, kv: float) -> bool:
        """Whether the smallest widths keep at most the share `kv` of the cache."""
        return 2 * self.widths[0] <= self.room(kv)

    def splits(self, kv: float) -> list[tuple[int, int]]:
        """All (d_qk, d_vo) that keep at most the share `kv` of the cache, the keys between 3/8 and 5/8 of it.

        Raises:
            ValueError: the share is outside (0, 1], or too small for any.
        """
        _check_share(kv)
        if not self.meets(kv):
            least = self.widths[0]
            raise ValueError(
                f"--kv {kv:g} of head_dim={self.head_dim} leaves {2 * kv * self.head_dim:g} channels for a key and a "
                f"value, but the smallest widths{_of(self.engine, self.kv_dtype)} are d_qk={least} and d_vo={least}; "
                f"try {share_at_least(least / self.head_dim):g} or more"
            )
        room = self.room(kv)
        if self.symmetric:
            return [(width, width) for width in self.widths if 2 * width <= room]
        pairs = ((d_qk, d_vo) for d_qk in self.widths for d_vo in self.widths if d_qk + d_vo <= room)
        return [pair for pair in pairs if _LEAST <= pair[0] / sum(pair) <= _MOST]

    def near(self, width: int) -> tuple[int, ...]:
        """Widths within a factor of 2 of `width`."""
        return tuple(other for other in self.widths if width <= 2 * other and other <= 2 * width)


def candidates_for(
    head_dim: int,
    engine: str | None = None,
    table: str | None = None,
    *,
    per_layer: bool = False,
    symmetric: bool = False,
    multiple: int | None = None,
    kv_dtype: KVDtype | None = None,
) -> Candidates:
    """The widths that an engine (or, with None, kvlatent itself) takes.

    Multiples of 4, and of 8 when an engine is named; without an engine or a multiple, the full head width as well.

    Args:
        head_dim: original head width.
        engine: a key of `engines.ENGINES`, or None.
        table: scope of the rotary table; left out, the engine's own.
        per_layer: layers are to differ.
        symmetric: only d_qk = d_vo.
        multiple: of which widths are to be multiples instead.
        kv_dtype: that the cache is to have, which may not take all of them.

    Raises:
        ValueError: an unknown engine or table, something that the engine does not take, or a head too narrow for it, or for
            the KV dtype.
    """
    row = None if engine is None else engine_named(engine)
    table = table or ("head" if row is None else row.scope(per_layer=per_layer))
    step = _step(row, multiple, head_dim)
    least = step if row is None else -(-max(step, row.smallest) // step) * step
    widths = tuple(range(least, head_dim + 1, step))
    if row is None and multiple is None and head_dim % step:
        widths = (*widths, head_dim)
    if not widths:
        raise ValueError(
            f"the smallest width{_of(engine)} is {least}: got head_dim={head_dim}; choose another engine or multiple"
        )
    if kv_dtype is not None:
        widths = _widths_taken(widths, kv_dtype, engine)
    check_engine(engine or "transformers", widths[0], widths[0], table)
    if per_layer and row is not None and row.sizes == 1:
        raise ValueError(
            f"engine {row.name} needs the same widths in every layer, so 1 group: got a plan per layer, with up to 3; "
            "leave --per-layer out or use --engine transformers"
        )
    if per_layer and table == "model":
        raise ValueError(
            "one rotary table for the model needs one d_qk for all layers, so 1 group: got a plan per layer, with up "
            "to 3; use --table layer or head"
        )
    return Candidates(
        widths,
        head_dim,
        table,
        symmetric or (row is not None and row.symmetric),
        engine,
        None if kv_dtype is None else kv_dtype.name,
    )


def _widths_taken(widths: tuple[int, ...], kv_dtype: KVDtype, engine: str | None) -> tuple[int, ...]:
    """Those that a KV dtype takes; raises `ValueError` where there is none."""
    taken = tuple(width for width in widths if kv_dtype.takes(width))
    if not taken:
        raise ValueError(
            f"a cache{_of(engine, kv_dtype.name)} takes {kv_dtype.rule}: got no such width from {widths[0]} to {widths[-1]}; "
            "choose another --kv-dtype or --backend"
        )
    return taken


def _step(row: Engine | None, multiple: int | None, head_dim: int) -> int:
    """Distance between candidates, channels."""
    required = 2 if row is None else row.multiple
    if multiple is None:
        return _MULTIPLE if row is None else max(_ENGINE_MULTIPLE, required)
    if isinstance(multiple, bool) or multiple <= 0 or multiple % 2 or multiple > head_dim:
        raise ValueError(
            f"a multiple of widths is a positive even number up to head_dim={head_dim}: got {multiple}; "
            f"try {_MULTIPLE}"
        )
    if row is not None and multiple % required:
        raise ValueError(
            f"engine {row.name} needs widths that are multiples of {required}: got multiples of {multiple}; "
            f"try {_ENGINE_MULTIPLE}"
        )
    return multiple


def _of(engine: str | None, kv_dtype: str | None = None) -> str:
    return ("" if engine is None else f" of engine {engine}") + (
        "" if kv_dtype is None else f" in {kv_dtype}"
    )
