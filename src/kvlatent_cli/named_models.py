"""Models that commands and benchmarks take by a name of their own, and where they are kept.

This is the door: the only place that asks the environment for a cache.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

REAL = "smollm2"


def cache_folder() -> Path:
    """`kvlatent` in the folder that XDG_CACHE_HOME names, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlatent"


def resolve_model(text: str) -> str:
    """The directory of SmolLM2-135M-Instruct, from 4-bit weights, for "smollm2" (fetched by the first call); else `text`.

    What lies here under that name comes first. As for `real_model.fetch_gguf`, whose errors it raises.
    """
    if Path(text).exists():
        return text
    from kvlatent.checkpoints.real_model import NAME, plain_checkpoint

    return str(plain_checkpoint(cache_folder())) if text in (REAL, NAME) else text


def model_argument(text: str) -> str:
    """`resolve_model` of what a script was given; argparse tells of other errors only that the value is invalid."""
    try:
        return resolve_model(text)
    except (ValueError, OSError) as error:
        raise ArgumentTypeError(str(error)) from error


def read_model(_: str, text: str) -> str:
    """`resolve_model` of what an option was given."""
    return resolve_model(text)
