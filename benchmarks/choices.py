"""What each choice of a conversion costs, nothing trained: channels, frequencies, values, one side at a time.

    python benchmarks/choices.py [--model DIR --data FILE] --out FILE.json

Perplexity over the original's on the same blocks, with the paired standard error, at half width. Without --model it
is the embedded model on the standard library modules held out from it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.perplexity import perplexity, perplexity_ratio
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import environment
from kvlatent.text.corpus import evaluation_blocks
from kvlatent.text.standard_library import MODEL_PATH, stdlib_documents

ROWS = {
    "preset paper (stride, frequency-aware, slice, 1/sqrt(d_qk))": {},
    "paper, channels matched to the frequency-aware grid": {"keys": "matched", "frequencies": "own"},
    "paper, own frequencies, original scale": {"frequencies": "own"},
    "paper, values by product SVD, original scale": {"values": "svd"},
    "matched, own frequencies, product SVD": {"keys": "matched", "frequencies": "own", "values": "svd"},
    "preset own-frequency (stride, own frequencies, product SVD)": {"preset": "own-frequency"},
    "keys only: stride, own frequencies": {"preset": "own-frequency", "d_vo": None},
    "keys only: stride, frequency-aware (paper)": {"d_vo": None},
    "values only: product SVD": {"preset": "own-frequency", "d_qk": None},
    "values only: slice (paper)": {"d_qk": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model, dtype="float32")
    tokenizer = load_tokenizer(args.model, model.config)
    width = model.model.layers[0].self_attn.head_dim // 2
    with tempfile.TemporaryDirectory() as folder:
        data = args.data
        if data is None:
            data = Path(folder) / "held_out.jsonl"
            data.write_text(
                "".join(json.dumps({"text": t}) + "\n" for t in stdlib_documents("held_out", False))
            )
        blocks = evaluation_blocks(data, tokenizer, 512, cache_dir=folder, vocab_size=model.config.vocab_size)
        blocks = blocks.select(range(min(len(blocks), args.tokens // 512)))
        original = perplexity(model, blocks)
        rows = {"original": {"perplexity": original.perplexity, "tokens": original.tokens}}
        for name, choices in ROWS.items():
            measured = perplexity(
                convert(model, **{"d_qk": width, "d_vo": width, "preset": "paper", **choices}), blocks
            )
            ratio, error = perplexity_ratio(measured, original)
            rows[name] = {"perplexity": measured.perplexity, "ratio": ratio, "ratio_standard_error": error}
            print(f"| {name} | x{ratio:.3f} ± {error:.3f} |", flush=True)
        result = {
            "command": f"python benchmarks/choices.py --tokens {args.tokens}"
            + (" --model MODEL --data FILE" if args.data else ""),
            "width": width,
            "sha256": {"model": identity(args.model), "data": identity(data)},
            "rows": rows,
            **environment("cpu"),
        }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
