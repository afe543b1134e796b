"""The rows of the baseline tables that have a file, and what two of them say together.

Two models that were measured on the same blocks and questions differ by less than their errors apart suggest, so a
difference is taken block by block, question by question, trial by trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlatent.evaluation.perplexity import Perplexity, perplexity_ratio
from kvlatent.evaluation.sequences import mean_and_error
from kvlatent.jobs.atomic import read_json
from kvlatent_lab.baseline.table_rows import TableRow

__all__ = [
    "MAKING",
    "Figures",
    "bytes_of",
    "making_minutes",
    "paired_change",
    "ratio_between",
    "read_finished",
]

Figures = Mapping[str, Any]
MAKING = ("calibration", "conversion", "training")
"""Of the seconds of a row, those of making its model; the others are of measuring it."""


def read_finished(folder: Path, rows: Iterable[TableRow]) -> dict[str, Figures]:
    """Documents of the rows that have a file in the folder, by name, in the order of the rows.

    Raises:
        FileNotFoundError: none has.
        ValueError: a file is damaged.
    """
    found = {}
    for row in rows:
        path = folder / f"{row.name}.json"
        if path.is_file():
            found[row.name] = read_json(path, "delete it to measure it again")
    if not found:
        raise FileNotFoundError(f"{folder} holds no finished row; run benchmarks/real_tables.py first")
    return found


def ratio_between(
    own: Figures, reference: Figures, text: str = "fineweb"
) -> tuple[float, float | None] | None:
    """Perplexity of a row over that of another, with the error of paired blocks; None where one is not measured.

    Args:
        own, reference: documents of rows.
        text: on which.
    """
    pair = [_perplexity(document["figures"].get(f"text {text}")) for document in (own, reference)]
    return None if pair[0] is None or pair[1] is None else perplexity_ratio(pair[0], pair[1])


def _perplexity(found: Figures | None) -> Perplexity | None:
    if found is None:
        return None
    fields: dict[str, Any] = {name: found[name] for name in Perplexity.__dataclass_fields__}
    fields |= {name: tuple(fields[name]) for name in ("block_losses", "block_tokens")}
    return Perplexity(**fields)


def paired_change(own: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """Mean of own - reference, item by item, and its standard error; None for one item.

    Raises:
        ValueError: they are not of the same items.
    """
    if len(own) != len(reference):
        raise ValueError(
            f"a difference needs both rows measured on the same items: got {len(own)} and {len(reference)}; delete the "
            "row of fewer items to measure it again"
        )
    return mean_and_error(np.subtract(own, reference, dtype=float))


def bytes_of(document: Figures) -> float | None:
    """Of a token in the cache."""
    found = document["figures"].get("cache")
    return None if found is None else found["bytes_per_token"]


def making_minutes(document: Figures) -> float | None:
    """Of calibration, conversion and training; None of a row that is not made, as the original."""
    seconds = [document["seconds"][part] for part in MAKING if part in document["seconds"]]
    return sum(seconds) / 60 if seconds else None
