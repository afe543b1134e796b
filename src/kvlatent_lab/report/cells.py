"""Cells of a study, whatever they hold: settings that vary, figures over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kvlatent_lab.report.blocks import numbers_in
from kvlatent_lab.report.result_files import Document
from kvlatent_lab.spread import standard_error

__all__ = [
    "FIRST",
    "SHARE",
    "SPLIT",
    "TOKENS",
    "Group",
    "cache_share",
    "flat",
    "frontier",
    "grouped",
    "telling",
    "widths_of",
]

SHARE = "cache kept, %"
SPLIT = "keys' part of the cache, %"
FIRST = "part of the tokens in stage I, %"
TOKENS = "tokens trained on"
"""Settings that follow from others, added to those of a group where they can be told; none of them makes a group."""

_SEED = "seed"
_GRIDS = {"needle": "exact", "order": "margin"}
"""Measurements that are grids, and which of their grids stands for them, by its mean."""


@dataclass(frozen=True)
class Group:
    """Cells with equal settings but for the seed; figures by name, one number a cell that has it."""

    settings: dict[str, Any]
    figures: dict[str, list[float]]
    errors: dict[str, float]
    cells: tuple[Document, ...]

    def by_seed(self, name: str) -> dict[str, float]:
        """The figure of each seed."""
        found = {}
        for one in self.cells:
            value = _numbers(one.content.figures).get(name)
            if value is not None:
                found[_key(one.content.settings.get(_SEED, one.record.seed))] = value
        return found

    def mean(self, name: str) -> float | None:
        return fmean(self.figures[name]) if self.figures.get(name) else None

    def spread(self, name: str) -> float | None:
        """Standard error over seeds; of one seed that of the measurement, where there is one."""
        values = self.figures.get(name, [])
        return standard_error(values) if len(values) > 1 else self.errors.get(name)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; lists are kept as they are."""
    found: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, Mapping):
            found |= flat(part, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = part
    return found


def grouped(cells: Sequence[Document]) -> tuple[list[str], list[Group]]:
    """Names of the settings that vary (but for the seed), and the cells by those settings, in their order."""
    settings = [{k: v for k, v in flat(one.content.settings).items() if _plain(v)} for one in cells]
    names = list(dict.fromkeys(name for one in settings for name in one))
    varying = [name for name in names if name != _SEED and len({_key(one.get(name)) for one in settings}) > 1]
    groups: dict[tuple, list[int]] = {}
    for index, one in enumerate(settings):
        groups.setdefault(tuple(_key(one.get(name)) for name in varying), []).append(index)
    made = [_group([cells[i] for i in members], settings[members[0]]) for members in groups.values()]
    return varying, sorted(made, key=lambda group: [_place(group.settings.get(name)) for name in varying])


def telling(varying: Sequence[str], groups: Sequence[Group]) -> list[str]:
    """Those of the settings that tell the groups apart; the others follow from them."""

    def apart(names: Sequence[str]) -> int:
        return len({tuple(_key(group.settings.get(name)) for name in names) for group in groups})

    kept = list(varying)
    for name in reversed(varying):
        fewer = [one for one in kept if one != name]
        if fewer and apart(fewer) == len(groups):
            kept = fewer
    return kept


def frontier(values: Mapping[float, float], sign: int = 1) -> list[float]:
    """Places in order, without those where a lower one is as good already: less is better, more with a sign of -1."""
    kept: list[float] = []
    for x in sorted(values):
        if not kept or sign * values[x] < sign * values[kept[-1]]:
            kept.append(x)
    return kept


def _place(value: Any) -> tuple[bool, float, str]:
    """Numbers by their size, before words."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (not number, float(value) if number else 0.0, "" if number else str(value))


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) or value is None


def _key(value: Any) -> str:
    """What makes two settings equal: 1 and 1.0 are, 1 and "1" and True are not."""
    return (
        repr(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value)
    )


def _group(cells: Sequence[Document], settings: dict[str, Any]) -> Group:
    figures: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for one in cells:
        for name, value in _numbers(one.content.figures).items():
            target = _error_of(name)
            if target is None:
                figures.setdefault(name, []).append(value)
            else:
                errors[target] = value
    errors |= {f"{name}_mean": error for name, error in errors.items() if f"{name}_mean" in figures}
    means = {name: fmean(values) for name, values in figures.items()}
    return Group({**settings, **_derived(settings, means)}, figures, errors, tuple(cells))


def _derived(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, float]:
    """What the settings and figures say without saying it."""
    found: dict[str, float] = {}
    if (kept := cache_share(settings, figures)) is not None:
        found[SHARE] = round(100 * kept, 6)
    if (widths := widths_of(settings)) is not None and sum(widths) > 0:
        found[SPLIT] = round(100 * widths[0] / sum(widths), 6)
    first, second = settings.get("stage1_tokens"), settings.get("stage2_tokens")
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        found[TOKENS] = first + second
        if first + second > 0:
            found[FIRST] = round(100 * first / (first + second), 6)
    return found


def _error_of(name: str) -> str | None:
    """The figure whose standard error this is: ratio_standard_error of ratio, standard_error of perplexity."""
    path, _, last = name.rpartition(".")
    if last == "standard_error":
        return f"{path}.perplexity" if path else "perplexity"
    for ending in ("_standard_error", "_stderr"):
        if last.endswith(ending):
            return f"{path}.{last.removesuffix(ending)}" if path else last.removesuffix(ending)
    return None


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Numbers among the figures; a grid (needle, order) by its mean."""
    found: dict[str, float] = {}
    for name, value in flat(figures).items():
        path, _, last = name.rpartition(".")
        grid = _GRIDS.get(path.rpartition(".")[2].removeprefix("original_"))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if grid is None:
                found[name] = float(value)
        elif grid == last and (numbers := numbers_in(value)):
            found[f"{path}, mean {last}"] = fmean(numbers)
    return found


def widths_of(settings: Mapping[str, Any]) -> tuple[float, float] | None:
    """d_qk and d_vo, where they are one number each."""
    d_qk, d_vo = settings.get("d_qk"), settings.get("d_vo")
    known = isinstance(d_qk, (int, float)) and isinstance(d_vo, (int, float))
    return (d_qk, d_vo) if known else None


def cache_share(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> float | None:
    """The share of the cache that is kept: measured, else as it was asked for, else from the widths."""
    own, original = figures.get("cache_bytes_per_token"), figures.get("original_cache_bytes_per_token")
    if own and original:
        return own / original
    for source, names in ((figures, ("cache_ratio", "cache_share")), (settings, ("share", "kv"))):
        for name in names:
            if isinstance(source.get(name), (int, float)):
                return float(source[name])
    widths, head_dim = widths_of(settings), settings.get("head_dim")
    return (
        sum(widths) / (2 * head_dim) if widths and isinstance(head_dim, (int, float)) and head_dim else None
    )
