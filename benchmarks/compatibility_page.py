"""What runs where, measured: docs/compatibility.md out of the records of the engine tests.

    python -m pytest tests/test_export_stock.py tests/test_export_gguf.py tests/test_openvino.py tests/test_export.py \
        tests/test_vllm_plugin.py tests/test_self_check.py tests/test_engines.py tests/test_kv_dtypes.py tests/test_serve.py \
        --compatibility benchmarks/results/compatibility
    .venv-engines/bin/python -m pytest tests/engines --compatibility benchmarks/results/compatibility
    python benchmarks/compatibility_page.py [--check]

The first two run the tests and write a record a module (tests/compatibility.py); the third renders them. --check writes
nothing and fails where the page is another than the records give.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks/results/compatibility"
PAGE = ROOT / "docs/compatibility.md"
_HEAD = """# What runs where

Generated from tests that ran (`python benchmarks/compatibility_page.py`, which says how); not written by hand. The models are tiny,
random and of every family, which is harder on an engine than a trained model: no two frequencies, norms or biases are alike.
*Difference* is the largest over all compared positions and the whole vocabulary, of the engine from our class in float32.
*Cache* is bytes a token as the engine itself says (its log, its pages, or the tensors that it fills), in brackets by the
formula; of vLLM's plugin the formula pads to what its kernels take. Perplexities of a real model are in
`benchmarks/results/stacking.md`.
"""
_TRAINED = """## Trained models

In float32 with a cache in float32 (`python benchmarks/engine_agreement.py`): logits of one block, and greedy continuations. "stories" is the toy of the
[log](log.md), "smol" SmolLM2-135M-Instruct from 4-bit weights; one rotary table for the model. A difference is beside the
largest logit, since float32 rounds in proportion to it.
"""
_TYPES = """## GGUF files in coarser types

Trained models, cache in float32 (`python benchmarks/gguf_types.py`). *Latent* and *original* are root mean square differences of
llama.cpp's logits from those of our class in float32, over their standard deviation, in brackets the largest: of the latent
checkpoint, and of the original that it was made from, at full width in the same type, which is what a user has without us.
*Rounding* is the same of our class with matrices, and what is multiplied by them, rounded to the type; `kvlatent export` refuses
to keep a file whose logits differ by more than {allowed:g} times that. *Same token* is how often the likeliest one is the same.
"""
_COLUMNS = (
    "model",
    "d_qk/d_vo of width",
    "table per",
    "weights",
    "KV dtype",
    "difference",
    "cache",
    "command",
)


def _width(width: Any) -> str:
    return ", ".join(map(str, width)) if isinstance(width, list) else str(width)


def _row(row: dict[str, Any]) -> str:
    said, formula = (f"{row[name]:,.1f}".removesuffix(".0") for name in ("said_bytes", "formula_bytes"))
    of = {"logits": "", "log-probabilities": " (log-prob.)"}[row["compared"]]
    cells = [
        row["model"],
        f"{_width(row['d_qk'])} / {_width(row['d_vo'])} of {row['head_dim']}",
        row["table"],
        row["weights"],
        row["kv_dtype"],
        f"{row['difference']:.1e}{of}",
        f"{said} ({formula})",
        f"`{row['command']}`",
    ]
    return f"| {' | '.join(cells)} |"


def trained(folder: Path) -> str:
    """What `engine_agreement.py` measured."""
    lines = [
        "| model | d_qk/d_vo of width | engine | loads | difference | largest logit | greedy, equal | cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        of = {"logits": "", "log-probabilities": " (log-prob.)"}[one["compared"]]
        said, formula = (one[f"cache_bytes_{kind}"] for kind in ("per_token", "by_formula"))
        cells = [
            one["model"],
            f"{one['d_qk']} / {one['d_vo']} of {one['head_dim']}",
            one["engine"],
            one["loads"],
            f"{one['difference']:.1e}{of}",
            f"{one['largest_value']:.0f}",
            f"{one['greedy_equal']} of {one['prompts']} x {one['new_tokens']}",
            f"{said:,.0f} ({formula:,.0f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_TRAINED, *lines, ""])


def coarser(folder: Path) -> str:
    """What `gguf_types.py` measured."""
    lines = [
        "| model | d_qk/d_vo of width | weights | latent | original | rounding, latent | rounding, original | same token, latent | original |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    allowed = set()
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        allowed.add(one["allowed"])
        for row in one["rows"]:
            both = [row[role] for role in ("latent", "original")]
            cells = [one["model"], f"{one['d_qk']} / {one['d_vo']} of {one['head_dim']}", row["dtype"]]
            cells += [f"{of['relative']:.1e} ({of['difference']:.2g})" for of in both]
            cells += [f"{of['rounding']:.1e}" for of in both] + [f"{of['same_argmax']:.1%}" for of in both]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_TYPES.format(allowed=max(allowed)), *lines, ""]) if allowed else ""


def _machine(record: dict[str, Any]) -> str:
    versions = record["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name))
    return f"Python {record['python']}, {named}; {record['machine']['processor']}"


def render(folder: Path) -> str:
    """The page for the records of a folder."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    parts, refused = [_HEAD], defaultdict(dict)
    by_engine = defaultdict(list)
    for file in files:
        for row in file["rows"]:
            by_engine[row["engine"].partition(", class ")[0], file["module"], _machine(file["record"])].append(row)  # fmt: skip
        for one in file["refused"]:
            refused[one["engine"]][one["sentence"]] = file["module"]
    for (engine, module, machine), rows in sorted(by_engine.items()):
        parts.append(f"## {engine}\n\n`{module}`, {len(rows)} rows; {machine}.\n")
        table = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|", *map(_row, rows)]
        parts.append("\n".join(table) + "\n")
    parts.append(trained(folder.parent / "engine_agreement"))
    parts.append(coarser(folder.parent / "gguf_types"))
    parts.append("## What is refused\n\nIn the words that users see, from the tests of refusals.\n")
    for engine, sentences in sorted(refused.items()):
        modules = ", ".join(f"`{module}`" for module in sorted(set(sentences.values())))
        parts.append(f"**{engine}** ({modules})\n")
        parts.append("\n".join(f"- {sentence}" for sentence in sentences) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not any(args.records.glob("*.json")):
        sys.exit(f"error: {args.records} holds no records; run the tests with --compatibility {args.records} first")  # fmt: skip
    page = render(args.records)
    if not args.check:
        args.out.write_text(page, encoding="utf-8")
    elif page != args.out.read_text(encoding="utf-8"):
        sys.exit(f"error: {args.out} is not what {args.records} gives; run benchmarks/compatibility_page.py and commit the page")  # fmt: skip


if __name__ == "__main__":
    main()
