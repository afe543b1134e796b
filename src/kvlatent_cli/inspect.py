"""The commands that read a checkpoint: generate, inspect."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o
from .session import session
from .tables import pairs_table


def generate(
    directory: o.Directory,
    prompt: Annotated[str, typer.Option(help="The text to continue.", metavar="TEXT")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", metavar="N")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[
        int, typer.Option(help="For a temperature above 0.", metavar="N", min=0, max=2**32 - 1)
    ] = 0,
    device: o.Device = "auto",
    dtype: o.LoadDtype = None,
    as_json: o.Json = False,
) -> None:
    """Continue a text."""
    with session(as_json) as run:
        from kvlatent.checkpoints.load import load_model
        from kvlatent.checkpoints.tokenizer_files import load_tokenizer
        from kvlatent.jobs.devices import choose_device
        from kvlatent.workflows.generate import continuation

        model = load_model(directory, dtype=dtype, device=choose_device(device))
        tokenizer = load_tokenizer(directory, model.config)
        added = continuation(model, tokenizer, prompt, max_new_tokens, temperature=temperature, seed=seed)
        run.show({"prompt": prompt, "continuation": added}, f"{prompt}{added}")


def inspect(directory: o.Directory, as_json: o.Json = False) -> None:
    """Say what a checkpoint is: widths, tables, cache bytes per token, and what was measured when it was made."""
    with session(as_json) as run:
        from kvlatent.workflows.inspect_checkpoint import describe

        document = describe(directory)
        run.show(document, pairs_table(_flat(document)))


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested document as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
