"""vLLM in a process of its own: answers to prompts of token ids, and the cache as vLLM accounts for it, as JSON.

python vllm_worker.py '{"model": DIR, "prompts": [[1, 2, ...]], "new_tokens": 64, "options": {...}}'
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams


def cache_of(worker):
    """Blocks, tokens a block, and bytes of a block over all layers."""
    config = worker.model_runner.kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    storages = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
    allocated = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return {
        "specs": sorted({type(spec).__name__ for spec in specs}),
        "block_size": specs[0].block_size,
        "num_blocks": config.num_blocks,
        "page_bytes": [
            spec.page_size_bytes * (1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names))
            for spec, group in zip(specs, config.kv_cache_groups, strict=True)
        ],
        "allocated_bytes": sum(allocated.values()),
    }


def main(request):
    llm = LLM(
        model=request["model"],
        **{"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 24, **request["options"]},
    )  # fmt: skip
    greedy = SamplingParams(
        temperature=0,
        max_tokens=request["new_tokens"],
        ignore_eos=True,
        logprobs=4,
        prompt_logprobs=4,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy)
    answers = []
    for output in outputs:
        rows = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "log_probabilities": [{str(i): one.logprob for i, one in row.items()} for row in rows],
            }
        )
    (cache,) = llm.collective_rpc(cache_of)
    return {"answers": answers, "cache": cache}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
