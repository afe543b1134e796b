"""Does an engine compute what our class computes, on a checkpoint of any size? Logits, greedy tokens, bytes of the cache.

    python benchmarks/engine_agreement.py --latent DIR --data TEXT --out DIR --engine llama.cpp [--python BIN] [--experimental]

The engine computes in float32 with a cache in float32, in a process of its own (`stacking_engines.py`), with the interpreter of
--python where another environment has it. What it loads is exported first: transformers and vLLM take a plain checkpoint, or with
--plugin (vLLM) the latent one; --experimental exports unequal widths to llama.cpp. Logits are compared over one block of the
text, and --prompts greedy continuations of --new-tokens tokens, which start where others end. A JSON file a checkpoint and engine
goes to --out; `compatibility_page.py` shows all of them. Exits with 1 where a limit is passed.
"""

import argparse
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stacking import run_engine
from torch import Tensor
from transformers import DynamicCache

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.engines.vllm_plugin import cache_widths
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.jobs.atomic import write_atomically
from kvlatent.jobs.fingerprints import fingerprint, identity
from kvlatent.jobs.record import environment, name_for_record
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import key_value_heads_of
from kvlatent.workflows.export_checkpoint import EXPORT_RECORD, export

TARGETS = {"transformers": "stock", "vllm": "stock", "llama.cpp": "gguf", "openvino": "openvino"}
LIMITS = {"transformers": 1e-5, "vllm": 2e-4, "llama.cpp": 1e-4, "openvino": 1e-3}
PROMPT = 16


def loaded(args: argparse.Namespace) -> str:
    """What the engine loads, exported in float32 unless it is the checkpoint itself."""
    if args.plugin:
        return args.latent
    target = TARGETS[args.engine]
    options: dict[str, Any] = {"dtype": "f32"} if target == "gguf" else {}
    options |= {"experimental": True} if args.experimental else {}
    parts = [identity(args.latent), version("kvlatent"), target, options]
    out = args.work / f"agreement-{fingerprint(parts)[:16]}"
    if not (out / EXPORT_RECORD).is_file():
        export(args.latent, out, to=target, overwrite=True, **options)
    return str(next(out.glob("*.gguf")) if target == "gguf" else out)


@torch.inference_mode()
def ours(model: Any, blocks: Tensor, prompts: list[list[int]], new_tokens: int) -> tuple[Tensor, list[Any]]:
    """Logits [B, T, V] of our class, and what it continues prompts with."""
    logits = model(input_ids=blocks, use_cache=False).logits
    found = []
    for prompt in prompts:
        cache, given = DynamicCache(config=model.config), list(prompt)
        for _ in range(new_tokens):
            ids = torch.tensor([given[cache.get_seq_length() :]])
            given.append(int(model(input_ids=ids, past_key_values=cache).logits[0, -1].argmax()))
        found.append(given[len(prompt) :])
    return logits, found


def largest_difference(theirs: Tensor, wanted: Tensor, engine: str) -> float:
    """Over all positions and tokens; of log-probabilities where the engine gives those."""
    if engine == "vllm":
        theirs, wanted = theirs.log_softmax(-1)[:, :-1], wanted.log_softmax(-1)[:, :-1]
    return float((theirs - wanted).abs().max())


def formula_bytes(config: Any, plugin: bool) -> float:
    """Bytes of a token in float32 over all layers; vLLM's plugin pads both sides of a layer to what its kernels take."""
    widths = [(latent_config_of(config).widths_at(layer)) for layer in range(config.num_hidden_layers)]
    if plugin:
        widths = [
            (one, one) for one in cache_widths(latent_config_of(config), config.num_hidden_layers, "cpu")
        ]
    return 4.0 * key_value_heads_of(config) * sum(map(sum, widths))


def command(args: argparse.Namespace) -> str:
    """A command that repeats the run, paths by their last name."""
    words = ["python", "benchmarks/engine_agreement.py", "--engine", args.engine]
    for name in ("latent", "data", "out"):
        words += [f"--{name}", name_for_record(str(getattr(args, name)))]
    words += [f"--{name}" for name in ("plugin", "experimental") if getattr(args, name)]
    return shlex.join(words)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One engine and checkpoint."""
    model: Any = load_model(args.latent, dtype="float32").eval()
    tokenizer = load_tokenizer(args.latent, model.config)
    text = ScoredText(args.data, "<|endoftext|>", "text", args.work, None)
    picked = text.blocks(tokenizer, model.config.vocab_size, args.block_size, 1 + args.prompts)
    rows = torch.as_tensor(picked[: 1 + args.prompts]["input_ids"])
    blocks = rows[:1]
    prompts = [row[: PROMPT + 8 * index].tolist() for index, row in enumerate(rows[1:])]
    wanted, continuations = ours(model, blocks, prompts, args.new_tokens)
    source = loaded(args)
    more = {"prompts": prompts, "new_tokens": args.new_tokens}
    answer = run_engine(args, source, "f32", blocks, wanted.shape[-1], more)
    if "refused" in answer:
        sys.exit(f"error: {args.engine} does not run it: {answer['refused']}")
    theirs = torch.from_numpy(np.array(answer.pop("logits")))
    same = [mine == other for mine, other in zip(continuations, answer.pop("greedy"), strict=True)]
    latent = latent_config_of(model.config)
    return answer | {
        "runs_on": args.engine,
        "loads": "the latent checkpoint"
        if args.plugin
        else f"export --to {TARGETS[args.engine]}" + (" --experimental" if args.experimental else ""),
        "model": name_for_record(args.latent),
        "d_qk": latent.d_qk_at(0),
        "d_vo": latent.d_vo_at(0),
        "head_dim": latent.original_head_dim,
        "compared": "log-probabilities" if args.engine == "vllm" else "logits",
        "positions": blocks.numel(),
        "difference": largest_difference(theirs, wanted, args.engine),
        "largest_value": float(wanted.abs().max()),
        "limit": LIMITS[args.engine],
        "greedy_equal": sum(same),
        "prompts": len(same),
        "new_tokens": args.new_tokens,
        "cache_bytes_by_formula": formula_bytes(model.config, args.plugin),
        "text": text.about(),
        "sha256": identity(args.latent),
        "record": environment("cpu") | {"command": command(args)},
    }


def main() -> None:
    """Measure, write, and say whether it is within the limits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latent", required=True)
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=TARGETS, required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--plugin", action="store_true", help="vLLM takes the latent checkpoint itself")
    parser.add_argument("--experimental", action="store_true", help="unequal widths to llama.cpp")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("build/stacking"))
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    found = measured(args)
    name = f"{Path(found['model']).name}_{args.engine}{'-plugin' if args.plugin else ''}.json"
    content = json.dumps(found, indent=1) + "\n"
    write_atomically(args.out / name, lambda path: path.write_text(content, encoding="utf-8"))
    print(
        f"{name}: {found['difference']:.1e} of {found['limit']:.0e}, {found['greedy_equal']} of {found['prompts']} equal"
    )
    if found["difference"] > found["limit"] or found["greedy_equal"] < found["prompts"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
