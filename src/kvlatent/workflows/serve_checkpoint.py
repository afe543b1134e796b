"""A server for clients of OpenAI on whatever a model is: the engine chosen, what it needs exported, the port looked at first."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from kvlatent.engines.engine_process import EngineProcess, EngineSettings
from kvlatent.jobs.progress import Progress, Report
from kvlatent.workflows.engine_choice import choose_runnable, foresee_runnable

__all__ = ["start_server"]


def start_server(
    source: str | Path,
    *,
    cache: Path,
    engine: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    context: int | None = None,
    kv_dtype: str | None = None,
    dtype: str | None = None,
    progress: Progress | Report | None = None,
) -> tuple[EngineProcess, dict[str, Any]]:
    """Start a server, and say what runs; it answers when this returns. End it with `stop`, or by a `with` block.

    Args:
        source, engine, cache, dtype: see `choose_runnable`.
        host, port: where it listens; port 0: any that is free.
        context: tokens of a sequence; None: the model's.
        kv_dtype: of the cache, as the engine calls it.

    Returns:
        The process, and a JSON-able dict {"model", "engine", "url", "context", "cache_dtype", "cache_bytes_per_token",
        "cache_bytes", "cache_said_by", "exported", "notes"}.

    Raises:
        ValueError, FileNotFoundError: one sentence naming what is wrong and what to do.
    """
    told = Progress.of(progress)
    port = _free_port(host, port)
    if (foreseen := foresee_runnable(source, engine)) is not None:
        foreseen.check_context(context)
        foreseen.check_kv_dtype(None if engine is None else kv_dtype)
    runnable = choose_runnable(source, engine, cache, dtype=dtype, progress=told)
    settings = EngineSettings(
        path=runnable.path,
        name=runnable.name,
        context=runnable.check_context(context),
        kv_dtype=runnable.check_kv_dtype(kv_dtype),
        host=host,
        port=port,
    )
    told.report("start", note=runnable.runner.name)
    process = EngineProcess(runnable.runner.module, "serve", settings)
    document = {
        "model": runnable.name,
        "context": settings.context,
        **process.facts,
        "exported": runnable.path if runnable.was_exported else None,
        "notes": list(runnable.notes),
    }
    return process, document


def _free_port(host: str, port: int) -> int:
    """The port, known to be free; one that is, for 0.

    Raises:
        ValueError: it is taken, or not this machine's to give.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"a port is 0 (any) to {2**16 - 1}: got {port}; try --port 8000")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ValueError(
            f"cannot listen on port {port} of {host} ({error.strerror}); give another --port or --host"
        ) from error
