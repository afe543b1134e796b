"""Sections of the studies: charts that answer the question of each, and for all of them every figure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvlatent_lab.report.blocks import Block, Section, dot_block, line_block
from kvlatent_lab.report.charts import Line, points
from kvlatent_lab.report.page_listings import Entry, Listing, Row, distinct, entry, plain, words
from kvlatent_lab.report.result_files import Document, Documents
from kvlatent_lab.report.study_groups import (
    FIRST,
    SEED,
    SHARE,
    SPLIT,
    TOKENS,
    Groups,
    cell_frames,
    frontier,
    grouped,
    telling,
)

__all__ = ["setting_label", "studies"]

_NAMES = {
    "ratio": "perplexity over the original's",
    "lora_rank": "rank",
    "stage2_learning_rate": "learning rate",
    "stage2_objective": "objective",
}
_ROLES = {"paper": "c2", "calibrated": "c1", "original": "original"}


@dataclass(frozen=True)
class _Plot:
    """A chart of a figure against the setting `x`; `lines` is the setting that makes a line, `facets` those of a chart.

    Lines of fewer than `least` points are left out. With `frontier` a line joins only what no lower x reaches.
    """

    x: str
    lines: str
    facets: tuple[str, ...] = ()
    figure: str = "ratio"
    log_x: bool = False
    least: int = 1
    frontier: bool = False


@dataclass(frozen=True)
class _Question:
    """What a study asks, and the charts that answer it."""

    title: str
    lead: str = ""
    plots: tuple[_Plot, ...] = ()


_QUESTIONS = {
    "widths": _Question(
        "Study: widths",
        "How wide keys and values must be, and how a cache is best shared between them.",
        (
            _Plot(SHARE, "preset", (TOKENS,), frontier=True),
            _Plot(SPLIT, SHARE, ("preset", TOKENS), least=2),
        ),
    ),
    "lora-rank": _Question(
        "Study: rank of the adapters",
        "How much freedom the feed-forward layers need while attention is trained. 0 leaves them as they are.",
        (_Plot("lora_rank", SHARE, log_x=True),),
    ),
    "stages": _Question(
        "Study: one stage or two",
        "Whether stage I pays at equal tokens, and from which share of the cache on.",
        (_Plot(FIRST, SHARE, ("preset", TOKENS), least=2),),
    ),
    "objective": _Question(
        "Study: objective",
        "What stage II should learn from, each at its own best rate: the next token, the original's distribution, or both.",
        (_Plot("stage2_learning_rate", "stage2_objective", log_x=True),),
    ),
    "rope": _Question(
        "Study: rotary tables",
        "What a table costs in perplexity, in word order and in the needle, at several widths.",
        tuple(
            _Plot("d_qk", "rope", (TOKENS,), figure)
            for figure in ("ratio", "order, mean margin", "needle, mean exact")
        ),
    ),
    "conversion": _Question(
        "Study: conversion",
        "What a calibrated conversion costs: budgets, tables, selections of other papers, one choice at a time.",
    ),
    "choices": _Question(
        "Study: choices",
        "Which part of a conversion without text does the damage: channels, frequencies, values, one side at a time.",
    ),
    "token-eviction": _Question(
        "Study: token eviction on top",
        "Fewer tokens and narrower ones go together: how much of each.",
        (_Plot(SHARE, "model", ("press",)),),
    ),
    "nested": _Question(
        "Study: one checkpoint for several widths",
        "What a width that is cut out of a nested checkpoint loses to the width trained alone, at equal tokens.",
        (_Plot(SHARE, "trained"),),
    ),
    "cross-layer": _Question(
        "Study: layers that share a cache",
        "Whether neighbouring layers should share one cache or every layer have a narrower one, at equal bytes and training "
        "FLOPs, and what both cost together.",
        (_Plot(SHARE, "design"),),
    ),
}


_DOTS = ("choices", "conversion")
"""Studies of named variants, whose settings are no axis."""


def studies(documents: Documents) -> list[Section]:
    """One section a study."""
    cells = documents.of("study")
    names = dict.fromkeys(one.content.study for one in cells)
    return [_study(name, [one for one in cells if one.content.study == name]) for name in names]


def _study(name: str, cells: Sequence[Document]) -> Section:
    question = _QUESTIONS.get(name) or _Question(f"Study: {name}")
    failed = tuple(
        f"{one.content.cell} could not be measured: {one.record.failed}" for one in cells if one.record.failed
    )
    cells = [one for one in cells if not one.record.failed]
    if not cells:
        block = Block("", points=failed, wide=True)
        return Section(f"study-{name}", question.title, question.lead, [block])
    groups = grouped(cells)
    blocks: list[Block | None] = list(_gains(cells)) if name == "stages" else []
    if name in _DOTS and "ratio" in groups.means:
        blocks.append(_dots(name, groups, cells))
    for plot in question.plots:
        blocks += _charts(name, plot, groups, cells)
    lead = f"{question.lead} Points are means over seeds, bars their standard errors."
    kept = [block for block in blocks if block is not None]
    return Section(
        f"study-{name}", question.title, lead.strip(), [*kept, _everything(name, groups, cells, failed)]
    )


def _charts(name: str, plot: _Plot, groups: Groups, cells: Sequence[Document]) -> Iterator[Block | None]:
    """The charts of a plot, one for each value of its facets; none where no cell has the figure or the setting."""
    if plot.figure not in groups.means or plot.x not in groups.settings:
        return
    data = groups.settings.assign(
        _y=groups.means[plot.figure],
        _error=groups.errors[plot.figure],
        _x=groups.settings[plot.x].astype(float),
    ).dropna(subset=["_x", "_y"])
    for title, members in _facets(plot, data):
        label = plot.lines if plot.lines in data and data[plot.lines].map(repr).nunique() > 1 else None
        lines = [
            _line(plot, label, rows)
            for _, rows in members.groupby(label or (lambda _: 0), sort=False, dropna=False)
        ]
        lines = [line for line in lines if len(line.points) >= plot.least]
        values = [y for line in lines for y in line.points["y"]] or [1.0]
        drawn = sum(len(line.points) for line in lines)
        yield line_block(
            f"study-{name}-{plot.x}-{plot.figure}{f'-{title}' if title else ''}",
            ": ".join(part for part in (_capital(_setting_name(plot.figure)), title) if part),
            lines,
            x_label=_setting_name(plot.x),
            y_label=_setting_name(plot.figure),
            log_x=plot.log_x,
            log_y=min(values) > 0 and max(values) > 4 * min(values),
            at_points=True,
            level=1.0 if plot.figure == "ratio" else None,
            note=""
            if drawn >= len(members)
            else "The best at its place, or at a smaller one, is drawn; the last listing has all.",
            sources=cells,
        )


def _facets(plot: _Plot, data: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Groups by those facets that vary, under what they are; what has "none" of a facet is on every chart."""
    names = [name for name in plot.facets if name in data and data[name].map(repr).nunique() > 1]
    common = (data[names] == "none").any(axis=1)
    if not names or common.all():
        yield "", data
        return
    for values, members in data[~common].groupby(names, sort=False, dropna=False):
        title = ", ".join(setting_label(name, value) for name, value in zip(names, values, strict=True))
        yield title, pd.concat([data[common], members])


