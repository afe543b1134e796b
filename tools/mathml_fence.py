"""Formulas of the documentation as MathML: browsers draw it by themselves, so that no page fetches a script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert

__all__ = ["draw_formula"]


def draw_formula(source: str, *_: Any, **__: Any) -> str:
    """HTML of a fenced block of language `math`, in the signature of pymdownx.superfences."""
    lines = (convert(line, display="block") for line in source.splitlines() if line.strip())
    return f'<div class="math" style="overflow-x: auto">{"".join(lines)}</div>'
