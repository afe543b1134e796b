"""Do narrow heads and a quantised cache add up? Perplexity, divergence and bytes of widths x KV dtypes, on the engines.

    python benchmarks/stacking.py --model smollm2 --latent DIR --data TEXT --out DIR --engine llama.cpp [--python BIN]
    python benchmarks/stacking.py --render DIR       the table of all cells there, into DIR.md

A cell is an engine, the original or the latent model, and a type of the cache; each is a JSON file in --out, and what is there
is not measured again. The engine runs in a process of its own, with the interpreter of --python where another environment has
it (`make engines`). Perplexity and divergence are against the original in float32 in transformers, on the same blocks.
"""

import argparse
import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.engines.kv_dtypes import check_kv_dtype, kv_bytes_by_layer
from kvlatent.evaluation.perplexity import perplexity_ratio, ratio_error, summarise
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.evaluation.speed.caches import cached_widths
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.fingerprints import fingerprint, identity
from kvlatent.jobs.record import environment, name_for_record
from kvlatent.workflows.engine_choice import choose_runnable
from kvlatent.workflows.export_checkpoint import EXPORT_RECORD, export
from kvlatent_cli.named_models import model_argument

WORKER = Path(__file__).with_name("stacking_engines.py")
DTYPES = {"llama.cpp": ("f16", "q8_0", "q4_0"), "vllm": ("bf16", "fp8"), "openvino": ("f32", "f16", "u8")}
_CPU = {"vllm": "cpu"}
_LINES_OF_A_FAILURE = 4


def loaded_by(engine: str, source: str, work: Path) -> str:
    """What an engine loads of a checkpoint, exported in float32 where it does not load it as it is."""
    if engine != "vllm":
        return choose_runnable(source, engine, work, dtype="f32").path
    if not getattr(load_config(source), "kv_latent", None):
        return source
    out = work / f"stock-{fingerprint([identity(source), version('kvlatent')])[:16]}"
    if not (out / EXPORT_RECORD).is_file():
        export(source, out, to="stock")
    return str(out)


def expected_bytes(engine: str, source: str, kv_dtype: str) -> float:
    """Bytes of a token over all layers by the formula that `kvlatent plan` uses."""
    config: Any = load_config(source)
    keys, values = zip(*cached_widths(config), strict=True)
    dtype = check_kv_dtype(kv_dtype, engine, keys, values, _CPU.get(engine))
    return sum(kv_bytes_by_layer(dtype, keys, values, config.num_hidden_layers, config.num_key_value_heads))


@torch.no_grad()
def reference(model: str, blocks: Tensor, work: Path) -> np.ndarray:
    """Logits [B, T, V] of the original in float32, computed once."""
    file = work / f"reference-{fingerprint([identity(model), blocks.tolist()])[:16]}.npy"
    if not file.is_file():
        original = load_model(model, dtype="float32").eval()

        def write(path: Path) -> None:
            shape = (*blocks.shape, original.config.vocab_size)
            held = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            for index, row in enumerate(blocks):
                held[index] = original(input_ids=row[None], use_cache=False).logits[0].numpy()
            held.flush()

        write_atomically(file, write)
    return np.load(file, mmap_mode="r")


def compare(theirs: np.ndarray, wanted: np.ndarray, blocks: Tensor) -> dict[str, Any]:
    """Perplexity of logits [B, T, V], and how far they are from the reference, of what stands in blocks [B, T]."""
    losses: dict[str, list[float]] = {"theirs": [], "wanted": []}
    divergences, agreed, counts = [], 0, [blocks.shape[1] - 1] * len(blocks)
    for index, row in enumerate(blocks):
        given, reference = (
            torch.from_numpy(np.array(one[index, :-1])).log_softmax(-1) for one in (theirs, wanted)
        )
        for name, found in (("theirs", given), ("wanted", reference)):
            losses[name].append(-float(found.gather(1, row[1:, None]).sum(dtype=torch.float64)))
        divergences.append(float((reference.exp() * (reference - given)).sum(dtype=torch.float64)))
        agreed += int((given.argmax(-1) == reference.argmax(-1)).sum())
    found, original = (summarise(losses[name], counts) for name in ("theirs", "wanted"))
    ratio, error = perplexity_ratio(found, original)
    return {
        "perplexity": found.perplexity,
        "original_perplexity": original.perplexity,
        "ratio": ratio,
        "ratio_standard_error": error,
        "kl": sum(divergences) / sum(counts),
        "kl_standard_error": ratio_error(divergences, counts),
        "top1_agreement": agreed / sum(counts),
    }


