"""How large the adapters on the FFN must be: the paper's Table 3, ranks at equal tokens.

The paper's 16 to 256 are a 256th to a 16th of its model width, so the ranks here are smaller; rank 0, the FFN left as it
is, shows whether they matter at all. Alpha is twice the rank throughout, as in the paper's Appendix A.
"""

from __future__ import annotations

from kvlatent_lab.study.grid_cells import Cell, Grid, Scale, widths_of
from kvlatent_lab.study.widths import figures

__all__ = ["LORA_RANK"]

RANKS = (0, 4, 8, 16, 32, 64)


def cells(scale: Scale) -> list[Cell]:
    """The paper's preset at half the width, every rank."""
    return [
        Cell(
            f"rank{rank}-seed{seed}",
            width,
            width,
            "paper",
            seed,
            recipe={"lora.rank": rank, "lora.alpha": max(1, 2 * rank)},
            **scale.trained(),
        )
        for width in widths_of(scale.head_dim, (2,))
        for seed in scale.seeds
        for rank in RANKS
    ]


LORA_RANK = Grid(
    "lora-rank",
    "how large the adapters on the FFN must be (Table 3 of the paper)",
    cells,
    figures,
    tokens=200_000,
    trains=True,
)
