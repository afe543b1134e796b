"""What has no server of its own, behind the one of `transformers serve`: our latent models, and OpenVINO GenAI.

Upstream's handlers know the requests and answers of OpenAI's interface, and call a model's `generate`. Here it gets a model
that is loaded already, and four things that clients rely on: a request longer than the context is refused before it is
run, mistakes are errors as OpenAI writes them, a temperature is obeyed, and a stream ends with [DONE]. It is upstream's internals that are
built upon, of the server alone; `tests/test_serve.py` holds every server to the same contract.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

from kvlatent.checkpoints.weight_files import first_line
from kvlatent.engines.engine_process import EngineSettings
from kvlatent.model.sampling import sampling_options

__all__ = ["serve_model"]

_SECONDS_TO_LISTEN, _SECONDS_TO_STOP = 60.0, 5.0


def serve_model(model: Any, tokenizer: Any, settings: EngineSettings) -> tuple[str, Callable[[], None]]:
    """Listen; the address, and what ends it.

    Args:
        model: with upstream's `generate`, `generation_config` and `device`.
        tokenizer: with the chat template, if there is one.
        settings: name, host, port and context.
    """
    import uvicorn
    from transformers import logging

    logging.set_verbosity_error()
    server = uvicorn.Server(
        uvicorn.Config(
            _application(model, tokenizer, settings), settings.host, settings.port, log_level="error"
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + _SECONDS_TO_LISTEN
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise ValueError(
                f"the server does not listen on {settings.host}:{settings.port}; give another --port"
            )
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]

    def stop() -> None:
        server.should_exit = True
        thread.join(_SECONDS_TO_STOP)

    return f"http://{settings.host}:{port}", stop


def _application(model: Any, tokenizer: Any, settings: EngineSettings) -> Any:
    """Upstream's application, with our model in it."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.server import build_server

    managed, state = _managed(model, tokenizer, settings.name), _generation_state(settings.context)
    handlers = [
        type(handler.__name__, (_ending(handler, tokenizer),), {})(managed, state)
        for handler in (ChatCompletionHandler, CompletionHandler)
    ]
    absent: Any = SimpleNamespace(handle_request=_absent)
    application: Any = build_server(managed, handlers[0], handlers[1], absent, absent, absent, state)
    _answer_mistakes(application)
    return application


async def _absent(*_: Any) -> Any:
    from fastapi import HTTPException

    raise HTTPException(404, "this server has /v1/completions, /v1/chat/completions and /v1/models")


def _managed(model: Any, tokenizer: Any, name: str) -> Any:
    """Upstream's manager of models, of one that is loaded already."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import Modality

    class OneModel(ModelManager):
        def __init__(self) -> None:
            super().__init__(device="cpu")
            self.force_model = name

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
            return model, tokenizer

        def get_model_modality(self, *_: Any, **__: Any) -> Modality:
            return Modality.LLM

        @staticmethod
        def get_gen_models(*_: Any, **__: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": int(time.time()), "owned_by": "kvlatent"}]

    return OneModel()


def _generation_state(context: int) -> Any:
    """Upstream's state, whose manager refuses what does not fit the context, and generates no further than that."""
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    class Fitting(GenerateManager):
        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, *a: Any, **k: Any
        ) -> Any:
            _fit(inputs, gen_config, context)
            return super().generate_streaming(model, processor, inputs, gen_config, *a, **k)

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, *a: Any, **k: Any
        ) -> Any:
            _fit(inputs, gen_config, context)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, *a, **k)

    state = GenerationState()
    manager = Fitting()
    state.get_manager = lambda *_, **__: manager
    return state


def _fit(inputs: Any, generation_config: Any, context: int) -> None:
    from fastapi import HTTPException

    inputs.pop("token_type_ids", None)  # Llamas know none
    length = inputs["input_ids"].shape[-1]
    if not 0 < length < context:
        rule = f"a prompt has 1 to {context - 1} tokens, one less than the context of {context}"
        raise HTTPException(
            400, f"{rule}: got {length}; shorten it, or start the server with a longer --context"
        )
    generation_config.max_new_tokens = min(generation_config.max_new_tokens, context - length)


def _ending(handler: Any, tokenizer: Any) -> Any:
    """A handler whose streams end as OpenAI's do, and that samples where a temperature is asked for."""
    from fastapi import HTTPException

    class Ending(handler):
        def _streaming(self, *a: Any, **k: Any) -> Any:
            response = super()._streaming(*a, **k)
            response.body_iterator = _with_end(response.body_iterator)
            return response

        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            if "messages" in body and tokenizer.chat_template is None:
                raise HTTPException(400, "this model has no chat template; ask /v1/completions with a prompt")
            _check_messages(body)
            return await super().handle_request(body, request_id)

        def _build_generation_config(self, body: dict[str, Any], *a: Any, **k: Any) -> Any:
            config = super()._build_generation_config(body, *a, **k)
            if body.get("temperature"):
                config.update(**sampling_options(float(body["temperature"])))
            return config

    return Ending


def _check_messages(body: dict[str, Any]) -> None:
    from fastapi import HTTPException

    messages = body.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise HTTPException(
            400, f"messages is a list of objects with role and content: got {messages!r:.80}; send a list"
        )


async def _with_end(stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for chunk in stream:
        yield chunk
    yield "data: [DONE]\n\n"


def _answer_mistakes(application: Any) -> None:
    """Errors as OpenAI writes them: {"error": {"message", "type", "code"}}."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    def answer(code: int, message: str) -> Any:
        kind = "invalid_request_error" if code < 500 else "server_error"
        error = {"message": message, "type": kind, "code": code}
        return JSONResponse({"error": error}, status_code=code)

    @application.exception_handler(HTTPException)
    async def refused(_: Any, error: Any) -> Any:
        return answer(400 if error.status_code == 422 else error.status_code, str(error.detail))

    @application.exception_handler(RequestValidationError)
    async def malformed(_: Any, error: Any) -> Any:
        return answer(400, "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()))

    # Upstream reads a request field by field, and what is missing or of another type fails there.
    async def unusable(_: Any, error: Any) -> Any:
        if isinstance(error, KeyError):
            return answer(400, f"the request lacks the field {error.args[0]!r}")
        return answer(400, first_line(error))

    @application.exception_handler(Exception)
    async def failed(_: Any, error: Any) -> Any:
        return answer(500, f"{type(error).__name__}: {first_line(error)}")

    for kind in (KeyError, TypeError, ValueError):
        application.exception_handler(kind)(unusable)
