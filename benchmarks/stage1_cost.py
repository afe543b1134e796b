"""What a stage I step costs, against what it cannot do without.

Reference: one forward of the original's layers plus one forward and backward of the latent layers, with the
same trained tensors. A stage I step adds the hooks and one squared error per layer; it must stay below 1.6
times that. Both are timed in turn in one process on one thread; medians and quartiles go to stdout as one
JSON document.

    python benchmarks/stage1_cost.py [--model DIR] [--data FILE] > benchmarks/results/stage1_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment
from kvlatent.text.corpus import evaluation_blocks
from kvlatent.text.standard_library import model_path
from kvlatent.training.layer_loss import capture, layer_losses
from kvlatent.training.loop import collate
from kvlatent.training.trainable import prepare_for_training


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    teacher = load_model(options.model, dtype="float32")
    width = options.width or teacher.get_decoder().layers[0].self_attn.head_dim // 2
    student = convert(teacher, d_qk=width, d_vo=width, preset="paper")
    prepare_for_training(student, Recipe.load(None, [f"lora.rank={options.rank}"]))
    batch = tokens(options, teacher.config)
    steps = steps_of(teacher.get_decoder(), student.get_decoder(), batch)
    times = interleaved(steps, options.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "benchmark": "stage1_cost",
        "ratio": round(medians["stage I step"] / medians["reference"], 4),
        "limit": 1.6,
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "shape": {"batch": options.batch, "block_size": options.block_size, "d_qk": width, "d_vo": width},
        "rank": options.rank,
        "rounds": options.rounds,
        "sha256": {"model": identity(options.model), "data": options.data and identity(options.data)},
        **environment("cpu"),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory or hub id (default: the embedded model)")
    parser.add_argument("--data", help="text file (default: random tokens)")
    parser.add_argument("--width", type=int, help="d_qk and d_vo (default: half of head_dim)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank on the FFN")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds after two for warm-up")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.model = options.model or str(model_path())
    return options


def tokens(options: argparse.Namespace, config: object) -> dict[str, torch.Tensor]:
    """One batch: the first blocks of the text, or random tokens."""
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch, options.block_size)
        return {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}
    tokenizer = load_tokenizer(options.model, config)
    with tempfile.TemporaryDirectory() as cache:
        rows = evaluation_blocks(
            Path(options.data), tokenizer, options.block_size, cache_dir=cache, vocab_size=config.vocab_size
        )
        return collate([rows[index] for index in range(options.batch)])


def steps_of(teacher, student, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], None]]:
    """The two things that are timed; each ends with gradients in place and clears them."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
    student.train()

    def reference() -> None:
        with torch.no_grad():
            teacher(**inputs, use_cache=False)
        student(**inputs, use_cache=False).last_hidden_state.float().square().mean().backward()
        student.zero_grad()

    def stage_one() -> None:
        layer_losses(student, capture(teacher, inputs), inputs).mean().backward()
        student.zero_grad()

    return {"reference": reference, "stage I step": stage_one}


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, round by round in turn, so that a slower minute hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 5), "first_quartile": round(low, 5), "third_quartile": round(high, 5)}


if __name__ == "__main__":
    main()
