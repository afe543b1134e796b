"""Tokens per second and memory of stage II, beside a plain `transformers.Trainer` loop with the same loss.

    python benchmarks/training_speed.py --model DIR --data FILE [--dtype bfloat16] [--out FILE]
    python benchmarks/training_speed.py --vocabulary 2048 [--objective next_token] [--out FILE]   a random Llama

The plain loop is what a user would write: both models give all logits, the divergence is torch's. Model, trained tensors,
blocks, arguments of the Trainer and precision are the same. Each round runs both, each in a process of its own, in turn, so
that a slower minute hits both and each has its own peak of memory. The first step is warm-up. One JSON document goes to
stdout, and to --out under the dtype's name, beside what is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from costs import resident_bytes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.jobs.devices import choose_device, working_dtype
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment
from kvlatent.selection.choices import PAPER
from kvlatent.text.standard_library import model_path
from kvlatent.training.loop import collate, training_arguments
from kvlatent.training.placement import place_teacher
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training
from kvlatent_cli.named_models import model_argument

KINDS = ("stage II", "plain Trainer")


class PlainTrainer(Trainer):
    """The divergence of dense logits, or without a teacher their cross-entropy."""

    teacher: Any

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
        """Mean over the labelled tokens."""
        counted = inputs.pop("labels") != -100
        labels = inputs["input_ids"].roll(-1, 1)[counted]
        logits = model(**inputs, use_cache=False).logits[counted].float()
        if self.teacher is None:
            return F.cross_entropy(logits, labels)
        predicted = logits.log_softmax(-1)
        with torch.no_grad(), self.accelerator.autocast():
            expected = self.teacher(**inputs, use_cache=False).logits[counted].float().log_softmax(-1)
        return F.kl_div(predicted, expected, reduction="batchmean", log_target=True)


class Clock(TrainerCallback):
    """Seconds, and seconds of the processor, at the end of every step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def tick(self, *told: Any) -> None:
        """Take the time once the device has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.tick()

    def seconds(self) -> list[list[float]]:
        """Of every step after the first: on the wall, of the processor."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [[round(after - before, 4) for before, after in zip(*pair, strict=True)] for pair in pairs]


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """Train one of the two; seconds a step, the largest resident size, and the losses."""
    device, recipe = args.device, read_recipe(args)
    teacher = load_teacher(args)
    width = max(2, teacher.model.layers[0].self_attn.head_dim // 2)
    student = convert(teacher, d_qk=width, d_vo=width, choices=PAPER)
    prepare_for_training(student, recipe)
    clock, rows = Clock(), read_rows(args, teacher)
    with tempfile.TemporaryDirectory() as folder:
        if args.only == KINDS[0]:
            summary = train_stage(
                student, teacher, 2, rows, recipe, folder, device=device, progress=clock.tick
            )
            losses = [summary["first_loss"], summary["last_loss"]]
        else:
            losses = train_plainly(student, teacher, rows, recipe, Path(folder), device, clock)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
    return {"seconds": clock.seconds(), "peak_bytes": peak, "first_and_last_loss": losses}


def load_teacher(args: argparse.Namespace) -> Any:
    """The original: read, or a random Llama with --vocabulary."""
    if args.vocabulary is None:
        dtype = working_dtype(args.dtype, args.device, load_config(args.model).dtype)
        return load_model(args.model, dtype=dtype, device=args.device)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=args.block_size, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(args.device).eval()


def train_plainly(
    student: Any, teacher: Any, rows: Any, recipe: Recipe, folder: Path, device: str, clock: Clock
) -> list[float]:
    """The plain loop; first and last loss."""
    arguments = training_arguments(recipe.stage2, recipe, 2, len(rows[0]["input_ids"]), folder, device)
    trainer = PlainTrainer(student, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    compares = recipe.stage2.objective == "kl"
    trainer.teacher = place_teacher(student, teacher, recipe.dtype, arguments.device) if compares else None
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [losses[0], losses[-1]]


def read_recipe(args: argparse.Namespace) -> Recipe:
    """Steps of --batch-size blocks, without a checkpoint in between."""
    tokens = args.batch_size * args.block_size * (args.steps + 1)
    stage = {
        "tokens": tokens,
        "batch_size": args.batch_size,
        "save_steps": args.steps + 2,
        "objective": args.objective,
    }
    changes = [f"stage2.{name}={value}" for name, value in stage.items()]
    return Recipe.load(None, [f"seed={args.seed}", f"dtype={args.dtype}", *changes])


def read_rows(args: argparse.Namespace, model: Any) -> Any:
    """As many blocks of the text as the steps take."""
    number = args.batch_size * (args.steps + 1)
    if args.vocabulary is not None:
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(0, args.vocabulary, (number, args.block_size), generator=generator)
        labels = torch.cat([ids[:, 1:], torch.full((number, 1), -100)], dim=1)
        positions = torch.arange(args.block_size)
        return [
            {"input_ids": row, "position_ids": positions, "labels": label}
            for row, label in zip(ids, labels, strict=True)
        ]
    with tempfile.TemporaryDirectory() as folder:
        text = ScoredText(args.data, "<|endoftext|>", "text", Path(folder))
        tokenizer = load_tokenizer(args.model, model.config)
        picked = text.blocks(tokenizer, model.config.vocab_size, args.block_size, number)
        return [picked[index] for index in range(min(number, len(picked)))]


def measure_both(args: argparse.Namespace) -> dict[str, Any]:
    """Run both in turn; medians, the ratio of the medians, and the largest memory."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[kind].append(json.loads(done.stdout))
    tokens = args.batch_size * args.block_size
    figures = {}
    for kind, runs in found.items():
        wall, processor = zip(*(step for one in runs for step in one["seconds"]), strict=True)
        figures[kind] = {
            "tokens_per_second": round(tokens / statistics.median(wall), 2),
            "tokens_per_processor_second": round(tokens / statistics.median(processor), 2),
            "seconds": [[step[0] for step in one["seconds"]] for one in runs],
            "peak_bytes": max(one["peak_bytes"] for one in runs),
            "first_and_last_loss": runs[0]["first_and_last_loss"],
        }
    ours, plain = figures.values()
    spared = 4 * tokens * (args.vocabulary or 0)
    return {
        "tokens_a_step": tokens,
        **(
            {"logits_bytes": spared, "spared_bytes": plain["peak_bytes"] - ours["peak_bytes"]}
            if spared
            else {}
        ),
        "ratio": round(ours["tokens_per_second"] / plain["tokens_per_second"], 3),
        "processor_ratio": round(
            ours["tokens_per_processor_second"] / plain["tokens_per_processor_second"], 3
        ),
        "limits": {"ratio": 0.95, "peak_bytes": 8_000_000_000},
        **figures,
    }


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=model_argument, default=str(model_path()), help="or smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="of each run, after one for warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--vocabulary", type=int, help="of a random Llama of width 256, in the place of --model"
    )
    parser.add_argument("--objective", choices=("kl", "next_token"), default="kl")
    parser.add_argument("--only", choices=KINDS, help="run one of them once, in this process")
    parser.add_argument("--out", type=Path, help="JSON file to add the document to")
    args = parser.parse_args()
    args.device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    if args.only is not None:
        json.dump(run_one(args), sys.stdout)
        return
    document = {"benchmark": "training_speed", "dtype": args.dtype, "seed": args.seed, **measure_both(args)}
    if args.vocabulary is None:
        document["sha256"] = {"model": identity(args.model), "data": args.data and identity(args.data)}
    else:
        document |= {"vocabulary": args.vocabulary, "objective": args.objective}
    document |= environment(args.device)
    json.dump(document, sys.stdout, indent=1)
    print()
    if args.out is not None:
        random = f"random {args.vocabulary} {args.objective}"
        name = args.dtype if args.vocabulary is None else random
        kept = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
        args.out.write_text(json.dumps({**kept, name: document}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
