"""The model card of an export: what it is, what read it back with which version, what it costs, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from kvlatent.checkpoints.card import figures_listing

__all__ = ["export_card"]

_LIBRARIES = {"stock": "transformers", "gguf": "gguf", "openvino": "openvino"}
_TEMPLATE = """---
{metadata}
---
# {title}

Exported by kvlatent from a latent checkpoint with keys of width {d_qk} and values of width {d_vo} a head.
Its cache takes {bytes:,} bytes per token in {cache_dtype}.
{changes}
Read back by {engine}, in a process of its own, before it was kept: {compared} of the last {positions} of a row of random
tokens differ from the latent checkpoint's own by {difference:.1e} at most, of a standard deviation of {spread:.2f}.
{run_with}{figures}
How it was made: `export.json` (command, versions, machine, hash of the latent checkpoint).

```
{command}
```
"""
_TITLES = {
    "stock": "Plain checkpoint with a smaller KV cache",
    "gguf": "GGUF file with a smaller KV cache",
    "openvino": "OpenVINO model with a smaller KV cache",
}


def export_card(record: Mapping[str, Any], made: Mapping[str, Any] | None) -> str:
    """The card (Markdown).

    Args:
        record: of the export, see `ExportRecord`.
        made: run.json of the latent checkpoint, whose figures are carried over.
    """
    facts, check = record["export"], record["check"]
    about = ModelCardData(
        **(record["source"] or {}),
        library_name=_LIBRARIES[record["to"]],
        pipeline_tag="text-generation",
        tags=["kvlatent", "kv-cache"],
    )
    changes = "".join(f"{change[0].upper()}{change[1:]}.\n" for change in facts.get("changes", ()))
    run_with = "".join(f"\n```\n{command}\n```\n" for command in facts.get("run_with", ()))
    listing = figures_listing(made["figures"]) if made and made.get("figures") else ""
    return _TEMPLATE.format(
        metadata=about.to_yaml(),
        title=_TITLES[record["to"]],
        d_qk=_width(record["d_qk"]),
        d_vo=_width(record["d_vo"]),
        bytes=facts["cache_bytes_per_token"],
        cache_dtype=facts["cache_dtype"],
        changes=changes,
        engine=facts["engine"],
        run_with=run_with,
        figures=f"\nThe latent checkpoint was measured when it was made:\n\n{listing}\n" if listing else "",
        command=record["command"],
        spread=check["standard_deviation"],
        **{name: check[name] for name in ("compared", "positions", "difference")},
    )


def _width(width: int | list[int]) -> str:
    return str(width) if isinstance(width, int) else f"{min(width)} to {max(width)}"
