"""Charts of a study: which setting is the axis, which makes lines, which makes a chart each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from kvlatent_lab.report.blocks import Block, line_block
from kvlatent_lab.report.cells import SHARE, TOKENS, Group, frontier
from kvlatent_lab.report.charts import Line, dot_chart
from kvlatent_lab.report.html_tables import Table, cell, plain
from kvlatent_lab.report.result_files import Document

__all__ = ["Plot", "charts", "is_number", "label_of", "said", "setting_name"]

_NAMES = {
    "ratio": "perplexity over the original's",
    "kv": SHARE,
    "table": "rotary table",
    "lora_rank": "rank",
    "stage2_learning_rate": "learning rate",
    "stage2_objective": "objective",
}
_MORE_IS_BETTER = ("exact", "margin", "top1_agreement", "preferred")


@dataclass(frozen=True)
class Plot:
    """A chart: the first of the figures that is there against the first of the x settings that varies.

    `lines` and `facets` are the settings that make a line, and a chart, each; of the lines only the first that varies
    counts. Lines of fewer than `least` points are left out. With `frontier` a line joins only what no lower x reaches.
    """

    figures: tuple[str, ...]
    x: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    facets: tuple[str, ...] = ()
    log_x: bool = False
    least: int = 1
    frontier: bool = False


def charts(
    name: str, plot: Plot, varying: Sequence[str], groups: Sequence[Group], cells: Sequence[Document]
) -> list[Block]:
    """The charts of a plot, one for each value of its facets; none where no cell has the figure."""
    figure = _figure(plot, groups)
    groups = [group for group in groups if figure is not None and group.mean(figure) is not None]
    if figure is None or not groups:
        return []
    axis = _axis(plot.x, varying, groups)
    if axis is None:
        return [] if plot.least > 1 else [_dots(name, figure, varying, groups, cells)]
    blocks = []
    for title, members in _facets(plot, groups):
        lines = _lines(plot, axis, figure, varying, members)
        block = line_block(
            f"study-{name}-{axis}-{figure}{f'-{title}' if title else ''}",
            ": ".join(part for part in (_capital(setting_name(figure)), title) if part),
            lines,
            x_label=setting_name(axis),
            y_label=setting_name(figure),
            log_x=plot.log_x,
            log_y=_wide(lines),
            x_ticks=sorted({x for line in lines for x in line.x}),
            level=1.0 if figure == "ratio" else None,
            note=_shared(members, lines),
            sources=cells,
        )
        blocks += [block] if block is not None else []
    return blocks


def _figure(plot: Plot, groups: Sequence[Group]) -> str | None:
    """The first wanted figure that is there, of the latent model where it is said whose it is."""
    known = {name for group in groups for name in group.figures}
    wanted = (one for name in plot.figures for one in (name, f"latent.{name}"))
    return next((one for one in wanted if one in known), None)


def _axis(wanted: Sequence[str], varying: Sequence[str], groups: Sequence[Group]) -> str | None:
    """The setting of the x axis: one that is wanted, else the number of most values; None where no number varies."""
    for name in wanted:
        if len(_values(name, groups)) > 1:
            return name
    numbers = [name for name in varying if len(_values(name, groups)) > 1]
    return None if wanted else max(numbers, key=lambda name: len(_values(name, groups)), default=None)


def _values(name: str, groups: Sequence[Group]) -> list[float]:
    """Values of a setting that is a number in every group, in order; none of any other."""
    values = [group.settings.get(name) for group in groups]
    return sorted({float(one) for one in values if is_number(one)}) if all(map(is_number, values)) else []


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _facets(plot: Plot, groups: Sequence[Group]) -> Iterator[tuple[str, list[Group]]]:
    """Groups by those facets that vary, under what they are; what has "none" of a facet is on every chart."""
    names = [name for name in plot.facets if len({str(group.settings.get(name)) for group in groups}) > 1]
    common = [group for group in groups if any(group.settings.get(name) == "none" for name in names)]
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group not in common:
            title = ", ".join(said(name, group.settings.get(name)) for name in names)
            found.setdefault(title, []).append(group)
    yield from ((title, [*common, *members]) for title, members in (found or {"": []}).items())


def _lines(plot: Plot, axis: str, figure: str, varying: Sequence[str], groups: Sequence[Group]) -> list[Line]:
    """Lines by the first setting that makes them; without one, by all words that vary."""
    makers = [name for name in plot.lines if len({str(group.settings.get(name)) for group in groups}) > 1][:1]
    if not plot.lines:
        makers = [name for name in varying if name != axis and not _values(name, groups)]
    members: dict[str, list[Group]] = {}
    for group in groups:
        label = ", ".join(said(name, group.settings.get(name)) for name in makers) or setting_name(figure)
        members.setdefault(label, []).append(group)
    lines = [_line(label, found, axis, figure, plot.frontier) for label, found in members.items()]
    return [line for line in lines if len(line.x) >= plot.least]


def _line(label: str, members: Sequence[Group], axis: str, figure: str, only_best: bool) -> Line:
    """The best group at each place of the axis, or only where it is the best so far."""
    sign = -1 if figure.endswith(_MORE_IS_BETTER) else 1
    best: dict[float, tuple[float, Group]] = {}
    for group in members:
        x, value = float(group.settings[axis]), group.mean(figure)
        assert value is not None
        if x not in best or sign * value < sign * best[x][0]:
            best[x] = value, group
    values = {x: value for x, (value, _) in best.items()}
    at = frontier(values, sign) if only_best else sorted(best)
    role = {"paper": "c2", "calibrated": "c1", "original": "original"}.get(label, "")
    errors = [best[x][1].spread(figure) for x in at]
    return Line(label, at, [best[x][0] for x in at], errors, role=role, dashed=role == "original")


def _shared(groups: Sequence[Group], lines: Sequence[Line]) -> str:
    drawn = sum(len(line.x) for line in lines)
    return (
        ""
        if drawn >= len(groups)
        else "The best at its place, or at a smaller one, is drawn; the last table has all."
    )


def _wide(lines: Sequence[Line]) -> bool:
    values = [y for line in lines for y in line.y]
    return bool(values) and min(values) > 0 and max(values) > 4 * min(values)


def _dots(
    name: str, figure: str, varying: Sequence[str], groups: Sequence[Group], cells: Sequence[Document]
) -> Block:
    """A dot for each group, where no number varies."""
    labels = [label_of(group, varying) for group in groups]
    values = [group.mean(figure) or 0.0 for group in groups]
    errors = [group.spread(figure) for group in groups]
    chart = dot_chart(
        f"study-{name}-{figure}",
        labels,
        values,
        errors,
        title=setting_name(figure),
        x_label=setting_name(figure),
        log_x=min(values) > 0 and max(values) > 4 * min(values),
        level=1.0 if figure == "ratio" else None,
    )
    rows = [(label, [cell(v, e)]) for label, v, e in zip(labels, values, errors, strict=True)]
    table = Table.of(f"study-{name}-{figure}", "", [setting_name(figure)], rows)
    return Block(_capital(setting_name(figure)), (table,), chart, sources=tuple(cells))


def label_of(group: Group, varying: Sequence[str]) -> str:
    """A group by its settings that vary."""
    return ", ".join(said(name, group.settings.get(name)) for name in varying) or group.cells[0].content.cell


def said(name: str, value: Any) -> str:
    """A setting as a label: words speak for themselves, numbers need their name."""
    if isinstance(value, bool) or value is None:
        return f"{setting_name(name)}: {'yes' if value else 'no'}"
    if name == SHARE and is_number(value):
        return f"{plain(value)} % of the cache"
    if name == TOKENS and is_number(value):
        return f"{plain(value)} tokens" if value else "untrained"
    return f"{setting_name(name)} {plain(value)}" if is_number(value) else str(value)


def setting_name(name: str) -> str:
    """A key as words; widths keep their own."""
    return _NAMES.get(name, name if name.startswith("d_") else name.replace("_", " "))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
