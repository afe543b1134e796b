"""The commands that look at a checkpoint with a text and write none: calibrate, plan."""

from __future__ import annotations

from typing import Any

from . import options as o
from .session import session
from .tables import budget_tables, pairs_table


def calibrate(
    model: o.Model,
    data: o.Data,
    out: o.StatisticsOut,
    blocks: o.Blocks = None,
    recipe: o.RecipeFile = None,
    overrides: o.Set = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    overwrite: o.OverwriteFile = False,
    as_json: o.Json = False,
) -> None:
    """Gather what a text says about a checkpoint, for `plan`, `convert` and `compress` at any widths."""
    with session(as_json) as run:
        from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint as work

        document = work(
            model,
            data,
            out,
            overwrite=overwrite,
            progress=run.report,
            blocks=blocks,
            recipe=recipe,
            overrides=overrides or [],
            device=device,
            dtype=dtype,
            seed=seed,
        )
        facts = {name: value for name, value in document.items() if name != "out"}
        run.show(document, pairs_table(facts), f"saved in {out}")


def plan(
    model: o.Model,
    kv: o.Kv = None,
    data: o.PlanData = None,
    statistics: o.Statistics = None,
    engine: o.Engine = None,
    per_layer: o.PerLayer = False,
    table: o.Table = None,
    memory: o.Memory = None,
    figure: o.Figure = None,
    blocks: o.Blocks = None,
    recipe: o.RecipeFile = None,
    overrides: o.Set = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    overwrite: o.OverwriteFile = False,
    as_json: o.Json = False,
) -> None:
    """Choose widths for a share of the cache, and say what they cost, what they are worth and what runs them."""
    with session(as_json) as run:
        from kvlatent.workflows.calibrate_and_plan import plan_checkpoint as work

        document: dict[str, Any] = work(
            model,
            data=data,
            statistics=statistics,
            memory_bytes=o.bytes_of(memory),
            figure=figure,
            overwrite=overwrite,
            progress=run.report,
            kv=kv,
            engine=engine,
            per_layer=per_layer,
            table=table,
            blocks=blocks,
            recipe=recipe,
            overrides=overrides or [],
            device=device,
            dtype=dtype,
            seed=seed,
        )
        run.show(document, *budget_tables(document))
