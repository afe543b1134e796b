"""Sections of the studies: charts for those with a question of their own, and for all of them every figure.

A study is known by its settings that vary. Which of them is the x axis, which makes the lines and which a chart each is
listed by study; for one that is not listed, numbers go on the axis and words make the lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvlatent_lab.report.blocks import Block, Section
from kvlatent_lab.report.cells import FIRST, SHARE, SPLIT, TOKENS, grouped, telling
from kvlatent_lab.report.gains import gains
from kvlatent_lab.report.html_tables import Cell, Row, Table, cell, distinct, plain, words
from kvlatent_lab.report.result_files import Document, Documents
from kvlatent_lab.report.study_charts import Plot, charts, is_number, label_of, setting_name

__all__ = ["studies"]


@dataclass(frozen=True)
class _Question:
    """What a study asks, and the charts that answer it."""

    title: str
    lead: str
    plots: tuple[Plot, ...]
    gains: bool = False


_RATIO = ("ratio", "perplexity", "loss")
_QUESTIONS = {
    "widths": _Question(
        "Study: widths",
        "How wide keys and values must be, and how a cache is best shared between them.",
        (
            Plot(_RATIO, x=(SHARE,), lines=("preset", "method"), facets=(TOKENS,), frontier=True),
            Plot(_RATIO, x=(SPLIT,), lines=(SHARE,), facets=("preset", "method", TOKENS), least=2),
        ),
    ),
    "lora-rank": _Question(
        "Study: rank of the adapters",
        "How much freedom the feed-forward layers need while attention is trained. 0 leaves them as they are.",
        (Plot(_RATIO, x=("lora_rank", "rank", "lora.rank"), lines=(SHARE, "kv", "preset"), log_x=True),),
    ),
    "stages": _Question(
        "Study: one stage or two",
        "Whether stage I pays at equal tokens, and from which share of the cache on.",
        (
            Plot(
                _RATIO,
                x=(FIRST, "stage1_share"),
                lines=(SHARE, "kv", "d_qk"),
                facets=("preset", TOKENS),
                least=2,
            ),
        ),
        gains=True,
    ),
    "objective": _Question(
        "Study: objective",
        "What stage II should learn from, each at its own best rate: the next token, the original's distribution, or both.",
        (
            Plot(
                _RATIO,
                x=("stage2_learning_rate", "learning_rate"),
                lines=("stage2_objective", "objective"),
                log_x=True,
            ),
        ),
    ),
    "rope": _Question(
        "Study: rotary tables",
        "What a table costs in perplexity, in word order and in the needle, at several widths.",
        (
            Plot(_RATIO, x=("d_qk", "width"), lines=("rope", "table"), facets=(TOKENS,)),
            Plot(("order, mean margin",), x=("d_qk", "width"), lines=("rope", "table"), facets=(TOKENS,)),
            Plot(("needle, mean exact",), x=("d_qk", "width"), lines=("rope", "table"), facets=(TOKENS,)),
        ),
    ),
    "token-eviction": _Question(
        "Study: token eviction on top",
        "Fewer tokens and narrower ones go together: how much of each.",
        (
            Plot(_RATIO, x=(SHARE, "kept"), lines=("model",), facets=("press",)),
            Plot(("needle, mean exact",), x=(SHARE, "kept"), lines=("model",), facets=("press",)),
        ),
    ),
}


def studies(documents: Documents) -> list[Section]:
    """One section a study."""
    names = dict.fromkeys(document.content.study for document in documents.of("study"))
    return [_study(name, [d for d in documents.of("study") if d.content.study == name]) for name in names]


def _study(name: str, cells: Sequence[Document]) -> Section:
    question = _QUESTIONS.get(name) or _Question(f"Study: {name}", "", (Plot(_RATIO),))
    failed = [
        f"{one.content.cell} could not be measured: {one.record.failed}" for one in cells if one.record.failed
    ]
    cells = [one for one in cells if not one.record.failed]
    if not cells:
        return Section(
            f"study-{name}", question.title, question.lead, (Block("", (), points=tuple(failed), wide=True),)
        )
    varying, groups = grouped(cells)
    blocks = gains(name, groups, cells) if question.gains else []
    for plot in question.plots:
        blocks += charts(name, plot, varying, groups, cells)
    blocks.append(replace(_table(name, cells), points=tuple(failed)))
    lead = f"{question.lead} Points are means over seeds, bars their standard errors."
    return Section(f"study-{name}", question.title, lead.strip(), tuple(blocks))


def _table(name: str, cells: Sequence[Document]) -> Block:
    """All figures of all cells, the constant ones said once."""
    varying, groups = grouped(cells)
    known = dict.fromkeys(figure for group in groups for figure in group.figures)
    figures = [*(one for one in _RATIO if one in known), *(one for one in known if one not in _RATIO)]
    constant = [
        one for one in figures if len({v for group in groups for v in group.figures.get(one, [None])}) == 1
    ]
    constant = constant if len(groups) > 1 else []
    columns = [one for one in figures if one not in constant]
    names = telling(varying, groups)
    first, *others = names or ["cell"]
    rows = []
    labels = distinct([label_of(group, names) for group in groups])
    for label, group in zip(labels, groups, strict=True):
        numbers = [cell(group.mean(one), group.spread(one)) for one in columns]
        settings = [_setting(group.settings.get(one)) for one in others]
        head = _setting(group.settings.get(first)).text if names else group.cells[0].content.cell
        rows.append(Row(label, (*settings, *numbers, cell(len(group.cells))), head))
    table = Table(
        f"study-{name}",
        "",
        setting_name(first),
        (*map(setting_name, [*others, *columns]), "seeds"),
        tuple(rows),
    )
    note = "± is the standard error over seeds; of one seed, that of the measurement."
    said = [
        f"{setting_name(one)} {plain(value)}"
        for one in constant
        if (value := groups[0].mean(one)) is not None
    ]
    if said:
        note += f" The same in all cells: {', '.join(said)}."
    if follows := [setting_name(one) for one in varying if one not in names]:
        note += f" Not shown, as they follow from the other settings: {', '.join(follows)}."
    return Block("Every figure", (table,), note=note, sources=tuple(cells), wide=len(table.columns) > 4)


def _setting(value: object) -> Cell:
    """A setting as a cell; numbers without zeros at their end."""
    if is_number(value):
        return Cell(plain(value), float(value))  # type: ignore[arg-type]
    return words({True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value)
