"""What a default conversion to half the cache takes on a model of a real shape with random weights: seconds, memory, busy card.

    python benchmarks/shape_seconds.py --shape smollm2-135m|llama-3-8b [--layers N] [--device cuda]

Random weights take the seconds of trained ones, but for attempts that a step takes again at a lower rate; so no weights have
to be at hand. With fewer --layers than the shape has, what goes by layers is also given for all of them. One JSON document goes
to stdout.
"""

import argparse
import json
import sys
import threading
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.record import environment
from kvlatent.selection.calibrate import calibrate

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}  # fmt: skip


class Watch:
    """Seconds by step, as progress tells of them, and the share of samples at which the card ran a kernel."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.samples = device, {}, []
        self._step, self._since = "", time.perf_counter()

    def tell(self, step: str, *_: Any) -> None:
        """A step goes on, or another one begins."""
        if step == self._step:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._step] = round(self.seconds.get(self._step, 0) + now - self._since, 2)
        self._step, self._since = step, now

    def sample(self, stop: threading.Event) -> None:
        """Look at the card ten times a second."""
        while not stop.wait(0.1):
            try:
                self.samples.append(torch.cuda.utilization())
            except (RuntimeError, ModuleNotFoundError):  # no NVML here
                return


def random_model(shape: str, layers: int | None, device: str, dtype: torch.dtype) -> Any:
    """A Llama of the shape, with weights drawn on the device."""
    values = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**values, max_position_embeddings=8192))
    return model.to(dtype).requires_grad_(False).eval()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate on random tokens and convert, by the clock."""
    model = random_model(args.shape, args.layers, args.device, getattr(torch, args.dtype))
    config = model.config
    ids = torch.randint(config.vocab_size, (args.blocks, 512), generator=torch.Generator().manual_seed(0))
    blocks = {"input_ids": ids, "position_ids": torch.arange(512).expand_as(ids)}
    watch, stop = Watch(args.device), threading.Event()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        threading.Thread(target=watch.sample, args=(stop,), daemon=True).start()
    half = config.hidden_size // config.num_attention_heads // 2
    start = time.perf_counter()
    watch.tell("calibrate")
    statistics = calibrate(model, blocks)
    watch.tell("closed form")
    convert(
        model, d_qk=half, d_vo=half, statistics=statistics, align=args.align, global_steps=args.global_steps,
        progress=watch.tell,
    )  # fmt: skip
    watch.tell("end")
    total = round(time.perf_counter() - start, 2)
    stop.set()
    whole = SHAPES[args.shape]["num_hidden_layers"]
    found = {
        "seconds": {name: value for name, value in watch.seconds.items() if name},
        "total_seconds": total,
        "layers": config.num_hidden_layers,
        "layers_of_the_shape": whole,
        "seconds_for_all_layers": round(total * whole / config.num_hidden_layers, 1),
    }
    if args.device == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        found["busy_share"] = round(sum(watch.samples) / max(1, len(watch.samples)) / 100, 3)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--blocks", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--align", type=int, default=200)
    parser.add_argument("--global-steps", type=int, default=64)
    args = parser.parse_args()
    asked = {name: getattr(args, name) for name in ("shape", "dtype", "blocks", "align", "global_steps")}
    json.dump(
        {"benchmark": "shape seconds", **asked, **measure(args), **environment(args.device)},
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
