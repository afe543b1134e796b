"""Peak memory of a conversion to half width, over the import baseline, against the size of the original.

    python benchmarks/conversion_memory.py > benchmarks/results/conversion_memory.json

A Llama of 1.05 GiB (fp32, constant weights) in a process of its own; the limit is 1.3 times its size.
"""

import json
import sys

import torch
from conversion_costs import resident_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.record import environment


def main() -> None:
    torch.set_num_threads(1)
    baseline = resident_bytes("VmRSS")
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=22,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)  # touched, or the kernel would not count it
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    convert(model, d_qk=32, d_vo=32, preset="paper")
    peak = resident_bytes("VmHWM") - baseline
    result = {"model_bytes": size, "peak_bytes": peak, "ratio": round(peak / size, 4), "limit": 1.3}
    json.dump(
        {"command": "python benchmarks/conversion_memory.py", **result, **environment("cpu")},
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
