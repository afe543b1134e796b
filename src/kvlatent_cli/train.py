"""The commands that train one stage of a checkpoint, and that show the whole on the embedded model: train, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .session import Session, session
from .tables import duration, pairs_table


def train(
    directory: o.Directory,
    stage: Annotated[int, typer.Option(help="1: layer by layer; 2: end to end.", metavar="1|2")],
    data: o.Data,
    teacher: Annotated[
        str | None, typer.Option(help="The original; only stage 2 on next tokens can do without.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; DIR itself by default.", metavar="DIR")
    ] = None,
    recipe: o.RecipeFile = None,
    overrides: o.Set = None,
    tokens: o.Tokens = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Train one stage of a latent checkpoint, in place unless --out is given. Repeat the command to continue."""
    with session(as_json) as run:
        from kvlatent.workflows.train_checkpoint import train as work

        values = {"dtype": dtype, "seed": seed} | (
            {f"stage{stage}.tokens": tokens} if stage in (1, 2) else {}
        )
        settings = [
            *(overrides or []),
            *(f"{key}={value}" for key, value in values.items() if value is not None),
        ]
        target = Path(directory) if out is None else out
        summary = work(
            directory,
            stage=stage,
            data=data,
            out=target,
            teacher=teacher,
            recipe=recipe,
            overrides=settings,
            device=device,
            overwrite=overwrite,
            progress=lambda number, done, total, speed, loss: run.report(
                f"stage {'I' * number}", done, total, f"{speed:,.0f} tokens/s, loss {loss:.4f}"
            ),
            announce=lambda plan: _say_stage(run, plan),
        )
        document = {**summary, "out": str(target)}
        run.show(
            document, pairs_table({name: value for name, value in document.items() if "layer" not in name})
        )


def demo(
    out: Annotated[Path | None, typer.Option(help="Directory to write; ./kvlatent-demo by default.")] = None,
    preset: Annotated[str, typer.Option(help="How channels are chosen.", metavar="NAME")] = "calibrated",
    tokens: o.Tokens = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Compress the model that ships with the package to half its cache, on the text of Python's standard library."""
    with session(as_json) as run:
        from kvlatent.workflows.demo_run import demo as work

        report = work(
            out, preset=preset, tokens=tokens, overwrite=overwrite, progress=run.report, say=run.say
        )
        run.show(report, *_demo_answer(report))


def _say_stage(run: Session, plan: dict[str, Any]) -> None:
    run.close()
    ((name, tokens),) = plan["tokens"].items()
    run.say(
        f"stage {'I' * int(name[-1])}: {tokens:,} tokens on {plan['device']} in {plan['dtype']}, about "
        f"{duration(plan['estimated_seconds'])} (an estimate from the model's size and this machine's speed)"
    )


def _demo_answer(report: dict[str, Any]) -> list[Any]:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("original", "latent"):
        table.add_column(name, justify="right")
    sides = (report["original"], report["latent"])
    table.add_row(
        "cache bytes per token (measured)", *(f"{side['cache_bytes_per_token']:,.0f}" for side in sides)
    )
    table.add_row("perplexity on held-out modules", *(f"{side['perplexity']:.3f}" for side in sides))
    for distance in report["original"]["copy_accuracy"]:
        shares = (f"{side['copy_accuracy'][distance]:.1%}" for side in sides)
        table.add_row(f"copies a random string, {distance} tokens back", *shares)
    lines = [
        f"\n{name} continues {report['prompt']!r}:\n{side['continuation']}"
        for name, side in zip(("original", "latent"), sides, strict=True)
    ]
    return [table, *lines, f"\nsaved in {report['out']} ({report['minutes']:.1f} min)"]
