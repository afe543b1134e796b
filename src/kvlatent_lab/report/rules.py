"""What a figure must be, whatever the study: a number, of a sign that its name allows.

A figure that breaks a rule would be drawn as if it were measured, or stop the page, so its file is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

__all__ = ["Positive", "Size", "check_numbers", "check_signs"]

Positive = Annotated[float, Field(gt=0)]
Size = Annotated[float, Field(ge=0)]

_POSITIVE = re.compile(r"(?:^|(?<!entropy)_)(?:ratio|perplexity)$")  # one-hot attention has no entropy
_ERROR = re.compile(r"(?:^|_)(?:standard_error|stderr)$")
_SIZE = re.compile(r"(?:^|_)(?:seconds|s|ms|bytes|(?:bytes|ms)_per_token|tokens)$")


def check_numbers(value: Any, place: str) -> None:
    """Raise `ValueError` where nested mappings and lists hold anything but numbers."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            check_numbers(part, f"{place}.{name}")
    elif isinstance(value, list):
        for part in value:
            check_numbers(part, place)
    else:
        _check_number(value, place)


def check_signs(figures: Mapping[str, Any], place: str) -> None:
    """Raise `ValueError` at a ratio or perplexity that is not above 0, and at an error, time or size below 0.

    Names tell which is which; what is none of them may be anything. None stands for what was not measured.
    """
    for name, value in figures.items():
        where = f"{place}.{name}"
        if isinstance(value, Mapping):
            check_signs(value, where)
        elif _ERROR.search(name):
            _check_errors(value, where)
        elif (positive := _POSITIVE.search(name)) or _SIZE.search(name):
            _check_size(value, where, above=bool(positive))


def _check_errors(value: Any, place: str) -> None:
    """Errors of a grid are one, too."""
    if isinstance(value, list):
        for part in value:
            _check_errors(part, place)
    else:
        _check_size(value, place)


def _check_size(value: Any, place: str, *, above: bool = False) -> None:
    if value is None:
        return
    _check_number(value, place)
    if value < 0 or (above and value == 0):
        raise ValueError(f"{place} must {'be above 0' if above else 'not be negative'}: got {value}")


def _check_number(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{place} must be a number: got {value!r:.40}")  # noqa: TRY004
