"""The commands that look at a checkpoint with a text and write none: calibrate, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .listings import budget_listing, list_pairs
from .options import (
    BLOCKS,
    BUDGET,
    DATA,
    DEVICE,
    DTYPE,
    MEMORY,
    MODEL,
    OVERWRITE_FILE,
    RECIPE,
    REQUIRED,
    SEED,
    STATISTICS,
    TABLE,
    Option,
    command,
)
from .session import Session

TEXT = Option("data", "Text to calibrate on.", "FILE")
STATISTICS_OUT = Option("out", "File to write, safetensors.", "FILE", Path, REQUIRED)
FIGURE = Option("figure", "Draw error against budget: .svg, .png or .pdf (needs matplotlib).", "FILE", Path)


@command(MODEL, DATA, STATISTICS_OUT, BLOCKS, *RECIPE, DEVICE, DTYPE, SEED, OVERWRITE_FILE)
def calibrate(run: Session, given: dict[str, Any]) -> None:
    """Collect what a text says about a checkpoint, for `plan`, `convert` and `compress` at any widths.

    A quarter of its blocks are made to ask for recall, which alignment loses first; --set calibration.recall=0 leaves the
    text as it is.
    """
    from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint

    document = calibrate_checkpoint(**given, progress=run.report)
    facts = {name: value for name, value in document.items() if name != "out"}
    run.show(document, list_pairs(facts), f"saved in {given['out']}")


@command(
    MODEL, *BUDGET, TEXT, STATISTICS, TABLE, MEMORY, FIGURE, BLOCKS, *RECIPE, DEVICE, DTYPE, SEED,
    OVERWRITE_FILE,
)  # fmt: skip
def plan(run: Session, given: dict[str, Any]) -> None:
    """Choose widths for a share of the cache, and say what they cost, what they are worth and what runs them."""
    from kvlatent.workflows.calibrate_and_plan import plan_checkpoint

    memory = given.pop("memory", None)
    document = plan_checkpoint(**given, memory_bytes=memory, progress=run.report)
    run.show(document, *budget_listing(document))
