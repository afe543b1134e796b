"""An engine in a process of its own: started with settings, known to be ready, gone when its block ends or its starter dies.

    python -P -m kvlatent.engines.engine_process MODULE serve|bench SETTINGS

MODULE, of this package, has `serve(settings)`, which gives `EngineFacts` and a function that ends it, and
`open_bench(settings)`, which gives `EngineFacts` and a function of `input_ids` and `new_tokens` to `BenchRun`. The process says on stdout, a JSON line each, what
runs, and then answers the lines that it is sent; its end of stdin is the end of both. What the engine itself prints goes to
stderr, where the starter keeps the last lines for the sentence that says why it failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Self

from kvlatent.jobs.record import Result

__all__ = ["BenchRun", "EngineFacts", "EngineProcess", "EngineSettings", "kept_stderr"]

_LINES_KEPT, _LOG_BYTES = 400, 2**26
_SECONDS_TO_STOP = 10.0
_SIGNS_OF_FAILURE = ("error", "failed", "unable", "cannot", "not support")


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs a model.

    Args:
        path: of what it loads.
        name: by which clients know the model.
        context: tokens of one sequence.
        kv_dtype: of the cache, as the engine calls it; None: its own default.
        host, port: where it listens; a bench does not.
        threads: of the engine; None: as many as there are processors for this process.
    """

    path: str
    name: str
    context: int
    kv_dtype: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    threads: int | None = None

    @property
    def num_threads(self) -> int:
        """Threads, once it is known for which machine."""
        return self.threads or len(os.sched_getaffinity(0))


class EngineFacts(Result):
    """What runs, by its own words.

    Attributes:
        engine: name and version.
        url: where it listens; None for a bench.
        cache_dtype: of keys and values.
        cache_bytes_per_token: as the engine reports it; None where it says nothing.
        cache_bytes: of all that it allocated; None where it allocates as it goes.
        cache_said_by: where the bytes are from.
    """

    engine: str
    url: str | None = None
    cache_dtype: str
    cache_bytes_per_token: float | None
    cache_bytes: float | None = None
    cache_said_by: str


class BenchRun(Result):
    """Seconds to read a prompt up to its next token, and of all the steps that each add one more; how many they are."""

    prefill_s: float
    decode_s: float
    steps: int


class EngineProcess:
    """A running engine; use it in a `with` block.

    Args:
        module: of this package.
        task: "serve" or "bench".
        settings: of the engine.

    Attributes:
        facts: `EngineFacts`, JSON-able.

    Raises:
        ValueError: it did not start; the sentence ends with its last words.
    """

    def __init__(self, module: str, task: str, settings: EngineSettings) -> None:
        self._log: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = subprocess.Popen(
            # -P: nothing in the working directory takes the place of a library.
            [sys.executable, "-P", "-m", __name__, module, task, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._drain = threading.Thread(target=self._keep_log, daemon=True)
        self._drain.start()
        try:
            self.facts = EngineFacts.checked(self._answer("start"))
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, input_ids: list[int], new_tokens: int) -> BenchRun:
        """Read a prompt into an empty cache and add tokens."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone, and the answer says why
            self._process.stdin.write(json.dumps({"input_ids": input_ids, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        return BenchRun.model_validate(self._answer("run"))

    def wait(self) -> None:
        """Return when the engine has ended by itself.

        Raises:
            ValueError: always, as it should not; the sentence ends with its last words.
        """
        self._process.wait()
        raise ValueError(f"the engine ended by itself ({self._last_words()}); start it again")

    def stop(self) -> None:
        """End the process, if need be by force."""
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._drain.join(_SECONDS_TO_STOP)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _answer(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_SECONDS_TO_STOP)
            self._drain.join(1.0)
            raise ValueError(f"the engine did not {what}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "mistake" in answer:
            raise ValueError(answer["mistake"])
        return answer

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log if line.strip()]
        telling = [line for line in lines if any(sign in line.lower() for sign in _SIGNS_OF_FAILURE)]
        return (telling or lines or [f"exit code {self._process.poll()}"])[-1]

    def _keep_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)


@contextmanager
def kept_stderr() -> Generator[Callable[[], str]]:
    """What goes to stderr inside the block, from other languages and processes as well, read by the function it yields."""
    with tempfile.TemporaryFile("w+b") as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), _LOG_BYTES, 0).decode(errors="replace")
        finally:
            os.dup2(before, 2)
            os.close(before)


def main(module: str, task: str, settings: str) -> None:
    """Run an engine until stdin ends."""
    say = _own_stdout()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both, and the starter ends this one
    engine = import_module(f"kvlatent.engines.{module}")
    given = EngineSettings(**json.loads(settings))
    try:
        if task == "serve":
            facts, stop = engine.serve(given)
            say(facts)
            sys.stdin.read()
            stop()
        else:
            facts, run = engine.open_bench(given)
            say(facts)
            for line in sys.stdin:
                say(run(**json.loads(line)))
    except ValueError as error:
        say({"mistake": str(error)})
    # Servers and pools of threads would wait for each other, and nothing here has to be written.
    os._exit(0)


def _own_stdout() -> Callable[[dict[str, Any]], None]:
    """Stdout for answers alone; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    return say


if __name__ == "__main__":
    main(*sys.argv[1:])
