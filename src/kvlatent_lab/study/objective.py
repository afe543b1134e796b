"""Next token, KL to the original, or both: which loss is the better teacher at equal tokens, each at its own best rate.

The paper compares them at rates a hundredfold apart. Here each objective is trained at every rate; the rate is chosen on
one part of the text, and what is reported is another. Stage II alone, so that nothing else differs.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from kvlatent.jobs.progress import Progress
from kvlatent_lab.study.converted_models import trained
from kvlatent_lab.study.grid_cells import Cell, Grid, Scale, widths_of
from kvlatent_lab.study.measuring import measured
from kvlatent_lab.study.subject import Subject

__all__ = ["OBJECTIVE"]

OBJECTIVES = ("next_token", "kl", "mix")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def cells(scale: Scale) -> list[Cell]:
    """The paper's preset at half the width, every objective at every rate."""
    return [
        Cell(
            f"{objective.replace('_', '-')}-rate{rate:g}-seed{seed}",
            width,
            width,
            "paper",
            seed,
            stage2=scale.tokens,
            recipe={"stage2.objective": objective, "stage2.learning_rate": rate},
        )
        for width in widths_of(scale.head_dim, (2,))
        for seed in scale.seeds
        for rate in RATES
        for objective in OBJECTIVES
    ]


def figures(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Train, and measure on the text to choose by and on the text to report."""
    model, on_the_way = trained(subject, cell, progress)
    chosen_by = measured(subject, model, progress, "validation")
    validation = {f"validation_{name}": chosen_by[name] for name in ("loss", "perplexity", "ratio", "tokens")}
    return measured(subject, model, progress) | validation | on_the_way


def check(subject: Subject) -> None:
    """Raise `ValueError` unless there is text to choose by beside the text to report."""
    subject.blocks("validation")


def conclude(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Each objective at the rate with the least mean validation loss over seeds.

    Returns:
        {"chosen": [{"objective", "learning_rate", "at_the_edge": whether it is the lowest or highest that was tried,
        "seeds", "loss", "ratio"}]}: means over seeds on the reported text. Only rates that every seed was measured at
        are compared.
    """
    losses: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        settings = document["settings"]
        rates = losses[settings["stage2_objective"]]
        rates[settings["stage2_learning_rate"]].append(document["figures"])
    rows = []
    for objective, rates in losses.items():
        seeds = max(map(len, rates.values()))
        whole = {rate: found for rate, found in rates.items() if len(found) == seeds}
        best = min(whole, key=lambda rate: statistics.fmean(f["validation_loss"] for f in whole[rate]))
        means = {name: statistics.fmean(f[name] for f in whole[best]) for name in ("loss", "ratio")}
        edge = best in (min(rates), max(rates))
        rows.append(
            {"objective": objective, "learning_rate": best, "at_the_edge": edge, "seeds": seeds, **means}
        )
    return {"chosen": rows}


OBJECTIVE = Grid(
    "objective",
    "next token, KL or a mix of both, at equal tokens, each at its best rate",
    cells,
    figures,
    tokens=150_000,
    trains=True,
    conclude=conclude,
    check=check,
)
