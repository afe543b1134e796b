"""What training makes of it, at equal tokens: the rank of the adapters, the share of stage I, the objective.

- `lora-rank` is the paper's Table 3. Its 16 to 256 are a 256th to a 16th of its model width, so the ranks here are smaller;
  rank 0, the FFN left as it is, shows whether they matter at all. Alpha is twice the rank, as in its Appendix A.
- `stages`: does stage I pay? The paper calls it necessary and never measures it. At equal tokens in all, two stages stand
  against one; stage II alone at half the tokens shows what its own length is worth. Learning rates are the recipe's.
- `objective`: next token, KL to the original, or both, stage II alone. The paper compares them at rates a hundredfold
  apart; here each is trained at every rate, the rate is chosen on one part of the text, and another part is reported.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from kvlatent.jobs.progress import Progress
from kvlatent_lab.spread import standard_error
from kvlatent_lab.study.conversion_grids import PRESETS
from kvlatent_lab.study.grid_cells import PAPER_PARTS, Cell, Grid, Scale, widths_of
from kvlatent_lab.study.measure_cell import measure_cell, measure_model, train_cell
from kvlatent_lab.study.subject import Subject

__all__ = ["LORA_RANK", "OBJECTIVE", "STAGES"]

RANKS = (0, 4, 8, 16, 32, 64)


def rank_cells(scale: Scale) -> list[Cell]:
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


LENGTHS = ((0, 10), (2, 8), (5, 5), (0, 5), (1, 4))
"""Stage I and stage II, in tenths of the tokens; the last two spend half of them."""


def stage_cells(scale: Scale) -> list[Cell]:
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
    cells = []
    for seed in scale.seeds:
        for width in widths_of(scale.head_dim, PAPER_PARTS):
            for preset in PRESETS:
                for shares in LENGTHS:
                    first, second = (share * tenth for share in shares)
                    name = f"{preset}-{width}x{width}-tenths{shares[0]}+{shares[1]}-seed{seed}"
                    cells.append(Cell(name, width, width, preset, seed, first, second))
    return cells


def compare_stages(documents: list[dict[str, Any]]) -> dict[str, Any]:
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


OBJECTIVES = ("next_token", "kl", "mix")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def objective_cells(scale: Scale) -> list[Cell]:
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


def measure_both_parts(subject: Subject, cell: Cell, progress: Progress) -> dict[str, Any]:
    """Train, and measure on the text to choose by and on the text to report."""
    model, on_the_way = train_cell(subject, cell, progress)
    chosen_by = measure_model(subject, model, progress, "validation")
    validation = {f"validation_{name}": chosen_by[name] for name in ("loss", "perplexity", "ratio", "tokens")}
    return measure_model(subject, model, progress) | validation | on_the_way


def check_validation_text(subject: Subject) -> None:
    """Raise `ValueError` unless there is text to choose by beside the text to report."""
    subject.blocks("validation")


def choose_rates(documents: list[dict[str, Any]]) -> dict[str, Any]:
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
        whole = {rate: figures for rate, figures in rates.items() if len(figures) == seeds}
        best = min(whole, key=lambda rate: statistics.fmean(f["validation_loss"] for f in whole[rate]))
        means = {name: statistics.fmean(f[name] for f in whole[best]) for name in ("loss", "ratio")}
        edge = best in (min(rates), max(rates))
        rows.append(
            {"objective": objective, "learning_rate": best, "at_the_edge": edge, "seeds": seeds, **means}
        )
    return {"chosen": rows}


LORA_RANK = Grid(
    "lora-rank",
    "how large the adapters on the FFN must be (Table 3 of the paper)",
    rank_cells,
    measure_cell,
    tokens=200_000,
    trains=True,
)
STAGES = Grid(
    "stages",
    "does stage I pay at equal tokens, and from which compression on",
    stage_cells,
    measure_cell,
    seeds=(0, 1, 2),
    tokens=81_920,
    trains=True,
    conclude=compare_stages,
)
OBJECTIVE = Grid(
    "objective",
    "next token, KL or a mix of both, at equal tokens, each at its best rate",
    objective_cells,
    measure_both_parts,
    tokens=150_000,
    trains=True,
    conclude=choose_rates,
    check=check_validation_text,
)
