"""Scores text against a cache that token eviction has thinned; runs as a script where kvpress is installed.

    python -I press_worker.py JOB.json RESULT.json

Why a script: kvpress pins an older transformers than kvlatent needs, so kvlatent is not importable here. A latent
checkpoint brings its own modelling file.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PRESSES = {
    "knorm": "KnormPress",
    "streaming-llm": "StreamingLLMPress",
    "snapkv": "SnapKVPress",
    "expected-attention": "ExpectedAttentionPress",
}


def main(job_file: str, result_file: str) -> None:
    """Do one job.

    The job: "checkpoint", "latent" (whether it brings its own modelling file), "blocks" (.npy of token ids [B, T]),
    "context", "press" ("none" or one of `PRESSES`), "evicted" (share of the context), "dtype", "device", "threads". The
    result is what `scores` returns.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        job["checkpoint"], trust_remote_code=job["latent"], dtype=getattr(torch, job["dtype"])
    )
    press = None
    if job["press"] != "none":
        import kvpress  # ty: ignore[import-not-found]

        press = getattr(kvpress, PRESSES[job["press"]])(job["evicted"])
    blocks = torch.from_numpy(np.load(job["blocks"])).long()
    result = scores(model.to(job["device"]).eval(), blocks, job["context"], press)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def scores(model: Any, blocks: Any, context: int, press: Any = None, batch_size: int = 8) -> dict[str, Any]:
    """Losses behind a context whose cache was thinned once, after it was filled.

    The text behind it keeps its positions; attention among it is causal, and the thinned cache is all it sees of the
    context. Its first token is not scored, as nothing has read the thinned cache yet when it is predicted.

    Args:
        model: causal language model in evaluation mode.
        blocks: [B, T] token ids; context: tokens of each that fill the cache.
        press: called with the model gives a context manager that thins; None thins nothing.

    Returns:
        "losses": summed nats a block, "tokens" a block, "cache_bytes" of all contexts after thinning.
    """
    import torch
    from transformers import DynamicCache

    losses, size = [], 0
    for batch in blocks.split(batch_size):
        batch = batch.to(model.device)
        cache = DynamicCache()
        with torch.no_grad():
            with nullcontext() if press is None else press(model):
                model.get_decoder()(input_ids=batch[:, :context], past_key_values=cache, use_cache=True)
            size += sum(_bytes(layer) for layer in cache.layers)
            positions = torch.arange(context, batch.shape[1], device=batch.device)
            logits = model(
                input_ids=batch[:, context:],
                past_key_values=cache,
                position_ids=positions.expand(len(batch), -1),
                use_cache=True,
            ).logits[:, :-1]
        targets = batch[:, context + 1 :]
        nats = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        losses += nats.double().sum(1).tolist()
    return {"losses": losses, "tokens": blocks.shape[1] - context - 1, "cache_bytes": size}


def _bytes(layer: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))


if __name__ == "__main__":
    main(*sys.argv[1:])
