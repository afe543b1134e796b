"""What a calibrated conversion costs, nothing trained: the targets, baselines of other papers, ablations and curves.

    python benchmarks/conversion.py --out DIR [--model DIR --data TRAINING_TEXT --eval HELD_OUT_TEXT]
    python benchmarks/conversion.py --out DIR --table [--collect FILE.json]

Without --model it is the embedded model, calibrated on the standard library modules it saw and measured on those it
did not. Every cell is one JSON file in --out; a finished one is not repeated. `--cells 'ours-*-aligned-seed0'` runs
some of them (shell patterns, several allowed), `--list` names them. Each seed draws its own calibration blocks.
"""

import argparse
import json
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from conversion_cells import Cell, all_cells
from conversion_costs import COSTS, measure_cost
from conversion_setting import Setting, source_hash
from conversion_tables import markdown

from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.perplexity import perplexity, perplexity_ratio
from kvlatent.jobs.atomic import write_text
from kvlatent.jobs.record import environment
from kvlatent.planning.width_plan import plan
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.latent_config import choose


def command(args: argparse.Namespace, cell: str) -> str:
    """A command that repeats the cell, every path by its use."""
    words = ["python benchmarks/conversion.py --out DIR"]
    if args.model is not None:
        words.append("--model MODEL --data TRAINING_TEXT --eval HELD_OUT_TEXT")
    if args.other_data is not None:
        words.append("--other-data OTHER_TEXT")
    for name in ("eval_tokens", "blocks", "block_size", "align", "threads"):
        words.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    return " ".join([*words, "--seeds", *map(str, args.seeds), f"--cells {cell}"])


def run_cell(setting: Setting, cell: Cell) -> dict[str, Any]:
    """Convert and measure; the figures of one cell."""
    model, widths = setting.model, setting.widths(cell)
    replaced = {"align": setting.args.align, **cell.choices} if cell.preset == "calibrated" else cell.choices
    choices = resolve_choices(cell.preset, **replaced)
    statistics, seconds = (None, 0.0)
    if choices.needs_statistics:
        statistics, seconds = setting.statistics(cell)
    if cell.per_layer:
        assert statistics is not None
        share = sum(cell.widths) / 128
        found = plan(statistics, share, table=choices.table, per_layer=True, aligned=choices.align > 0)
        widths = (found.d_qk, found.d_vo)
    config = None
    if cell.rule is not None:
        config = choose(model.config, *widths, choices, pairs=setting.pairs(cell, widths[0]))
    start = time.perf_counter()
    sizes = {"d_qk": widths[0], "d_vo": widths[1]} if config is None else {}
    latent = convert(model, config, **sizes, choices=choices, statistics=statistics, seed=cell.seed)
    converting = time.perf_counter() - start
    measured = perplexity(latent, setting.eval_blocks)
    ratio, error = perplexity_ratio(measured, setting.original)
    return {
        "d_qk": widths[0],
        "d_vo": widths[1],
        "choices": vars(choices) | ({"keys": cell.rule} if cell.rule else {}),
        "text": cell.text,
        "calibration_tokens": 0 if statistics is None else statistics.tokens,
        "seed": cell.seed,
        "ratio": ratio,
        "ratio_standard_error": error,
        "perplexity": measured.perplexity,
        "original_perplexity": setting.original.perplexity,
        "tokens": measured.tokens,
        "calibration_seconds": round(seconds, 2),
        "conversion_seconds": round(converting, 2),
    }


def run(setting: Setting, cells: list[Cell], costs: list[str]) -> None:
    """All unfinished cells, in order."""
    todo: list[Cell | str] = [*cells, *costs]
    for number, cell in enumerate(todo, 1):
        name = cell if isinstance(cell, str) else cell.name
        path = setting.out / f"{name}.json"
        if path.is_file():
            continue
        try:
            row = measure_cost(setting, cell) if isinstance(cell, str) else run_cell(setting, cell)
        except ValueError as error:  # an impossible width is a result: say why
            row = {"impossible": str(error)}
        record = {"cell": name, **row, "command": command(setting.args, name), "source": source_hash()}
        record |= {"sha256": {use: setting.about[use] for use in ("model", "data", "eval")}}
        write_text(path, json.dumps({**record, **environment("cpu")}, indent=1) + "\n")
        shown = {k: v for k, v in row.items() if k in ("ratio", "impossible", "conversion_seconds")}
        print(f"[{number}/{len(todo)}] {name} {shown or row}", flush=True)


def finished(out: Path) -> dict[str, dict[str, Any]]:
    """All finished cells of a folder by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def collect(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """One file of all cells; what they share is said once."""
    rows = {name: dict(cell) for name, cell in cells.items()}
    shared = {}
    for key in ("sha256", "python", "versions", "machine", "source"):
        values = [row.get(key) for row in rows.values()]
        if values and all(value == values[0] for value in values):
            shared[key] = values[0]
            for row in rows.values():
                row.pop(key, None)
    write_text(path, json.dumps({"cells": rows, **shared}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="results folder, one JSON file a cell")
    parser.add_argument("--work", type=Path, help="statistics and blocks; default OUT/work")
    parser.add_argument("--model", type=Path, help="default: the embedded model and its texts")
    parser.add_argument("--data", type=Path, help="text to calibrate on")
    parser.add_argument("--eval", type=Path, help="text to measure on")
    parser.add_argument("--other-data", type=Path, help="another text to calibrate on")
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--blocks", type=int, default=128, help="of calibration")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--align", type=int, default=200, help="steps of alignment where it is on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", action="append", help="shell pattern of names; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--table", action="store_true", help="print tables of the finished cells and stop")
    parser.add_argument("--collect", type=Path, help="with --table: all finished cells in one file")
    args = parser.parse_args()
    if args.model is not None and (args.data is None or args.eval is None):
        parser.error("--model needs --data and --eval")
    return args


def main() -> None:
    args = parse()
    if args.table:
        cells = finished(args.out)
        print(markdown(cells))
        if args.collect is not None:
            collect(cells, args.collect)
        return
    patterns = args.cells or ["*"]
    cells = [
        cell
        for cell in all_cells(args.seeds, other=args.other_data is not None)
        if any(fnmatch(cell.name, pattern) for pattern in patterns)
    ]
    costs = [name for name in COSTS if any(fnmatch(name, pattern) for pattern in patterns)]
    if args.list:
        print("\n".join([cell.name for cell in cells] + costs))
        return
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run(Setting(args), cells, costs)


if __name__ == "__main__":
    main()
