"""The `kvlatent` command: its subcommands, and nothing heavy at import."""

from __future__ import annotations

import typer

from . import convert, export, inspect, measure, plan, serve, train

app = typer.Typer(
    name="kvlatent",
    help="Halve the KV cache of a pretrained language model: convert, distil, measure, load as before.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, function in {
    "compress": convert.compress,
    "convert": convert.convert,
    "export": export.export,
    "slice": convert.slice,
    "serve": serve.serve,
    "calibrate": plan.calibrate,
    "plan": plan.plan,
    "teach": train.teach,
    "train": train.train,
    "eval": measure.evaluate,
    "bench": measure.bench,
    "study": measure.study,
    "report": measure.report,
    "generate": inspect.generate,
    "inspect": inspect.inspect,
    "demo": train.demo,
}.items():
    app.command(name)(function)


def main() -> None:
    """Entry point of the console script."""
    app()
