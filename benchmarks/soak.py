"""Minutes of mixed load on `kvlatent serve`: does its memory stay flat, and does it answer as before the load?

    python benchmarks/soak.py --minutes 30 [--engines llama.cpp transformers] [--workers 2] [--seed 0] [--out FILE]

The embedded model is given a chat template, converted to half its cache and served by each engine at once, as users type it, on
the loopback. Greedy answers of every prompt in four forms (completion, chat, both streamed) are asked for first, and compared
throughout. Beside them: sampled answers, streams and requests that are cancelled, prompts longer than the context, malformed
requests, and clients in a process of their own that are killed half-way (`soak_clients.py`). The resident size is that of
the command and the engine's process together; the first fifth of the time is warm-up, and growth is the median of the last
fifth over the median of the second one. Open files, sockets and threads are counted likewise. One JSON document goes to stdout; exit code 1 where anything was wrong.
"""

import argparse
import json
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import soak_clients
from json_document import write_document
from openai import OpenAI

from kvlatent.jobs.record import environment
from kvlatent.text.standard_library import model_path

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
GROWTH_ALLOWED = 0.02
HELD_ALLOWED = 8  # connections open at the moment
_EVERY_S, _PAUSE_S, _REQUEST_S = 2.0, 0.05, 120.0
_SENTENCES_KEPT = 20
_CALLS: dict[str, tuple[int, Callable[..., str | None]]] = {
    "sampled": (2, soak_clients.sample),
    "cancelled stream": (3, soak_clients.cancel_stream),
    "cancelled request": (3, soak_clients.cancel_request),
    "over-long prompt": (2, soak_clients.ask_too_long),
    "malformed": (2, soak_clients.ask_malformed),
    "killed client": (1, soak_clients.kill_client),
}  # how often of 25, and what; the others are answers that are compared
_COMPARED = 12