def run_engine(
    args: argparse.Namespace,
    path: str,
    kv_dtype: str,
    blocks: Tensor,
    vocabulary: int,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The engine's answer, and its logits under "logits"; "refused" with its words where it does not run.

    `more` of a request is what `stacking_engines.py` says.
    """
    np.save(args.work / "ids.npy", blocks.numpy())
    request = {"engine": args.engine, "model": path, "kv_dtype": kv_dtype, "vocabulary": vocabulary}
    request |= {name: str(args.work / f"{name}.npy") for name in ("ids", "logits")}
    request |= {"answer": str(args.work / "answer.json")} | (more or {})
    Path(request["answer"]).unlink(missing_ok=True)
    (args.work / "request.json").write_text(json.dumps(request))
    command = [args.python, str(WORKER), str(args.work / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not Path(request["answer"]).is_file():
        (args.work / "failed.log").write_text(done.stdout + done.stderr)
        lines = [line for line in done.stderr.splitlines() if "Error" in line and "Traceback" not in line]
        return {"refused": (lines or done.stderr.splitlines()[-_LINES_OF_A_FAILURE:])[-1].strip()}
    return json.loads(Path(request["answer"]).read_text()) | {
        "logits": np.load(request["logits"], mmap_mode="r")
    }


def measured(
    args: argparse.Namespace, role: str, kv_dtype: str, blocks: Tensor, about: dict[str, Any]
) -> dict[str, Any]:
    """One cell."""
    source = args.model if role == "original" else args.latent
    wanted = reference(args.model, blocks, args.work)
    answer = run_engine(args, loaded_by(args.engine, source, args.work), kv_dtype, blocks, wanted.shape[-1])
    logits = answer.pop("logits", None)
    figures = {} if logits is None else compare(logits, wanted, blocks)
    figures |= {"cache_bytes_by_formula": expected_bytes(args.engine, source, kv_dtype)} if figures else {}
    return about | answer | figures


def settings_of(args: argparse.Namespace, role: str, kv_dtype: str, text: dict[str, Any]) -> dict[str, Any]:
    """What decides a cell; another file of the same name is of another run."""
    source = args.model if role == "original" else args.latent
    d_qk, d_vo = cached_widths(load_config(source))[0]
    return {
        "benchmark": "stacking",
        "runs_on": args.engine,
        "model": role,
        "d_qk": d_qk,
        "d_vo": d_vo,
        "kv_dtype": kv_dtype,
        "sha256": {"original": identity(args.model), "model": identity(source)},
        "text": text,
        "blocks": [args.blocks, args.block_size],
    }


def command(args: argparse.Namespace) -> str:
    """A command that repeats the run, paths by their last name."""
    words = ["python", "benchmarks/stacking.py"]
    for name in ("model", "latent", "data", "out"):
        words += [f"--{name}", name_for_record(getattr(args, name))]
    words += ["--engine", args.engine, "--blocks", str(args.blocks), "--block-size", str(args.block_size)]
    return shlex.join(words)


def render(folder: Path) -> str:
    """The cells of a folder as a table."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = {(engine, dtype): (engine, n) for engine, all_of in DTYPES.items() for n, dtype in enumerate(all_of)}  # fmt: skip
    cells.sort(key=lambda cell: (*order[cell["runs_on"], cell["kv_dtype"]], -cell["d_qk"]))
    blocks, length = cells[0]["blocks"]
    original = next(cell["original_perplexity"] for cell in cells if "kl" in cell)
    about = (
        f"{blocks} blocks of {length} tokens of {cells[0]['text']['name']}; perplexity, KL (nats a token, original from cell) "
        "and the likeliest token against the original in float32 in transformers (perplexity "
        f"{original:.3f}). Bytes a token as the engine says, in brackets by the formula."
    )
    lines = [
        "# Narrow heads x quantised caches, on the engines",
        "",
        about,
        "",
        "| engine | widths | KV dtype | bytes a token | perplexity | ratio | KL | same likeliest token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        head = (
            f"| {cell.get('engine', cell['runs_on'])} | {cell['d_qk']}/{cell['d_vo']} | {cell['kv_dtype']} |"
        )
        if "refused" in cell:
            lines.append(f"{head} refused: {cell['refused']} | | | | |")
            continue
        said = cell["cache_bytes_per_token"]
        lines.append(
            f"{head} {said:,.0f} ({cell['cache_bytes_by_formula']:,.0f}) | {cell['perplexity']:.3f} | "
            f"{cell['ratio']:.4f} ± {cell['ratio_standard_error'] or 0:.4f} | {cell['kl']:.4f} ± {cell['kl_standard_error'] or 0:.4f} | "
            f"{cell['top1_agreement']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def measure_all(args: argparse.Namespace) -> None:
    """Every cell of an engine that is not there yet."""
    config: Any = load_config(args.model)
    text = ScoredText(args.data, "<|endoftext|>", "text", args.work, None)
    picked = text.blocks(load_tokenizer(args.model, config), config.vocab_size, args.block_size, args.blocks)
    blocks = torch.as_tensor(picked[: args.blocks]["input_ids"])
    if len(blocks) < args.blocks:
        sys.exit(f"error: {args.data} has {len(blocks)} blocks of {args.block_size} tokens: got --blocks {args.blocks}; give less")  # fmt: skip
    for role in args.roles:
        for kv_dtype in args.kv_dtypes or DTYPES[args.engine]:
            about = settings_of(args, role, kv_dtype, text.about())
            out = args.out / f"{args.engine}_{role}_{kv_dtype}.json"
            if out.is_file():
                found = json.loads(out.read_text())
                if any(found.get(key) != value for key, value in about.items()):
                    sys.exit(f"error: {out} is of another model or text; give another --out, or remove it")
                continue
            cell = measured(args, role, kv_dtype, blocks, about)
            cell |= {"record": environment("cpu") | {"command": command(args)}}
            content = json.dumps(cell, indent=2) + "\n"
            write_atomically(out, lambda path, content=content: path.write_text(content, encoding="utf-8"))
            print(out.name, cell.get("refused") or f"ratio {cell['ratio']:.4f}, KL {cell['kl']:.4f}", flush=True)  # fmt: skip


def main() -> None:
    """Measure what is missing, or render what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", type=Path, metavar="DIR")
    parser.add_argument("--model", type=model_argument, help="the original, or smollm2")
    parser.add_argument("--latent", help="of equal widths and one table")
    parser.add_argument("--data", help="held-out text")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", choices=DTYPES)
    parser.add_argument("--kv-dtypes", nargs="+")
    parser.add_argument("--roles", nargs="+", choices=("original", "latent"), default=["original", "latent"])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("build/stacking"))
    args = parser.parse_args()
    if args.render:
        args.render.with_suffix(".md").write_text(render(args.render), encoding="utf-8")
        return
    missing = [name for name in ("model", "latent", "data", "out", "engine") if getattr(args, name) is None]
    if missing:
        parser.error(f"give {', '.join(f'--{name}' for name in missing)}, or --render DIR")
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    measure_all(args)


if __name__ == "__main__":
    main()
