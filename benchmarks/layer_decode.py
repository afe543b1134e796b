"""One layer's attention when a token is added, on a CPU: narrow widths against the first, and against a plain read.

    OMP_NUM_THREADS=2 python benchmarks/layer_decode.py --out benchmarks/results/decode_attention.json

Defaults are Llama-3-8B's heads at 8k and 32k tokens, batch 1 and 8, in both types. `--ways kernel products sdpa` adds what
transformers does, which takes seconds a call at 32k: give it few --repeats and short --contexts. Nothing else may run.
"""

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from kvlatent.evaluation.speed.decode_attention import (
    WAYS,
    decode_lines,
    measure_cache_writes,
    measure_decode_attention,
    write_lines,
)
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.record import environment


def widths_of(text: str) -> tuple[int, int]:
    """(d_qk, d_vo) of "64/96"."""
    d_qk, d_vo = text.split("/")
    return int(d_qk), int(d_vo)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="results file")
    parser.add_argument("--widths", nargs="+", default=["128/128", "64/64", "32/32", "64/96"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["kernel", "products"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of torch; as torch chooses where left out")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def command(args: argparse.Namespace) -> str:
    """A command that repeats the run, the results file by its last name."""
    words = ["python", "benchmarks/layer_decode.py"]
    for name, value in vars(args).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [
                "--" + name.replace("_", "-"),
                *(str(v.name if isinstance(v, Path) else v) for v in values),
            ]
    return shlex.join(words)


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    widths, rows, writes = [widths_of(text) for text in args.widths], [], []
    for dtype in args.dtypes:
        for context in args.contexts:
            for batch in args.batches:
                shape = {"key_value_heads": args.key_value_heads, "dtype": dtype, "repeats": args.repeats}
                found = measure_decode_attention(
                    batch, context, widths, heads=args.heads, ways=args.ways, seed=args.seed, **shape
                )
                written = measure_cache_writes(batch, context, widths, **shape)
                print("\n".join((*decode_lines(found), *write_lines(written))), flush=True)
                rows += found
                writes += written
    document = {
        "kind": "decode attention",
        "rows": [asdict(row) for row in rows],
        "writes": [asdict(row) for row in writes],
        "record": {**environment("cpu"), "seed": args.seed, "command": command(args)},
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_atomically(args.out, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
