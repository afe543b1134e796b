"""What a streamed conversion takes on a checkpoint of a real shape with random weights: peak memory, seconds, kills survived.

    python benchmarks/streaming.py cost --shape llama-3.2-1b|llama-3-8b [--calibrated] [--layers N] [--folder DIR]
    python benchmarks/streaming.py kills [--number 20] [--shape tiny] [--folder DIR]
    python benchmarks/streaming.py predict --shape llama-3-70b [--calibrated] [--blocks 128] [--align 200] [--device cuda]

`cost` makes the checkpoint in shards, copies it (and flushes the copy, as a conversion does), converts it in a process of its
own, and deletes all of it. With fewer --layers than the shape has, what goes by layers is also given for all of them. `kills`
converts once undisturbed, then again with a SIGKILL at random moments, and compares the results to the bit. `predict` says what
is expected, of files without content, and whatever the machine. The tokenizer is the embedded model's, the text the standard library. One JSON document goes to stdout.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvlatent.checkpoints.resident_layers import ResidentLayers
from kvlatent.checkpoints.sharded import open_sharded
from kvlatent.conversion.stream_costs import stream_costs
from kvlatent.jobs.fingerprints import file_sha256
from kvlatent.jobs.record import environment
from kvlatent.model.widths import Widths
from kvlatent.selection.choices import resolve_choices
from kvlatent.text.standard_library import model_path, stdlib_documents

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 8192, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, **_ROPE,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True, **_ROPE,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, **_ROPE,
    },
    "llama-3-70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, **_ROPE,
    },
}  # fmt: skip
_SHARD = 1 << 30  # bytes
_DOCUMENTS = 60


def empty_model(shape: dict[str, Any]) -> LlamaForCausalLM:
    """A model of that shape, without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16", bos_token_id=None, eos_token_id=0))


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Random bfloat16 weights in shards, never more than one of them in memory, with a tokenizer that is no larger."""
    folder.mkdir()
    model = empty_model(shape)
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    wanted, held = dict(model.named_parameters()), 0
    for name, tensor in wanted.items():
        held += tensor.numel() * 2
        if held > _SHARD and shards[-1]:
            shards.append([])
            held = tensor.numel() * 2
        shards[-1].append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = torch.empty(wanted[name].shape, dtype=torch.bfloat16)
            if name.endswith("norm.weight"):
                tensors[name].fill_(1.0)
            else:
                tensors[name].normal_(std=0.02, generator=generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    for file in model_path().glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def copy_seconds(source: Path, target: Path) -> float:
    """Of copying a checkpoint and flushing the copy, which is deleted again."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def command(args: argparse.Namespace, source: Path, out: Path, text: Path) -> list[str]:
    """The conversion as users type it."""
    words = [sys.executable, "-m", "kvlatent_cli", "convert", str(source), "--out", str(out), "--stream"]
    words += ["--kv", "0.5", "--device", args.device, "--json"]
    if not args.calibrated:
        return [*words, "--preset", args.preset]
    words += ["--data", str(text), "--blocks", str(args.blocks), "--align", str(args.align)]
    return [*words, "--set", f"data.block_size={args.block_size}"]


def measure_cost(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of copying and of converting, and the peak resident size of the latter."""
    shape = SHAPES[args.shape]
    layers = args.layers or shape["num_hidden_layers"]
    source, out, text = folder / "model", folder / "latent", folder / "text.txt"
    text.write_text("<|endoftext|>".join(stdlib_documents("train")[:_DOCUMENTS]), encoding="utf-8")
    make_checkpoint(source, {**shape, "num_hidden_layers": layers})
    copies = [copy_seconds(source, folder / "copy")]
    start = time.perf_counter()
    process = subprocess.Popen(command(args, source, out, text), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the conversion ended with {os.waitstatus_to_exitcode(status)}")
    told = json.loads((out / "run.json").read_text())["conversion"]
    shutil.rmtree(out)
    copies.append(copy_seconds(source, folder / "copy"))
    found = {
        "checkpoint_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "layers": layers,
        "copy_seconds": [round(each, 2) for each in copies],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "conversion_seconds": told["seconds"],
        "over_copy": round(2 * seconds / sum(copies), 3),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }
    if layers != shape["num_hidden_layers"]:
        whole = told["seconds"] * shape["num_hidden_layers"] / layers
        found["minutes_of_all_layers"] = round((seconds - told["seconds"] + whole) / 60, 1)
    return found


def measure_kills(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How many conversions were killed at a random moment, as often as it took, and ended as the undisturbed one."""
    source, text = folder / "model", folder / "text.txt"
    text.write_text("<|endoftext|>".join(stdlib_documents("train")[:_DOCUMENTS]), encoding="utf-8")
    make_checkpoint(source, SHAPES[args.shape])
    start = time.perf_counter()
    subprocess.run(command(args, source, folder / "whole", text), check=True, stdout=subprocess.DEVNULL)
    seconds, expected = time.perf_counter() - start, tensor_hashes(folder / "whole")
    chance, kills, identical = random.Random(0), 0, 0
    while kills < args.number:
        out = folder / "killed"
        while True:
            process = subprocess.Popen(command(args, source, out, text), stdout=subprocess.DEVNULL)
            try:
                status = process.wait(timeout=chance.uniform(0.2, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills, status = kills + 1, 0
                if not out.exists() or out.with_name("killed.partial").exists():
                    continue  # otherwise it had come to its end
            break
        if status:
            raise SystemExit(f"a conversion that was continued ended with {status}")
        if tensor_hashes(out) != expected:
            raise SystemExit("a conversion that was killed and continued gave other tensors")
        identical += 1
        shutil.rmtree(out)
    return {
        "kills": kills,
        "conversions": identical,
        "identical": True,
        "undisturbed_seconds": round(seconds, 2),
    }


def predict(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `stream_costs` says of a conversion to half the cache."""
    model, header, end = empty_model(SHAPES[args.shape]), {}, 0
    for name, tensor in model.named_parameters():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    choices = replace(resolve_choices(), align=args.align if args.calibrated else 0, global_steps=0)
    half, blocks = model.config.head_dim // 2, args.blocks if args.calibrated else 0
    dtype = torch.float32 if args.calibrated and args.device == "cpu" else torch.bfloat16
    layers = ResidentLayers(open_sharded(folder, model.config), model.config, dtype, "cpu")
    layers.device = torch.device(args.device)  # which need not be here
    sizes = {"blocks": blocks, "size": args.block_size}
    return asdict(stream_costs(layers, Widths(half, half), choices, torch.bfloat16, **sizes))


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Of the shards, by name, once every tensor was found to load."""
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                file.get_tensor(name)
    return {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def main() -> None:
    """Measure one of them and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "kills", "predict"))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--calibrated", action="store_true", help="on text, else from the weights alone")
    parser.add_argument("--preset", default="calibrated", help="without text")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--align", type=int, default=20, help="steps a layer")
    parser.add_argument("--number", type=int, default=20, help="of kills")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; the system's for temporary files"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="kvlatent-") as folder:
        measure = {"cost": measure_cost, "kills": measure_kills, "predict": predict}[args.what]
        found = measure(args, Path(folder))
    asked = {name: value for name, value in vars(args).items() if name != "folder"}
    known = {} if args.what == "predict" else environment(args.device)
    json.dump({"asked": asked, **known, **found}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
