"""The tables of docs/reproducing-the-paper.md, from what the studies left in benchmarks/results.

    python benchmarks/paper_tables.py [--results DIR] [--table NAME]

A study of a model lies in study_NAME_MODEL, or in study_NAME_trained_MODEL where tokens were added to one that trains
nothing by itself. A study that was not run is a dash.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from kvlatent.model.rotary import attenuation, frequency_aware_exponents, standard_exponents
from kvlatent_lab.study import summary

MODELS = ("embedded", "stories")
Rows = list[dict[str, Any]]


class Results:
    """Summaries by study and model, read once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, {}

    def of(self, study: str, model: str) -> dict[str, Any]:
        """The summary of a study; empty where it was not run."""
        path = self.folder / f"study_{study.replace('-', '_')}_{model}"
        if path not in self.known:
            self.known[path] = summary(path) if path.is_dir() else {"rows": []}
        return self.known[path]

    def rows(self, study: str, subject: str, /, **settings: Any) -> Rows:
        """Rows of a study with these settings."""
        rows = self.of(study, subject)["rows"]
        return [row for row in rows if settings.items() <= row["settings"].items()]


def figure(rows: Rows, name: str = "ratio", digits: int = 3, tokens: int | None = None) -> str:
    """Mean of the only row, with its standard error: over seeds, else the measurement's own."""
    if tokens is not None:
        rows = [row for row in rows if trained_on(row) == tokens]
    if not rows:
        return "-"
    if len(rows) > 1:
        raise ValueError(f"{len(rows)} rows where one was meant: {[row['settings'] for row in rows]}")
    known = rows[0]["figures"]
    if name not in known:
        return "-"
    error = known[name]["standard_error"]
    if error is None:
        error = known.get(f"{name}_standard_error", {}).get("mean")
    return number(known[name]["mean"], error, digits)


def number(value: float, error: float | None = None, digits: int = 3) -> str:
    """A value to about four digits, with its error to the same place."""
    places = digits if abs(value) < 10 else 1
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


def trained_on(row: dict[str, Any]) -> int:
    """Tokens of both stages."""
    return row["settings"]["stage1_tokens"] + row["settings"]["stage2_tokens"]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def both(names: Iterable[str]) -> list[str]:
    """Headings for both models."""
    return [f"{name}, {model}" for model in MODELS for name in names]


def widths(results: Results) -> str:
    """Tables 2 and 6: perplexity over the original's at every pair of widths."""
    pairs = [(32, 32), (16, 16), (8, 8), (32, 64), (16, 64), (8, 64), (64, 32), (64, 16), (64, 8)]
    pairs += [(32, 16), (16, 32), (32, 8), (8, 32)]
    rows = []
    for d_qk, d_vo in pairs:
        line = [f"{d_qk}/{d_vo}", f"{100 * (d_qk + d_vo) / 128:g} %"]
        for model in MODELS:
            place = {"d_qk": d_qk, "d_vo": d_vo}
            line += [
                figure(results.rows("widths", model, preset="paper", **place)),
                figure(results.rows("widths-trained", model, preset="paper", **place)),
                figure(results.rows("widths", model, preset="calibrated", **place)),
            ]
        rows.append(line)
    return table(
        ["d_qk/d_vo", "cache", *both(["paper, untrained", "paper, trained", "calibrated, untrained"])], rows
    )


def lora_rank(results: Results) -> str:
    """Table 3: ranks at equal tokens."""
    rows = [
        [
            str(rank),
            *(
                figure(results.rows("lora-rank", model, lora_rank=rank), name)
                for model in MODELS
                for name in ("perplexity", "ratio")
            ),
        ]
        for rank in (0, 4, 8, 16, 32, 64)
    ]
    return table(["rank", *both(["perplexity", "over the original's"])], rows)


def stages(results: Results) -> str:
    """Perplexity with stage I over that without, at equal tokens in all."""
    rows = []
    for model in MODELS:
        for one in results.of("stages", model).get("comparisons", []):
            ratio, error = math.exp(one["log_ratio"]), one["standard_error"]
            t = "" if not error else f"{one['log_ratio'] / error:+.1f}"
            rows.append(
                [
                    model,
                    one["preset"],
                    f"{one['d_qk']}/{one['d_vo']}",
                    f"{one['tokens']:,}",
                    f"{100 * one['stage1_tokens'] / one['tokens']:.0f} %",
                    number(ratio, None if error is None else ratio * error, 4),
                    t,
                    str(one["seeds"]),
                ]
            )
    head = [
        "model",
        "preset",
        "widths",
        "tokens in all",
        "of them stage I",
        "with over without",
        "t",
        "seeds",
    ]
    return table(head, sorted(rows, key=lambda row: (row[0], row[1] != "paper", -int(row[2].split("/")[0]))))


