"""What calibrating, converting and a step of stage I cost beside what they cannot do without: seconds and memory.

    python benchmarks/costs.py seconds [--model DIR] [--data FILE]   calibration and conversion to half the widths
    python benchmarks/costs.py precision [--model DIR] [--data FILE] the same in bfloat16 and float32: figures and seconds
    python benchmarks/costs.py memory [--calibrated]                 peak of a conversion over the size of the original
    python benchmarks/costs.py stage1 [--model DIR] [--data FILE]    a step over a forward and a backward of the layers, and
                                                                     what its graphs and states hold, in both forms

Without --model it is the embedded model (smollm2: a real one, see real_model.py), without --data the standard library's
held-out modules. One JSON document goes to stdout. Memory is the largest resident size of this process over that after
the imports, of a Llama with constant weights (1.05 GiB in fp32), so it needs a process of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.scored_text import ScoredText
from kvlatent.jobs.devices import precision
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment
from kvlatent.model.assembly import full_width
from kvlatent.model.hidden_states import blocks_at_once, isolate_layer
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import PAPER
from kvlatent.text.standard_library import model_path
from kvlatent.training.layer_loss import capture, layer_losses, layer_losses_one_at_a_time
from kvlatent.training.trainable import prepare_for_training
from kvlatent_cli.named_models import model_argument

LONG, HELD_OUT = 2048, 32


def measure_seconds(args: argparse.Namespace) -> dict[str, Any]:
    """Of a plain forward over the text, of calibration on it, and of conversion without and with alignment."""
    model, half = load(args)
    blocks, before = read_blocks(args, model, args.blocks), resident_bytes("VmHWM")
    one = {name: column[:1] for name, column in blocks.items()}
    calibrate_once = partial(calibrate, precision=args.precision)
    forward(model, one, args.precision)
    _, plain = timed(lambda: forward(model, blocks, args.precision))
    collected, calibration = timed(lambda: calibrate_once(model, blocks))
    _, again = timed(lambda: forward(model, blocks, args.precision))
    options: dict[str, Any] = {
        "d_qk": half,
        "d_vo": half,
        "statistics": collected,
        "precision": args.precision,
    }
    _, closed = timed(lambda: convert(model, **options, align=0))
    _, aligned = timed(lambda: convert(model, **options, align=args.align))
    figures = {
        "tokens": collected.tokens,
        "precision": args.precision,
        "forward_seconds": [plain, again],
        "calibration_seconds": calibration,
        "calibration_over_forward": round(2 * calibration / (plain + again), 3),
        "conversion_seconds": closed,
        "aligned_conversion_seconds": aligned,
        "total_seconds": round(calibration + closed, 2),
        "total_aligned_seconds": round(calibration + aligned, 2),
        "peak_bytes": resident_bytes("VmHWM") - before,
    }
    if whole := blocks["input_ids"].numel() // LONG:
        ids = blocks["input_ids"].flatten()[: whole * LONG].view(whole, LONG)
        long = {"input_ids": ids, "position_ids": torch.arange(LONG).expand_as(ids)}
        _, plain = timed(lambda: forward(model, long, args.precision))
        _, calibration = timed(lambda: calibrate_once(model, long))
        figures["calibration_over_forward_at_2048"] = round(calibration / plain, 3)
        figures["peak_bytes_at_2048"] = resident_bytes("VmHWM")
    return figures


def measure_precision(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of two conversions that differ in the dtype of their products alone, block by block on held-out text."""
    model, half = load(args)
    blocks = read_blocks(args, model, args.blocks + HELD_OUT)
    text, held_out = (
        {name: column[part] for name, column in blocks.items()}
        for part in (slice(args.blocks), slice(args.blocks, None))
    )
    figures, losses = {}, {}
    for dtype in args.dtypes:
        collected, calibration = timed(lambda: calibrate(model, text, precision=dtype))  # noqa: B023
        options: dict[str, Any] = {"statistics": collected, "align": args.align, "precision": dtype}
        latent, conversion = timed(lambda: convert(model, d_qk=half, d_vo=half, **options))  # noqa: B023
        losses[dtype] = block_losses(latent, held_out)
        perplexity = float(losses[dtype].mean().exp())
        figures[dtype] = {
            "perplexity": perplexity,
            "calibration_seconds": calibration,
            "conversion_seconds": conversion,
        }
    compared = {}
    if len(losses) == 2:
        difference = losses["bfloat16"] - losses["float32"]
        error = float(difference.std() / len(difference) ** 0.5)
        compared = {"loss_difference": float(difference.mean()), "loss_difference_standard_error": error}
    original = float(block_losses(model, held_out).mean().exp())
    return {
        "tokens": text["input_ids"].numel(),
        "held_out_tokens": held_out["input_ids"].numel(),
        "original_perplexity": original,
        **figures,
        "block_losses": {dtype: one.tolist() for dtype, one in losses.items()},
        **compared,
    }


