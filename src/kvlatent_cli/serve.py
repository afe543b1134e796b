"""The command that answers clients: serve."""

from __future__ import annotations

import signal
import threading
from typing import Any

from .listings import list_pairs
from .named_models import cache_folder, read_model
from .options import Option, command, positional
from .session import Session

SERVED = positional(
    "model",
    "DIR",
    "A latent or an original checkpoint, what `kvlatent export` wrote, a GGUF file or smollm2.",
    read=read_model,
)
SERVING = (
    Option(
        "engine",
        "Engine to run; by default the first that is installed and takes the model, in this order.",
        "vllm|llama.cpp|openvino|transformers",
    ),
    Option("host", "Address to listen on.", default="127.0.0.1"),
    Option("port", "Port to listen on; 0 for any that is free.", "N", int, 8000),
    Option("context", "Tokens of a sequence; the model's by default.", "N", int),
    Option("kv_dtype", "Type of the cache, as the engine calls it, e.g. q8_0 or fp8.", "NAME"),
    Option("dtype", "Type of the matrices where the model has to be exported first.", "f32|f16|bf16|q8_0"),
)


@command(SERVED, *SERVING)
def serve(run: Session, given: dict[str, Any]) -> None:
    """Serve a model to clients of OpenAI (chat, completions, streaming) until interrupted; what runs is printed first."""
    from kvlatent.workflows.serve_checkpoint import start_server

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this process
    process, document = start_server(given.pop("model"), **given, cache=cache_folder(), progress=run.report)
    with process:
        run.close()
        for note in document["notes"]:
            run.say(f"passed over: {note}")
        if document["exported"] is not None:
            run.say(f"exported into {document['exported']}")
        run.show(document, list_pairs(_figures(document)), f"ready: {document['url']}/v1 (Ctrl-C ends it)")
        run.flush()
        try:
            process.wait()
        except KeyboardInterrupt:
            run.say("ended")


def _figures(document: dict[str, Any]) -> dict[str, str]:
    """What runs, and what its cache takes."""
    token, total = document["cache_bytes_per_token"], document.get("cache_bytes")
    size = "not said" if token is None else f"{token:,.0f} bytes a token"
    return {
        "model": document["model"],
        "engine": document["engine"],
        "context": f"{document['context']:,} tokens",
        f"cache ({document['cache_dtype']})": size
        + ("" if total is None else f", {total / 2**20:,.1f} MiB held"),
        "by": document["cache_said_by"],
    }
