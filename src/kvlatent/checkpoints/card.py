"""The model card written beside the weights: what the checkpoint is, what it costs, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from kvlatent.checkpoints.remote_code import NEEDS
from kvlatent.jobs.record import with_error

__all__ = ["RECALLED", "model_card", "recall_cell"]

_STEPS = {
    "original": "original",
    "converted": "converted, not trained",
    "stage1": "after stage I",
    "latent": "**this checkpoint**",
}
RECALLED = "recall (kept)"
_TEMPLATE = """---
{metadata}
---
# Latent-attention checkpoint

Keys are cached at width {d_qk} and values at {d_vo} a head, where the original has {head_dim} for both: {share:.1%} of
its cache. Made by kvlatent with preset `{preset}`; stages trained: {stages}.{conversion}

{measured}

It needs {needs}.

```python
import kvlatent  # or, without it, for the model: from_pretrained(..., trust_remote_code=True)
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory", trust_remote_code=False)  # no code of its own
```

How it was made: `recipe.yaml` (every setting), `run.json` (command, versions, machine, hashes of model and text),
and after training `metrics.jsonl` (the losses), all beside the weights.

```
{command}
```
"""
_MEASURED = """{listing}

Perplexity on {tokens:,} tokens {text}, with standard errors (of the ratio: from paired blocks).
Bytes are those of one token of one sequence in the live cache, in {cache_dtype}."""
_RECALL = """
Recall is the share of the tokens of random strings that a model repeats, {distances} tokens back in
that text, and in brackets the share that this is of the original's."""


def model_card(record: Mapping[str, Any]) -> str:
    """The card of a run, from the record written as run.json (Markdown)."""
    plan, figures = record["plan"], record["figures"]
    measured = "Its quality has not been measured; `kvlatent eval DIR --against ORIGINAL` does that."
    if figures:
        measured = _MEASURED.format(
            listing=figures_listing(figures), text=scored_text(record), **figures["latent"]
        )
        if recall := figures["latent"].get("recall"):
            measured += _RECALL.format(distances=", ".join(map(str, recall["distances"])))
        measured += "".join(f"\n\n**Warning:** {warning}." for warning in record.get("warnings", ()))
    about = ModelCardData(
        **record.get("source", {}),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "kvlatent",
            "kv-cache",
            "custom_code",
        ],  # the last as transformers tags what carries a modelling file
    )
    return _TEMPLATE.format(
        metadata=about.to_yaml(),
        **{name: plan[name] for name in ("d_qk", "d_vo", "head_dim", "share", "preset")},
        stages=", ".join("I" * int(stage[-1]) for stage in plan["tokens"]) or "none",
        conversion=_describe_conversion(record),
        measured=measured,
        command=record["command"],
        needs=NEEDS,
    )


def _describe_conversion(record: Mapping[str, Any]) -> str:
    """Sentences on what the weights were, what the conversion looked at, and what it warned of."""
    notes = [f"The original's weights were {record['weights']}."] if record.get("weights") else []
    notes += [f"{note[0].upper()}{note[1:]}." for note in record["plan"].get("notes", ())]
    calibration = record.get("calibration")
    if calibration:
        align = record["plan"]["choices"]["align"]
        aligned = f", then {align} steps of attention alignment a layer" if align else ""
        notes.append(f"Calibrated on {calibration['tokens']:,} tokens of text{aligned}.")
        if seen := calibration.get("seen_share"):
            notes.append(f"Of the text it was measured on, the calibration has looked at {seen:.1%}.")
    return "".join(f"\n{note}" for note in notes)


def scored_text(record: Mapping[str, Any]) -> str:
    """Which text the figures are of: a separate one, or the part of the data that nothing was fitted to, or all of it."""
    other = record["sha256"].get("eval_data")
    if other is None:
        fitted = "training" in record or record.get("calibration")
        return "from the held-out part of the data" if fitted else "of the given text"
    return f"from a separate text ({other if other.startswith('hub:') else f'sha256 {other}'})"


def figures_listing(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Perplexities, ratios, recall and cache bytes of the steps of a run, in Markdown."""
    recalls = any(row.get("recall") for row in figures.values())
    names = ["perplexity", "over the original's", *([RECALLED] if recalls else []), "cache bytes per token"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, label in _STEPS.items():
        if name in figures:
            row = figures[name]
            ratio = with_error(row["ratio"], row["ratio_standard_error"]) if "ratio" in row else "1"
            value = with_error(row["perplexity"], row["standard_error"])
            recall = [recall_cell(row)] if recalls else []
            cells = (label, value, ratio, *recall, f"{row['cache_bytes_per_token']:,.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recall_cell(row: Mapping[str, Any]) -> str:
    """Recall of one step of a run, and how much of the original's that is; "" where it was not measured."""
    recall = row.get("recall")
    if not recall:
        return ""
    kept = recall.get("kept")
    share = "" if kept is None else f" ({with_error(kept, recall['kept_standard_error'])})"
    return f"{recall['copied']:.3f}{share}"
