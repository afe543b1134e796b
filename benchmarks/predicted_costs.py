"""The cost model of training against measured runs, and its table for the recipes of well-known models.

    python benchmarks/predicted_costs.py measure [--out FILE]   bytes and seconds of small models on this processor
    python benchmarks/predicted_costs.py table                  memory, hours and tokens on 8 cards of 80 GB, in Markdown

A measured run is one stage of a random Llama in a process of its own. Its bytes are the largest resident size over that before
the model; the prediction's are those of one card without a driver. Its seconds are the processor's, the median of the steps behind the first;
the prediction takes the speed of one matrix product on this machine, so what is left is the share of it that training reaches,
and that should be about the same for all sizes and both stages if operations are counted rightly.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from costs import resident_bytes
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment
from kvlatent.model.head import PROCESSOR_LOGITS_BYTES
from kvlatent.selection.choices import PAPER
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training
from kvlatent.training.training_costs import Card, StageCost, predict_stage

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text", "vocab_size": 248_320, "hidden_size": 4096, "intermediate_size": 12_288,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
    },
    "phi-4-mini": {
        "model_type": "phi3", "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
        "pad_token_id": 199_999,
    },
}  # fmt: skip
SHARES = {"half": 0.5, "quarter": 0.25}
CARDS = 8
SMALL = {"256 x 4": (256, 4), "384 x 6": (384, 6), "512 x 8": (512, 8)}
BATCH, LENGTH, STEPS, VOCABULARY = 4, 256, 3, 4096


def config_of(name: str) -> PretrainedConfig:
    """The config of a well-known model, as far as its costs go."""
    shape = dict(SHAPES[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def recipe_costs(name: str, share: str) -> list[StageCost]:
    """Both stages of a recipe on 8 cards of 80 GB."""
    recipe = Recipe.load(RECIPES / f"{name}-{share}.yaml")
    return [predict_stage(config_of(name), recipe, stage, kv=SHARES[share], cards=CARDS) for stage in (1, 2)]


def header(first: StageCost, second: StageCost) -> str:
    """What a recipe's second line says."""
    stages = (
        f"stage {'I' * cost.stage} takes {cost.total_bytes / 1e9:.0f} GB a card and {cost.hours:.1f} hours"
        for cost in (first, second)
    )
    return f"Predicted: {' and '.join(stages)} (benchmarks/predicted_costs.py)."


def rows() -> list[str]:
    """The table's lines."""
    found = ["| model | cache | stage | tokens | GB a card | hours on 8 |", "|---|---|---|---|---|---|"]
    for name in SHAPES:
        for share in SHARES:
            for cost in recipe_costs(name, share):
                found.append(
                    f"| {name} | {share} | {'I' * cost.stage} | {cost.tokens / 1e6:,.0f} M | {cost.total_bytes / 1e9:.0f} | "
                    f"{cost.hours:.1f} |"
                )
    return found


def small_config(name: str) -> LlamaConfig:
    """A Llama that trains in seconds."""
    width, layers = SMALL[name]
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
        max_position_embeddings=LENGTH,
    )  # fmt: skip


def small_recipe(checkpointing: bool) -> Recipe:
    """Few steps in float32, without a checkpoint."""
    tokens = BATCH * LENGTH * (STEPS + 1)
    items = [
        f"tokens={tokens}",
        f"batch_size={BATCH}",
        "save_steps=99",
        f"activation_checkpointing={checkpointing}",
    ]
    stages = [f"stage{stage}.{item}" for stage in (1, 2) for item in items]
    return Recipe.load(None, ["dtype=float32", f"data.block_size={LENGTH}", *stages])


def run_small(name: str, stage: int, checkpointing: bool) -> dict[str, Any]:
    """Bytes above those before the model, and seconds of each step but the first."""
    recipe = small_recipe(checkpointing)
    block = {"input_ids": torch.arange(LENGTH) % VOCABULARY, "position_ids": torch.arange(LENGTH)}
    blocks = [{**block, "labels": (block["input_ids"] + 1) % VOCABULARY}] * (BATCH * (STEPS + 1))
    run_tiny_stage(recipe, stage)
    before, times = resident_bytes("VmRSS"), []
    original = AutoModelForCausalLM.from_config(small_config(name)).requires_grad_(False).eval()
    student = convert(original, d_qk=32, d_vo=32, choices=PAPER)
    prepare_for_training(student, recipe)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the largest size so far is forgotten: the conversion's is none of training's
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            student,
            original,
            stage,
            blocks,
            recipe,
            folder,
            progress=lambda *told: times.append(time.process_time()),
        )
    seconds = [after - one for one, after in pairwise(times)]
    return {"bytes": resident_bytes("VmHWM") - before, "seconds": seconds}


def run_tiny_stage(recipe: Recipe, stage: int) -> None:
    """What the libraries take at their first step is none of the model's."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
    )
    original = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    student = convert(original, d_qk=8, d_vo=8, choices=PAPER)
    prepare_for_training(student, recipe)
    block = {"input_ids": torch.arange(32), "position_ids": torch.arange(32), "labels": torch.arange(32)}
    small = Recipe.load(recipe, [f"stage{stage}.tokens=128"])
    with tempfile.TemporaryDirectory() as folder:
        train_stage(student, original, stage, [block] * 4, small, folder)


def product_speed() -> float:
    """Operations a second of one matrix product in float32, the best of ten."""
    left, right, best = torch.ones(1024, 1024), torch.ones(1024, 1024), float("inf")
    for _ in range(10):
        start = time.process_time()
        (left @ right).sum().item()
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def measure() -> dict[str, Any]:
    """Every small model, both stages, and one with activation checkpointing."""
    found = []
    cells = [(name, stage, False) for name in SMALL for stage in (1, 2)] + [
        ("512 x 8", stage, True) for stage in (1, 2)
    ]
    for name, stage, checkpointing in cells:
        command = [sys.executable, __file__, "one", name, str(stage), str(int(checkpointing))]
        done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        speed = product_speed()
        card = Card(memory_bytes=64 * PROCESSOR_LOGITS_BYTES, flops=speed, reached=1.0, context_bytes=0.0)
        cost = predict_stage(small_config(name), small_recipe(checkpointing), stage, kv=0.5, card=card)
        measured_speed = BATCH * LENGTH / statistics.median(done["seconds"])
        found.append({
            "model": name, "stage": stage, "activation_checkpointing": checkpointing,
            "measured_bytes": done["bytes"], "predicted_bytes": round(cost.total_bytes),
            "bytes_ratio": round(done["bytes"] / cost.total_bytes, 3),
            "tokens_per_second": round(measured_speed, 1),
            "reached": round(measured_speed * cost.flops_per_token / speed, 3),
        })  # fmt: skip
    return {
        "benchmark": "predicted_costs",
        "batch": BATCH,
        "length": LENGTH,
        "rows": found,
        **environment("cpu"),
    }


def main() -> None:
    """Measure or print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    measured = commands.add_parser("measure")
    measured.add_argument("--out", type=Path)
    one = commands.add_parser("one", help="a single run, for `measure`")
    for name, kind in (("name", str), ("stage", int), ("checkpointing", int)):
        one.add_argument(name, type=kind)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "table":
        print("\n".join(rows()))
    elif args.command == "one":
        json.dump(run_small(args.name, args.stage, bool(args.checkpointing)), sys.stdout)
    else:
        text = json.dumps(measure(), indent=1) + "\n"
        print(text, end="")
        if args.out is not None:
            args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
