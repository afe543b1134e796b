"""How answers look to people: plans, figures, and what a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

LABELS = {
    "original": "original",
    "converted": "converted, untrained",
    "stage1": "after stage I",
    "latent": "latent",
}


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """A plan in three lines: widths, bytes, work."""
    size = plan["cache_bytes_per_token"]
    tokens = ", ".join(f"stage {'I' * int(name[-1])} {count:,}" for name, count in plan["tokens"].items())
    lines = [
        f"widths: d_qk {plan['d_qk']}, d_vo {plan['d_vo']} of {plan['head_dim']} (preset {plan['preset']})",
        f"cache: {size['latent']:,} of {size['original']:,} bytes per token in {size['dtype']}: {plan['share']:.1%}",
    ]
    if tokens:
        lines.append(
            f"training tokens: {tokens}; about {duration(plan['estimated_seconds'])} on {plan['device']} in "
            f"{plan['dtype']} (an estimate from the model's size and this machine's speed)"
        )
    else:
        lines.append("training tokens: none")
    return lines


def duration(seconds: float) -> str:
    """Rounded, in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plus_minus(value: float, error: float | None, digits: int = 3) -> str:
    """A figure with its standard error."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def figures_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a step of the run: perplexity, its ratio to the original's, cache bytes."""
    dtypes = {row["cache_dtype"] for row in figures.values()}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("perplexity", "ratio", f"cache bytes/token ({', '.join(sorted(dtypes))})"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, label in LABELS.items():
        if name in figures:
            row = figures[name]
            ratio = plus_minus(row["ratio"], row["ratio_standard_error"]) if "ratio" in row else ""
            value = plus_minus(row["perplexity"], row["standard_error"])
            table.add_row(label, value, ratio, f"{row['cache_bytes_per_token']:,.0f}")
    return table


def pairs_table(pairs: Mapping[str, Any]) -> Table:
    """Names and values, one a row."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table
