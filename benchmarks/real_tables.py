"""The baseline tables of a method on a real model: one command, one JSON file a row, several processes at once.

    python benchmarks/real_tables.py --model smollm2 --texts DIR --tasks DIR [--only PATTERN] [--list] [--render]

A call that was killed goes on when it is repeated, and several processes with the same --out share the rows. What the
folders lack (of texts wikitext2_test.txt, tinystories_valid.txt, of tasks any) is an empty column, and is measured by a
later call that finds it. Rows *-aligned-* are the method of the first tables, for good; *-passed-* is all that the calibrated
conversion does, with --align and --global-steps steps. --render writes OUT.md, where both stand side by side, OUT.svg (quality
against bytes of cache) and OUT_minutes.svg.
"""

import argparse
import sys
from pathlib import Path

import torch

from kvlatent.checkpoints.load import load_config
from kvlatent.jobs.atomic import write_text
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.families import head_dim_of
from kvlatent_cli.named_models import model_argument
from kvlatent_lab.baseline.baseline_run import Baseline, Request, pick_rows
from kvlatent_lab.baseline.columns import Sizes
from kvlatent_lab.baseline.finished_rows import read_finished
from kvlatent_lab.baseline.markdown_table import render_markdown
from kvlatent_lab.baseline.pictures import draw_bytes, draw_minutes
from kvlatent_lab.baseline.table_rows import Steps, TableRow, table_rows

RESULTS = Path(__file__).with_name("results")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=model_argument, required=True, help="directory or hub id of the original, or smollm2"
    )
    parser.add_argument(
        "--texts", type=Path, help="folder of fineweb_train.jsonl, fineweb_valid.jsonl and other texts"
    )
    parser.add_argument("--tasks", type=Path, help="folder of question sets")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_tables")
    parser.add_argument("--work", type=Path, default=Path("build/real_tables"))
    parser.add_argument(
        "--only", metavar="PATTERN", help="rows whose name matches, several separated by commas"
    )
    parser.add_argument("--list", action="store_true", help="name the rows, most telling first, and stop")
    parser.add_argument(
        "--render",
        action="store_true",
        help="write OUT.md and its pictures from the rows that exist, and stop",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to measure in")
    parser.add_argument("--train-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of torch in this process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calibration-blocks", type=int, default=128)
    parser.add_argument("--calibration-block-size", type=int, default=512)
    for name, of in (("align", "alignment, a layer"), ("global_steps", "the global pass")):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Steps(), name),
            help=f"steps of {of}, in rows *-passed-* (default %(default)s, the preset's)",
        )  # fmt: skip
    parser.add_argument("--rate", type=float, help="of training; left out, the best of short runs")
    parser.add_argument("--pilot-tokens", type=int, default=32_768, help="of each of these runs")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if not (args.list or args.render) and (args.texts is None or args.tasks is None):
        parser.error("--texts and --tasks are needed to measure; --list and --render do without")
    return args


def requested(args: argparse.Namespace) -> Request:
    """The same as a request."""
    overrides = [
        f"calibration.blocks={args.calibration_blocks}",
        f"data.block_size={args.calibration_block_size}",
        f"dtype={args.train_dtype}",
        f"seed={args.seed}",
    ]
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    names = ("model", "texts", "tasks", "out", "work", "dtype", "pilot_tokens", "rate", "device")
    given = {name: getattr(args, name) for name in names}
    return Request(sizes=sizes, recipe=Recipe.load(None, overrides), steps=steps_of(args), **given)


def steps_of(args: argparse.Namespace) -> Steps:
    """Of the new method."""
    return Steps(args.align, args.global_steps)


def main() -> None:
    """List, render or measure; what is wrong is said in one sentence."""
    args = arguments()
    try:
        work(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def work(args: argparse.Namespace) -> None:
    """List, render or measure."""
    rows = table_rows(head_dim_of(load_config(str(args.model))), args.seed, steps_of(args))
    if args.list:
        for row in pick_rows(rows, args.only):
            print(row.name, "(done)" if (args.out / f"{row.name}.json").is_file() else "")
    elif args.render:
        print(*render(args.out, pick_rows(rows, args.only)), sep="\n")
    else:
        torch.set_num_threads(args.threads)
        print(*Baseline(requested(args), Progress.of(say)).until_done(args.only), sep="\n")


def render(out: Path, rows: list[TableRow]) -> list[Path]:
    """Write the pictures and the markdown of finished rows beside their folder; returns the paths of what was written."""
    found = read_finished(out, rows)
    pictures = {}
    for about, draw, end in (
        ("Quality against bytes of cache", draw_bytes, ".svg"),
        ("Quality against minutes of making, at half the cache", draw_minutes, "_minutes.svg"),
    ):
        if draw(found, path := out.with_name(out.name + end)):
            pictures[about] = path
    table = out.with_name(f"{out.name}.md")
    write_text(table, render_markdown(found, {about: path.name for about, path in pictures.items()}))
    return [table, *pictures.values()]


def say(step: str, done: int = 0, total: int = 0, note: str = "") -> None:
    """Tell of a step's begin and of every tenth part, on standard error."""
    if not done or done == total or (total and done * 10 // total != (done - 1) * 10 // total):
        print(f"{step}: {done}/{total} {note}" if total else step, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
