"""How answers look to people: plans, figures, and what a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

LABELS = {
    "original": "original",
    "converted": "converted, untrained",
    "stage1": "after stage I",
    "latent": "latent",
}


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """A plan in three or four lines: widths, bytes, calibration, training."""
    size, open_split = plan["cache_bytes_per_token"], plan["d_qk"] is None
    widths = f"d_qk {plan['d_qk']}, d_vo {plan['d_vo']} of {plan['head_dim']}"
    if open_split:
        widths = f"split of {plan['share']:.1%} of {plan['head_dim']} + {plan['head_dim']} chosen after calibration"
    tokens = ", ".join(f"stage {'I' * int(name[-1])} {count:,}" for name, count in plan["tokens"].items())
    most = "at most " if open_split else ""
    lines = [
        f"widths: {widths} (preset {plan['preset']})",
        f"cache: {most}{size['latent']:,} of {size['original']:,} bytes per token in {size['dtype']}: {plan['share']:.1%}",
    ]
    minutes = plan.get("minutes")
    if plan["calibration_blocks"]:
        choices = plan["choices"]
        steps = "steps by the time that is left"
        if minutes is None:
            steps = f"{choices['align']} steps of alignment a layer, {choices['global_steps']} on all layers at once"
        lines.append(
            f"calibration: up to {plan['calibration_blocks']} blocks of text, one rotary table per {choices['table']}, "
            f"{steps}"
        )
    if minutes is not None:
        lines.append(
            f"time: {minutes:g} minutes on {plan['device']} in {plan['dtype']}, split between the steps once this "
            "machine's speed is measured"
        )
    elif tokens:
        lines.append(
            f"training tokens: {tokens}; about {duration(plan['estimated_seconds'])} on {plan['device']} in "
            f"{plan['dtype']} (an estimate from the model's size and this machine's speed)"
        )
    else:
        lines.append("training tokens: none")
    return lines


def duration(seconds: float) -> str:
    """Rounded, in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures_listing(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a step of the run: perplexity, its ratio to the original's, recall, cache bytes."""
    from kvlatent.checkpoints.card import RECALLED, recall_cell
    from kvlatent.jobs.record import with_error  # which imports torch

    recalls = any(row.get("recall") for row in figures.values())
    dtypes = {row["cache_dtype"] for row in figures.values()}
    listing = Table(box=box.SIMPLE_HEAD)
    listing.add_column("")
    recalled = [RECALLED] if recalls else []
    for name in ("perplexity", "ratio", *recalled, f"cache bytes/token ({', '.join(sorted(dtypes))})"):
        listing.add_column(name, justify="right")
    for name, label in LABELS.items():
        if name in figures:
            row = figures[name]
            ratio = with_error(row["ratio"], row["ratio_standard_error"]) if "ratio" in row else ""
            value = with_error(row["perplexity"], row["standard_error"])
            recall = [recall_cell(row)] if recalls else []
            listing.add_row(label, value, ratio, *recall, f"{row['cache_bytes_per_token']:,.0f}")
    return listing


def conversion_listing(record: Mapping[str, Any]) -> list[Any]:
    """What the calibration says of a conversion: seconds, layers where they are explained, scopes of the rotary table."""
    calibration, conversion = record["calibration"], record["conversion"]
    if calibration is None:
        return []
    plan = record["plan"]
    seconds = (
        f"calibrated on {calibration['tokens']:,} tokens in {calibration['seconds']:.1f} s, converted in "
        f"{conversion['seconds']:.1f} s: d_qk {widths_text(plan['d_qk'])}, d_vo {widths_text(plan['d_vo'])} of {plan['head_dim']}"
    )
    lines: list[Any] = [seconds]
    if calibration.get("recall_blocks"):
        lines.append(
            f"{calibration['recall_blocks']} of {calibration['blocks']} blocks were made to ask for recall"
        )
    if reason := calibration.get("no_recall"):
        lines.append(f"no block asks for recall: {reason}")
    if seen := calibration.get("seen_share"):
        lines.append(f"of the text measured on, the calibration has looked at {seen:.1%}")
    if layers := conversion.get("layers"):
        lines += [
            "relative squared error of the attention output of each layer, before refit and alignment",
            strategies_listing(layers),
        ]
        reasons = {name: why for row in layers for name, why in row["reasons"].items()}
        lines += [f"{name} is impossible: {why}" for name, why in reasons.items()]
    if tuned := [row["output_error"] for row in conversion.get("tuned", ()) if "output_error" in row]:
        before, after = (fmean(row[name] for row in tuned) for name in ("before", "after"))
        lines.append(f"error of the layers' outputs on held-out blocks: {before:.4f}, tuned {after:.4f}")
    if prices := conversion.get("scope_errors"):
        told = ", ".join(f"{scope} {error:.4f}" for scope, error in prices.items())
        lines.append(f"predicted error of the keys alone with one rotary table per: {told}")
    return lines


def minutes_lines(record: Mapping[str, Any]) -> list[str]:
    """What the steps of a run with a budget took and gained."""
    minutes = record.get("minutes")
    if minutes is None:
        return []
    lines = [f"{minutes['spent']:.3g} of {minutes['asked']:g} minutes: {minutes['why']}"]
    for row in minutes["steps"]:
        steps = f", {row['steps']:,} steps" if row.get("steps") is not None else ""
        gained = row.get("before") is not None and row.get("after") is not None
        figures = f", divergence {row['before']:.4f} to {row['after']:.4f} nats" if gained else ""
        lines.append(f"{row['step']}: {row['minutes']:.3g} minutes{steps}{figures}")
    return lines


def strategies_listing(layers: Sequence[Mapping[str, Any]]) -> Table:
    """One row a layer: widths, and the error of the attention output under every strategy."""
    names = list(layers[0]["errors"])
    listing = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "d_qk", "d_vo", *names):
        listing.add_column(name, justify="right")
    for row in layers:
        errors = ("-" if row["errors"][name] is None else f"{row['errors'][name]:.4f}" for name in names)
        listing.add_row(*(str(row[name]) for name in ("layer", "d_qk", "d_vo")), *errors)
    return listing


