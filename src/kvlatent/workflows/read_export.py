"""A process of its own that loads an export and writes the logits it gives: what the exporting process knows, it does not.

    python -m kvlatent.workflows.read_export MODULE EXPORT PLACE

PLACE holds `input_ids.safetensors`; `logits.safetensors` is written beside it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from kvlatent.checkpoints.weight_files import first_line

__all__ = ["read_in_fresh_process"]

_INPUTS, _LOGITS = "input_ids.safetensors", "logits.safetensors"


def read_in_fresh_process(module: str, export: Path, input_ids: Tensor) -> Tensor:
    """What `read_logits` of an exporter gives for an export, in a Python that was started for it.

    Args:
        module: of the exporter, in `kvlatent.engines`.
        input_ids: [B, T].

    Raises:
        ValueError: the process failed; the sentence ends with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as place:
        save_file({"input_ids": input_ids}, Path(place, _INPUTS))
        # -P: nothing in the working directory takes the place of a library.
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, module, str(export), place],
            capture_output=True,
            text=True,
            errors="replace",
        )
        written = Path(place, _LOGITS)
        if done.returncode != 0 or not written.is_file():
            words = [line for line in done.stderr.splitlines() if line.strip()]
            raise ValueError(
                f"what was written does not load in a fresh process ({words[-1].strip() if words else done.returncode}), "
                "so it was removed"
            )
        return load_file(written)["logits"]


def main(module: str, export: str, place: str) -> None:
    """Read the inputs, write the logits; a mistake of the user's is the last line on stderr."""
    input_ids = load_file(Path(place, _INPUTS))["input_ids"]
    try:
        logits = import_module(f"kvlatent.engines.{module}").read_logits(Path(export), input_ids)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(first_line(error)) from error
    save_file({"logits": logits.float().contiguous()}, Path(place, _LOGITS))


if __name__ == "__main__":
    main(*sys.argv[1:])
