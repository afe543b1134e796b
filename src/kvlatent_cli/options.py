"""A command's parameters, each declared once; its signature, the values it gets and the words of its record follow.

An option that is not named on the command line and has no default is not given to the workflow, whose own default holds.
To add one for a key of the recipe: mark the key there (`recipe.OPTION`) and add a row to the group of its commands here.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from .named_models import read_model
from .session import Session, check_one_process, session

REQUIRED: Any = ...


@dataclass(frozen=True)
class Option:
    """One parameter of a command.

    Args:
        name: of the workflow's argument; the flag is spelled like it, but for `flag`.
        help: one sentence.
        metavar: what stands for the value in the help.
        kind: type of what is typed.
        default: of what is typed; None: the workflow's own.
        flag: where it is spelled otherwise.
        read: makes the value of flag and text, or raises `ValueError`.
        is_positional: it has no flag.
    """

    name: str
    help: str
    metavar: str | None = None
    kind: Any = str
    default: Any = None
    flag: str | None = None
    read: Callable[[str, str], Any] | None = None
    is_positional: bool = False

    @property
    def spelling(self) -> str:
        """The flag without its dashes."""
        return self.flag or self.name.replace("_", "-")

    def parameter(self) -> inspect.Parameter:
        """The parameter that typer reads off a signature."""
        kind = self.kind | None if self.default is None else self.kind
        shown: dict[str, Any] = {"help": self.help, "metavar": self.metavar}
        if self.is_positional:
            default = typer.Argument(self.default, **shown)
        else:
            default = typer.Option(self.default, f"--{self.spelling}", **shown)
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    def value(self, typed: Any) -> Any:
        """What the workflow gets for what was typed."""
        return typed if self.read is None else self.read(self.spelling, typed)


def positional(
    name: str,
    metavar: str,
    help: str,
    kind: Any = str,
    read: Callable[[str, str], Any] | None = None,
) -> Option:
    """A required parameter without a flag."""
    return Option(name, help, metavar, kind, REQUIRED, read=read, is_positional=True)


def switch(name: str, help: str) -> Option:
    """An option that is named or not."""
    return Option(name, help, kind=bool, default=False)


JSON = switch("json", "Print one JSON document on stdout, and nothing else there.")


def command(
    *options: Option, spreads: bool = False
) -> Callable[[Callable[[Session, dict[str, Any]], None]], Callable[..., None]]:
    """Make a command of a function of the session and the values of its options, by name.

    Args:
        spreads: torchrun may start it in several processes.
    """

    def decorate(work: Callable[[Session, dict[str, Any]], None]) -> Callable[..., None]:
        @functools.wraps(work)
        def run_command(**typed: Any) -> None:
            with session(as_json=typed.pop("json")) as run:
                if not spreads:
                    check_one_process(getattr(work, "__name__", "this"))
                named = [option for option in options if typed[option.name] not in (None, [])]
                run.typed = {
                    option.spelling: typed[option.name] for option in named if not option.is_positional
                }
                work(run, {option.name: option.value(typed[option.name]) for option in named})

        parameters = [option.parameter() for option in (*options, JSON)]
        setattr(run_command, "__signature__", inspect.Signature(parameters))  # noqa: B010 - not an attribute to ty
        run_command.__annotations__ = {}  # those of `work`, which typer would ask for as well
        return run_command

    return decorate


def read_widths(flag: str, text: str) -> int | tuple[int, ...]:
    """`32` is one width for all layers, `32,32,16` one per layer.

    Raises:
        ValueError: not whole numbers.
    """
    numbers = tuple(read_numbers(flag, text))
    return numbers[0] if len(numbers) == 1 else numbers


def read_numbers(flag: str, text: str) -> list[int]:
    """`128,512` as a list.

    Raises:
        ValueError: not whole numbers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--{flag} is a whole number or a list such as 32,32,16: got {text!r}; try 32"
        ) from None


def read_names(flag: str, text: str) -> list[str]:
    """`needle, order` as a list without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def read_bytes(flag: str, text: str) -> float:
    """`24GB` in bytes; also MB, TB, and MiB, GiB, TiB.

    Raises:
        ValueError: no positive number with one of these units.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", text)
    try:
        size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"--{flag} is a number of MB, GB or TB (or MiB, GiB, TiB): got {text!r}; try 24GB")
    return size


