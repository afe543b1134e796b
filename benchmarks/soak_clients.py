"""What clients of `kvlatent serve` do to it, one request a function: asked for, cancelled, too long, malformed, killed half-way.

    python benchmarks/soak_clients.py URL MODEL PROMPT     streams an answer until it is killed

Each function returns None where the server did what it should, else one sentence; so a run counts requests and keeps sentences.
"""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openai import APIStatusError, APITimeoutError, OpenAI

PROMPTS = (
    "import os\nimport sys\n\n\ndef ",
    "class Reader:\n    def __init__(self, ",
    "    for line in lines:\n        if ",
    "def test_",
    "    try:\n        return ",
    "# Copyright ",
    "    raise ValueError(",
    "        self.assertEqual(",
)
CONTEXT = 1024  # of the embedded model
TOKENS, LONG = 24, 160  # of an answer that is compared, and of one that is not heard to its end
_GREEDY = {"max_tokens": TOKENS, "temperature": 0}
_ALIVE_S = 30.0


def completion(client: OpenAI, model: str, prompt: str) -> str:
    """Greedy, in one piece."""
    return client.completions.create(model=model, prompt=prompt, **_GREEDY).choices[0].text


def streamed_completion(client: OpenAI, model: str, prompt: str) -> str:
    """Greedy, in the pieces of a stream."""
    parts = client.completions.create(model=model, prompt=prompt, **_GREEDY, stream=True)
    return "".join(part.choices[0].text for part in parts if part.choices)


def chat(client: OpenAI, model: str, prompt: str) -> str:
    """Greedy, in one piece."""
    messages: Any = [{"role": "user", "content": prompt}]
    return (
        client.chat.completions.create(model=model, messages=messages, **_GREEDY).choices[0].message.content
        or ""
    )


def streamed_chat(client: OpenAI, model: str, prompt: str) -> str:
    """Greedy, in the pieces of a stream."""
    messages: Any = [{"role": "user", "content": prompt}]
    parts = client.chat.completions.create(model=model, messages=messages, **_GREEDY, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


COMPARED: dict[str, Callable[[OpenAI, str, str], str]] = {
    "completion": completion,
    "streamed completion": streamed_completion,
    "chat": chat,
    "streamed chat": streamed_chat,
}


def sample(client: OpenAI, model: str, chance: random.Random) -> str | None:
    """Not greedy: there is an answer, and usage is counted."""
    answer = client.completions.create(
        model=model,
        prompt=chance.choice(PROMPTS),
        max_tokens=TOKENS,
        temperature=1.5,
        seed=chance.randrange(2**31),
    )
    counted = answer.usage is not None and answer.usage.completion_tokens > 0
    return None if counted else f"an answer without usage: {answer}"


def cancel_stream(client: OpenAI, model: str, chance: random.Random) -> str | None:
    """Hang up after some pieces."""
    parts = client.completions.create(
        model=model, prompt=chance.choice(PROMPTS), max_tokens=LONG, stream=True
    )
    for _ in zip(range(chance.randint(0, 12)), parts, strict=False):
        pass
    parts.close()
    return None


def cancel_request(client: OpenAI, model: str, chance: random.Random) -> str | None:
    """Hang up before there is an answer."""
    with contextlib.suppress(APITimeoutError):
        impatient = client.with_options(timeout=chance.uniform(0.005, 0.1))
        impatient.completions.create(model=model, prompt=chance.choice(PROMPTS), max_tokens=LONG)
    return None


def ask_too_long(client: OpenAI, model: str, chance: random.Random) -> str | None:
    """A prompt of more tokens than the context: 400, and a sentence with the context's length."""
    prompt = chance.choice(PROMPTS) * chance.randint(400, 800)
    asked: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 4,
        "stream": chance.random() < 0.5,
    }
    return refused(lambda: list(client.completions.create(**asked)), {400}, str(CONTEXT))


def ask_malformed(client: OpenAI, model: str, chance: random.Random) -> str | None:
    """What no server can answer: a 4xx status, and a sentence that names what is wrong."""
    path, body, codes, word = chance.choice(MALFORMED)
    return refused(lambda: client.post(path, body={"model": model, **body}, cast_to=object), codes, word)


MALFORMED: tuple[tuple[str, dict[str, Any], set[int], str], ...] = (
    ("/chat/completions", {"max_tokens": 4}, {400}, "messages"),
    ("/chat/completions", {"messages": "hello", "max_tokens": 4}, {400}, "messages"),
    ("/completions", {"max_tokens": 4}, {400}, "prompt"),
    ("/completions", {"prompt": "def ", "max_tokens": "many"}, {400}, ""),
    ("/completions", {"prompt": "def ", "temperature": "hot"}, {400}, ""),
    ("/nothing", {}, {404}, ""),
)


def refused(ask: Callable[[], object], codes: set[int], word: str) -> str | None:
    """Whether the server answers with one of the status codes and a message that has the word, and is no traceback."""
    try:
        answer = ask()
    except APIStatusError as error:
        said = (
            str(error.body.get("message", error.body))
            if isinstance(error.body, dict)
            else error.response.text
        )
        if error.status_code in codes and said and word in said and "Traceback" not in said:
            return None
        return f"status {error.status_code} instead of {sorted(codes)}, or not {word!r} in it: {said[:200]}"
    return f"an answer instead of one of {sorted(codes)} with {word!r}: {str(answer)[:200]}"


def kill_client(url: str, model: str, chance: random.Random) -> str | None:
    """A process that streams an answer, and ends by SIGKILL at a random moment of it."""
    command = [sys.executable, str(Path(__file__)), url, model, chance.choice(PROMPTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        process.wait(_ALIVE_S)
        return None if line else f"the client that was to be killed failed: {process.stderr.read()[-200:]}"


def stream_forever(url: str, model: str, prompt: str) -> None:
    """Stream answers, and say when the first piece was there."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    while True:
        for _ in client.completions.create(model=model, prompt=prompt, max_tokens=LONG, stream=True):
            print("streams", flush=True)


if __name__ == "__main__":
    stream_forever(*sys.argv[1:])
