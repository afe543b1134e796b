"""Run every recipe of the cookbook, keep what each printed, and write the page that shows both.

    python examples/cookbook/cook_all.py [--only NAME,...] [--page-only] [any option of the recipes]

What a recipe printed lies in `outputs`, a file a recipe; docs/cookbook.md is made of those files and of the scripts' own words.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

from kvlatent.jobs.atomic import write_text

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent.parent / "docs" / "cookbook.md"
RECIPES = {
    "halve_and_serve": "Halve SmolLM2 and serve it",
    "plan_a_budget": "Plan for a budget",
    "stack_with_a_quantised_cache": "Stack with a quantised cache",
    "train_back_from_a_quarter": "Train back from a quarter",
    "fine_tune_and_export": "Fine-tune with TRL and export",
}
_HEAD = """# Cookbook

Five scripts that run on two cores, with a model out of the package index (SmolLM2-135M-Instruct, from 4-bit weights). Each prints
the commands that it types. What stands under them is what they printed, on two cores that other work shared; the settings
are small, so that all five take minutes, and the figures are worse than those of a real run ([log](log.md)).
`make cookbook` runs them again, and this page is written from what they print.
"""
_NOT_RUN = "<!-- not run: takes minutes and a model of 93 MB; tests/test_cookbook.py runs it on a toy -->"


def cook(name: str, words: list[str]) -> None:
    """Run a recipe and keep its output, and how long it took.

    Raises `SystemExit` where it fails; the output before stays.
    """
    start = time.monotonic()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {name} ended with {done.returncode}: {done.stdout[-500:]}")
    minutes = (time.monotonic() - start) / 60
    (FOLDER / "outputs").mkdir(exist_ok=True)
    write_text(FOLDER / "outputs" / f"{name}.txt", f"{done.stdout.rstrip()}\n\n({minutes:.1f} minutes)\n")


def page() -> str:
    """docs/cookbook.md, from the scripts and their outputs."""
    parts = [_HEAD]
    for name, title in RECIPES.items():
        said = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
        file = FOLDER / "outputs" / f"{name}.txt"
        parts += [f"## {title}\n\n{said}\n"]
        parts += [f"{_NOT_RUN}\n```bash\npython examples/cookbook/{name}.py\n```\n"]
        if file.is_file():
            parts += [f"```text\n{file.read_text(encoding='utf-8').rstrip()}\n```\n"]
        else:
            parts += ["It has not been run for this page yet.\n"]
    return "\n".join(parts)


def main() -> None:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument(
        "--page-only", action="store_true", help="write the page of the outputs that are there"
    )
    args, words = parser.parse_known_args()
    if unknown := [name for name in args.only if name not in RECIPES]:
        parser.error(f"--only takes {', '.join(RECIPES)}: got {', '.join(unknown)}")
    for name in [] if args.page_only else args.only:
        cook(name, words)
        write_text(PAGE, page())
    write_text(PAGE, page())


if __name__ == "__main__":
    main()
