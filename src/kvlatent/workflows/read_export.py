"""A process of its own that loads an export and says what it computes: what the exporting process knows, it does not.

    python -m kvlatent.workflows.read_export MODULE EXPORT PLACE

PLACE holds `input_ids.safetensors` and `texts.json`; `logits.safetensors` is written beside them, and `token_ids.json` by
exporters whose engine has a tokenizer of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from kvlatent.checkpoints.weight_files import first_line
from kvlatent.jobs.scratch import scratch_folder

__all__ = ["read_in_fresh_process"]

_INPUTS, _LOGITS = "input_ids.safetensors", "logits.safetensors"
_TEXTS, _TOKENS = "texts.json", "token_ids.json"


def read_in_fresh_process(
    module: str, export: Path, input_ids: Tensor, texts: Sequence[str]
) -> tuple[Tensor, list[list[int]] | None]:
    """What an exporter reads off an export, in a Python that was started for it.

    Args:
        module: of the exporter, in `kvlatent.engines`.
        input_ids: [B, T].
        texts: to make tokens of.

    Returns:
        What `read_logits` gives; and what `read_token_ids` does, or None where the exporter has no such function.

    Raises:
        ValueError: the process failed; the sentence has its last words.
    """
    with scratch_folder() as place:
        save_file({"input_ids": input_ids}, place / _INPUTS)
        (place / _TEXTS).write_text(json.dumps(list(texts)), encoding="utf-8")
        # -P: nothing in the working directory takes the place of a library.
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, module, str(export), place],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise ValueError(
                "what was written does not load in a fresh process, so it was removed: "
                f"{words[-1] if words else f'it ended with code {done.returncode}'}"
            )
        tokens = place / _TOKENS
        ids = json.loads(tokens.read_text(encoding="utf-8")) if tokens.is_file() else None
        return load_file(place / _LOGITS)["logits"], ids


def main(module: str, export: str, place: str) -> None:
    """Read what was asked, write what was found; a mistake of the user's is the last line on stderr."""
    exporter = import_module(f"kvlatent.engines.{module}")
    try:
        logits = exporter.read_logits(Path(export), load_file(Path(place, _INPUTS))["input_ids"])
        save_file({"logits": logits.float().contiguous()}, Path(place, _LOGITS))
        if hasattr(exporter, "read_token_ids"):
            texts = json.loads(Path(place, _TEXTS).read_text(encoding="utf-8"))
            Path(place, _TOKENS).write_text(json.dumps(exporter.read_token_ids(Path(export), texts)))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(first_line(error)) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
