"""Stage II from a teacher store beside stage II with the original in memory: perplexity, seconds, bytes.

    python benchmarks/stored_teacher.py [--model DIR] [--data FILE --eval-data FILE] [--tokens N] [--top-k 16,64] [--out FILE]

Without --model it is the embedded model (smollm2: a real one), without --data the standard library: trained on
the modules that the model knows, measured on those that it never saw. The conversion is the own-frequency preset at --kv
of the cache. Every run starts from it, sees the same blocks in the same order and differs in its teacher alone. One JSON
document goes to stdout, and to --out.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import kvlatent
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.quality import compare, measure
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import environment
from kvlatent.text.corpus import evaluation_blocks
from kvlatent.text.standard_library import model_path, stdlib_documents
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent_cli.named_models import model_argument

LIMIT = 0.003
"""Of the perplexity, either way: what the store may cost."""


def write_texts(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The text to train on, in which a run of --tokens repeats little, and the one to measure on."""
    if args.data is not None:
        return args.data, args.eval_data
    places = folder / "train.jsonl", folder / "held_out.jsonl"
    for place, split, characters in zip(places, ("train", "held_out"), (4 * args.tokens, None), strict=True):
        documents = stdlib_documents(split)
        random.Random(args.seed).shuffle(documents)
        lines, written = [], 0
        for document in documents:
            lines.append(json.dumps({"text": document}) + "\n")
            written += len(document)
            if characters is not None and written >= characters:
                break
        place.write_text("".join(lines), encoding="utf-8")
    return places


def train_once(
    args: argparse.Namespace, folder: Path, data: Path, teacher: Path | str, name: str
) -> dict[str, Any]:
    """One run of stage II; what it took."""
    start = time.monotonic()
    summary = kvlatent.train(
        folder / "latent",
        stage=2,
        data=data,
        out=folder / name,
        teacher=teacher,
        overrides=settings(args),
        device="cpu",
    )
    return {
        "seconds": round(time.monotonic() - start, 1),
        **{key: summary[key] for key in ("tokens", "steps", "last_loss")},
    }


def settings(args: argparse.Namespace) -> list[str]:
    """The recipe of all runs."""
    return [
        f"seed={args.seed}",
        "dtype=float32",
        f"data.block_size={args.block_size}",
        f"stage2.tokens={args.tokens}",
        *args.set,
    ]


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert, teach, train from each teacher, measure."""
    data, eval_data = write_texts(args, folder)
    convert_checkpoint(
        args.model, folder / "latent", kv=args.kv, overrides=["conversion.preset=own-frequency"]
    )
    runs: dict[str, dict[str, Any]] = {"original": train_once(args, folder, data, args.model, "original")}
    for top_k in args.top_k:
        name = f"top-{top_k}"
        taught = kvlatent.teach(
            args.model,
            data=data,
            out=folder / f"store-{top_k}",
            top_k=top_k,
            overrides=settings(args),
            device="cpu",
        )
        runs[name] = train_once(args, folder, data, folder / f"store-{top_k}", name)
        runs[name]["store"] = {key: taught[key] for key in ("tokens", "bytes_per_token", "bytes", "seconds")}
    original = load_model(args.model, dtype="float32")
    tokenizer = load_tokenizer(args.model, original.config)
    blocks = evaluation_blocks(
        eval_data,
        tokenizer,
        args.block_size,
        cache_dir=folder / "blocks",
        vocab_size=original.config.vocab_size,
        max_tokens=args.eval_tokens,
    )
    figures = {
        name: measure(load_model(folder / name, dtype="float32"), blocks) for name in ("latent", *runs)
    }
    before = measure(original, blocks)[0]["perplexity"]
    for name, found in runs.items():
        found["perplexity"] = figures[name][0]["perplexity"]
        found |= compare(figures[name][1], figures["original"][1])
    return {
        "perplexity_of": {"the original": before, "the conversion": figures["latent"][0]["perplexity"]},
        "runs": runs,
        "limit": LIMIT,
        "sha256": {"model": identity(args.model), "data": identity(data), "eval_data": identity(eval_data)},
    }


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=model_argument, default=str(model_path()), help="or smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--eval-data", type=Path, help="goes with --data")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--top-k", type=lambda text: [int(word) for word in text.split(",")], default=[64])
    parser.add_argument("--kv", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.data is None) != (args.eval_data is None):
        parser.error("--data and --eval-data go together")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        document = {
            "benchmark": "stored_teacher",
            "seed": args.seed,
            **run(args, Path(folder)),
            **environment("cpu"),
        }
    json.dump(document, sys.stdout, indent=1)
    print()
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
