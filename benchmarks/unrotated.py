"""Unrotated key channels selected against factored, in closed form and aligned: perplexity and copying of one model.

    python benchmarks/unrotated.py --model build/hybrid/model --shares 0.5 0.25

The model reads code (`pretrain_hybrid.py` makes one): calibrated on blocks of the standard library's training modules, a
quarter of them recall, measured on its held-out ones. At a share, keys and values have that share of the head each. One
JSON document goes to stdout, and a row to stderr as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.checks.text_perplexity import measure_documents
from kvlatent.evaluation.copying import copy_accuracy
from kvlatent.jobs.record import environment
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import PRESETS
from kvlatent.text.recall_blocks import replace_by_recall
from kvlatent.text.standard_library import stdlib_documents

SEED = 1


def calibration_blocks(tokenizer: Any, count: int, size: int) -> Dataset:
    """Windows of the training modules, at random places."""
    documents = list(stdlib_documents("train"))
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(documents))[: 4 * count]
    ids = [
        i
        for at in order
        for i in [tokenizer.eos_token_id, *tokenizer(documents[at], verbose=False)["input_ids"]]
    ]
    starts = rng.integers(0, len(ids) - size, count)
    rows = [ids[start : start + size] for start in starts]
    positions = [list(range(size))] * count
    return Dataset.from_dict({"input_ids": rows, "position_ids": positions, "labels": rows}).with_format(
        "torch"
    )


def measure(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out perplexity and the share of random strings repeated, by distance."""
    documents = stdlib_documents("held_out")
    figures, _ = measure_documents(model, tokenizer, documents, window=args.size, max_tokens=args.tokens)
    copied = copy_accuracy(model, tokenizer, distances=args.distances, trials=args.trials)
    return {"perplexity": figures["perplexity"], "copying": {str(d): round(v, 4) for d, v in copied.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--tables", nargs="+", default=["head"])
    parser.add_argument(
        "--align", type=int, nargs="+", default=[0, 200], help="0: closed form, nothing refitted"
    )
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_000, help="of held-out text")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--distances", type=int, nargs="+", default=[50, 200, 400])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    blocks = replace_by_recall(calibration_blocks(tokenizer, args.blocks, args.size), tokenizer)
    statistics = calibrate(model, blocks)
    original = measure(model, tokenizer, args)
    rows: list[dict[str, Any]] = []
    print(json.dumps({"original": original}), file=sys.stderr, flush=True)
    head_dim = model.config.head_dim
    for share, table, align in ((s, t, a) for s in args.shares for t in args.tables for a in args.align):
        for unrotated in ("selected", "factored"):
            choices = replace(PRESETS["calibrated"], unrotated=unrotated, table=table, align=align)
            if not align:
                choices = replace(choices, refit=False, global_steps=0)
            started, width = time.monotonic(), int(head_dim * share)
            latent = convert(model, d_qk=width, d_vo=width, choices=choices, statistics=statistics)
            seconds = round(time.monotonic() - started, 1)
            figures = measure(latent, tokenizer, args)
            row = {"share": share, "table": table, "align": align, "unrotated": unrotated, "seconds": seconds}
            row |= {"ratio": round(figures["perplexity"] / original["perplexity"], 4), **figures}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps({"original": original, "rows": rows, **environment("cpu")}, indent=2))


if __name__ == "__main__":
    main()
