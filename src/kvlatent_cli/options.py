"""The options that several commands share, each spelled once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint: a directory or a hub id.", metavar="MODEL")]
Directory = Annotated[str, typer.Argument(help="Latent checkpoint: a directory or a hub id.", metavar="DIR")]
Data = Annotated[
    str,
    typer.Option(
        help="Text or conversations: .txt, .jsonl, .json, .parquet, or a hub data set.", metavar="FILE"
    ),
]
TextToCalibrate = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on; a held-out part of it is measured. All of it, where the preset looks at no text.",
        metavar="FILE",
    ),
]
PlanData = Annotated[str | None, typer.Option(help="Text to calibrate on.", metavar="FILE")]
EvalData = Annotated[
    str | None, typer.Option(help="Another text to measure on, instead of a held-out part.", metavar="FILE")
]
Statistics = Annotated[
    Path | None, typer.Option(help="What `kvlatent calibrate` wrote: calibrate no more.", metavar="FILE")
]
Out = Annotated[Path, typer.Option(help="Directory to write.", metavar="DIR")]
Kv = Annotated[float | None, typer.Option(help="Share of the cache to keep, in (0, 1]; 0.5 by default.")]
Qk = Annotated[str | None, typer.Option(help="Key width a head: N, or N,N,... one per layer.", metavar="N")]
Vo = Annotated[str | None, typer.Option(help="Value width a head: N, or N,N,... one per layer.", metavar="N")]
Engine = Annotated[
    str | None,
    typer.Option(help="What must be able to run the result, e.g. vllm or llama.cpp.", metavar="NAME"),
]
PerLayer = Annotated[
    bool, typer.Option("--per-layer", help="Let layers differ in width (with --kv), in three groups at most.")
]
Preset = Annotated[
    str | None, typer.Option(help="How channels are chosen; 'calibrated' by default.", metavar="NAME")
]
Table = Annotated[
    str | None,
    typer.Option(help="Who shares a rotary table; head by default.", metavar="head|layer|model"),
]
Align = Annotated[
    int | None, typer.Option(help="Steps of attention alignment a layer; 0: none.", metavar="STEPS")
]
Blocks = Annotated[
    int | None, typer.Option(help="Blocks of text to calibrate on; 128 by default.", metavar="N")
]
Memory = Annotated[
    str | None, typer.Option(help="Of the device that serves, for the longest context.", metavar="24GB")
]
Figure = Annotated[
    Path | None,
    typer.Option(help="Draw error against budget: .svg, .png or .pdf (needs matplotlib).", metavar="FILE"),
]
StatisticsOut = Annotated[Path, typer.Option(help="File to write, safetensors.", metavar="FILE")]
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
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")]
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


def numbers(name: str, text: str) -> list[int]:
    """`128,512` as a list.

    Raises:
        ValueError: not whole numbers.
    """
    found = widths(name, text)
    return list(found) if isinstance(found, tuple) else [found] if found is not None else []


def names(text: str) -> list[str]:
    """`needle, order` as a list without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def bytes_of(text: str | None) -> float | None:
    """`24GB` in bytes; also MB, TB, and MiB, GiB, TiB.

    Raises:
        ValueError: no positive number with one of these units.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    try:
        size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"--memory is a number of MB, GB or TB (or MiB, GiB, TiB): got {text!r}; try 24GB")
    return size
