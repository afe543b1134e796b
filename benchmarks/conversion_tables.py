"""Markdown tables from the finished cells of `benchmarks/conversion.py`; a cell that is not finished is a dash.

Over several seeds a figure is their mean, with the largest distance between two of them; over one seed it comes with the
paired standard error of the measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from conversion_cells import (
    CHANGES,
    CURVE,
    HALF,
    HALF_STATISTICS,
    RULES,
    SPLITS,
    TENTH,
    VALUE_CURVES,
    VARIANTS,
    Cell,
    ablated,
    baseline,
    keys_only,
    ours,
    paper,
    values_only,
)

Results = dict[str, dict[str, Any]]

TARGETS = {"75 %": (1.003, 1.005), "50 %": (1.012, 1.025), "28 %": (1.05, 1.10), "12.5 %": (1.40, None)}
NAMES = {
    "gram": "ours (Gram search)",
    "energy": "energy (MHA2MLA)",
    "fisher": "Fisher (RAP)",
    "scores": "greedy on scores (EliteKV)",
    "plain": "selection alone",
    "gains": "+ gains",
    "gains-refit": "+ gains, refit",
    "stride": "selection: stride",
    "layer": "table per layer",
    "no-gains": "gains off",
    "no-refit": "refit off",
    "svd": "values by plain SVD",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the rows that hold nothing but dashes."""
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def ratios(results: Results, make: Callable[[int], Cell]) -> list[float]:
    """Ratios of the finished seeds of a cell."""
    names = {make(seed).name for seed in seeds_of(results)}
    return [results[name]["ratio"] for name in sorted(names) if "ratio" in results.get(name, {})]


def seeds_of(results: Results) -> list[int]:
    found = {int(m[1]) for name in results if (m := re.search(r"-seed(\d+)$", name))}
    return sorted(found) or [0]


def shown(results: Results, make: Callable[[int], Cell]) -> str:
    """A ratio with its spread over seeds or its standard error; a dash where there is none."""
    names = sorted({make(seed).name for seed in seeds_of(results)})
    rows = [results[name] for name in names if name in results]
    if any("impossible" in row for row in rows):
        return "impossible"
    if not rows:
        return "-"
    values = [row["ratio"] for row in rows]
    mean = sum(values) / len(values)
    if len(values) == 1:
        error = rows[0]["ratio_standard_error"]
        return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return f"{mean:.4f} [{max(values) - min(values):.4f}, {len(values)} seeds]"


def targets(results: Results) -> str:
    rows = []
    for kept, (aligned, closed) in SPLITS.items():
        head, model = TARGETS[kept]
        rows.append(
            [
                kept,
                shown(results, lambda s, w=aligned: ours("", w, aligned=True, seed=s, per_layer=True)),
                shown(
                    results, lambda s, w=aligned: ours("", w, "layer", aligned=True, seed=s, per_layer=True)
                ),
                f"{aligned[0]}/{aligned[1]}",
                shown(results, lambda s, w=aligned: ours("", w, aligned=True, seed=s)),
                f"{closed[0]}/{closed[1]}",
                shown(results, lambda s, w=closed: ours("", w, aligned=False, seed=s)),
                f"{head}",
                shown(results, lambda s, w=closed: ours("", w, "model", aligned=False, seed=s)),
                shown(results, lambda s, w=aligned: ours("", w, "model", aligned=True, seed=s)),
                "" if model is None else f"{model}",
            ]
        )
    head = ["kept", "planned per layer, aligned", "the same, table per layer"]
    head += ["same widths everywhere", "aligned", "widths", "statistics only", "target"]
    head += ["one table, statistics only", "one table, aligned", "target"]
    return table(head, rows)


def papers(results: Results) -> str:
    widths = ((32, 32), (16, 16), (8, 8))
    return table(
        ["paper preset", *(f"{a}/{b}" for a, b in widths)],
        [["ratio", *(shown(results, lambda s, w=w: paper(w)) for w in widths)]],
    )


