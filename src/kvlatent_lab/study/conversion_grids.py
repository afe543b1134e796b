"""What a conversion costs, nothing trained unless tokens are given: widths, choices without text, the calibrated preset.

`widths` is the paper's Tables 2 and 6: its 128 channels a head scale with the model's, and its preset (with the
frequency-aware table) stands beside the calibrated one. `choices` takes the paper's conversion apart. `conversion` is the
calibrated one: budgets, widths a layer, tables a head, a layer or a model, selections of other papers, how much text, one
choice at a time, keys against values. A seed draws the calibration blocks and the alignment's, so it changes nothing
where nothing is drawn or trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvlatent_lab.study.grid_cells import PAPER_PARTS, Cell, Grid, Scale, widths_of
from kvlatent_lab.study.measure_cell import measure_cell

__all__ = ["CHOICES", "CONVERSION", "PRESETS", "WIDTHS"]

PRESETS = ("paper", "calibrated")


def width_cells(scale: Scale) -> list[Cell]:
    """Both presets at every pair of widths."""
    cells = []
    for d_qk, d_vo in width_pairs(scale.head_dim):
        for preset in PRESETS:
            drawn = preset == "calibrated" or scale.tokens > 0
            for seed in scale.seeds if drawn else scale.seeds[:1]:
                name = f"{preset}-{d_qk}x{d_vo}-seed{seed}"
                cells.append(Cell(name, d_qk, d_vo, preset, seed, **scale.trained()))
    return cells


def width_pairs(head_dim: int) -> list[tuple[int, int]]:
    """(d_qk, d_vo) of Table 2, then of Table 6."""
    narrow = widths_of(head_dim, PAPER_PARTS)
    equal = [(width, width) for width in narrow]
    values_whole = [(width, head_dim) for width in narrow]
    keys_whole = [(head_dim, width) for width in narrow]
    unequal = [pair for width in narrow[1:] for pair in ((narrow[0], width), (width, narrow[0]))]
    return [*equal, *values_whole, *keys_whole, *unequal]


_OWN = {"frequencies": "own"}
_WITHOUT_TEXT: dict[str, tuple[str, dict[str, str], str]] = {
    "paper": ("paper", {}, "both"),
    "paper-matched": ("paper", {"keys": "matched", **_OWN}, "both"),
    "paper-own": ("paper", _OWN, "both"),
    "paper-svd": ("paper", {"values": "svd"}, "both"),
    "matched-own-svd": ("paper", {"keys": "matched", "values": "svd", **_OWN}, "both"),
    "own-frequency": ("own-frequency", {}, "both"),
    "keys-own": ("own-frequency", {}, "keys"),
    "keys-paper": ("paper", {}, "keys"),
    "values-svd": ("own-frequency", {}, "values"),
    "values-slice": ("paper", {}, "values"),
}
"""Preset, what replaces its answers, and the sides that are narrowed."""


def choice_cells(scale: Scale) -> list[Cell]:
    """Every set of choices at half the width."""
    seeds = scale.seeds if scale.tokens else scale.seeds[:1]
    cells = []
    for half in widths_of(scale.head_dim, (2,)):
        for name, (preset, choices, sides) in _WITHOUT_TEXT.items():
            d_qk = scale.head_dim if sides == "values" else half
            d_vo = scale.head_dim if sides == "keys" else half
            for seed in seeds:
                cells.append(
                    Cell(f"{name}-seed{seed}", d_qk, d_vo, preset, seed, choices=choices, **scale.trained())
                )
    return cells


Pair = tuple[int, int]
BUDGETS: dict[str, tuple[Pair, Pair]] = {
    "75 %": ((48, 48), (48, 48)),
    "50 %": ((32, 32), (36, 28)),
    "28 %": ((16, 20), (20, 16)),
    "12.5 %": ((8, 8), (8, 8)),
}
"""By share of the cache, the widths with alignment and those from statistics alone, best splits of earlier measurements,
in 64ths of a head."""
CURVE = (48, 32, 16, 8)
STATISTICS = {"align": 0}
SELECTION = {"gains": False, "refit": False, **STATISTICS}
ONE_CHANGE: dict[str, dict[str, Any]] = {
    "layer": {"table": "layer"},
    "stride": {"keys": "stride", "table": "model"},
    "no-gains": {"gains": False},
    "no-refit": {"refit": False},
    "svd": {"values": "svd"},
}


def conversion_cells(scale: Scale) -> list[Cell]:
    """Every variant once, the most important first; a name says all of it, so that variants can meet."""
    cells: dict[str, Cell] = {}
    for word, pairs, seeds, choices, options in _variants(scale):
        for d_qk, d_vo in (_channels(scale.head_dim, *pair) for pair in pairs):
            for seed in seeds:
                name = f"{word}-{d_qk}x{d_vo}-seed{seed}"
                settings: dict[str, Any] = {
                    "choices": {"table": "head", **choices},
                    **options,
                    **scale.trained(),
                }
                cells.setdefault(name, Cell(name, d_qk, d_vo, seed=seed, **settings))
    return list(cells.values())


VariantRow = tuple[str, Sequence[Pair], Sequence[int], dict[str, Any], dict[str, Any]]


def _variants(scale: Scale) -> Iterator[VariantRow]:
    """(first words of the name, widths in 64ths of a head, seeds, choices, other arguments of a cell)."""
    every, first = scale.seeds, scale.seeds[:1]
    aligned, closed = zip(*BUDGETS.values(), strict=True)
    half, half_closed = BUDGETS["50 %"]
    per_layer = {"per_layer": True}
    yield "planned-head-aligned", aligned, every, {}, per_layer
    yield "model-aligned", aligned[:3], every, {"table": "model"}, {}
    yield "head-aligned", [half], every, {}, {}
    yield "head-aligned", aligned, first, {}, {}
    yield "planned-layer-aligned", aligned, first, {"table": "layer"}, per_layer
    for table in ("head", "model"):
        choices = {"table": table, **STATISTICS}
        yield f"{table}-statistics", [half_closed], every, choices, {}
        yield f"{table}-statistics", [*closed, half], first, choices, {}
    yield "paper", [(32, 32), (16, 16), (8, 8)], first, {"table": "model"}, {"preset": "paper"}
    yield "gram-selection", aligned, first, SELECTION, {}
    yield "head-statistics", aligned, first, STATISTICS, {}  # the same with gains and refit
    for word, choices in (("selection", SELECTION), ("refit", STATISTICS)):
        yield f"energy-{word}", aligned, first, {"keys": "energy", **choices}, {}
        for rule in ("fisher", "scores"):
            yield f"{rule}-{word}", aligned, first, choices, {"extra": {"keys": rule}}
    tenth = {"recipe": {"calibration.blocks": max(1, round(scale.blocks / 10))}}
    yield "tenth-head-aligned", [half], first, {}, tenth
    yield "tenth-head-statistics", [half_closed], every, STATISTICS, tenth
    for kind, align in (("statistics", STATISTICS), ("aligned", {})):
        for word, change in ONE_CHANGE.items():
            yield f"{word}-{kind}", [half], first, {**change, **align}, {}
    yield "energy-aligned", [half], first, {"keys": "energy"}, {}  # from statistics it is energy-refit
    for word, choices in (("sliced", {"values": "slice"}), ("factored", {})):
        whole_keys = [(64, width) for width in CURVE]
        yield f"values-{word}", whole_keys, first, {"refit": False, **choices, **STATISTICS}, {}
    for kind, align in (("statistics", STATISTICS), ("aligned", {})):
        yield f"head-{kind}", [(width, 64) for width in CURVE], first, align, {}


def _channels(head_dim: int, d_qk: int, d_vo: int) -> Pair:
    """Widths in 64ths of a head as channels, of keys an even number; their sum keeps its share of the cache."""
    keys = max(2, 2 * round(d_qk * head_dim / 128))
    return keys, max(1, min(head_dim, round((d_qk + d_vo) * head_dim / 64) - keys))


WIDTHS = Grid(
    "widths",
    "which widths of keys and values cost how much (Tables 2 and 6 of the paper)",
    width_cells,
    measure_cell,
)
CHOICES = Grid(
    "choices",
    "which part of a conversion without text does the damage: channels, frequencies, values, one side at a time",
    choice_cells,
    measure_cell,
)
CONVERSION = Grid(
    "conversion",
    "what a calibrated conversion costs: budgets, tables, selections of other papers, one choice at a time",
    conversion_cells,
    measure_cell,
    seeds=(0, 1, 2),
)
