"""llama.cpp on a GGUF file through `xllamacpp`: its own server for clients of OpenAI, and its own timings for a bench."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvlatent.engines.engine_process import EngineSettings, kept_stderr

__all__ = ["file_sizes", "open_bench", "serve"]

_DEFAULT_CACHE = "f16"
_SLOTS = 4  # requests at once, which share the context, as llama-server has it
_VERBOSITY = 4  # at less it does not say how large the cache is
_CACHE_SIZE = re.compile(r"llama_kv_cache: size =\s*([\d.]+) MiB \(\s*(\d+) cells")
_SECONDS_FOR_LOG = 5.0  # its log is written by a thread of its own


def serve(settings: EngineSettings) -> tuple[dict[str, Any], Callable[[], None]]:
    """Listen; `EngineFacts`, and what ends it."""
    server, facts = _load(settings, slots=_SLOTS)
    return facts | {"url": server.listening_address}, [
        server
    ].clear  # it listens as long as it is referred to


def open_bench(settings: EngineSettings) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """`EngineFacts`, and what runs a prompt once and gives `BenchRun`."""
    server, facts = _load(settings, slots=1)

    def run(input_ids: list[int], new_tokens: int) -> dict[str, Any]:
        asked = {
            "prompt": input_ids,
            "max_tokens": new_tokens + 1,  # the first comes out of the prompt
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer: Any = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise ValueError(f"llama.cpp did not run the prompt: {answer.get('error', answer)}")
        said = answer["timings"]
        return {
            "prefill_s": said["prompt_ms"] / 1e3,
            "decode_s": said["predicted_ms"] / 1e3,
            "steps": said["predicted_n"] - 1,
        }

    return facts, run


def _load(settings: EngineSettings, *, slots: int) -> tuple[Any, dict[str, Any]]:
    xllamacpp: Any = import_module("xllamacpp")  # a compiled module without types
    params = xllamacpp.CommonParams()
    params.model.path = settings.path
    params.model_alias = {settings.name}
    params.n_ctx, params.n_parallel, params.kv_unified = settings.context, slots, True
    params.n_gpu_layers, params.fit_params = -1, False  # all layers where there is a GPU; lengths as given
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.num_threads
    params.hostnames, params.port = [settings.host], settings.port
    kind = settings.kv_dtype or _DEFAULT_CACHE
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}")
    params.warmup, params.verbosity = False, _VERBOSITY
    params.cache_ram_mib = (
        0  # else it keeps caches of earlier prompts, up to 8 GiB of them beside the one it tells of
    )
    server, log = _logged(lambda: xllamacpp.Server(params))
    size, cells = 0.0, 0
    for one in _CACHE_SIZE.finditer(log):  # one for layers with windows, one for those without
        size, cells = size + float(one[1]) * 2**20, max(cells, int(one[2]))
    return server, {
        "engine": f"llama.cpp in xllamacpp {version('xllamacpp')}",
        "cache_dtype": kind,
        "cache_bytes_per_token": size / cells,
        "cache_bytes": size,
        "cache_said_by": "its log at start",
    }


def _logged(load: Callable[[], Any]) -> tuple[Any, str]:
    """What `load` gives, and what was logged until the size of the cache stood there."""
    with kept_stderr() as read:
        try:
            server = load()
        except RuntimeError as error:
            raise ValueError(f"llama.cpp does not load it: {_reason(read()) or error}") from error
        until = time.monotonic() + _SECONDS_FOR_LOG
        while not _CACHE_SIZE.search(log := read()):
            if time.monotonic() > until:
                raise ValueError(
                    f"llama.cpp in xllamacpp {version('xllamacpp')} does not say how large its cache is; "
                    "pip install xllamacpp==2026.10.11549"
                )
            time.sleep(0.01)
    return server, log


def _reason(log: str) -> str:
    """The first line that tells of an error."""
    lines = [
        line for line in log.splitlines() if re.search(r"\bE\b.*(error|failed|unsupported|require)", line)
    ]
    return re.sub(r"^[\d.]+ E ", "", lines[0]).strip() if lines else ""


def file_sizes(file: Path) -> tuple[int, int, int]:
    """Context in tokens, widths of keys and of values that a GGUF file is made for.

    Raises:
        ValueError: it is damaged, or does not say.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        arch = fields["general.architecture"].contents()
        said = {name: field.contents() for name, field in fields.items() if name.startswith(f"{arch}.")}
        heads = said[f"{arch}.attention.head_count"]
        heads = max(heads) if isinstance(heads, list) else heads
        width = said[f"{arch}.embedding_length"] // heads
        lengths = [said.get(f"{arch}.attention.{side}_length", width) for side in ("key", "value")]
        return int(said[f"{arch}.context_length"]), int(lengths[0]), int(lengths[1])
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{file} is no GGUF file of a model ({error}); download or export it again"
        ) from error
