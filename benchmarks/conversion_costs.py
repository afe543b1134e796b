"""Seconds and memory of calibrating and converting, as cells of `benchmarks/conversion.py`.

Memory is the largest resident size over that after the imports, each in a process of its own: a plain forward of one
block, then calibration and conversion on the text and on four times the text. A small model disappears behind the
libraries' own buffers, so a random Llama of 0.4 GB is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvlatent.checkpoints.load import load_model
from kvlatent.conversion.convert_model import convert
from kvlatent.selection.calibrate import calibrate

COSTS = ("cost-seconds", "cost-memory")
MODES = ("forward", "statistics", "aligned")
RANDOM_BLOCK, RANDOM_BLOCKS, RANDOM_ALIGN = 128, 8, 2
LONG = 2048


def measure_cost(setting: Any, name: str) -> dict[str, Any]:
    """The figures of one cell of `COSTS`."""
    return seconds(setting) if name == "cost-seconds" else memory(setting)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, round(time.perf_counter() - start, 2)


@torch.no_grad()
def forward(model: Any, blocks: dict[str, torch.Tensor]) -> None:
    """The decoder over all blocks, one at a time, as calibration runs it."""
    for ids, positions in zip(blocks["input_ids"], blocks["position_ids"], strict=True):
        model.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)


def columns(blocks: Any) -> dict[str, torch.Tensor]:
    picked = blocks[:]
    return {name: torch.as_tensor(picked[name]) for name in ("input_ids", "position_ids")}


def seconds(setting: Any) -> dict[str, Any]:
    """Of calibration, of conversion to half the cache, and of a plain forward over the same text."""
    model, half = setting.model, max(2, setting.head_dim // 2)
    blocks = columns(setting.calibration_blocks("data", 1.0, 0))
    forward(model, {name: column[:1] for name, column in blocks.items()})
    _, plain = timed(lambda: forward(model, blocks))
    statistics, calibration = timed(lambda: calibrate(model, blocks))
    short = {"d_qk": half, "d_vo": half, "statistics": statistics}
    _, closed = timed(lambda: convert(model, align=0, **short))
    _, aligned = timed(lambda: convert(model, align=setting.args.align, **short))
    whole = blocks["input_ids"].numel() // LONG
    found = {
        "tokens": statistics.tokens,
        "forward_seconds": plain,
        "calibration_seconds": calibration,
        "conversion_seconds": closed,
        "aligned_conversion_seconds": aligned,
        "total_seconds": round(calibration + closed, 2),
        "total_aligned_seconds": round(calibration + aligned, 2),
        "limits_seconds": [60, 240],
    }
    if whole:
        ids = blocks["input_ids"].flatten()[: whole * LONG].view(whole, LONG)
        long = {"input_ids": ids, "position_ids": torch.arange(LONG).expand_as(ids)}
        _, plain = timed(lambda: forward(model, long))
        _, calibration = timed(lambda: calibrate(model, long))
        found["calibration_over_forward_at_2048"] = round(calibration / plain, 3)
    return found


def memory(setting: Any) -> dict[str, Any]:
    """Peak bytes of every mode, of this model and of a random one, at one and at four times the text."""
    args, found = setting.args, {}
    largest = setting.calibration_blocks("data", 1.0, 0, 4 * args.blocks)
    path = setting.work / "memory.safetensors"
    save_file(columns(largest), path)
    for label, model, text, blocks, align in (
        ("model", str(setting.path), str(path), args.blocks, args.align),
        ("random", "random", "random", RANDOM_BLOCKS, RANDOM_ALIGN),
    ):
        runs = [("forward", 1)] + [(mode, times * blocks) for mode in MODES[1:] for times in (1, 4)]
        rows = [
            {"mode": mode, "blocks": number, **_fresh(model, text, number, mode, align, args.threads)}
            for mode, number in runs
        ]
        size = rows[0]["model_bytes"]
        activations = max(0, rows[0]["peak_bytes"] - size)
        found[label] = {
            "model_bytes": size,
            "limit_bytes": 3 * size + activations,
            "rows": [
                {**row, "ratio": round(row["peak_bytes"] / size, 3), "above_forward_bytes": row["peak_bytes"]
                 - rows[0]["peak_bytes"]}
                for row in rows
            ],
        }  # fmt: skip
    return found


def _fresh(model: str, text: str, blocks: int, mode: str, align: int, threads: int) -> dict[str, Any]:
    """`_peak` in a new process."""
    words = [sys.executable, __file__, model, text, str(blocks), mode, str(align), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process; unlike ru_maxrss it does not start at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{field} is not in /proc/self/status: memory is measured on Linux only")


def random_model() -> LlamaForCausalLM:
    """104 M random parameters, grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def _peak(model: str, text: str, blocks: int, mode: str, align: int) -> dict[str, Any]:
    """What loading a model and one mode of work add to the largest resident size."""
    baseline = resident_bytes("VmRSS")
    original = (
        random_model() if model == "random" else load_model(model, dtype="float32").requires_grad_(False)
    )
    if text == "random":
        ids = torch.randint(2000, (blocks, RANDOM_BLOCK), generator=torch.Generator().manual_seed(0))
        data = {"input_ids": ids, "position_ids": torch.arange(RANDOM_BLOCK).expand_as(ids)}
    else:
        data = {name: column[:blocks] for name, column in load_file(text).items()}
    if mode == "forward":
        forward(original, data)
    else:
        half = original.model.layers[0].self_attn.head_dim // 2
        steps = align if mode == "aligned" else 0
        convert(original, d_qk=half, d_vo=half, align=steps, statistics=calibrate(original, data))
    size = sum(p.numel() * p.element_size() for p in original.parameters())
    return {"model_bytes": size, "peak_bytes": resident_bytes("VmHWM") - baseline}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text"):
        parser.add_argument(name)
    parser.add_argument("blocks", type=int)
    parser.add_argument("mode", choices=MODES)
    for name in ("align", "threads"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(_peak(given.model, given.text, given.blocks, given.mode, given.align)))
