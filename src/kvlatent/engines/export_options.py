"""What every exporter is given, and what an exporter is.

An exporter is a module of this package with these functions; `workflows/export_checkpoint.py` lists them by target.
- `check_exportable(latent, options)`: the tokens for which the export will be the same model; raises `ValueError`, one sentence
  with the nearest profile that works, before anything is written.
- `matrix_rounding(options)`: how what is written rounds matrices, `MatrixRounding`, or None where it keeps them as they are.
- `write_export(latent, source, out, options)`: writes into the folder `out` and returns JSON-able facts, `ExportFacts`.
- `read_logits(out, input_ids)`: what the engine makes of the written files, in a process of its own; input_ids [B, T] to
  [B, T, V], or fewer positions, the last ones; logits, or log-probabilities where the engine gives no logits.
- `read_token_ids(out, texts)`, where what was written has a tokenizer that is not the checkpoint's files: the ids of texts,
  with what the tokenizer puts around them, in that process, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field
from torch import Tensor

from kvlatent.engines.matrix_rounding import MatrixRounding
from kvlatent.jobs.record import Result

__all__ = ["ExportFacts", "ExportOptions", "Exporter", "check_installed"]


@dataclass(frozen=True)
class ExportOptions:
    """How a latent checkpoint goes out.

    Args:
        stored_dtype: of the checkpoint, "float32", "bfloat16" or "float16"; exports keep it unless told otherwise.
        dtype: of the matrices: of a GGUF file "f32", "f16", "bf16" or "q8_0", of an OpenVINO graph "f32" or "f16"; None: as
            stored.
        pad: unequal widths may be filled up with zeros to the widest.
        experimental: unequal widths may go into a GGUF file under the architecture name step35.
    """

    stored_dtype: str = "float32"
    dtype: str | None = None
    pad: bool = False
    experimental: bool = False


class ExportFacts(Result):
    """What an exporter says of what it wrote, for the card and the record.

    Attributes:
        engine: what reads it back, with its version.
        cache_bytes_per_token: that the engine spends, in its own default type of cache.
        cache_dtype: that type.
        context: tokens for which it is the same model; None: all that the checkpoint takes.
        changes: sentences on what is not as it was in the latent checkpoint.
        run_with: commands that run it; DIR stands for its directory.
        tolerance: of the logits' root mean square difference from ours, over their standard deviation, beside what
            `matrix_rounding` makes of them.
    """

    engine: str
    cache_bytes_per_token: int
    cache_dtype: str
    context: int | None = None
    changes: list[str] = Field(default_factory=list)
    run_with: list[str] = Field(default_factory=list)
    tolerance: float = 1e-4


class Exporter(Protocol):
    """A module that exports; see above."""

    def check_exportable(self, latent: Any, options: ExportOptions) -> int: ...
    def matrix_rounding(self, options: ExportOptions) -> MatrixRounding | None: ...
    def write_export(
        self, latent: Any, source: Path, out: Path, options: ExportOptions
    ) -> dict[str, Any]: ...
    def read_logits(self, out: Path, input_ids: Tensor) -> Tensor: ...


def check_installed(target: str, modules: tuple[str, ...], install: str) -> str:
    """The first of these modules that is installed.

    Raises:
        ValueError: none is; the sentence says how to install one.
    """
    for module in modules:
        if find_spec(module) is not None:
            return module
    raise ValueError(
        f"an export to {target} is read back by the engine itself, and {' and '.join(modules)} "
        f"{'is' if len(modules) == 1 else 'are'} not installed; {install}"
    )
