"""Original against latent model after the same fine-tuning: SFT, and DPO on top of it, measured by answers that are right.

    python benchmarks/after_recovery.py run --latent DIR [--original smollm2] [--seeds 0,1,2] [--out DIR] [--work DIR]
    python benchmarks/after_recovery.py table [--out DIR]

The task is that of `instruction_task.py`. A cell is one model, one method and one seed; each is a file in --out, and a
cell whose file is there is not run again. The seed makes the questions that are learnt from, their order, and those that are
measured, so that both models of a seed see and answer the same. "none" is the model as it came; "dpo" begins where "sft"
of the same model and seed ended, which is kept in --work. Both use TRL's trainers with the same settings, all weights learn.
An answer is right if greedy decoding gives the word and ends there; since that is known from the likeliest token at
each place of the right answer, one forward pass a question measures it. `table` writes what was found beside the cells.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from instruction_task import Question, make_questions

import kvlatent
from kvlatent.checkpoints.load import load_model, load_tokenizer
from kvlatent.jobs.atomic import write_text
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import environment
from kvlatent_cli.named_models import model_argument

METHODS = ("none", "sft", "dpo")
MODELS = ("original", "latent")
RESULTS = Path(__file__).resolve().parent / "results" / "after_recovery"
_SETTINGS = ("sft_examples", "sft_rate", "dpo_pairs", "dpo_rate", "beta", "batch_size", "questions", "bf16")


def chats(questions: list[Question], *, pairs: bool) -> Dataset:
    """What TRL learns from: prompt and completion, or prompt, chosen and rejected."""
    rows = []
    for question in questions:
        said, wrong = ([{"role": "assistant", "content": word}] for word in (question.answer, question.wrong))
        answers = {"chosen": said, "rejected": wrong} if pairs else {"completion": said}
        rows.append({"prompt": question.prompt, **answers})
    return Dataset.from_list(rows)


def fine_tune(
    model: Any, tokenizer: Any, method: str, seed: int, args: argparse.Namespace, work: Path
) -> Any:
    """Train all weights of `model` in place for one pass; TRL's trainer, done."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    number = args.sft_examples if method == "sft" else args.dpo_pairs
    data = chats(learnt_from(seed, method, number), pairs=method == "dpo")
    common: dict[str, Any] = {
        "output_dir": str(work),
        # A pair is two sequences.
        "per_device_train_batch_size": args.batch_size if method == "sft" else max(1, args.batch_size // 2),
        "learning_rate": args.sft_rate if method == "sft" else args.dpo_rate,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "seed": seed,
        "bf16": args.bf16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    settings: Any
    if method == "sft":
        settings, kind = SFTConfig(**common), SFTTrainer
    else:
        settings, kind = DPOConfig(**common, beta=args.beta, precompute_ref_log_probs=True), DPOTrainer
    trainer = kind(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer


def learnt_from(seed: int, method: str, number: int) -> list[Question]:
    """The questions of a seed that a method learns from; DPO's are none of those of SFT."""
    return make_questions(1000 * seed + METHODS.index(method), number)


def held_out(seed: int, args: argparse.Namespace) -> list[Question]:
    """Those that are measured."""
    sizes = {"sft": args.sft_examples, "dpo": args.dpo_pairs}
    known = {one.text for method, number in sizes.items() for one in learnt_from(seed, method, number)}
    return make_questions(1000 * seed + 999, args.questions, frozenset(known))


@torch.no_grad()
def answers_right(
    model: Any, tokenizer: Any, questions: list[Question], *, bf16: bool, batch_size: int = 16
) -> list[bool]:
    """Of each question whether greedy decoding would give its answer and then end."""
    end = tokenizer.eos_token_id
    rows = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], end]
        rows.append((before, answer))
    right: dict[int, bool] = {}
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        longest = max(sum(map(len, rows[index])) for index in chosen)
        # On the right, where causal attention does not see it; no position moves.
        ids = [(rows[i][0] + rows[i][1] + [end] * longest)[:longest] for i in chosen]
        kept = max(longest - len(rows[index][0]) for index in chosen) + 1
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(torch.tensor(ids), use_cache=False, logits_to_keep=kept).logits
        likeliest = logits.argmax(-1).tolist()
        for row, index in zip(likeliest, chosen, strict=True):
            before, answer = rows[index]
            first = len(before) - 1 - (longest - kept)
            right[index] = row[first : first + len(answer)] == answer
    return [right[index] for index in range(len(rows))]


def run_cell(name: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune (unless the method is "none") and measure."""
    start = time.monotonic()
    source = str(getattr(args, name))
    ends = {each: args.work / f"{name}-{each}-{seed}" for each in METHODS}
    if method == "dpo" and not ends["sft"].is_dir():
        raise ValueError(
            f"dpo begins where sft ended: there is no {ends['sft']}; run --methods sft first, with this --work"
        )
    tokenizer = load_tokenizer(source, kvlatent.load_model(source).config)
    model = load_model(ends["sft"] if method == "dpo" else source, dtype="float32")
    losses: list[float] = []
    if method != "none":
        trainer = fine_tune(model, tokenizer, method, seed, args, args.work / f".{name}-{method}-{seed}")
        losses = [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row]
        shutil.rmtree(args.work / f".{name}-{method}-{seed}", ignore_errors=True)
    trained = time.monotonic() - start
    if method == "sft":
        kvlatent.save(model, ends["sft"], tokenizer=tokenizer, overwrite=True)
    questions = held_out(seed, args)
    right = answers_right(model, tokenizer, questions, bf16=args.bf16)
    return {
        "right": [int(one) for one in right],
        "kinds": [one.kind for one in questions],
        "accuracy": round(sum(right) / len(right), 4),
        "losses": losses,
        "seconds": {"training": round(trained, 1), "all": round(time.monotonic() - start, 1)},
    }


def run(args: argparse.Namespace) -> None:
    """Every cell that is not there yet, a seed after the other."""
    sources = {name: identity(getattr(args, name)) for name in MODELS}
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in args.methods:
            for name in MODELS:
                file = args.out / f"{name}-{method}-{seed}.json"
                asked = {key: getattr(args, key) for key in _SETTINGS} | {"sha256": sources[name]}
                if file.is_file():
                    known = json.loads(file.read_text(encoding="utf-8"))["asked"]
                    if other := sorted(key for key in asked if asked[key] != known.get(key)):
                        raise ValueError(
                            f"{file.name} was measured with another {', '.join(other)}; give another --out"
                        )
                    continue
                found = run_cell(name, method, seed, args)
                head = {"benchmark": "after_recovery", "model": name, "method": method, "seed": seed}
                document = {**head, "asked": asked, **found, **environment("cpu")}
                write_text(file, json.dumps(document, indent=1) + "\n")
                print(f"{file.stem}: {found['accuracy']:.3f} in {found['seconds']['all']:.0f} s", flush=True)


def read_cells(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The cells that finished."""
    cells = {}
    for file in sorted(folder.glob("*-*-*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        cells[cell["model"], cell["method"], cell["seed"]] = cell
    return cells


def compare(cells: dict[tuple[str, str, int], dict[str, Any]], method: str) -> dict[str, Any] | None:
    """Latent less original over all questions of the seeds that both have, with standard errors.

    One error is that of paired questions, the other that of seeds (their differences' spread), which sees that training
    itself is chance; what is said of the difference goes by the larger.
    """
    seeds = sorted(seed for name, way, seed in cells if name == "latent" and way == method)
    seeds = [seed for seed in seeds if ("original", method, seed) in cells]
    if not seeds:
        return None
    answers = {name: [cells[name, method, seed]["right"] for seed in seeds] for name in MODELS}
    gaps = [
        [mine - theirs for mine, theirs in zip(*pair, strict=True)]
        for pair in zip(answers["latent"], answers["original"], strict=True)
    ]
    flat = [gap for row in gaps for gap in row]
    by_seed = [statistics.fmean(row) for row in gaps]
    errors = [_standard_error(flat), _standard_error(by_seed) if len(seeds) > 1 else 0.0]
    return {
        "seeds": seeds,
        "questions": len(flat),
        "accuracy": {name: [statistics.fmean(row) for row in answers[name]] for name in MODELS},
        "difference": statistics.fmean(flat),
        "by_seed": by_seed,
        "error_questions": errors[0],
        "error_seeds": errors[1],
        "within_two": abs(statistics.fmean(flat)) <= 2 * max(errors),
    }


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def table(folder: Path) -> str:
    """The page of all finished cells, in Markdown."""
    cells = read_cells(folder)
    lines = [
        "# Original and latent model after the same fine-tuning",
        "",
        "Written by `python benchmarks/after_recovery.py table`. Share of held-out questions answered with the right word and",
        "nothing else; the difference is latent less original, paired by question.",
        "",
        "| after | seeds | questions | original | latent | difference | error, questions | error, seeds | within two errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        if (found := compare(cells, method)) is None:
            continue
        means = {name: statistics.fmean(found["accuracy"][name]) for name in MODELS}
        within = "yes" if found["within_two"] else "no"
        spread = f"{found['error_seeds']:.3f}" if len(found["seeds"]) > 1 else "-"
        lines.append(
            f"| {method} | {', '.join(map(str, found['seeds']))} | {found['questions']} | {means['original']:.3f} "
            f"| {means['latent']:.3f} | {found['difference']:+.3f} | {found['error_questions']:.3f} "
            f"| {spread} | {within} |"
        )
    planned = [(name, way, seed) for seed in (0, 1, 2) for way in METHODS for name in MODELS]
    if missing := [" ".join(map(str, key)) for key in planned if key not in cells]:
        lines += ["", f"Not run yet, of those of seeds 0 to 2: {', '.join(missing)}."]
    lines += ["", *_kinds(cells), "", *_each_cell(cells)]
    return "\n".join(lines) + "\n"


def _kinds(cells: dict[tuple[str, str, int], dict[str, Any]]) -> list[str]:
    kinds = sorted({kind for cell in cells.values() for kind in cell["kinds"]})
    lines = ["| what is asked for | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for method in METHODS:
        for name in MODELS:
            chosen = [cell for key, cell in cells.items() if key[:2] == (name, method)]
            shares = []
            for kind in kinds:
                marks = [
                    right
                    for cell in chosen
                    for right, of in zip(cell["right"], cell["kinds"], strict=True)
                    if of == kind
                ]
                shares.append(f"{statistics.fmean(marks):.3f}" if marks else "-")
            if chosen:
                lines.append(f"| {name}, {method} | " + " | ".join(shares) + " |")
    return lines


def _each_cell(cells: dict[tuple[str, str, int], dict[str, Any]]) -> list[str]:
    lines = ["| cell | right | first and last loss | seconds |", "|---|---|---|---|"]
    for (name, method, seed), cell in sorted(
        cells.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])
    ):
        ends = f"{cell['losses'][0]:.2f}, {cell['losses'][-1]:.2f}" if cell["losses"] else "-"
        lines.append(
            f"| {name}, {method}, {seed} | {cell['accuracy']:.3f} | {ends} | {cell['seconds']['all']:.0f} |"
        )
    return lines


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--original", type=model_argument, default="smollm2")
    parser.add_argument(
        "--latent", type=Path, help="what `kvlatent convert` or `compress` made of the original"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("build/after_recovery"))
    parser.add_argument(
        "--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--sft-examples", type=int, default=288)
    parser.add_argument("--sft-rate", type=float, default=1e-4)
    parser.add_argument("--dpo-pairs", type=int, default=64)
    parser.add_argument("--dpo-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step")
    parser.add_argument("--questions", type=int, default=240, help="held out, a seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-bf16", dest="bf16", action="store_false", help="float32, for processors without units for it"
    )
    args = parser.parse_args()
    if args.what == "run" and args.latent is None:
        parser.error("run needs --latent")
    if unknown := [one for one in args.methods if one not in METHODS]:
        parser.error(f"--methods takes {', '.join(METHODS)}: got {', '.join(unknown)}")
    return args


def main() -> None:
    """Run the cells, or write the page."""
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        if args.what == "run":
            run(args)
        text = table(args.out)
        write_text(args.out.with_suffix(".md"), text)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)


if __name__ == "__main__":
    main()