@torch.no_grad()
def block_losses(model: Any, blocks: dict[str, Tensor]) -> Tensor:
    """Mean loss of every block, in nats a token."""
    found = []
    for ids, positions in zip(blocks["input_ids"], blocks["position_ids"], strict=True):
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0, :-1]
        wanted = positions[1:] > 0  # the first token of a document has nothing to be predicted from
        found.append(cross_entropy(logits[wanted].float(), ids[1:][wanted]))
    return torch.stack(found)


@torch.no_grad()
def forward(model: Any, blocks: dict[str, Tensor], dtype: str) -> None:
    """The decoder over all blocks, as many at a time as calibration takes, in its precision."""
    size = blocks_at_once(full_width(model).model, blocks["input_ids"].shape[1])
    columns = (blocks[name].split(size) for name in ("input_ids", "position_ids"))
    with precision("cpu", dtype):
        for ids, positions in zip(*columns, strict=True):
            model.model(input_ids=ids, position_ids=positions, use_cache=False)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds."""
    start = time.perf_counter()
    return work(), round(time.perf_counter() - start, 2)


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of a conversion to half width, without text or calibrated on eight random blocks of 128."""
    baseline = resident_bytes("VmRSS")
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # touched, or the kernel would not count it
            parameter.normal_(std=0.05, generator=generator) if args.calibrated else parameter.fill_(0.01)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = 3.0 if args.calibrated else 1.3
    if args.calibrated:
        ids = torch.randint(8000, (8, 128), generator=generator)
        collected = calibrate(model, {"input_ids": ids, "position_ids": torch.arange(128).expand_as(ids)})
        convert(model, d_qk=32, d_vo=32, statistics=collected, align=2)
    else:
        convert(model, d_qk=32, d_vo=32, choices=PAPER)
    peak = resident_bytes("VmHWM") - baseline
    return {"model_bytes": size, "peak_bytes": peak, "ratio": round(peak / size, 4), "limit": limit}


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process; unlike ru_maxrss it does not start at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{field} is not in /proc/self/status: memory is measured on Linux only")


def measure_stage1(args: argparse.Namespace) -> dict[str, Any]:
    """Medians and quartiles of a step and of its reference, in turn, so that a slower minute hits both.

    Reference: a forward of the original, a forward and backward of the latent layers, with the same trained tensors. A step
    adds the hooks and one squared error a layer; it must stay below 1.6 times that.
    """
    teacher, half = load(args)
    student = convert(teacher, d_qk=half, d_vo=half, choices=PAPER)
    prepare_for_training(student, Recipe.load(None, ["lora.rank=16"]))
    decoders, inputs = (teacher.get_decoder(), student.get_decoder().train()), read_blocks(args, teacher, 4)
    held = stage1_memory(decoders, inputs)

    def reference() -> None:
        with torch.no_grad():
            decoders[0](**inputs, use_cache=False)
        decoders[1](**inputs, use_cache=False).last_hidden_state.float().square().mean().backward()

    def step() -> None:
        layer_losses_one_at_a_time(decoders[1], decoders[0], inputs).mean().backward()

    def step_with_all_graphs() -> None:
        layer_losses(decoders[1], capture(decoders[0], inputs), inputs).mean().backward()

    works = {"reference": reference, "stage I step": step, "with all graphs": step_with_all_graphs}
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(args.rounds + 2):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            decoders[1].zero_grad()
            if number >= 2:  # two for warm-up
                times[name].append(time.perf_counter() - start)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    ratio = quartiles["stage I step"][1] / quartiles["reference"][1]
    return {"ratio": round(ratio, 4), "limit": 1.6, "quartiles_seconds": quartiles, "bytes": held}


