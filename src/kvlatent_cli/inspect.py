"""The commands that read a checkpoint: generate, inspect."""

from __future__ import annotations

from typing import Any

from .listings import list_pairs
from .options import CHECKPOINT, DEVICE, LOAD_DTYPE, REQUIRED, SEED, Option, command
from .session import Session

PROMPT = Option("prompt", "Text to continue.", "TEXT", default=REQUIRED)
NEW_TOKENS = Option("max_new_tokens", "Tokens to add.", "N", int, 64)
TEMPERATURE = Option(
    "temperature", "Sampling temperature; 0 takes the likeliest token each time.", None, float, 0.0
)


@command(CHECKPOINT, PROMPT, NEW_TOKENS, TEMPERATURE, SEED, DEVICE, LOAD_DTYPE)
def generate(run: Session, given: dict[str, Any]) -> None:
    """Continue a text."""
    from kvlatent.workflows.generate import continue_text

    document = continue_text(**given)
    run.show(document, f"{document['prompt']}{document['continuation']}")


@command(CHECKPOINT)
def inspect(run: Session, given: dict[str, Any]) -> None:
    """Say what a checkpoint is: widths, tables, cache bytes per token, and what was measured when it was made."""
    from kvlatent.workflows.inspect_checkpoint import describe

    document = describe(**given)
    run.show(document, list_pairs(_flat(document)))


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested document as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
