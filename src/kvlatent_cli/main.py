"""The `kvlatent` command: its subcommands, and nothing heavy at import."""

from __future__ import annotations

import typer

from . import judge, look, make, survey, teach

app = typer.Typer(
    name="kvlatent",
    help="Halve the KV cache of a pretrained language model: convert, distil, measure, load as before.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, function in {
    "compress": make.compress,
    "convert": make.convert,
    "calibrate": survey.calibrate,
    "plan": survey.plan,
    "train": teach.train,
    "eval": judge.evaluate,
    "bench": judge.bench,
    "study": judge.study,
    "report": judge.report,
    "generate": look.generate,
    "inspect": look.inspect,
    "demo": teach.demo,
}.items():
    app.command(name)(function)


def main() -> None:
    """Entry point of the console script."""
    app()
