"""The command that takes a latent checkpoint to the engines that people run: export."""

from __future__ import annotations

from typing import Any

from .listings import list_pairs
from .options import LATENT, OUT, OVERWRITE, REQUIRED, Option, command, switch
from .session import Session

TARGET = Option(
    "to",
    "A plain checkpoint (transformers, vLLM, SGLang, MLX), a GGUF file (llama.cpp), or a graph (OpenVINO GenAI).",
    "stock|gguf|openvino",
    default=REQUIRED,
)
DTYPE = Option(
    "dtype",
    "Type of the matrices of a GGUF file or a graph (f32 or f16); as stored by default.",
    "f32|f16|bf16|q8_0",
)
PAD = switch("pad", "Fill unequal widths up with zeros to the widest, which is then what the cache costs.")
EXPERIMENTAL = switch(
    "experimental", "Write unequal widths into a GGUF file under the architecture name step35."
)


@command(LATENT, TARGET, OUT, DTYPE, PAD, EXPERIMENTAL, OVERWRITE)
def export(run: Session, given: dict[str, Any]) -> None:
    """Write a latent checkpoint as something that engines load as they are, and check there that it is the same model."""
    from kvlatent.workflows.export_checkpoint import export

    document = export(given.pop("model"), **given, progress=run.report)
    facts, check = document["export"], document["check"]
    for change in facts["changes"]:
        run.say(f"note: {change}")
    run.show(
        {**document, "out": str(given["out"])},
        list_pairs(
            {
                "read back by": facts["engine"],
                f"difference of {check['compared']}": f"{check['difference']:.1e}",
                "cache bytes per token": f"{facts['cache_bytes_per_token']:,} ({facts['cache_dtype']})",
            }
        ),
        *(command.replace("DIR", str(given["out"])) for command in facts["run_with"]),
        f"saved in {given['out']}",
    )
