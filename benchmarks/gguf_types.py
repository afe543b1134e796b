"""What a GGUF file in a coarser type costs, of a latent checkpoint and beside it of the original in the same type.

    python benchmarks/gguf_types.py --original DIR --latent DIR --data TEXT --out DIR [--python BIN] [--dtypes f16 bf16 q8_0]

Logits of llama.cpp over one block of the text (`stacking_engines.py`, with the interpreter of --python and a cache in float32)
against those of our class in float32, the latent model's against its own, the original's (at full width, by the same writer)
against its own. "rounding" is the same of our class with matrices rounded to the type and what is multiplied by them, too: an
export may differ by twice that. A JSON file a checkpoint goes to --out; `compatibility_page.py` shows all of them. Exits with 1
where that limit is passed, by either.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stacking import run_engine
from torch import Tensor

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.engines import gguf_export
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.matrix_rounding import relative_difference
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import environment, name_for_record
from kvlatent.model.assembly import full_width
from kvlatent.model.classes import latent_config_of
from kvlatent.workflows.export_checkpoint import ROUNDINGS

ALLOWED_EXACT = 1e-4  # of an export that rounds nothing


def loaded(source: str) -> Any:
    """Our class in float32, an original at full width."""
    model: Any = load_model(source, dtype="float32").eval()
    return model if getattr(model.config, "kv_latent", None) else full_width(model)


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[1, T, V]"""
    return model(input_ids=ids, use_cache=False).logits


def measured(args: argparse.Namespace, source: str, ids: Tensor, dtype: str) -> dict[str, float]:
    """One model in one type: difference (largest), and roots of mean squares over the standard deviation of logits."""
    model = loaded(source)
    d_qk, d_vo = latent_config_of(model.config).widths_at(0)
    options = ExportOptions(dtype=dtype, experimental=d_qk != d_vo)
    wanted, rounding = logits_of(model, ids), gguf_export.matrix_rounding(options)
    assert rounding is not None
    with rounding.applied(model):
        rounded = logits_of(model, ids)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        gguf_export.write_export(model, Path(source), Path(folder), options)
        del model
        file = next(Path(folder).glob("*.gguf"))
        answer = run_engine(args, str(file), "f32", ids, wanted.shape[-1])
    if "refused" in answer:
        sys.exit(f"error: llama.cpp does not run {source} in {dtype}: {answer['refused']}")
    theirs = torch.from_numpy(np.array(answer["logits"]))
    return {
        "difference": float((theirs - wanted).abs().max()),
        "largest_value": float(wanted.abs().max()),
        "relative": relative_difference(theirs, wanted),
        "rounding": relative_difference(rounded, wanted),
        "same_argmax": float((theirs.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }


def command(args: argparse.Namespace) -> str:
    """A command that repeats the run, paths by their last name."""
    words = ["python", "benchmarks/gguf_types.py"]
    for name in ("original", "latent", "data", "out"):
        words += [f"--{name}", name_for_record(str(getattr(args, name)))]
    return shlex.join([*words, "--dtypes", *args.dtypes, "--tokens", str(args.tokens)])


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Every type of a latent checkpoint and its original."""
    config: Any = load_config(args.latent)
    latent, tokenizer = latent_config_of(config), load_tokenizer(args.latent, config)
    text = ScoredText(args.data, "<|endoftext|>", "text", args.work, None)
    picked = text.blocks(tokenizer, config.vocab_size, args.tokens, 1)
    ids = torch.as_tensor(picked[:1]["input_ids"])
    rows = []
    for dtype in args.dtypes:
        row: dict[str, Any] = {"dtype": dtype}
        for role in ("original", "latent"):
            row[role] = measured(args, getattr(args, role), ids, dtype)
            print(dtype, role, json.dumps(row[role]), file=sys.stderr, flush=True)
        rows.append(row)
    return {
        "benchmark": "gguf types",
        "model": name_for_record(args.latent),
        "d_qk": latent.d_qk_at(0),
        "d_vo": latent.d_vo_at(0),
        "head_dim": latent.original_head_dim,
        "positions": ids.numel(),
        "allowed": ROUNDINGS,
        "rows": rows,
        "text": text.about(),
        "sha256": {"original": identity(args.original), "model": identity(args.latent)},
        "record": environment("cpu") | {"command": command(args)},
    }


def main() -> None:
    """Measure, write, and say whether it is within the limits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--original", required=True)
    parser.add_argument("--latent", required=True, help="made from it")
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable, help="has llama-cpp-python")
    parser.add_argument("--dtypes", nargs="+", choices=("f16", "bf16", "q8_0"), default=["f16", "bf16", "q8_0"])  # fmt: skip
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("build/stacking"))
    args = parser.parse_args()
    args.engine = "llama.cpp"
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    found = measure_all(args)
    content = json.dumps(found, indent=1) + "\n"
    out = args.out / f"{Path(found['model']).name}.json"
    write_atomically(out, lambda path: path.write_text(content, encoding="utf-8"))
    passed = [
        f"{role} in {row['dtype']} by {row[role]['relative']:.2g}, {row[role]['rounding']:.2g} by rounding"
        for row in found["rows"]
        for role in ("original", "latent")
        if row[role]["relative"] > max(ALLOWED_EXACT, ROUNDINGS * row[role]["rounding"])
    ]
    if passed:
        sys.exit(f"error: more than {ROUNDINGS} times what rounding costs: {'; '.join(passed)}")


if __name__ == "__main__":
    main()
