"""Every listing of every command is printed whole, in terminals of any width and in files."""

import ast
import io
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.table import Table

import kvlatent_cli
from kvlatent_cli import budget_listings, listings, measured_listings, printing
from kvlatent_cli.session import session

LONG = 123456.789012345
BYTES = 98765432109


def figures() -> dict:
    row = {"perplexity": LONG, "standard_error": LONG, "cache_dtype": "bfloat16"}
    row |= {"cache_bytes_per_token": BYTES, "ratio": LONG, "ratio_standard_error": LONG}
    row["recall"] = dict.fromkeys(("copied", "kept", "kept_standard_error"), 0.123456)  # shares
    return dict.fromkeys(listings.LABELS, row)


def strategies() -> list[dict]:
    errors = {"stride": LONG, "matched": None, "energy": LONG, "gram": LONG}
    return [{"layer": layer, "d_qk": 1234567, "d_vo": 7654321, "errors": errors} for layer in (9, 1234567)]


def budget() -> dict:
    row = {"kv": LONG, "d_qk": 1234567, "d_vo": 7654321, "error": LONG, "symmetric_width": 1234567}
    plan = {
        "d_qk": list(range(1000, 1064)),
        "d_vo": [7654321],
        "head_dim": 128,
        "engines": {"head": ["vllm"]},
    }
    plan["predicted_error"] = dict.fromkeys(("total", "keys", "values"), LONG) | {"unit": "nats a token"}
    size = {"latent": BYTES, "original": BYTES, "share": LONG}
    serving = {
        "cache_bytes_per_token": size,
        "decode_speedup": [{"context": BYTES, "batch": BYTES, "speedup": LONG}],
    }
    serving["maximum_context"] = [{"batch": BYTES, "original": BYTES, "latent": None}]
    return {"plan": plan, "serving": serving, "curve": [row | {"symmetric_error": LONG}] * 2, "figure": None}


def options_in_bytes() -> dict:
    measured = {
        "row": "head-passed-50-kl-0.3M",
        "model": "m" * 60,
        "head_dim": 128,
        "d_qk": 1234567,
        "d_vo": 7654321,
    }
    measured |= {"engine": "transformers", "kv_dtype": "bfloat16", "tokens_trained": BYTES, "text": "fineweb"}
    measured |= dict.fromkeys(("kl", "kl_standard_error", "perplexity_ratio"), LONG)
    row = {"d_qk": 1234567, "d_vo": 7654321, "kv_dtype": "int4_per_token_head", "bytes": BYTES, "share": LONG}
    row |= {"maximum_context": BYTES, "decode_speedup": LONG, "note": "fine", "ran": False}
    row["loss"] = {"is_original": False, "predicted": LONG, "measured": [measured]}
    budget = {"batch": 1234567, "context": BYTES, "kv_bytes": BYTES}
    about = {"engine": "vllm", "backend": "sm100", "head_dim": 128, "table": "model", "calibration": {}}
    return {**about, "budget": budget, "options": [row] * 2, "notes": [], "refused": [], "too_large": []}


def evaluation() -> dict:
    grid = {"exact": [[LONG]], "rank": [[LONG]], "margin": [[LONG]], "preferred": [[LONG]]}
    row = figures()["latent"] | {"bits_per_byte": LONG, "needle": grid, "order": grid, "causality": LONG}
    row["tasks"] = {"tasks": {"arc_challenge_of_123456": {"acc": LONG, "acc_stderr": LONG}}}
    diagnosis = {"summary": "fine", "findings": [], "not_measured": []}
    return {"model": {"name": "small [bold] :dog:"}, "original": {}, "figures": {"latent": row, "original": row}, "diagnosis": diagnosis}  # fmt: skip


def study() -> dict:
    figure = {"mean": LONG, "standard_error": LONG}
    rows = [
        {
            "settings": {"d_qk": width, "objective": f"[a] {width}"},
            "seeds": [0],
            "figures": dict.fromkeys(("perplexity", "ratio", "cache_ratio"), figure),
        }
        for width in (1234567, 7654321)
    ]
    return {"finished": ["a"], "cells": ["a"], "out": "o", "summary": {"rows": rows}}


