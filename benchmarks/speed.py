"""Prefill, decoding, cache bytes and peak memory of an original and its latent model, with every attention asked for.

    python benchmarks/speed.py --out DIR --model LATENT --against ORIGINAL [--device cuda --dtype bfloat16]
    python benchmarks/speed.py --out DIR --shapes llama-3-8b --d-qk 64 --d-vo 64 --device cuda \\
        --contexts 1024 8192 32768 131072 --attention eager sdpa flex_attention --compile no yes

With --shapes both models have random weights: what they say means nothing, what they take is the real thing. Every
attention, with and without compiling, is one JSON file in --out; a finished one is not repeated. A compiled step runs
with the plain caches of --caches and with the static one.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from kvlatent.evaluation.speed.bench_run import bench
from kvlatent.evaluation.speed.caches import CACHES
from kvlatent.evaluation.speed.lines import bench_lines
from kvlatent.evaluation.speed.variants import ATTENTIONS
from kvlatent.jobs.atomic import write_atomically
from kvlatent_cli.named_models import model_argument
from kvlatent_lab.model_shapes import SHAPES, random_pair


def models(args: argparse.Namespace) -> tuple[Any, Any]:
    """(latent, original): names to load, or random weights in these shapes."""
    if args.shapes is None:
        return args.model, args.against
    original, latent = random_pair(
        args.shapes,
        args.d_qk,
        args.d_vo,
        layers=args.layers,
        context=max(args.contexts) + args.new_tokens,
        table=args.table,
        dtype=args.dtype or "bfloat16",
        device=args.device,
        seed=args.seed,
    )
    return latent, original


def caches_of(args: argparse.Namespace, compiled: bool) -> list[str]:
    """Kinds of cache of one setting."""
    if not compiled:
        return args.caches
    return [*(kind for kind in args.caches if kind == "dynamic"), "static"]


def command(args: argparse.Namespace, attention: str, compiled: bool) -> str:
    """A command that repeats one setting, paths by their last name."""
    words = ["python", "benchmarks/speed.py"]
    setting = {"attention": attention, "compile": "yes" if compiled else "no"}
    for name, value in (vars(args) | setting).items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *(Path(str(each)).name for each in values)]
    return shlex.join(words)


def run(args: argparse.Namespace) -> None:
    """All unfinished settings, in order."""
    latent, original = models(args)
    for attention in args.attention:
        for compiled in (word == "yes" for word in args.compile):
            path = args.out / f"{attention}{'-compiled' if compiled else ''}.json"
            if path.is_file():
                continue
            try:
                document = bench(
                    latent,
                    original,
                    batches=args.batches,
                    contexts=args.contexts,
                    new_tokens=args.new_tokens,
                    repeats=args.repeats,
                    caches=caches_of(args, compiled),
                    memory=args.memory,
                    attention=attention,
                    compile=compiled,
                    dtype=args.dtype,
                    device=args.device,
                    seed=args.seed,
                    progress=lambda what, done, total, note: print(f"{done}/{total} {note}", flush=True),
                )
            except Exception as error:  # noqa: BLE001 - one kernel that does not run here must not cost the others
                print(f"{path.name}: {type(error).__name__}: {error}", flush=True)
                continue
            if args.shapes is not None:
                for role in ("model", "original"):
                    document[role] |= {"name": args.shapes, "random_weights": True}
            document["record"]["command"] = command(args, attention, compiled)
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            write_atomically(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))
            print("\n".join(bench_lines(document)), flush=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="results folder, one JSON file a setting")
    parser.add_argument("--model", type=model_argument, help="latent checkpoint")
    parser.add_argument("--against", type=model_argument, help="its original, or smollm2")
    parser.add_argument("--shapes", choices=sorted(SHAPES), help="random weights instead of checkpoints")
    parser.add_argument("--layers", type=int, help="with --shapes: as many only")
    parser.add_argument("--d-qk", type=int, default=64, help="with --shapes")
    parser.add_argument("--d-vo", type=int, default=64, help="with --shapes")
    parser.add_argument("--table", choices=("head", "layer", "model"), default="head", help="with --shapes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["dynamic", "quantized-int4"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["sdpa"])
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no"])
    parser.add_argument("--memory", type=float, help="bytes to find the longest contexts for")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if (args.shapes is None) == (args.model is None or args.against is None):
        parser.error("give --shapes, or both --model and --against")
    return args


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run(args)


if __name__ == "__main__":
    main()
