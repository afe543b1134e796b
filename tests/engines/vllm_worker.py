"""vLLM in a process of its own: answers to prompts of token ids, and the cache as vLLM accounts for it, as JSON.

    python vllm_worker.py REQUESTS ANSWERS

Both are JSON files, a list with one entry a model; the log has a line that starts with MARK before each. A request: {"model": DIR, "prompts": [[1, 2, ...]], "new_tokens": 64,
"options": {...}}. One process serves all of them in turn, since its imports take longer than all answers.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

MARK = "=== request"
OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 1 << 24,
    "enforce_eager": True,
    "disable_log_stats": True,
}


def cache_of(worker):
    """Blocks, tokens a block, and bytes of a block over all layers."""
    config = worker.model_runner.kv_cache_config
    groups = [(group.kv_cache_spec, len(group.layer_names)) for group in config.kv_cache_groups]
    storages = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
    return {
        "specs": sorted({type(spec).__name__ for spec, _ in groups}),
        "block_size": groups[0][0].block_size,
        "num_blocks": config.num_blocks,
        # The specs of layers of several sizes are summed already.
        "page_bytes": [
            spec.page_size_bytes * (1 if hasattr(spec, "kv_cache_specs") else n) for spec, n in groups
        ],
        "allocated_bytes": sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()),
    }


def answer(request):
    """Tokens and log-probabilities a prompt, of the prompt's own tokens and of those that follow; and the cache."""
    llm = LLM(model=request["model"], **{**OPTIONS, **request.get("options", {})})
    new_tokens = request["new_tokens"]
    greedy = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
    settings = SamplingParams(logprobs=4, prompt_logprobs=4, **greedy)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    answers = []
    for output in llm.generate(prompts, settings, use_tqdm=False):
        (first,) = output.outputs
        rows = [*output.prompt_logprobs[1:], *first.logprobs]
        values = [{str(token): one.logprob for token, one in row.items()} for row in rows]
        answers.append({"tokens": list(first.token_ids), "log_probabilities": values})
    (cache,) = llm.collective_rpc(cache_of)
    return {"answers": answers, "cache": cache}


def main(requests, answers):
    done = []
    for index, request in enumerate(json.loads(Path(requests).read_text())):
        print(f"\n{MARK} {index}", file=sys.stderr, flush=True)
        try:
            done.append(answer(request))
        except Exception as error:  # noqa: BLE001 - a test asks what it says
            done.append({"error": f"{type(error).__name__}: {error}"})
        cleanup_dist_env_and_memory()
        Path(answers).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
