"""OpenVINO GenAI with paged attention on an exported directory: behind the server of `transformers serve`, and for a bench."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from kvlatent.engines.engine_process import EngineSettings
from kvlatent.engines.openai_server import serve_model
from kvlatent.engines.openvino_paging import paged_cache

__all__ = ["OpenVINOModel", "open_bench", "serve"]

_BLOCK_TOKENS = 32  # of the cache's blocks on a CPU


class OpenVINOModel:
    """What upstream's handlers take for a model: `generate` for one row of token ids.

    Args:
        settings: path, context, dtype of the cache, threads.
    """

    def __init__(self, settings: EngineSettings) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-settings.context // _BLOCK_TOKENS) + 1
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = settings.context
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": settings.num_threads,
            **_cache_properties(settings.kv_dtype),
        }
        self._pipeline = openvino_genai.LLMPipeline(
            settings.path, "CPU", scheduler_config=scheduler, ATTENTION_BACKEND="PA", **properties
        )
        self.device, self.name_or_path = torch.device("cpu"), settings.path
        self.config = AutoConfig.from_pretrained(settings.path)
        self.generation_config = GenerationConfig.from_pretrained(settings.path)

    def generate(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **_: Any,
    ) -> Tensor:
        """Ids [1, T] with the generated ones behind them; the mask of one whole row says nothing."""
        import openvino

        if streamer is not None:
            streamer.put(input_ids)
        relay = None if streamer is None else _relay(streamer)
        result = self._pipeline.generate(
            openvino.Tensor(input_ids.numpy()), _engine_config(generation_config), relay
        )
        if relay is not None and relay.failure is not None:
            raise relay.failure
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, torch.tensor([result.tokens[0]], dtype=input_ids.dtype)], 1)

    def times(self, input_ids: list[int], new_tokens: int) -> dict[str, Any]:
        """`BenchRun`: a prompt is read, and tokens added greedily."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens + 1, True, False
        said = self._pipeline.generate(
            openvino.Tensor(torch.tensor([input_ids]).numpy()), config
        ).perf_metrics
        steps = said.get_num_generated_tokens() - 1
        return {
            "prefill_s": said.get_ttft().mean / 1e3,
            "decode_s": said.get_tpot().mean * steps / 1e3,
            "steps": steps,
        }


def _cache_properties(kv_dtype: str | None) -> dict[str, str]:
    """What the engine is told for a type of cache, nothing for its own; a cache in f32 needs sums in f32."""
    if kv_dtype is None:
        return {}
    hint = {"INFERENCE_PRECISION_HINT": "f32"} if kv_dtype == "f32" else {}
    return {"KV_CACHE_PRECISION": kv_dtype, **hint}


def _relay(streamer: Any) -> Any:
    """What the engine tells each token, for a streamer of upstream's; a failure there stops the engine."""
    import openvino_genai

    class Relay(openvino_genai.StreamerBase):
        failure: Exception | None = None

        def write(self, token: Any) -> Any:
            try:
                streamer.put(torch.tensor([token] if isinstance(token, int) else token))
            except Exception as error:  # noqa: BLE001 - it is raised again beyond the engine
                self.failure = error
                return openvino_genai.StreamingStatus.CANCEL
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None: ...

    return Relay()


def _engine_config(asked: GenerationConfig) -> Any:
    """What is asked of upstream's `generate`, as the engine calls it."""
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = asked.max_new_tokens
    config.do_sample = bool(asked.do_sample)
    if config.do_sample:
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(asked, name, None)) is not None:
                setattr(config, name, value)
        config.rng_seed = int(torch.randint(2**31, ()))  # torch was seeded with what the request names
    if asked.repetition_penalty is not None:
        config.repetition_penalty = asked.repetition_penalty
    if asked.stop_strings:
        stops = asked.stop_strings
        config.stop_strings = {stops} if isinstance(stops, str) else set(stops)
    ends = asked.eos_token_id
    if ends is not None:
        config.stop_token_ids = {ends} if isinstance(ends, int) else set(ends)
    return config


def serve(settings: EngineSettings) -> tuple[dict[str, Any], Callable[[], None]]:
    """Listen; `EngineFacts`, and what ends it."""
    model = OpenVINOModel(settings)
    url, stop = serve_model(model, AutoTokenizer.from_pretrained(settings.path), settings)
    return _facts(settings) | {"url": url}, stop


def open_bench(settings: EngineSettings) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """`EngineFacts`, and what runs a prompt once and gives `BenchRun`."""
    return _facts(settings), OpenVINOModel(settings).times


def _facts(settings: EngineSettings) -> dict[str, Any]:
    cache = paged_cache(Path(settings.path), settings.kv_dtype)
    return {
        "engine": f"OpenVINO GenAI {version('openvino-genai')}",
        "cache_dtype": cache["cache_dtype"],
        "cache_bytes_per_token": cache["bytes_per_token"],
        "cache_said_by": "the blocks of its compiled model",
    }
