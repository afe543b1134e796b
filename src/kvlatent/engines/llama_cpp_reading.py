"""What llama.cpp makes of a GGUF file: logits through llama-cpp-python where it is installed, else log-probabilities.

xllamacpp, which needs no compiler, is a server: it gives the log-probabilities of the next token after a prompt, so one
request a position. Both read in a process of their own, with a cache in float32.
"""

from __future__ import annotations

import json
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor

from kvlatent.engines.export_options import check_installed

__all__ = ["engine_installed", "read_logits", "read_token_ids"]

_PACKAGES = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}
_SERVED_POSITIONS = 4  # each is a request that answers with the whole vocabulary


def engine_installed() -> str:
    """The installed package that runs llama.cpp, with its version: the one that gives logits comes first.

    Raises:
        ValueError: there is none; the sentence says how to install one.
    """
    package = _PACKAGES[_module()]
    return f"llama.cpp in {package} {version(package)}"


def _module() -> str:
    return check_installed("gguf", tuple(_PACKAGES), "pip install xllamacpp")


def read_logits(file: Path, input_ids: Tensor) -> Tensor:
    """Logits [1, T, V] of a row [1, T]; or log-probabilities of its last positions."""
    ids = input_ids[0].tolist()
    return (_logits if _module() == "llama_cpp" else _log_probabilities)(file, ids)[None]


def read_token_ids(file: Path, texts: list[str]) -> list[list[int]]:
    """The ids that the file's own tokenizer gives for texts, with what it puts around them; markup in them is text."""
    if _module() == "llama_cpp":
        llama: Any = _load(file, 8)
        return [llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    server = _serve(file, 8)
    return [_post(server, "/tokenize", content=text, add_special=True)["tokens"] for text in texts]


def _load(file: Path, length: int) -> Any:
    import llama_cpp

    plain: Any = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "n_gpu_layers": 0}
    return llama_cpp.Llama(str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False, **plain)


def _logits(file: Path, ids: list[int]) -> Tensor:
    llama = _load(file, len(ids))
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())


def _serve(file: Path, length: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = length, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0
    return xllamacpp.Server(params)


def _log_probabilities(file: Path, ids: list[int]) -> Tensor:
    server, rows = _serve(file, len(ids) + 8), []
    tokens = GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    asked = {
        "max_tokens": 1,
        "logprobs": len(tokens),
        "temperature": 1.0,
        "cache_prompt": True,
        # A token that is half a character is held back, and its probabilities with it; the bias comes after them.
        "logit_bias": [[next(i for i, text in enumerate(tokens) if text.isascii() and text.isalpha()), 1e4]],
    }
    for end in range(max(1, len(ids) - _SERVED_POSITIONS + 1), len(ids) + 1):
        answer = server.handle_completions({"prompt": ids[:end], **asked})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        row = torch.full((len(tokens),), torch.nan)
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[one["id"]] = one["logprob"]
        rows.append(row)
    return torch.stack(rows)


def _post(server: Any, path: str, **content: Any) -> Any:
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())
