"""The rows of the baseline tables: the original, its quantised caches, conversions, and what training makes of them.

The most telling rows come first, so that a run that is cut short leaves the answer to the largest questions. Rows
"aligned" are the method of the first tables, whatever the defaults become; "passed" is the calibrated conversion with all
that it does. What is compared side by side differs in that word alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvlatent.selection.choices import PRESETS
from kvlatent_lab.study.grid_cells import MEASURED, Cell

__all__ = ["NEW", "OLD", "PLAIN", "QUANTISED", "SHARES", "TOKENS", "Steps", "TableRow", "table_rows"]

PLAIN = "dynamic"
QUANTISED = {"int4": "quantized-int4", "int8": "quantized-int8-hqq"}
SHARES: dict[str, tuple[int, int]] = {"75": (48, 48), "50": (32, 32), "28": (16, 20), "12.5": (8, 8)}
"""Widths of keys and values in 64ths of a head, by the share of the cache that they keep in per cent."""
PAPER_SHARES = {"50": (32, 32), "25": (16, 16), "12.5": (8, 8)}  # its widths divide a head's 64
TOKENS = {"0.3M": 300_000, "1M": 1_000_000, "3M": 3_000_000}
LONG_RUN = {"10M": 10_000_000}
"""Of two kinds and shares alone: a long run that a card makes in minutes and a processor in a day."""
OLD, NEW = "aligned", "passed"
_TUNED: dict[str, dict[str, Any]] = {
    "statistics": {"align": 0, "global_steps": 0},
    OLD: {"align": 200, "global_steps": 0},
}
"""Pinned, as these rows were measured when there was nothing else; so was text without blocks that ask for recall."""


class Steps(NamedTuple):
    """Of alignment, a layer, and of the global pass in rows "passed"; the preset's where nothing else is asked for."""

    align: int = PRESETS["calibrated"].align
    global_steps: int = PRESETS["calibrated"].global_steps


@dataclass(frozen=True)
class TableRow:
    """One row: a model and the cache that it is measured with.

    Args:
        name: of its file.
        cell: the conversion and its training; None is the original.
        cache: a kind of `evaluation.speed.caches`.
    """

    name: str
    cell: Cell | None = None
    cache: str = PLAIN

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its figures beside the model and the texts."""
        return {"cache": self.cache} | ({} if self.cell is None else self.cell.settings)


def table_rows(head_dim: int, seed: int = 0, steps: Steps | None = None) -> list[TableRow]:
    """All rows for heads of so many channels, the most telling first; without steps, with the preset's."""
    rows: dict[str, TableRow] = {}
    for row in _in_order(head_dim, seed, steps or Steps()):
        rows.setdefault(row.name, row)
    return list(rows.values())


def _in_order(head_dim: int, seed: int, steps: Steps) -> Iterator[TableRow]:
    def row(kind: str, share: str, cache: str = PLAIN, tokens: str | None = None) -> TableRow:
        name = f"{kind}-{share}" + (f"-kl-{tokens}" if tokens else "")
        cell = _conversion(kind, share, head_dim, seed, (TOKENS | LONG_RUN)[tokens] if tokens else 0, steps)
        return TableRow(name + ("" if cache == PLAIN else f"-{cache}"), cell, QUANTISED.get(cache, cache))

    yield TableRow("original")
    yield from (row(kind, "50") for kind in ("head-passed", "model-passed", "planned-passed"))
    yield from (row("head-passed", share) for share in ("75", "28", "12.5"))
    yield row("head-passed", "50", "int8")
    yield row("head-passed", "50", tokens="0.3M")
    yield from (TableRow(f"original-{name}", cache=cache) for name, cache in QUANTISED.items())
    yield from (row(kind, "50") for kind in ("head-aligned", "head-statistics", "model-aligned", "paper"))
    yield row("head-passed", "50", "int4")
    yield from (row("head-passed", "28", cache) for cache in QUANTISED)
    yield from (row("model-passed", share) for share in ("75", "28", "12.5"))
    yield row("model-passed", "50", tokens="0.3M")
    yield from (row("model-passed", share, cache) for share in ("50", "28") for cache in QUANTISED)
    for share in ("28", "75", "12.5"):
        yield from (row(kind, share) for kind in ("planned-passed", "head-aligned", "head-statistics"))
    yield row("model-statistics", "50")
    yield row("paper", "25")
    yield row("head-aligned", "50", tokens="0.3M")
    yield row("paper", "50", tokens="0.3M")
    yield from (row("head-aligned", share, cache) for share in ("50", "28") for cache in QUANTISED)
    for share in SHARES:
        yield from (row(kind, share) for kind in ("planned-aligned", "planned-statistics"))
    for share in ("28", "75", "12.5"):
        yield from (row(kind, share) for kind in ("model-aligned", "model-statistics"))
    yield row("paper", "12.5")
    for tokens in TOKENS:
        for share in ("50", "28", "12.5", "75"):
            yield from (row(kind, share, tokens=tokens) for kind in ("head-passed", "model-passed"))
            yield from (row(kind, share, tokens=tokens) for kind in ("planned-passed", "head-aligned"))
        yield from (row("paper", share, tokens=tokens) for share in PAPER_SHARES)
    for tokens in LONG_RUN:
        yield from (
            row(kind, share, tokens=tokens)
            for kind in ("planned-passed", "model-passed")
            for share in ("50", "28")
        )


def _conversion(kind: str, share: str, head_dim: int, seed: int, tokens: int, steps: Steps) -> Cell:
    """Scope of the table or "planned" or "paper", then how the weights come about: `head-aligned`, `paper`, ..."""
    scope, _, tuned = kind.partition("-")
    parts = PAPER_SHARES[share] if kind == "paper" else SHARES[share]
    d_qk, d_vo = (part * head_dim // 64 for part in parts)
    name = f"{kind}-{share}-{tokens}"
    shared: dict[str, Any] = {"seed": seed, "stage2": tokens}
    if kind == "paper":
        return Cell(name, d_qk, d_vo, "paper", **shared)
    planned = scope == "planned"
    shared |= {"per_layer": planned, "recipe": {} if tuned == NEW else {"calibration.recall": 0.0}}
    if tuned == NEW:  # unfinished training lies under the name, and is not continued from other steps
        name += f"-{steps.align}-{steps.global_steps}"
        shared["extra"] = {"widths": MEASURED} if planned else {}
    choices = {"table": "head" if planned else scope} | (_TUNED[tuned] if tuned != NEW else steps._asdict())
    return Cell(name, d_qk, d_vo, "calibrated", choices=choices, **shared)