def demo() -> dict:
    side = {"cache_bytes_per_token": BYTES, "perplexity": LONG, "copy_accuracy": {BYTES: LONG}}
    both = {"original": side | {"continuation": "a"}, "latent": side | {"continuation": "b"}}
    about = {
        "model": "m" * 60,
        "weights": "dequantised from m.gguf (Q4_1)",
        "held_out": "held-out docstrings",
    }
    return {**both, **about, "prompt": "p", "out": "o", "minutes": 1.0}


FACTS = {
    "tokens": BYTES,
    "a.very.long.name.of.a.figure.of.0123456789": "[16, 16]",
    "sha256": "0123456789" * 7,
}
MAKERS = {
    "figures_listing": lambda: [listings.figures_listing(figures())],
    "strategies_listing": lambda: [listings.strategies_listing(strategies())],
    "budget_listing": lambda: budget_listings.budget_listing(budget()),
    "bytes_listing": lambda: budget_listings.bytes_listing(options_in_bytes()),
    "list_pairs": lambda: [listings.list_pairs(FACTS)],
    "evaluation_listing": lambda: measured_listings.evaluation_listing(evaluation()),
    "study_listing": lambda: measured_listings.study_listing(study()),
    "demo_listing": lambda: listings.demo_listing(demo()),
}


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(listing: Table, monkeypatch, stdout: io.StringIO) -> str:
    """What a command writes on stdout whose answer is that listing."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("LINES", "25")  # without it, rich takes a dumb terminal for one of 80 columns
    monkeypatch.setenv("TERM", "dumb")  # no colours, which would stand between the characters
    with session() as run:
        run.show({}, listing)
    return stdout.getvalue()


def cells(listing: Table) -> list[list[str]]:
    """Rows, the header first."""
    columns = [[str(column.header), *map(str, column.cells)] for column in listing.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return rows if listing.show_header else rows[1:]


def characters(text: str) -> Counter:
    return Counter(text) - Counter({char: text.count(char) for char in " \n─"})


def listings_of(name: str) -> list[Table]:
    return [part for part in MAKERS[name]() if isinstance(part, Table)]


@pytest.mark.parametrize("width", [1, 10, 20, 40, 80, 200])
@pytest.mark.parametrize("name", MAKERS)
def test_no_character_is_lost_in_a_terminal(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for listing in listings_of(name):
        text = printed(listing, monkeypatch, Terminal())
        assert "…" not in text
        assert characters(text) == characters("".join(map("".join, cells(listing))))
        words = [
            word
            for c in listing.columns
            if c.justify == "right"
            for cell in c.cells
            for word in str(cell).split()
        ]
        assert [word for word in words if word not in text] == []  # no figure is broken in two
        assert (
            width < 80
            or name in ("strategies_listing", "bytes_listing")
            or max(map(len, text.splitlines())) <= width
        )


@pytest.mark.parametrize("columns", ["1", "20", "80"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_row_is_a_line_in_a_file(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for listing in listings_of(name):
        lines = printed(listing, monkeypatch, io.StringIO()).splitlines()
        for row in cells(listing):
            assert any(all(cell in line for cell in row) for line in lines)


def test_a_bar_of_progress_keeps_its_figures(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    note = "123,456 tokens/s, loss 12.3456"
    for width in (20, 40, 60, 80, 120):
        bar = printing.progress_bar()
        bar.add_task(
            "measure the original", total=7654321, completed=1234567, note=note, left="about 12 min left"
        )
        console = bar.console
        console.width = width
        with console.capture() as capture:
            console.print(bar.get_renderable())
        text = capture.get()
        assert "…" not in text
        assert not characters(f"measure the original 1234567/7654321 {note}") - characters(text)


def test_nothing_else_makes_or_prints_listings():
    """A new listing belongs in `MAKERS`, and is printed by the session."""
    makers, consoles = set(), set()
    for path in Path(kvlatent_cli.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
                makers |= {function.name} if {"Table", "Table.grid"} & called else set()
                consoles |= {path.stem} if "Console" in called or "rich.print" in called else set()
    assert makers == set(MAKERS)
    assert consoles == {"printing"}