def baselines(results: Results) -> str:
    widths = [aligned for aligned, _ in SPLITS.values()]
    rows = []
    for variant in VARIANTS:
        for rule in RULES:
            figures = [shown(results, lambda s, w=w, r=rule, v=variant: baseline(r, v, w, s)) for w in widths]
            rows.append([f"{NAMES[rule]}, {NAMES[variant]}", *figures])
    figures = [shown(results, lambda s, w=w: ours("", w, aligned=True, seed=s)) for w in widths]
    rows.append(["ours, aligned", *figures])
    return table(["pairs by, values whitened", *(f"{a}/{b}" for a, b in widths)], rows)


def text(results: Results) -> str:
    """A tenth of the text, and another text, against the whole."""
    rows = []
    for aligned, widths in ((True, HALF), (False, HALF_STATISTICS)):

        def make(seed: int, aligned: bool = aligned, widths: tuple = widths, **more: Any) -> Cell:
            return ours("", widths, aligned=aligned, seed=seed, **more)

        whole, tenth = ratios(results, make), ratios(results, lambda s, m=make: m(s, share=TENTH))
        excess = "-"
        if whole and tenth and sum(whole) > len(whole):
            excess = f"{(sum(tenth) / len(tenth) - 1) / (sum(whole) / len(whole) - 1):.3f}"
        other = shown(results, lambda s, m=make: m(seeds_of(results)[0], text="other"))
        name = f"{widths[0]}/{widths[1]}, " + ("aligned" if aligned else "statistics only")
        rows.append(
            [name, shown(results, make), shown(results, lambda s, m=make: m(s, share=TENTH)), excess, other]
        )
    return table(
        ["", "all text", "a tenth of it", "excess, tenth over all (at most 1.2)", "other text"], rows
    )


def ablation(results: Results) -> str:
    first = seeds_of(results)[0]

    def both(make: Callable[[bool], Cell]) -> list[str]:
        return [shown(results, lambda s, a=aligned: make(a)) for aligned in (True, False)]

    rows = [["all of it", *both(lambda a: ours("", HALF, aligned=a, seed=first))]]
    rows.append(["one table for the model", *both(lambda a: ours("", HALF, "model", aligned=a, seed=first))])
    for change in CHANGES:
        name = "selection: energy" if change == "energy" else NAMES[change]
        rows.append([name, *both(lambda a, c=change: ablated(c, aligned=a))])
    return table(["32/32, changed", "aligned", "statistics only"], rows)


def curves(results: Results) -> str:
    rows = []
    for kind in ("paper", "statistics", "aligned"):
        figures = [shown(results, lambda s, w=w, k=kind: keys_only(w, k)) for w in CURVE]
        rows.append([f"keys, {kind}", *figures])
    for kind in VALUE_CURVES:
        figures = [shown(results, lambda s, w=w, k=kind: values_only(w, k)) for w in CURVE]
        rows.append([f"values, {kind}", *figures])
    return table(["one side at width", *map(str, CURVE)], rows)


def costs(results: Results) -> str:
    parts = []
    if "cost-seconds" in results:
        row = results["cost-seconds"]
        names = [name for name in row if name.endswith("_seconds") or "2048" in name]
        parts.append(table(names, [[str(row[name]) for name in names]]))
    for label in ("model", "random"):
        found = results.get("cost-memory", {}).get(label)
        if found is None:
            continue
        rows = [
            [row["mode"], str(row["blocks"]), f"{row['peak_bytes'] / 2**20:.1f}", f"{row['ratio']:.2f}"]
            for row in found["rows"]
        ]
        limit = f"limit {found['limit_bytes'] / 2**20:.1f} MiB"
        parts.append(table([f"{label}: {limit}", "blocks", "peak MiB", "over the model"], rows))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """All tables, each under its heading."""
    parts = {
        "Targets: perplexity over the original's": targets,
        "The paper": papers,
        "Selections of other papers": baselines,
        "How much and which text": text,
        "One choice at a time": ablation,
        "Keys against values": curves,
        "Seconds and memory": costs,
    }
    versions = {row["source"] for row in results.values() if "source" in row}
    note = "" if len(versions) < 2 else f"\n\nCells come from {len(versions)} versions of the library's code."
    return "\n\n".join(f"## {name}\n\n{make(results)}" for name, make in parts.items()) + note