_TOKENS = {"": 1, "K": 2**10, "M": 2**20}


def read_context(flag: str, text: str) -> int:
    """`128k` in tokens, 1,024 of them a k, as contexts are named; also `1M`, and plain numbers.

    Raises:
        ValueError: no whole number of tokens.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmM]?)\s*", text)
    tokens = float(match[1]) * _TOKENS[match[2].upper()] if match else 0.0
    if tokens < 1 or tokens % 1:
        raise ValueError(
            f"--{flag} is a number of tokens, or of k (1,024) or M (1,048,576): got {text!r}; try 32k"
        )
    return int(tokens)


MODEL = positional(
    "model",
    "MODEL",
    "The original checkpoint: a directory, a hub id, a GGUF file or smollm2.",
    read=read_model,
)
LATENT = positional("model", "DIR", "A latent checkpoint: a directory or a hub id.")
CHECKPOINT = positional(
    "model",
    "DIR",
    "A latent or an original checkpoint: a directory, a hub id, a GGUF file or smollm2.",
    read=read_model,
)
DATA = Option(
    "data",
    "Text or conversations: a .txt, .jsonl, .json or .parquet file, or a hub data set.",
    "FILE",
    default=REQUIRED,
)
EVAL_DATA = Option("eval_data", "Another text to measure on, instead of a held-out part.", "FILE")
STATISTICS = Option("statistics", "What `kvlatent calibrate` wrote, to calibrate no more.", "FILE", Path)
OUT = Option("out", "Directory to write.", "DIR", Path, REQUIRED)
OVERWRITE = switch("overwrite", "Replace what the output directory holds.")
ALLOW_CHANGE = switch(
    "allow_change",
    "Continue an unfinished run with other rates, tokens or checkpoints than it was begun with.",
)
OVERWRITE_FILE = switch("overwrite", "Replace a file of that name.")
STREAM = switch(
    "stream", "Hold one decoder layer in memory at a time; by itself where the model does not fit."
)
DRY_RUN = switch("dry_run", "Print the plan and write nothing.")
TOKENS = Option("tokens", "Training tokens, of all stages together.", "N", int)
MINUTES = Option(
    "minutes", "Minutes for the whole run, split between its steps by this machine's speed.", "M", float
)
MEMORY = Option(
    "memory", "Memory of the device that serves, for the longest context.", "24GB", read=read_bytes
)
SEED = Option("seed", "Random seed.", "N", int)
DEVICE = Option("device", "Device to run on.", "auto|cpu|cuda", default="auto")
DTYPE = Option("dtype", "Precision to run in; the recipe's by default.", "auto|float32|bfloat16")
LOAD_DTYPE = Option("dtype", "Precision to load in; the checkpoint's by default.", "float32|bfloat16|float16")

RECIPE = (
    Option("recipe", "YAML file with the settings of the run.", "FILE", Path),
    Option("overrides", "Set a key of the recipe, e.g. stage1.learning_rate=1e-4.", "KEY=VALUE", list[str], flag="set"),
)  # fmt: skip
BUDGET = (
    Option("kv", "Share of the cache to keep, in (0, 1]; 0.5 by default.", kind=float),
    Option("engine", "Engine that must be able to run the result, e.g. vllm or llama.cpp.", "NAME"),
    switch(
        "per_layer",
        "Let layers differ in width (with --kv), as each is measured to need; for an engine in three groups.",
    ),
)
TABLE = Option("table", "Who shares a rotary table; each head has its own by default.", "head|layer|model")
BLOCKS = Option("blocks", "Blocks of text to calibrate on; 128 by default.", "N", int)
EXACT_WIDTHS = (
    Option("d_qk", "Key width of a head: N, or N,N,... one per layer.", "N", read=read_widths),
    Option("d_vo", "Value width of a head: N, or N,N,... one per layer.", "N", read=read_widths),
)
CONVERSION = (
    *BUDGET,
    *EXACT_WIDTHS,
    Option("preset", "How channels are chosen; 'calibrated' by default.", "NAME"),
    TABLE,
    Option("align", "Steps of attention alignment a layer; 0 for none.", "STEPS", int),
    Option("global_steps", "Steps on all layers at once, after it; 0 for none.", "STEPS", int),
    BLOCKS,
    STATISTICS,
    EVAL_DATA,
    switch("explain", "Show the error of every layer under every strategy (converts once for each)."),
    *RECIPE,
)
