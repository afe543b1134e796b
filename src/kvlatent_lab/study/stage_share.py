"""Does stage I pay? Its length, none included, against that of stage II; the paper calls it necessary and never measures.

At equal tokens in all, two stages stand against one; stage II alone at half the tokens shows what its own length is
worth. Three compression ratios, both presets, three seeds. Learning rates are the recipe's.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from kvlatent_lab.spread import standard_error
from kvlatent_lab.study.grid_cells import PAPER_PARTS, Cell, Grid, Scale, widths_of
from kvlatent_lab.study.widths import PRESETS, figures

__all__ = ["STAGES"]

LENGTHS = ((0, 10), (2, 8), (5, 5), (0, 5), (1, 4))
"""Stage I and stage II, in tenths of the tokens; the last two spend half of them."""


def cells(scale: Scale) -> list[Cell]:
    """Every pair of lengths for every width, preset and seed; one seed is whole before the next begins.

    A tenth of the tokens is a whole number of optimiser steps, so that equal tokens are equal.

    Raises:
        ValueError: the tokens do not make ten steps.
    """
    tenth = round(scale.tokens / (10 * scale.step)) * scale.step
    if not tenth:
        raise ValueError(
            f"the study stages needs ten optimiser steps: got {scale.tokens} tokens, a step takes {scale.step}; pass "
            f"--tokens {10 * scale.step} or more"
        )
    found = []
    for seed in scale.seeds:
        for width in widths_of(scale.head_dim, PAPER_PARTS):
            for preset in PRESETS:
                for shares in LENGTHS:
                    first, second = (share * tenth for share in shares)
                    name = f"{preset}-{width}x{width}-tenths{shares[0]}+{shares[1]}-seed{seed}"
                    found.append(Cell(name, width, width, preset, seed, first, second))
    return found


def conclude(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Two stages against one at equal tokens, seed by seed.

    Returns:
        {"comparisons": [...]}, each with the settings that both sides share, "stage1_tokens" of the side with two
        stages, "seeds", "log_ratio": mean over seeds of ln(perplexity with stage I / without), below 0 where stage I
        pays, and "standard_error" over seeds (None for one seed).
    """
    alone, both = {}, defaultdict(list)
    for document in documents:
        settings = document["settings"]
        total = settings["stage1_tokens"] + settings["stage2_tokens"]
        place = (settings["preset"], settings["d_qk"], settings["d_vo"], total)
        if settings["stage1_tokens"]:
            both[*place, settings["stage1_tokens"]].append(document)
        else:
            alone[*place, settings["seed"]] = document["figures"]["loss"]
    rows = []
    for (preset, d_qk, d_vo, total, first), group in both.items():
        pairs = [
            (document["figures"]["loss"], alone[preset, d_qk, d_vo, total, document["settings"]["seed"]])
            for document in group
            if (preset, d_qk, d_vo, total, document["settings"]["seed"]) in alone
        ]
        if not pairs:
            continue
        differences = [with_first - without for with_first, without in pairs]
        rows.append(
            {"preset": preset, "d_qk": d_qk, "d_vo": d_vo, "tokens": total, "stage1_tokens": first}
            | {"seeds": len(differences), "log_ratio": statistics.fmean(differences)}
            | {"standard_error": standard_error(differences)}
        )
    return {"comparisons": rows}


STAGES = Grid(
    "stages",
    "does stage I pay at equal tokens, and from which compression on",
    cells,
    figures,
    seeds=(0, 1, 2),
    tokens=81_920,
    trains=True,
    conclude=conclude,
)
