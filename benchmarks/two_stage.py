"""Does stage I pay? One stage against two at equal tokens, from the same conversion (the paper never measured it).

    python benchmarks/two_stage.py --model DIR --data train.txt --eval-data valid.txt --work DIR --out FILE.json

Rows: perplexity of the original, after conversion, after stage I, after stage II; for stage II alone with all the
tokens, and for stage I with `--share` of them before it. Killed runs go on from `--work`.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.quality import measure
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment
from kvlatent.text.corpus import evaluation_blocks, prepare
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import merged_copy, prepare_for_training


def sha256(path: Path) -> str:
    """Of a file, or of a directory's weights."""
    return hashlib.sha256((path / "model.safetensors" if path.is_dir() else path).read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--d-qk", type=int, default=32)
    parser.add_argument("--d-vo", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of both stages together")
    parser.add_argument(
        "--share", type=float, default=0.2, help="of the tokens that stage I gets in the two-stage row"
    )
    parser.add_argument("--objective", default="next_token", choices=["next_token", "kl"])
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="recipe override, section.key=value")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe.load(None, ["data.block_size=512", f"stage2.objective={args.objective}", *args.set])
    original = load_model(args.model, dtype="float32").requires_grad_(False)
    tokenizer = load_tokenizer(args.model, original.config)
    common = {"block_size": recipe.data.block_size, "cache_dir": args.work / "data"}
    common["vocab_size"] = original.config.vocab_size
    corpus = prepare(args.data, tokenizer, held_out=0.0, **common)
    blocks = evaluation_blocks(args.eval_data, tokenizer, **common)
    blocks = blocks.select(range(min(len(blocks), args.eval_tokens // recipe.data.block_size)))

    def perplexity(model) -> dict:
        figures, _ = measure(model, blocks)
        return {
            name: figures[name]
            for name in ("perplexity", "standard_error", "tokens", "cache_bytes_per_token")
        }

    rows: dict[str, dict] = {
        "original": perplexity(original),
        "converted": perplexity(convert(original, d_qk=args.d_qk, d_vo=args.d_vo, preset="paper")),
    }
    print(json.dumps(rows))
    shares = {"stage II only": (0, args.tokens), "two stages": (round(args.tokens * args.share), None)}
    for name, (first, second) in shares.items():
        second = args.tokens - first if second is None else second
        latent = convert(original, d_qk=args.d_qk, d_vo=args.d_vo, preset="paper")
        prepare_for_training(latent, recipe)
        for stage, tokens in ((1, first), (2, second)):
            if not tokens:
                continue
            planned = Recipe.model_validate(
                recipe.model_dump()
                | {f"stage{stage}": getattr(recipe, f"stage{stage}").model_dump() | {"tokens": tokens}}
            )
            work = args.work / args.objective / name.replace(" ", "-") / f"stage{stage}"
            started = time.time()
            summary = train_stage(latent, original, stage, corpus.train, planned, work)
            row = perplexity(merged_copy(latent)) | {
                "tokens_trained": summary["tokens"],
                "minutes": summary["minutes"],
            }
            rows[f"{name}: after stage {'I' * stage}"] = row
            print(name, stage, f"{time.time() - started:.0f} s", json.dumps(row), flush=True)
    result = {
        "command": f"python benchmarks/two_stage.py --d-qk {args.d_qk} --d-vo {args.d_vo} --tokens {args.tokens} "
        f"--share {args.share} --objective {args.objective} --eval-tokens {args.eval_tokens} --threads {args.threads}"
        + "".join(f" --set {override}" for override in args.set)
        + " --model MODEL --data TRAIN --eval-data VALID --work WORK --out FILE",
        "sha256": {
            "model": sha256(args.model),
            "data": sha256(args.data),
            "eval_data": sha256(args.eval_data),
        },
        "recipe": recipe.model_dump(mode="json"),
        "rows": rows,
        **environment("cpu"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
