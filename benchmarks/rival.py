"""What fewer bits a number cost, what fewer numbers a token cost, and both: the quantised cache is the honest rival.

    python benchmarks/rival.py --model LATENT --against ORIGINAL --out FILE [--data TEXT] [--caches dynamic quantized-int4]

The first half of every block fills a cache of each kind; the second half is scored against what can be read back from
it. Bytes are those of the live cache after the first half. Without --data the held-out modules of the standard library
are read.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.perplexity import Perplexity, perplexity_ratio, summarise
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.evaluation.speed.caches import CACHES, check_caches, make_cache
from kvlatent.evaluation.speed.memory import held_bytes
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import environment, name_for_record
from kvlatent_cli.named_models import model_argument


def behind(
    model: PreTrainedModel, blocks: Tensor, kind: str, batch_size: int = 8
) -> tuple[Perplexity, float]:
    """Perplexity of the second halves of blocks [B, T], and the bytes a token of the first halves takes.

    The first token of a second half is not scored: nothing has read the cache back when it is predicted.
    """
    half, losses, size = blocks.shape[1] // 2, [], 0
    for batch in blocks.split(batch_size):
        cache = make_cache(kind, model.config, blocks.shape[1])
        with torch.no_grad():
            model(input_ids=batch[:, :half], past_key_values=cache, use_cache=True, logits_to_keep=1)
            size += held_bytes(cache)
            logits = model(input_ids=batch[:, half:], past_key_values=cache, use_cache=True).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), batch[:, half + 1 :], reduction="none"
        )
        losses += nats.double().sum(1).tolist()
    scored = blocks.shape[1] - half - 1
    return summarise(losses, [scored] * len(losses)), size / (half * len(blocks))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Every model with every kind of cache."""
    paths = {"original": args.against, "latent": args.model}
    models = {role: load_model(path, dtype=args.dtype) for role, path in paths.items()}
    check_caches(args.caches, [model.config for model in models.values()], torch.device("cpu"))
    tokenizer = load_tokenizer(args.against, models["original"].config)
    text = ScoredText(args.data, "<|endoftext|>", "text", args.work, None)
    vocabulary = models["original"].config.vocab_size
    picked = text.blocks(tokenizer, vocabulary, args.block_size, args.blocks)
    blocks = torch.as_tensor(picked[: args.blocks]["input_ids"])
    rows, base = [], None
    for kind in args.caches:
        for role, model in models.items():
            found, size = behind(model.eval(), blocks, kind)
            base = base or (found, size)
            ratio, error = perplexity_ratio(found, base[0])
            row = {"model": role, "cache": kind, "perplexity": found.perplexity, "ratio": ratio}
            row |= {"ratio_standard_error": error, "bytes_per_token": size, "share": size / base[1]}
            rows.append(row)
            print(
                f"{role:9} {kind:16} {ratio:.4f} ± {error or 0:.4f}  {100 * size / base[1]:.1f} % of the bytes"
            )
    return {
        "benchmark": "rival",
        "rows": rows,
        "sha256": {"model": identity(args.against), "latent": identity(args.model)},
        "dtype": str(models["latent"].dtype).removeprefix("torch."),
        "blocks": [len(blocks), blocks.shape[1]],
        "text": text.about(),
        "record": environment("cpu") | {"command": command(args)},
    }


def command(args: argparse.Namespace) -> str:
    """A command that repeats the run, paths by their last name."""
    words = [
        "python",
        "benchmarks/rival.py",
        "--model",
        name_for_record(args.model),
        "--against",
        name_for_record(args.against),
    ]
    words += ["--out", args.out.name, *(["--data", name_for_record(args.data)] if args.data else [])]
    words += ["--dtype", args.dtype] if args.dtype else []
    words += ["--caches", *args.caches, "--block-size", str(args.block_size), "--blocks", str(args.blocks)]
    return shlex.join(words)


def main() -> None:
    """Measure, print and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_argument, required=True)
    parser.add_argument("--against", type=model_argument, required=True, help="the original, or smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--caches", nargs="+", default=["dynamic", "quantized-fp8", "quantized-int4", "quantized-int2"], choices=CACHES)  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("build/rival"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measured(args), indent=2) + "\n"
    write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
