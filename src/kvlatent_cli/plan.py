"""The commands that look at a checkpoint with a text and write none: calibrate, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .budget_listings import budget_listing, bytes_listing
from .listings import list_pairs
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
    read_bytes,
    read_context,
)
from .session import Session

TEXT = Option("data", "Text to calibrate on.", "FILE")
STATISTICS_OUT = Option("out", "File to write, safetensors.", "FILE", Path, REQUIRED)
FIGURE = Option("figure", "Draw error against budget: .svg, .png or .pdf (needs matplotlib).", "FILE", Path)
KV_BUDGET = (
    Option("kv_bytes", "Bytes for the caches of all sequences together, instead of --kv; needs no text.", "8GiB", read=read_bytes),
    Option("context", "Tokens of a sequence, e.g. 32768 or 128k; the model's longest by default.", "128k", read=read_context),
    Option("batch", "Sequences at once.", "N", int),
    Option("kv_dtype", "KV dtype of the cache on the engine, e.g. fp8 or q8_0; with --kv-bytes all by default.", "NAME"),
    Option("backend", "What the engine runs on, e.g. cuda, sm100 or cpu.", "NAME"),
)  # fmt: skip


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
    MODEL, *BUDGET, *KV_BUDGET, TEXT, STATISTICS, TABLE, MEMORY, FIGURE, BLOCKS, *RECIPE, DEVICE, DTYPE, SEED,
    OVERWRITE_FILE,
)  # fmt: skip
def plan(run: Session, given: dict[str, Any]) -> None:
    """Choose widths for a share of the cache, and say what they cost, what they are worth and what runs them.

    For a number of bytes (--kv-bytes), choose widths and KV dtypes of the engine together.
    """
    from kvlatent.workflows.calibrate_and_plan import plan_checkpoint

    memory = given.pop("memory", None)
    document = plan_checkpoint(**given, memory_bytes=memory, progress=run.report)
    listing = bytes_listing if "options" in document else budget_listing
    run.show(document, *listing(document))
