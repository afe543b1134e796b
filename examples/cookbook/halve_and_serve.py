"""Halve a model's cache and serve it to a client of OpenAI's.

The conversion reads a few thousand tokens of prose, which is little (`--blocks 128 --steps 200` is a real run); the server is
transformers', since it needs nothing else. vLLM, llama.cpp and OpenVINO take the same model.
"""

import subprocess
import sys

from ingredients import halve, options, ready, say
from openai import OpenAI

QUESTION = "Name three colours."


def main() -> None:
    """Convert, serve, ask."""
    parser = options(__doc__)
    parser.add_argument("--max-tokens", type=int, default=24, help="of the answer")
    args = ready(parser)
    halve(args)
    say("$ kvlatent serve halved --engine transformers --port 0 &")
    server = subprocess.Popen(
        [sys.executable, "-m", "kvlatent_cli", "serve", "halved", "--engine", "transformers", "--port", "0"],
        cwd=args.folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = next((line for line in server.stdout if line.startswith("ready")), "")
        if not address:
            raise SystemExit("error: the server did not start")
        url = next(word for word in address.split() if word.startswith("http")).rstrip("/.,")
        client = OpenAI(base_url=url if url.endswith("/v1") else f"{url}/v1", api_key="none")
        name = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=args.max_tokens,
            temperature=0,
        )
        say(f"> {QUESTION}\n{(answer.choices[0].message.content or '').strip()}")
    finally:
        server.terminate()  # as Ctrl-C would
        server.wait(timeout=180)


if __name__ == "__main__":
    main()