def _line(plot: _Plot, label: str | None, rows: pd.DataFrame) -> Line:
    """The best group at each place of the axis, or only where it is the best so far."""
    rising = plot.figure.endswith(("exact", "margin"))
    ordered = rows.sort_values("_y", ascending=not rising, kind="stable")
    best = ordered.drop_duplicates("_x").set_index("_x").sort_index()
    if plot.frontier:
        best = best.loc[frontier(best["_y"], rising=rising).index]
    text = setting_label(label, rows[label].iloc[0]) if label else _setting_name(plot.figure)
    role = _ROLES.get(text, "")
    return Line(text, points(best.index, best["_y"], best["_error"]), role, dashed=role == "original")


def _gains(cells: Sequence[Document]) -> Iterator[Block | None]:
    """What stage I gains: perplexity with it over that without, at equal tokens, seed by seed.

    A chart for each preset and number of tokens, a line for each share of the cache; below 1 stage I pays.
    """
    settings, figures = cell_frames(cells)
    if FIRST not in settings or "perplexity" not in figures:
        return
    shared = [name for name in ("preset", "d_qk", "d_vo", TOKENS, SEED) if name in settings]
    data = settings.assign(perplexity=figures["perplexity"]).dropna(subset=[FIRST, "perplexity"])
    alone = data.loc[data[FIRST] == 0, [*shared, "perplexity"]].drop_duplicates(shared, keep="last")
    both = data[data[FIRST] > 0].merge(alone, on=shared, suffixes=("", "_alone"))
    both["gain"] = both["perplexity"] / both["perplexity_alone"]
    facets = [name for name in ("preset", TOKENS) if name in both]
    for values, members in both.groupby(facets):
        title = ", ".join(setting_label(name, value) for name, value in zip(facets, values, strict=True))
        lines = []
        for kept, rows in members.groupby(SHARE):
            gain = rows.groupby(FIRST)["gain"].agg(["mean", "sem"])
            lines.append(Line(setting_label(SHARE, kept), points(gain.index, gain["mean"], gain["sem"])))
        yield line_block(
            f"study-stages-gain-{title}",
            f"What stage I gains: {title}",
            lines,
            x_label=_setting_name(FIRST),
            y_label="perplexity with stage I over without",
            at_points=True,
            level=1.0,
            note="At equal tokens in all, seed by seed; below 1 stage I pays.",
            sources=cells,
        )