def make_checkpoint(folder: Path) -> Path:
    """The embedded model with a chat template, at half its cache."""
    original, latent = folder / "original", folder / "stdlib-llama"
    shutil.copytree(model_path(), original)
    (original / "chat_template.jinja").write_text(TEMPLATE)
    words = [
        "convert",
        original,
        "--out",
        latent,
        "--kv",
        "0.5",
        "--preset",
        "own-frequency",
        "--table",
        "model",
    ]
    subprocess.run(
        [sys.executable, "-m", "kvlatent_cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )
    return latent


class Served:
    """`kvlatent serve` of an engine, its answers before the load, and what was counted under it.

    Args:
        checkpoint: to serve.
        engine: that runs it.
        log: where the command's words go.
    """

    def __init__(self, checkpoint: Path, engine: str, log: Path) -> None:
        self.engine, self.model = engine, checkpoint.name
        self.counts: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.sentences: list[str] = []
        self.samples: list[
            tuple[float, int, int]
        ] = []  # seconds since the start, bytes, open files and threads
        self._lock = threading.Lock()
        words = ["serve", str(checkpoint), "--engine", engine, "--port", "0", "--json"]
        words += ["--kv-dtype", "f32"] if engine == "llama.cpp" else []
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvlatent_cli", *words],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                break
        if not text:
            raise SystemExit(f"{engine} was not served: {log.read_text()[-400:]}")
        self.said: dict[str, Any] = json.loads(text)
        self.url = f"{self.said['url']}/v1"
        with self.client() as client:
            self.expected = {
                (form, prompt): ask(client, self.model, prompt)
                for form, ask in soak_clients.COMPARED.items()
                for prompt in soak_clients.PROMPTS
            }

    def client(self) -> OpenAI:
        """One that does not try again."""
        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=_REQUEST_S)

    def load(self, until: float, chance: random.Random) -> None:
        """One request after the other, by chance, to that time of `time.monotonic`."""
        kinds = ["compared"] * _COMPARED + [kind for kind, (often, _) in _CALLS.items() for _ in range(often)]
        with self.client() as client:
            while time.monotonic() < until and self.process.poll() is None:
                kind = chance.choice(kinds)
                try:
                    sentence = (
                        self._compare(client, chance)
                        if kind == "compared"
                        else self._call(kind, client, chance)
                    )
                except Exception as error:  # noqa: BLE001 - whatever it was, it is a finding
                    sentence = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.counts[kind] += 1
                    if sentence is not None:
                        self.wrong[kind] += 1
                        self.sentences.append(f"{kind}: {sentence}")
                time.sleep(_PAUSE_S)

    def _compare(self, client: OpenAI, chance: random.Random) -> str | None:
        form, prompt = chance.choice(list(self.expected))
        found, expected = soak_clients.COMPARED[form](client, self.model, prompt), self.expected[form, prompt]
        return None if found == expected else f"{form} of {prompt!r}: {found!r} instead of {expected!r}"

    def _call(self, kind: str, client: OpenAI, chance: random.Random) -> str | None:
        _, call = _CALLS[kind]
        return call(self.url if kind == "killed client" else client, self.model, chance)

    def sample(self, since: float) -> None:
        """Note the resident size of the command and of the engine."""
        try:
            command = psutil.Process(self.process.pid)
            processes = (command, *command.children(recursive=True))
            size = sum(one.memory_info().rss for one in processes)
            held = sum(one.num_fds() + one.num_threads() for one in processes)
        except psutil.NoSuchProcess:
            return  # it ended, which `end` tells
        self.samples.append((time.monotonic() - since, size, held))

    def end(self) -> dict[str, Any]:
        """Whether it still lives and answers; how it ends when it is asked to; all that was counted."""
        lived = self.process.poll() is None
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._log.close()
        return {
            "engine": self.said["engine"],
            "cache_dtype": self.said["cache_dtype"],
            "requests": dict(self.counts),
            "wrong": dict(self.wrong),
            "sentences": self.sentences[:_SENTENCES_KEPT],
            "lived": lived,
            "exit_code": code,
            **growth_of(self.samples),
        }


def growth_of(samples: list[tuple[float, int, int]]) -> dict[str, Any]:
    """Medians of the second and of the last fifth of the time, and how much more the latter is; of memory one a tenth, too."""
    end = samples[-1][0]

    def median(what: int, start: float, stop: float) -> float:
        return statistics.median(one[what] for one in samples if start * end <= one[0] <= stop * end)

    return {
        "resident_mib": [round(median(1, part / 10, (part + 1) / 10) / 2**20, 1) for part in range(10)],
        "growth": round(median(1, 0.8, 1.0) / median(1, 0.2, 0.4) - 1, 4),
        "files_and_threads": [median(2, 0.2, 0.4), median(2, 0.8, 1.0)],
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Serve, load, sample, end."""
    checkpoint = make_checkpoint(folder)
    served = [Served(checkpoint, engine, folder / f"{engine}.log") for engine in args.engines]
    since = time.monotonic()
    until = since + 60 * args.minutes
    threads = [
        threading.Thread(target=one.load, args=(until, random.Random(f"{args.seed} {one.engine} {number}")))
        for one in served
        for number in range(args.workers)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for one in served:
            one.sample(since)
        time.sleep(_EVERY_S)
    return {"minutes": round((time.monotonic() - since) / 60, 2), "servers": [one.end() for one in served]}


def is_flawless(server: dict[str, Any]) -> bool:
    """Nothing wrong, memory flat, no file, socket or thread kept, alive to the end and ended when asked."""
    before, after = server["files_and_threads"]
    flat = server["growth"] < GROWTH_ALLOWED and after <= before + HELD_ALLOWED
    return not server["wrong"] and flat and server["lived"] and server["exit_code"] == 0


def main() -> None:
    """Measure, print, fail where anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--engines", nargs="+", default=["llama.cpp", "transformers"])
    parser.add_argument("--workers", type=int, default=2, help="clients at once, of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder:
        found = measure(args, Path(folder))
    flawless = all(map(is_flawless, found["servers"]))
    asked = {"minutes": args.minutes, "engines": args.engines, "workers": args.workers, "seed": args.seed}
    command = shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]])
    document = {
        "benchmark": "soak",
        "command": command,
        "asked": asked,
        "flawless": flawless,
        **found,
        **environment("cpu"),
    }
    write_document(document, args.out)
    sys.exit(0 if flawless else 1)


if __name__ == "__main__":
    main()
