"""What the recipes of this folder share: their options, a text, the halved model, and a way to show a command and run it.

A recipe is a script. It prints what it types and what comes back, works in --folder, and makes nothing twice that lies there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

from kvlatent.text.library_prose import prose_documents

ROOT = Path(__file__).resolve().parent.parent.parent
_CHARACTERS = 200_000  # of a text: what is held out of it is measured, which takes longer than the conversion
DEFAULT_FOLDER = ROOT / "build" / "cookbook"


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every recipe has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a directory, or smollm2 from the package index")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="to work in")
    parser.add_argument(
        "--blocks", type=int, default=48, help="of 512 tokens to calibrate on; a real run takes 128"
    )
    parser.add_argument("--steps", type=int, default=24, help="of alignment a layer; a real run takes 200")
    parser.add_argument("--width", type=int, default=32, help="half of a head's, of keys and of values")
    return parser


def ready(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as given, in a folder that holds the texts: `text.jsonl` to read and `held_out.jsonl` to measure on."""
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    if Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    for name, split in (("text", "train"), ("held_out", "held_out")):
        file = args.folder / f"{name}.jsonl"
        if not file.is_file():
            documents, lines, written = prose_documents(split), [], 0
            random.Random(0).shuffle(documents)
            while documents and written < _CHARACTERS:
                written += len(documents[-1])
                lines.append(json.dumps({"text": documents.pop()}) + "\n")
            file.write_text("".join(lines), encoding="utf-8")
    return args


def say(text: str) -> None:
    """Print a line at once, before what a command prints."""
    print(text, flush=True)


def run(args: argparse.Namespace, line: str) -> None:
    """Show a command, run it in the folder, show what it prints on stdout; progress and warnings stay on stderr.

    Raises `SystemExit` where it fails.
    """
    shown = line.replace(args.model, Path(args.model).name).replace(f"{ROOT}{os.sep}", "")
    say(f"$ {shown}")
    words = shlex.split(line)
    program = {"kvlatent": [sys.executable, "-m", "kvlatent_cli"], "python": [sys.executable]}[words[0]]
    done = subprocess.run(
        [*program, *words[1:]], cwd=args.folder, stdout=subprocess.PIPE, text=True, check=False
    )
    for kept in done.stdout.splitlines():
        say(kept.rstrip().replace(f"{args.folder}{os.sep}", ""))
    say("")
    if done.returncode:
        raise SystemExit(f"error: {words[0]} ended with {done.returncode}")


def halve(args: argparse.Namespace) -> Path:
    """The model at half its cache, in `halved`: the same widths everywhere and one rotary table, which every engine takes."""
    if not (args.folder / "halved").is_dir():
        run(
            args,
            f"kvlatent convert {args.model} --data text.jsonl --out halved --d-qk {args.width} --d-vo {args.width} "
            f"--table model --blocks {args.blocks} --align {args.steps} --global-steps {args.steps}",
        )
    return args.folder / "halved"
