"""Listings of the page: entries that carry the exact number beside its rounded text, and how numbers are rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Entry", "Listing", "Row", "distinct", "entry", "exact", "number", "plain", "share", "words"]

_MINUS, _TIMES = "\u2212", "\u00d7"


@dataclass(frozen=True)
class Entry:
    """What is read, the number behind it, its error, and how deep a heat map shades it (0 to 1)."""

    text: str = "–"
    value: float | None = None
    error: float | None = None
    shade: float | None = None


@dataclass(frozen=True)
class Row:
    """A row with a name of its own in the listing; `head` is what its first column says, the name if it is empty."""

    name: str
    entries: tuple[Entry, ...]
    head: str = ""


@dataclass(frozen=True)
class Listing:
    """A listing with a name of its own, so that a reader of the HTML finds each figure by listing, row and column."""

    name: str
    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    heat: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        corner: str,
        columns: Sequence[str],
        rows: Sequence[tuple[str, Sequence[Entry]]],
        *,
        caption: str = "",
        heat: bool = False,
    ) -> Listing:
        names = distinct([head for head, _ in rows])
        named = [Row(name, tuple(each), head) for name, (head, each) in zip(names, rows, strict=True)]
        return cls(name, caption, corner, tuple(columns), tuple(named), heat)


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels of their own, as a listing calls rows and columns by them: those that come again are numbered."""
    taken: dict[str, None] = {}
    for label in labels:
        one, number = label, 1
        while one in taken:
            number += 1
            one = f"{label} ({number})"
        taken[one] = None
    return list(taken)


def number(value: float, error: float | None = None, *, digits: int = 4) -> str:
    """A number as it is read: `digits` significant digits, or two of its error, but no more than six of its own."""
    if error is not None and 0 < error < math.inf and max(abs(value), error) < 1e15:
        first = -math.floor(math.log10(error))  # the place of its first digit
        most = 5 - math.floor(math.log10(abs(value))) if value else 8
        places = max(min(first + 1, max(most, first)), 0)
        return f"{_grouped(value, places)} ± {_grouped(error, places)}"
    text = exact(value, digits)
    return text if error is None else f"{text} ± {exact(error, 2)}"


def plain(value: float) -> str:
    """A number without zeros at its end, as settings and axes want it."""
    text = exact(value)
    return text.rstrip("0").rstrip(".") if "." in text and "^" not in text else text


def exact(value: float, digits: int = 4) -> str:
    """Whole numbers in full, others with so many significant digits, very small and large ones in powers of ten."""
    if float(value).is_integer() and abs(value) < 1e15:
        return _grouped(value, 0)
    size = math.floor(math.log10(abs(value)))
    if not -5 < size < 15:
        mantissa, _, power = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa} {_TIMES} 10^{int(power)}".replace("-", _MINUS)
    return _grouped(value, max(digits - 1 - size, 0))


def _grouped(value: float, places: int) -> str:
    return f"{value:,.{places}f}".replace("-", _MINUS)


def _known(value: Any) -> float | None:
    """A number; None and NaN, which stands for it in a data frame, are none."""
    return None if value is None or math.isnan(value) else float(value)


def entry(value: float | None, error: float | None = None, *, digits: int = 4) -> Entry:
    """The entry of a number; a dash where there is none."""
    value, error = _known(value), _known(error)
    return Entry() if value is None else Entry(number(value, error, digits=digits), value, error)


def share(value: float | None, error: float | None = None, *, places: int = 1, shade: bool = False) -> Entry:
    """The entry of a share, read in per cent; the number behind it stays between 0 and 1."""
    value, error = _known(value), _known(error)
    if value is None:
        return Entry()
    text = f"{100 * value:.{places}f}" + ("" if error is None else f" ± {100 * error:.{places}f}") + " %"
    return Entry(text, value, error, min(max(value, 0.0), 1.0) if shade else None)


def words(text: object) -> Entry:
    """The entry of something that is no number."""
    return Entry() if text is None else Entry(str(text))
