"""The options that several commands share, each spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint: a directory or a hub id.", metavar="MODEL")]
Directory = Annotated[str, typer.Argument(help="Latent checkpoint: a directory or a hub id.", metavar="DIR")]
Data = Annotated[
    str, typer.Option(help="Text: .txt, .jsonl, .json, .parquet, or a hub data set.", metavar="FILE")
]
OptionalData = Annotated[str | None, typer.Option(help="Text to measure on.", metavar="FILE")]
Out = Annotated[Path, typer.Option(help="Directory to write.", metavar="DIR")]
Kv = Annotated[float | None, typer.Option(help="Share of the cache to keep, in (0, 1]; 0.5 by default.")]
Qk = Annotated[str | None, typer.Option(help="Key width a head: N, or N,N,... one per layer.", metavar="N")]
Vo = Annotated[str | None, typer.Option(help="Value width a head: N, or N,N,... one per layer.", metavar="N")]
Preset = Annotated[
    str | None, typer.Option(help="How channels are chosen; 'paper' by default.", metavar="NAME")
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="YAML file with the settings of the run.", metavar="FILE")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A recipe key, e.g. stage1.learning_rate=1e-4.", metavar="KEY=VALUE"),
]
Tokens = Annotated[int | None, typer.Option(help="Training tokens, of all stages together.", metavar="N")]
Stages = Annotated[str, typer.Option(help="Stages to train.", metavar="none|1|2|both")]
Device = Annotated[str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda")]
Dtype = Annotated[str | None, typer.Option(help="Precision to run in.", metavar="float32|bfloat16")]
LoadDtype = Annotated[
    str | None,
    typer.Option(
        help="Precision to load in; the checkpoint's by default.", metavar="float32|bfloat16|float16"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of everything random.", metavar="N")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output directory holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")
]


def widths(name: str, text: str | None) -> int | tuple[int, ...] | None:
    """`32` is one width for all layers, `32,32,16` one per layer.

    Raises:
        ValueError: not whole numbers.
    """
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--{name} is a whole number or a list such as 32,32,16: got {text!r}; try 32"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