def widths_text(widths: int | Sequence[int]) -> str:
    """One number, or one per layer."""
    return str(widths) if isinstance(widths, int) else ",".join(map(str, widths))


def list_pairs(pairs: Mapping[str, Any]) -> Table:
    """Names and values, one a row."""
    listing = Table(box=None, show_header=False, pad_edge=False)
    listing.add_column()
    listing.add_column()
    for name, value in pairs.items():
        listing.add_row(name, _value_text(value))
    return listing


def _value_text(value: Any) -> str:
    """A value in the words of people, not of Python."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        apart = "; " if any(isinstance(each, Mapping) for each in value) else ", "
        return apart.join(map(_value_text, value))
    return str(value)


def demo_listing(report: Mapping[str, Any]) -> list[Any]:
    """What a demo measured of both models, and how they continue a text."""
    listing = Table(box=box.SIMPLE_HEAD)
    listing.add_column("")
    for name in ("original", "latent"):
        listing.add_column(name, justify="right")
    sides = (report["original"], report["latent"])
    listing.add_row(
        "cache bytes per token (measured)", *(f"{side['cache_bytes_per_token']:,.0f}" for side in sides)
    )
    listing.add_row(f"perplexity on {report['held_out']}", *(f"{side['perplexity']:.3f}" for side in sides))
    for distance in report["original"]["copy_accuracy"]:
        shares = (f"{side['copy_accuracy'][distance]:.1%}" for side in sides)
        listing.add_row(f"copies a random string, {distance} tokens back", *shares)
    lines = [
        f"\n{name} continues {report['prompt']!r}:\n{side['continuation']}"
        for name, side in zip(("original", "latent"), sides, strict=True)
    ]
    about = (
        [f"{report['model']}{', ' if report['weights'] else ''}{report['weights'] or ''}"]
        if report["model"]
        else []
    )
    return [*about, listing, *lines, f"\nsaved in {report['out']} ({report['minutes']:.1f} min)"]


def cost_lines(costs: dict[str, Any]) -> list[str]:
    """What a stage will take, a line a fact."""
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in costs["card_bytes"].items())
    return [
        f"stage {'I' * costs['stage']}: {costs['tokens']:,} tokens, {costs['flops_per_token'] / 1e9:,.1f} GFLOP each",
        f"{costs['total_bytes'] / 1e9:,.1f} GB on each of {costs['cards']} cards: {parts}",
        f"{costs['hours']:,.2g} hours on cards of 312 TFLOP/s at 35 % of them (assumed)",
    ]
