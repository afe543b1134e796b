"""The cells of `benchmarks/conversion.py`: what is converted how, on which text. Each is named by its settings, so that
tables can share it.

Widths are for heads of 64 and scale with the head. Parts, in the order they run: aligned (targets, with alignment, a
table per head), targets (their other columns), paper, baselines, text (a tenth of it), ablation, curves, other (text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Widths = tuple[int, int]

# Kept share: (widths with alignment, widths from statistics alone), the best splits of earlier measurements.
SPLITS: dict[str, tuple[Widths, Widths]] = {
    "75 %": ((48, 48), (48, 48)),
    "50 %": ((32, 32), (36, 28)),
    "28 %": ((16, 20), (20, 16)),
    "12.5 %": ((8, 8), (8, 8)),
}
HALF, HALF_STATISTICS = SPLITS["50 %"]
TENTH = 0.1  # of the calibration blocks
RULES = ("gram", "energy", "fisher", "scores")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"gains": False, "refit": False, "align": 0},
    "gains-refit": {"gains": True, "refit": True, "align": 0},
}
CHANGES: dict[str, dict[str, Any]] = {
    "stride": {"keys": "stride"},
    "energy": {"keys": "energy"},
    "layer": {"table": "layer"},
    "no-gains": {"gains": False},
    "no-refit": {"refit": False},
    "svd": {"values": "svd"},
}
CURVE = (48, 32, 16, 8)
VALUE_CURVES: dict[str, dict[str, Any]] = {
    "sliced": {"values": "slice", "refit": False, "align": 0},
    "factored": {"refit": False, "align": 0},
}


@dataclass(frozen=True)
class Cell:
    """One conversion and its measurement.

    Args:
        name: of the result file; part: which of the tables asked for it first.
        widths: (d_qk, d_vo) for heads of 64.
        per_layer: `plan` gives every layer its own widths, at the same share of the cache.
        choices: what replaces the answers of `preset`.
        rule: pairs by a rule of `conversion_baselines` ("fisher", "scores"), or None: by `choices`.
        text: "data", or "other" (the file of --other-data); share: of the calibration blocks.
        seed: of the calibration blocks and of alignment.
    """

    name: str
    part: str
    widths: Widths
    preset: str = "calibrated"
    choices: dict[str, Any] = field(default_factory=dict)
    rule: str | None = None
    text: str = "data"
    share: float = 1.0
    seed: int = 0
    per_layer: bool = False

    @property
    def aligned(self) -> bool:
        """Whether alignment is on."""
        return self.preset == "calibrated" and self.choices.get("align") != 0


def _pair(widths: Widths) -> str:
    return f"{widths[0]}x{widths[1]}"


def ours(
    part: str,
    widths: Widths,
    scope: str = "head",
    *,
    aligned: bool,
    seed: int = 0,
    share: float = 1.0,
    text: str = "data",
    per_layer: bool = False,
) -> Cell:
    """The calibrated preset, whole or without alignment."""
    words = ["ours", _pair(widths), *["planned"] * per_layer, scope, "aligned" if aligned else "statistics"]
    words += ["tenth"] * (share < 1) + ["other"] * (text == "other") + [f"seed{seed}"]
    choices: dict[str, Any] = {"table": scope} | ({} if aligned else {"align": 0})
    return Cell(
        "-".join(words), part, widths, choices=choices, text=text, share=share, seed=seed, per_layer=per_layer
    )


def paper(widths: Widths) -> Cell:
    """The paper's preset, which looks at no text."""
    return Cell(f"paper-{_pair(widths)}", "paper", widths, preset="paper")


def baseline(rule: str, variant: str, widths: Widths, seed: int = 0) -> Cell:
    """Pairs by one selection rule, values whitened, and what `variant` leaves on of gains and refit."""
    if rule == "gram" and variant == "gains-refit":
        return ours("baselines", widths, aligned=False, seed=seed)
    own = rule in ("fisher", "scores")
    choices = VARIANTS[variant] | ({} if own else {"keys": rule})
    name = f"{rule}-{_pair(widths)}-{variant}-seed{seed}"
    return Cell(name, "baselines", widths, choices=choices, rule=rule if own else None, seed=seed)


def ablated(change: str, *, aligned: bool) -> Cell:
    """One choice changed at half the cache."""
    choices = CHANGES[change] | ({} if aligned else {"align": 0})
    kind = "aligned" if aligned else "statistics"
    return Cell(f"ablation-{_pair(HALF)}-{change}-{kind}", "ablation", HALF, choices=choices)


def keys_only(width: int, kind: str) -> Cell:
    """Values at full width; `kind` is "statistics", "aligned" or "paper"."""
    name, widths = f"keys-{width}-{kind}", (width, 64)
    if kind == "paper":
        return Cell(name, "curves", widths, preset="paper")
    return Cell(name, "curves", widths, choices={"align": 0} if kind == "statistics" else {})


def values_only(width: int, kind: str) -> Cell:
    """Keys at full width; `kind` is one of `VALUE_CURVES`."""
    return Cell(f"values-{width}-{kind}", "curves", (64, width), choices=VALUE_CURVES[kind])


def splits() -> list[Widths]:
    """Where ours is compared with other selections: the splits with alignment."""
    return [aligned for aligned, _ in SPLITS.values()]


def all_cells(seeds: Sequence[int], *, other: bool = False) -> list[Cell]:
    """Every cell once, the most important first; `other` adds those of the other text."""
    first = seeds[0]
    cells = [ours("aligned", one, aligned=True, seed=s, per_layer=True) for one in splits() for s in seeds]
    cells += [ours("targets", one, "model", aligned=True, seed=s) for one in splits()[:3] for s in seeds]
    cells += [ours("aligned", HALF, aligned=True, seed=s) for s in seeds]
    cells += [ours("aligned", one, aligned=True, seed=first) for one in splits()]
    cells += [ours("aligned", one, "layer", aligned=True, seed=first, per_layer=True) for one in splits()]
    cells += [
        ours("targets", one, scope, aligned=False, seed=s)
        for _, one in SPLITS.values()
        for scope in ("head", "model")
        for s in (seeds if one == HALF_STATISTICS else seeds[:1])
    ]
    cells += [paper(one) for one in ((32, 32), (16, 16), (8, 8))]
    cells += [baseline(rule, "plain", one, first) for one in splits() for rule in RULES]
    cells += [baseline(rule, "gains-refit", one, first) for one in splits() for rule in RULES]
    cells.append(ours("text", HALF, aligned=True, seed=first, share=TENTH))
    cells += [ours("text", HALF_STATISTICS, aligned=False, seed=s, share=TENTH) for s in seeds]
    if other:
        cells.append(ours("other", HALF_STATISTICS, aligned=False, seed=first, text="other"))
        cells.append(ours("other", HALF, aligned=True, seed=first, text="other"))
    for aligned in (False, True):
        cells.append(ours("ablation", HALF, "model", aligned=aligned, seed=first))
        cells += [ablated(change, aligned=aligned) for change in CHANGES]
    cells += [values_only(width, kind) for kind in VALUE_CURVES for width in CURVE]
    cells += [keys_only(width, kind) for kind in ("statistics", "aligned") for width in CURVE]
    first_asked: dict[str, Cell] = {}
    for cell in cells:
        first_asked.setdefault(cell.name, cell)
    return list(first_asked.values())