def stage1_memory(decoders: tuple[Any, Any], inputs: dict[str, Tensor]) -> dict[str, int]:
    """Bytes that a forward pass of stage I holds at the most in graphs and states, weights aside, in both forms, and limits.

    What a graph holds is what autograd saves, each storage once; "one layer's graph" is that of the layer alone.
    """
    teacher, student = decoders
    states = capture(teacher, inputs)
    state = states[0].numel() * states[0].element_size()
    layers = len(states) - 1
    weights = {p.untyped_storage().data_ptr() for decoder in decoders for p in decoder.parameters()}
    one = held_at_most(lambda: layer_losses_one_at_a_time(student, teacher, inputs).mean(), weights)
    whole = held_at_most(lambda: layer_losses(student, states, inputs).mean(), weights)
    layer = isolate_layer(student, 0)
    positions = inputs["position_ids"]

    def alone() -> Tensor:
        output = layer(inputs_embeds=states[0], position_ids=positions, use_cache=False).last_hidden_state
        return (output.float() - states[1].float()).square().mean()

    return {
        "one layer's graph": (graph := held_at_most(alone, weights)),
        "one at a time": one,
        "with all graphs": whole,
        "states and one graph": (layers + 1) * state + graph,
    }


def held_at_most(work: Callable[[], Tensor], known: set[int]) -> int:
    """The most bytes that graphs hold while `work` runs, of storages that are not `known`."""
    alive: Counter[tuple[int, int]] = Counter()
    most = 0

    def pack(tensor: Tensor) -> Any:
        nonlocal most
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        holder = _Held(tensor)
        if key[0] not in known:
            alive[key] += 1
            most = max(most, sum(size for (_, size), count in alive.items() if count))
            weakref.finalize(holder, alive.subtract, [key])
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        work()
    return most


class _Held:
    """A saved tensor, so that it is seen when it goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def load(args: argparse.Namespace) -> tuple[Any, int]:
    """The original, and half the width of its heads."""
    model = load_model(args.model, dtype="float32").requires_grad_(False).eval()
    return model, max(2, model.model.layers[0].self_attn.head_dim // 2)


def read_blocks(args: argparse.Namespace, model: Any, number: int) -> dict[str, Tensor]:
    """The first blocks of the text."""
    tokenizer = load_tokenizer(args.model, model.config)
    with tempfile.TemporaryDirectory() as folder:
        text = ScoredText(args.data, "<|endoftext|>", "text", Path(folder))
        picked = text.blocks(tokenizer, model.config.vocab_size, args.block_size, number)[:number]
    return {name: torch.as_tensor(picked[name]) for name in ("input_ids", "position_ids")}


def main() -> None:
    """Measure one of them and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {
        "seconds": measure_seconds,
        "precision": measure_precision,
        "memory": measure_memory,
        "stage1": measure_stage1,
    }
    parser.add_argument("what", choices=measures)
    parser.add_argument("--model", type=model_argument, default=str(model_path()), help="or smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--blocks", type=int, default=128, help="of calibration")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--align", type=int, default=200, help="steps of alignment")
    parser.add_argument("--rounds", type=int, default=15, help="of stage1, after two for warm-up")
    parser.add_argument("--calibrated", action="store_true", help="memory with statistics and alignment")
    parser.add_argument("--layers", type=int, default=22, help="of memory's model")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of seconds")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32")
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    document = {"benchmark": f"costs {args.what}", **measures[args.what](args)}
    if args.what != "memory":
        document["sha256"] = {"model": identity(args.model), "data": args.data and identity(args.data)}
    json.dump({**document, **environment("cpu")}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
