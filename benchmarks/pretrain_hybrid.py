"""Pretrain a small hybrid on a CPU: gated attention with partial rotary in every n-th layer, linear attention between.

The shape is Qwen3.5's at a small size: heads of 64 of which 16 channels rotate, a QK-norm, an output gate. It starts from
the embedded model (`pretrain_embedded.py`): embeddings, norms and FFNs, and attention as far as it goes (every fourth pair
keeps its turn, which is the table of 16 rotated channels; the others lose theirs); linear attention starts from nothing. With
``--every 1`` all layers are attention, and a few hundred steps are enough. The text is the embedded model's, at a shorter
context and with more recall. The learning rate goes by the clock, so that the run ends in time on any machine. Run from the
repository root:

    nice -n 10 python benchmarks/pretrain_hybrid.py --work build/hybrid --every 4 --minutes 24 --threads 1

It writes a checkpoint with the embedded model's tokenizer to ``WORK/model``, and what it was trained on beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_embedded import IGNORED, MixedText, token_stream
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from kvlatent.evaluation.sequences import ordinary_ids
from kvlatent.jobs.record import environment
from kvlatent.text.standard_library import MODEL_PATH

CONTEXT = 512
BATCH = 4
PEAK_RATE = 1.5e-3
WARMUP_SHARE, DECAY_SHARE = 0.03, 0.35  # of the time
SAVE_EVERY_S = 120


def configuration(every: int) -> Qwen3_5TextConfig:
    """Four layers of the embedded model's sizes, attention in every n-th."""
    layers = range(1, 5)
    return Qwen3_5TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        layer_types=["linear_attention" if layer % every else "full_attention" for layer in layers],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@torch.no_grad()
def from_embedded(every: int) -> Qwen3_5ForCausalLM:
    """The hybrid with what the embedded model has for it; its own norms are 1 + weight."""
    model = Qwen3_5ForCausalLM(configuration(every))
    embedded = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    own = model.state_dict()
    for name, tensor in embedded.state_dict().items():
        if name in own and "self_attn" not in name:
            own[name].copy_(tensor - 1 if "norm" in name else tensor)
    for new, old in zip(model.model.layers, embedded.model.layers, strict=True):
        if hasattr(new, "self_attn"):
            _take_attention(new.self_attn, old.self_attn)
    return model


def _take_attention(new: Any, old: Any) -> None:
    """Queries, keys, values and outputs; the gate starts open by half, and the outputs at twice their size."""
    pairs = [*range(0, 32, 4), *(pair for pair in range(32) if pair % 4)]  # 8 that turn, 24 that no longer do
    turning, idle = pairs[:8], pairs[8:]
    order = [*turning, *(pair + 32 for pair in turning), *idle, *(pair + 32 for pair in idle)]
    query = old.q_proj.weight.unflatten(0, (4, 64))[:, order]
    key = old.k_proj.weight.unflatten(0, (2, 64))[:, order]
    new.q_proj.weight.copy_(torch.cat([query, 0.02 * torch.randn_like(query)], dim=1).flatten(0, 1))
    new.k_proj.weight.copy_(key.flatten(0, 1))
    new.v_proj.weight.copy_(old.v_proj.weight)
    new.o_proj.weight.copy_(2 * old.o_proj.weight)
    for norm, weight in ((new.q_norm, query), (new.k_norm, key)):  # inputs are normed: white, of size 1
        norm.weight.fill_(float(weight.square().sum(-1).mean().sqrt()) - 1)


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> tuple[Qwen3_5ForCausalLM, dict]:
    """Train for ``args.minutes``; the model and what the run was."""
    ids = ordinary_ids(tokenizer, 2048)
    stream = token_stream(tokenizer, args.work / "train.u16")
    data = MixedText(stream, ids, tokenizer, args.seed, args.copy_share, CONTEXT)
    torch.manual_seed(args.seed)
    model = from_embedded(args.every)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    started = saved = time.monotonic()
    step, sums = 0, np.zeros((2, 2))
    while (share := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (share + 1e-3) / WARMUP_SHARE, (1 - share) / DECAY_SHARE)
        items = [data[step * BATCH + i] for i in range(BATCH)]
        inputs, labels, copied = (
            torch.stack([item[name] for item in items]) for name in ("input_ids", "labels", "is_copy")
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
        ).view(BATCH, -1)
        seen = labels[:, 1:] != IGNORED
        (losses.sum() / seen.sum().clamp_min(1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for row, chosen in enumerate((~copied, copied)):
            sums[row] += float(losses[chosen].detach().sum()), float(seen[chosen].sum())
        step += 1
        if step % 20 == 0:
            code, copy = (total / max(count, 1) for total, count in sums)
            print(f"step {step} share {share:.3f} code {code:.3f} copy {copy:.3f}", flush=True)
            sums[:] = 0
        if time.monotonic() - saved > SAVE_EVERY_S:
            saved = time.monotonic()
            model.save_pretrained(args.work / "model")
    minutes = round((time.monotonic() - started) / 60, 1)
    return model, {"steps": step, "tokens": step * BATCH * CONTEXT, "minutes": minutes}


def main() -> None:
    """Train, and write the checkpoint and what the run was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the tokenised text and the result"
    )
    parser.add_argument("--every", type=int, default=4, help="attention in every n-th layer: 1, 2 or 4")
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy-share", type=float, default=0.5, help="share of copy text among the items")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (args.work / "model").mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH)
    tokenizer.save_pretrained(args.work / "model")
    model, run = train(args, tokenizer)
    model.save_pretrained(args.work / "model")
    command = (
        f"python benchmarks/pretrain_hybrid.py --work build/hybrid --every {args.every} --minutes {args.minutes:g} "
        f"--threads {args.threads}"
    )
    record = {
        "command": command,
        "seed": args.seed,
        "copy_share": args.copy_share,
        **run,
        **environment("cpu"),
    }
    (args.work / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)


if __name__ == "__main__":
    main()
