"""The commands that make a latent checkpoint: compress, convert."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .listings import conversion_listing, figures_listing, list_pairs, minutes_lines, plan_lines
from .options import (
    ALLOW_CHANGE,
    CONVERSION,
    DATA,
    DEVICE,
    DRY_RUN,
    DTYPE,
    EXACT_WIDTHS,
    LATENT,
    MINUTES,
    MODEL,
    OUT,
    OVERWRITE,
    SEED,
    STREAM,
    TOKENS,
    Option,
    command,
)
from .session import Session, keep_boards

STAGES = Option("stages", "Stages to train; both by default, 2 with --minutes.", "none|1|2|both")
STORE = Option(
    "teacher",
    "What `kvlatent teach` wrote of MODEL and --data, to train stage 2 without the original in memory.",
    "DIR",
    Path,
)
TEXT_TO_CALIBRATE = Option(
    "data",
    "Text to calibrate on; a held-out part of it is measured. All of it, where the preset looks at no text.",
    "FILE",
)
SHARE = Option("kv", "Share of the original's cache to keep, at most that of DIR.", kind=float)


@command(
    MODEL,
    DATA,
    OUT,
    *CONVERSION,
    TOKENS,
    MINUTES,
    STAGES,
    STORE,
    DEVICE,
    DTYPE,
    SEED,
    OVERWRITE,
    ALLOW_CHANGE,
    DRY_RUN,
)
def compress(run: Session, given: dict[str, Any]) -> None:
    """Convert a checkpoint, train it in two stages, measure it, save it. Repeat the command to continue a killed run."""
    from kvlatent.workflows.compress_checkpoint import compress

    keep_boards(given["out"])
    record = compress(**given, progress=run.report, announce=partial(_say_plan, run))
    _show_record(run, record, given["out"])


@command(MODEL, OUT, *CONVERSION, TEXT_TO_CALIBRATE, MINUTES, STREAM, DEVICE, DTYPE, OVERWRITE, DRY_RUN)
def convert(run: Session, given: dict[str, Any]) -> None:
    """Convert a checkpoint without training it: calibrate on --data, choose what to keep, and measure what it costs."""
    from kvlatent.workflows.convert_checkpoint import convert_checkpoint

    record = convert_checkpoint(**given, progress=run.report, announce=partial(_say_plan, run))
    _show_record(run, record, given["out"])


@command(LATENT, SHARE, *EXACT_WIDTHS, OUT, OVERWRITE)
def slice(run: Session, given: dict[str, Any]) -> None:
    """Cut a narrower latent checkpoint out of one that was trained at several widths."""
    from kvlatent.workflows.slice_checkpoint import slice_checkpoint

    record = slice_checkpoint(**given, progress=run.report)
    plan = record["plan"]
    run.show(
        {**record, "out": str(given["out"])},
        list_pairs({name: plan[name] for name in ("d_qk", "d_vo", "share", "cache_bytes_per_token")}),
        f"saved in {given['out']}",
    )


def _say_plan(run: Session, plan: dict[str, Any]) -> None:
    """The plan, and what to know before it happens, on stderr."""
    run.close()
    for line in plan_lines(plan):
        run.say(line)
    _say_notes(run, plan)


def _say_notes(run: Session, plan: dict[str, Any]) -> None:
    for note in plan["notes"]:
        run.say(f"warning: {note}")


def _show_record(run: Session, record: dict[str, Any], out: Path) -> None:
    """A finished run's figures, or a plan."""
    if "command" not in record:
        _say_notes(run, record["plan"])
        run.show(record, *plan_lines(record["plan"]))
        return
    figures = [figures_listing(record["figures"])] if record["figures"] else []
    run.show(
        {**record, "out": str(out)},
        *conversion_listing(record),
        *minutes_lines(record),
        *figures,
        f"saved in {out}",
    )