def _dots(name: str, groups: Groups, cells: Sequence[Document]) -> Block:
    """A dot a variant, called as its cells are, less their seed."""
    labels = [re.sub(r"-seed\d+$", "", cells[at].content.cell) for at in groups.first]
    dots = pd.DataFrame(
        {"y": list(groups.means["ratio"]), "error": list(groups.errors["ratio"])}, index=labels
    )
    title = _capital(_setting_name("ratio"))
    return dot_block(f"study-{name}-ratio", title, dots.dropna(subset=["y"]), label="variant", sources=cells)


def _everything(name: str, groups: Groups, cells: Sequence[Document], failed: tuple[str, ...]) -> Block:
    """All figures of all cells, the constant ones said once."""
    means, settings = groups.means, groups.settings
    first = [figure for figure in ("ratio", "perplexity", "loss") if figure in means]
    figures = [*first, *(figure for figure in means if figure not in first)]
    constant = [figure for figure in figures if len(means) > 1 and means[figure].nunique(dropna=False) == 1]
    columns = [figure for figure in figures if figure not in constant]
    names = telling(groups)
    corner, *others = names or ["cell"]
    labels = distinct(
        [
            ", ".join(setting_label(one, value) for one, value in row.items())
            for _, row in settings[names].iterrows()
        ]
    )
    rows = []
    for label, at in zip(labels, means.index, strict=True):
        head = _setting(settings.loc[at, corner]).text if names else cells[0].content.cell
        entries = [*(_setting(settings.loc[at, one]) for one in others)]
        entries += [entry(means.loc[at, one], groups.errors.loc[at, one]) for one in columns]
        rows.append(Row(label or head, (*entries, entry(groups.seeds[at])), head))
    headed = (*map(_setting_name, [*others, *columns]), "seeds")
    listing = Listing(f"study-{name}", "", _setting_name(corner), headed, tuple(rows))
    note = "± is the standard error over seeds; of one seed, that of the measurement."
    if constant:
        same = ", ".join(f"{_setting_name(one)} {plain(means[one].iloc[0])}" for one in constant)
        note += f" The same in all cells: {same}."
    if follows := [_setting_name(one) for one in groups.varying if one not in names]:
        note += f" Not shown, as they follow from the other settings: {', '.join(follows)}."
    return Block("Every figure", (listing,), None, note, failed, cells, wide=len(headed) > 4)


def setting_label(name: str, value: Any) -> str:
    """A setting as a label: words speak for themselves, numbers need their name."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None or math.isnan(value):  # a data frame's None
        return f"{_setting_name(name)}: {'yes' if value is True else 'no'}"
    if name == SHARE:
        return f"{plain(value)} % of the cache"
    if name == TOKENS:
        return f"{plain(value)} tokens" if value else "untrained"
    return f"{_setting_name(name)} {plain(value)}"


def _setting(value: Any) -> Entry:
    """A setting as an entry; numbers without zeros at their end."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return words({True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value)
    return Entry(plain(value), float(value))


def _setting_name(name: str) -> str:
    """A key as words; widths keep their own."""
    return _NAMES.get(name, name if name.startswith("d_") else name.replace("_", " "))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