def stages_levels(results: Results) -> str:
    """What the comparison of the stages starts from: perplexity over the original's of every cell's mean."""
    rows = []
    for model in MODELS:
        for row in results.rows("stages", model):
            known = row["settings"]
            rows.append(
                [
                    model,
                    known["preset"],
                    f"{known['d_qk']}/{known['d_vo']}",
                    f"{known['stage1_tokens']:,} + {known['stage2_tokens']:,}",
                    figure([row], "converted_ratio"),
                    figure([row], "stage1_ratio"),
                    figure([row]),
                ]
            )
    return table(
        ["model", "preset", "widths", "stage I + II", "converted", "after stage I", "at the end"], rows
    )


def objective(results: Results) -> str:
    """Table 1, training against distillation: each objective at the rate that validation text chose."""
    rows = []
    for model in MODELS:
        for one in results.of("objective", model).get("chosen", []):
            edge = " (at the edge)" if one["at_the_edge"] else ""
            rows.append(
                [model, one["objective"], f"{one['learning_rate']:g}{edge}", number(math.exp(one["loss"])), number(one["ratio"])]
            )  # fmt: skip
    return table(["model", "objective", "rate chosen", "perplexity", "over the original's"], rows)


def rope(results: Results) -> str:
    """Tables at several widths of the keys alone: the curve, and the model."""
    rows = []
    for model in MODELS:
        for width in (32, 16, 8):
            for name in ("standard", "frequency-aware", "matched", "calibrated"):
                cells = results.rows("rope", model, d_qk=width, rope=name)
                trained = results.rows("rope-trained", model, d_qk=width, rope=name)
                names = ("attenuation_negative_share", "attenuation_noise", "ratio")
                line = [figure(cells, one) for one in names] + [figure(trained)]
                line += [figure(cells, one, 2) for one in ("order_after_margin_mean", "needle_rank_mean")]
                rows.append([model, str(width), name, *line])
    head = ["model", "d_qk", "table", "curve below 0, share", "noise", "untrained", "trained"]
    return table([*head, "order margin behind the span, change", "needle rank, change"], rows)


def curves(results: Results) -> str:
    """Figures 7 to 10 and appendix D.2: both tables of a whole head at the paper's bases; no model."""
    rows = []
    for theta, length in ((1e4, 4096), (5e5, 8192)):
        for width in (8, 16, 32, 64, 128):
            plain, aware = (
                attenuation(
                    torch.tensor([theta**-e for e in exponents], dtype=torch.float64), torch.arange(length)
                )
                for exponents in (standard_exponents(width), frequency_aware_exponents(width))
            )
            shares = [f"{100 * (curve < 0).double().mean():.1f} %" for curve in (plain, aware)]
            lower = 100 * (aware < plain).double().mean()
            worst = float((aware - plain).min())
            rows.append([f"{theta:g}", f"{length:,}", str(width), *shares, f"{lower:.1f} %", f"{worst:.3f}"])
    head = ["theta", "positions", "width", "standard below 0", "frequency-aware below 0"]
    return table([*head, "frequency-aware lower than standard", "by at most"], rows)


def token_eviction(results: Results) -> str:
    """Table 4: tokens dropped on top of narrower ones; over the original with its whole context."""
    rows = []
    known = {
        (row["settings"]["evicted"], row["settings"]["press"]) for m in MODELS for row in results.rows("token-eviction", m)
    }  # fmt: skip
    for share, press in sorted(known):
        line = [press, f"{100 * share:g} %"]
        for model in MODELS:
            for name in ("original", "calibrated"):
                cells = results.rows("token-eviction", model, model=name, press=press, evicted=share)
                line += [figure(cells), figure(cells, "cache_ratio")]
        rows.append(line)
    names = ["original", "its cache", "half width", "its cache"]
    return table(["method", "evicted", *both(names)], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "widths": widths,
    "lora-rank": lora_rank,
    "stages": stages,
    "stages-levels": stages_levels,
    "objective": objective,
    "rope": rope,
    "curves": curves,
    "token-eviction": token_eviction,
}


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--table", choices=TABLES)
    args = parser.parse_args()
    results = Results(args.results)
    for name, make in TABLES.items():
        if args.table in (None, name):
            print(f"### {name}\n\n{make(results)}\n")


if __name__ == "__main__":
    main()
