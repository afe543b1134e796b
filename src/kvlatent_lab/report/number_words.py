"""The text of a result file to data, and what is wrong with a file as one sentence.

Numbers that JSON can spell and a chart cannot draw are refused here, once; characters that no page can hold are
replaced, since a name is no reason to lose a result.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from pydantic import ValidationError

__all__ = ["parsed", "sentence", "showable"]

_LARGEST = 1e150
"""So large that no figure is beyond it, and so small that the ratio of two numbers stays finite."""

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def parsed(text: str) -> Any:
    """The data of a JSON text.

    Raises:
        ValueError: not JSON, or a number that is not finite, beyond 1e150, or smaller than 1e-150 and not 0.
    """
    return showable(
        json.loads(text, parse_constant=_not_finite, parse_float=_number, parse_int=_whole_number)
    )


def _not_finite(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}, and figures are finite")


def _number(word: str) -> float:
    value = float(word)
    if (
        abs(value) > _LARGEST
        or 0 < abs(value) < 1 / _LARGEST
        or (value == 0 and re.match("-?[0.]*[1-9]", word))
    ):
        raise ValueError(f"numbers are 0 or between 1e-150 and 1e150 in size: it holds {word:.20}")
    return value


def _whole_number(word: str) -> int:
    _number(word)  # first, as Python refuses thousands of digits in words of its own
    return int(word)


def showable(value: Any) -> Any:
    """The same data with every character that HTML and SVG cannot hold replaced."""
    if isinstance(value, str):
        return _UNSEEN.sub("\ufffd", value)
    if isinstance(value, dict):
        return {showable(key): showable(part) for key, part in value.items()}
    return [showable(part) for part in value] if isinstance(value, list) else value


def sentence(error: Exception) -> str:
    """What is wrong with a file, without its path."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {_said(first)}" if place else _said(first)
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg} in line {error.lineno}"
    if isinstance(error, UnicodeDecodeError):
        return "no text in UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.strerror or "cannot be read" if isinstance(error, OSError) else str(error)


def _said(detail: Any) -> str:
    """One error of pydantic; one that a validator of ours raised speaks for itself."""
    own = detail.get("ctx", {}).get("error")
    if isinstance(own, Exception):
        return sentence(own)
    given = detail["input"]
    return detail["msg"] + (f": got {given!r:.40}" if isinstance(given, (str, int, float)) else "")
