"""What the code computes, to the bit: converted weights, losses of both stages, the figures of an evaluation.

    python benchmarks/golden.py --out golden.json            # write
    python benchmarks/golden.py --against golden.json        # compare; exit 1 and name what differs

For changes that move code and must not move a number. It speaks through the public functions and commands alone, on the
embedded model and modules of the Python standard library, with one torch thread. Another processor, torch or Python
rounds otherwise, so the file of a comparison is written on the machine that compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file

import kvlatent

MODEL = Path(kvlatent.__file__).parent / "assets" / "stdlib-llama"
TRAINED_ON = (
    "ast",
    "cmd",
    "copy",
    "dis",
    "doctest",
    "optparse",
    "pdb",
    "pickle",
    "shutil",
    "tokenize",
    "turtle",
)
HELD_OUT = ("calendar", "csv", "heapq", "textwrap")
BLOCK, STEPS = 256, 5
CONVERSIONS = {
    "calibrated, a table per head": {"table": "head", "align": 6},
    "calibrated, a table per layer": {"table": "layer", "align": 6},
    "calibrated, one table": {"table": "model", "align": 6},
    "calibrated, not aligned": {"align": 0},
    "calibrated, widths per layer": {"d_qk": [64, 32, 48, 24, 32, 40], "align": 2},
    "own-frequency": {"preset": "own-frequency"},
    "paper": {"preset": "paper"},
    "by weights": {"keys": "weights", "values": "svd", "gains": False, "refit": False, "align": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--against", type=Path, help="compare with the figures of an earlier call")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = conversions() | commands(Path(folder))
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if args.against is not None:
        wanted = json.loads(args.against.read_text())
        changed = sorted(name for name in wanted | figures if wanted.get(name) != figures.get(name))
        print(f"{len(wanted) - len(changed)} of {len(wanted)} equal to the bit", *changed, sep="\n  ")
        sys.exit(bool(changed))


def text_of(modules: tuple[str, ...]) -> list[str]:
    """Source text of standard library modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in modules]


def conversions() -> dict[str, str]:
    """Hashes of the statistics of a text, and of what each preset and table scope makes of it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    model = kvlatent.load_model(MODEL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer("\n".join(text_of(TRAINED_ON)), verbose=False)["input_ids"])
    blocks = ids[: 24 * BLOCK].view(24, BLOCK)
    rows = Dataset.from_dict({"input_ids": blocks, "position_ids": torch.arange(BLOCK).expand_as(blocks)})
    statistics = kvlatent.calibrate(model, rows.with_format("torch"), rows=16, seed=0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        statistics.save(path)
        # Without the tensor that earlier versions saved and nothing read, so that their files compare.
        found["statistics"] = digest({n: t for n, t in load_file(path).items() if not n.endswith(".gram")})
    for name, choices in CONVERSIONS.items():
        data = {"statistics": statistics} if choices.get("preset") is None else {}
        widths = {"d_qk": 32, "d_vo": 32}
        if isinstance(choices.get("d_qk"), list):
            choices = choices | {"d_qk": choices["d_qk"][: model.config.num_hidden_layers]}
        latent = kvlatent.convert(model, **(widths | choices), **data, seed=0)
        found[f"conversion, {name}"] = digest(latent.state_dict())
        found[f"config, {name}"] = hashlib.sha256(
            json.dumps(latent.config.kv_latent, sort_keys=True).encode()
        ).hexdigest()
    return found


def commands(folder: Path) -> dict[str, object]:
    """What the console script writes: a compressed checkpoint, five steps of each stage, an evaluation."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, modules in ((train, TRAINED_ON), (held_out, HELD_OUT)):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in text_of(modules)))
    tokens = STEPS * 2 * BLOCK
    settings = [f"data.block_size={BLOCK}", "calibration.blocks=16", "lora.rank=4"]
    settings += [f"stage{n}.{key}" for n in (1, 2) for key in ("batch_size=2", f"tokens={tokens}")]
    given = [word for setting in settings for word in ("--set", setting)]
    found: dict[str, object] = {}
    run("convert", MODEL, "--data", train, "--out", folder / "half", "--kv", 0.5, "--align", 4, *given)
    found["convert, weights"] = file_digest(folder / "half")
    found["convert, figures"] = json.loads((folder / "half" / "run.json").read_text())["figures"]
    at = folder / "half"
    for stage in (1, 2):
        out = folder / f"stage{stage}"
        run("train", at, "--stage", stage, "--data", train, "--teacher", MODEL, "--out", out, *given)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["stage"] in (stage, f"stage{stage}")]
        assert len(losses) == STEPS, lines
        found[f"stage {stage}, losses"], found[f"stage {stage}, weights"] = losses, file_digest(out)
        at = out
    small = ("--eval-data", held_out, *given)
    run("compress", MODEL, "--data", train, "--out", folder / "all", "--preset", "paper", "--kv", 0.5, *small)
    found["compress, weights"] = file_digest(folder / "all")
    found["compress, figures"] = json.loads((folder / "all" / "run.json").read_text())["figures"]
    reading = ("--data", held_out, "--max-tokens", 4096, "--contexts", 128, "--block-size", BLOCK)
    document = json.loads(run("eval", at, "--against", MODEL, *reading, "--json"))
    found["eval, figures"], found["eval, diagnosis"] = document["figures"], document["diagnosis"]
    return found


def run(*words: object) -> str:
    """The standard output of a command."""
    call = [sys.executable, "-m", "kvlatent_cli", *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{call}\n{done.stderr}")
    return done.stdout


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by name, type and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return state.hexdigest()


def file_digest(folder: Path) -> str:
    return digest(load_file(folder / "model.safetensors"))


if __name__ == "__main__":
    main()
