"""What the cells of a study say together: means over seeds with their standard errors."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from kvlatent_lab.spread import standard_error
from kvlatent_lab.study.folder import cell_files, read_cell
from kvlatent_lab.study.request import STUDIES

__all__ = ["summary"]


def summary(folder: str | Path) -> dict[str, Any]:
    """Means over seeds of every setting of a study's folder, and what the study concludes from all cells.

    Args:
        folder: results of one study, finished or not.

    Returns:
        {"study", "model": {"name", "fingerprint"}, "rows", "failed": {cell: why}, "damaged": {cell: why}, ...}. A row is
        {"settings" without the seed, "seeds": [...], "figures": {name: {"mean", "standard_error"}}}; the error is that
        of the mean over seeds, None for one seed (where a figure has an error of its own, such as
        "ratio_standard_error", that is another: the text's). Figures that are lists or maps are left to the cells. What
        else a study adds: "comparisons" (stages), "chosen" (objective).

    Raises:
        FileNotFoundError: there is no such folder, or no cell in it.
        ValueError: cells of several studies or models lie in it.
    """
    folder, documents, damaged = Path(folder), [], {}
    for path in cell_files(folder):
        try:
            documents.append(read_cell(path))
        except ValueError as error:
            damaged[path.stem] = str(error)
    if not documents:
        raise FileNotFoundError(f"{folder} holds no finished cell of a study; run one with kvlatent study")
    for what in ("study", "model"):
        kinds = {json.dumps(document[what], sort_keys=True): document["cell"] for document in documents}
        if len(kinds) > 1:
            raise ValueError(
                f"{folder} holds cells of more than one {what}: {' and '.join(sorted(kinds.values())[:2])} differ; "
                "give each its own folder"
            )
    study = documents[0]["study"]
    measured = [document for document in documents if document["figures"]]
    grid = STUDIES.get(study)
    conclusion = grid.conclude(measured) if grid is not None and grid.conclude is not None else {}
    return {
        "study": study,
        "model": documents[0]["model"],
        "rows": average_over_seeds(measured),
        "failed": {d["cell"]: d["record"].get("failed", "") for d in documents if not d["figures"]},
        "damaged": damaged,
        **conclusion,
    }


def average_over_seeds(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting, in the order of the settings: by name, then by value."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        settings = {name: value for name, value in document["settings"].items() if name != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(document)
    averages = []
    for group in sorted(groups.values(), key=_order):
        settings = {name: value for name, value in group[0]["settings"].items() if name != "seed"}
        shared = set.intersection(*(set(document["figures"]) for document in group))
        names = [name for name in group[0]["figures"] if name in shared]
        averages.append(
            {
                "settings": settings,
                "seeds": sorted(document["settings"]["seed"] for document in group),
                "figures": {
                    name: _mean_and_error([document["figures"][name] for document in group])
                    for name in names
                    if isinstance(group[0]["figures"][name], int | float)
                },
            }
        )
    return averages


def _order(group: list[dict[str, Any]]) -> list[tuple[str, bool, float, str]]:
    settings = {name: value for name, value in group[0]["settings"].items() if name != "seed"}
    numbers = {name: isinstance(value, int | float) for name, value in settings.items()}
    return [
        (name, not numbers[name], value if numbers[name] else 0.0, str(value))
        for name, value in sorted(settings.items())
    ]


def _mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Mean, and its standard error where there are two values or more."""
    return {"mean": statistics.fmean(values), "standard_error": standard_error(values)}
