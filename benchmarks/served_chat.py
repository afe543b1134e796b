"""Does a model with a smaller cache still answer? The same questions to servers of the original and of latent checkpoints.

    python benchmarks/served_chat.py --original DIR --latent DIR [DIR ...] [--engine transformers] [--dtype f32] --out FILE
    python benchmarks/served_chat.py --render FILE       the transcript, into FILE with the ending .md

Each is served by `kvlatent serve`, one after the other, and asked by the client of OpenAI, greedily, a conversation a question.
An answer is right where it holds one of the expected words as a word, in capitals or not. A cache still answers where its model
has at least four fifths as many right as the original. Bytes are what the engine reports.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from json_document import write_document
from openai import OpenAI

from kvlatent.checkpoints.load import load_config
from kvlatent.evaluation.speed.caches import cached_widths
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.record import environment, name_for_record

SHARE = 0.8
QUESTIONS = (
    ("What is the capital of France?", ("Paris",)),
    ("How many days are there in a week?", ("seven", "7")),
    ("Which planet do we live on?", ("Earth",)),
    ("What is the opposite of hot?", ("cold",)),
    ("Who wrote the play Romeo and Juliet?", ("Shakespeare",)),
    ("What do bees make?", ("honey",)),
    ("Which country is Tokyo the capital of?", ("Japan",)),
    ("What is frozen water called?", ("ice",)),
    ("My bicycle is red and my car is green. What colour is my bicycle?", ("red",)),
    ("Anna has a dog called Bruno. What is the name of the dog?", ("Bruno",)),
    ("The train leaves at nine and the bus at ten. When does the train leave?", ("nine", "9")),
    ("Repeat this word: lantern", ("lantern",)),
)
"""With the words of which an answer has to hold one; the last four have their answer in the question."""


def is_right(answer: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words is in it."""
    return any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in words)


def ask(url: str, model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Every question once."""
    found = []
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        for question, words in QUESTIONS:
            messages: Any = [{"role": "user", "content": question}]
            chosen = client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_tokens, temperature=0
            ).choices[0]
            answer = (chosen.message.content or "").strip()
            found.append({"question": question, "answer": answer, "is_right": is_right(answer, words)})
    return found


def served(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """What a server says of itself, and its answers; the server ends with this call."""
    words = ["serve", source, "--engine", args.engine, "--port", "0", "--json", "--context", str(args.context)]  # fmt: skip
    words += [f"--dtype={args.dtype}"] if args.dtype else []
    command = [sys.executable, "-m", "kvlatent_cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        text = ""
        for line in server.stdout:
            text += line
            if line == "}\n":
                break
        if not text:
            sys.exit(f"error: {source} was not served; {shlex.join(words)} says why")
        said = json.loads(text)
        try:
            answers = ask(said["url"], said["model"], args.max_tokens)
        finally:
            server.terminate()  # an interrupt is ignored by what a shell started in the background
    keys, values = zip(*cached_widths(load_config(source)), strict=True)
    kept = ("model", "engine", "cache_dtype", "cache_bytes_per_token", "cache_said_by")
    return {
        **{key: said[key] for key in kept},
        "mean_d_qk": round(sum(keys) / len(keys), 2),
        "mean_d_vo": round(sum(values) / len(values), 2),
        "sha256": identity(source),
        "right": sum(one["is_right"] for one in answers),
        "answers": answers,
    }


def verdict(servers: list[dict[str, Any]]) -> dict[str, Any]:
    """Which of them answer, and the smallest cache among those; the first is the original's."""
    needed = SHARE * servers[0]["right"]
    answering = [one for one in servers if one["right"] >= needed]
    smallest = min(answering, key=lambda one: one["cache_bytes_per_token"])
    return {
        "right_needed": needed,
        "answering": [one["model"] for one in answering],
        "smallest": smallest["model"],
    }


def render(document: dict[str, Any]) -> str:
    """The table, and the transcript (Markdown)."""
    servers = document["servers"]
    original = servers[0]["cache_bytes_per_token"]
    about = (
        f"`{document['command']}`: {servers[0]['engine']}, greedy, at most {document['max_tokens']} tokens an answer. Right is an "
        f"answer that holds the expected word; a cache still answers with at least {document['right_needed']:g} of {len(QUESTIONS)} right, "
        f"{SHARE:.0%} of what the original has."
    )
    lines = [
        "# Questions to served chats",
        "",
        about,
        "",
        "| model | mean d_qk/d_vo | cache bytes a token, by the engine | of the original's | right | still answers |",
        "|---|---|---|---|---|---|",
    ]
    for one in servers:
        size = one["cache_bytes_per_token"]
        lines.append(
            f"| {one['model']} | {one['mean_d_qk']:g}/{one['mean_d_vo']:g} | {size:,.0f} ({one['cache_dtype']}) | {size / original:.0%} | "
            f"{one['right']} of {len(QUESTIONS)} | {'yes' if one['model'] in document['answering'] else 'no'} |"
        )
    for number, (question, words) in enumerate(QUESTIONS):
        lines += ["", f"**{question}** ({' or '.join(words)})", ""]
        for one in servers:
            given = one["answers"][number]
            said = " ".join(given["answer"].split())
            lines.append(f"- {one['model']}, {'right' if given['is_right'] else 'wrong'}: {said}")
    return "\n".join(lines) + "\n"


def document_of(args: argparse.Namespace, servers: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found so far."""
    words = ["python", "benchmarks/served_chat.py", "--original", name_for_record(args.original), "--latent"]
    words += [*(one["model"] for one in servers[1:]), "--engine", args.engine]
    return {
        "benchmark": "served chat",
        "command": shlex.join(words),
        "max_tokens": args.max_tokens,
        **verdict(servers),
        "servers": servers,
        **environment("cpu"),
    }


def main() -> None:
    """Ask, or render what was answered."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render", type=Path, metavar="FILE")
    parser.add_argument("--original")
    parser.add_argument("--latent", nargs="+", default=[])
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--dtype", help="of what has to be exported for the engine")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.render:
        page = render(json.loads(args.render.read_text(encoding="utf-8")))
        args.render.with_suffix(".md").write_text(page, encoding="utf-8")
        return
    if not (args.original and args.latent):
        parser.error("give --original and --latent, or --render FILE")
    servers = []
    for source in (args.original, *args.latent):
        servers.append(served(args, source))
        print(
            f"{servers[-1]['model']}: {servers[-1]['right']} of {len(QUESTIONS)}", file=sys.stderr, flush=True
        )
        if args.out:  # a run that is cut short keeps what it has
            args.out.write_text(json.dumps(document_of(args, servers), indent=1) + "\n", encoding="utf-8")
    write_document(document_of(args, servers), args.out)


if __name__ == "__main__":
    main()
