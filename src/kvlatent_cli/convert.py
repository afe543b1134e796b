"""The commands that make a latent checkpoint: compress, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import options as o
from .session import Session, session
from .tables import conversion_tables, figures_table, plan_lines


def compress(
    model: o.Model,
    data: o.Data,
    out: o.Out,
    kv: o.Kv = None,
    d_qk: o.Qk = None,
    d_vo: o.Vo = None,
    engine: o.Engine = None,
    per_layer: o.PerLayer = False,
    preset: o.Preset = None,
    table: o.Table = None,
    align: o.Align = None,
    blocks: o.Blocks = None,
    statistics: o.Statistics = None,
    recipe: o.RecipeFile = None,
    overrides: o.Set = None,
    tokens: o.Tokens = None,
    stages: o.Stages = "both",
    eval_data: o.EvalData = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Convert a checkpoint, train it in two stages, measure it, save it. Repeat the command to continue a killed run."""
    with session(as_json) as run:
        from kvlatent.workflows.compress_checkpoint import compress as work

        record = work(
            model,
            data,
            out,
            eval_data=eval_data,
            statistics=statistics,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=run.report,
            announce=lambda plan: say_plan(run, plan),
            kv=kv,
            d_qk=o.widths("d-qk", d_qk),
            d_vo=o.widths("d-vo", d_vo),
            engine=engine,
            per_layer=per_layer,
            preset=preset,
            table=table,
            align=align,
            blocks=blocks,
            recipe=recipe,
            overrides=overrides or [],
            tokens=tokens,
            stages=stages,
            device=device,
            dtype=dtype,
            seed=seed,
        )
        show_record(run, record, out)


def convert(
    model: o.Model,
    out: o.Out,
    kv: o.Kv = None,
    d_qk: o.Qk = None,
    d_vo: o.Vo = None,
    engine: o.Engine = None,
    per_layer: o.PerLayer = False,
    preset: o.Preset = None,
    table: o.Table = None,
    align: o.Align = None,
    data: o.TextToCalibrate = None,
    blocks: o.Blocks = None,
    statistics: o.Statistics = None,
    eval_data: o.EvalData = None,
    recipe: o.RecipeFile = None,
    overrides: o.Set = None,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Convert a checkpoint without training it: calibrate on --data, choose what to keep, and measure what it costs."""
    with session(as_json) as run:
        from kvlatent.workflows.convert_checkpoint import convert_checkpoint as work

        record = work(
            model,
            out,
            data=data,
            eval_data=eval_data,
            statistics=statistics,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=run.report,
            announce=lambda plan: say_plan(run, plan),
            kv=kv,
            d_qk=o.widths("d-qk", d_qk),
            d_vo=o.widths("d-vo", d_vo),
            engine=engine,
            per_layer=per_layer,
            preset=preset,
            table=table,
            align=align,
            blocks=blocks,
            recipe=recipe,
            overrides=overrides or [],
            device=device,
        )
        show_record(run, record, out)


def say_plan(run: Session, plan: dict[str, Any]) -> None:
    """The plan, and what to know before it happens, on stderr."""
    run.close()
    for line in plan_lines(plan):
        run.say(line)
    _say_notes(run, plan)


def _say_notes(run: Session, plan: dict[str, Any]) -> None:
    for note in plan["notes"]:
        run.say(f"warning: {note}")


def show_record(run: Session, record: dict[str, Any], out: Path) -> None:
    """A finished run's figures, or a plan."""
    if "command" not in record:
        _say_notes(run, record["plan"])
        run.show(record, *plan_lines(record["plan"]))
        return
    tables = [figures_table(record["figures"])] if record["figures"] else []
    run.show({**record, "out": str(out)}, *conversion_tables(record), *tables, f"saved in {out}")
