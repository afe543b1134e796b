"""The drawings of the documentation: `python tools/site_pictures.py` writes docs/pictures.

tests/test_site.py fails where a drawing is no longer what this writes. They stand on a light card of their own, since a
picture that a page refers to does not learn whether the page is dark.
"""

from __future__ import annotations

import math
from pathlib import Path

__all__ = ["PICTURES"]

ROOT = Path(__file__).resolve().parent.parent
_INK, _KEYS, _VALUES, _GONE, _LIGHT = "#24292f", "#2563a8", "#b4540a", "#d5d9de", "#6b7280"


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif">\n'
        f"<title>{title}</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n'
    )
    return start + "\n".join(parts) + "\n</svg>\n"


def _text(x: float, y: float, words: str, *, size: int = 14, fill: str = _INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{words}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'


def cache_picture() -> str:
    """One head's cache before and after: a row a token, keys and values beside each other."""
    tokens, cell, full, kept = ("The", "cat", "sat", "on", "the"), 26, 64, 32
    parts = []
    for left, title, width in ((80, "before: 64 and 64 numbers", full), (440, "after: 32 and 32", kept)):
        parts.append(_text(left, 28, title))
        for row, token in enumerate(tokens):
            y = 48 + row * cell
            if left == 80:
                parts.append(_text(68, y + 15, token, anchor="end", fill=_LIGHT))
            for start, fill in ((left, _KEYS), (left + 148, _VALUES)):
                parts.append(_box(start, y, 2 * full, cell - 6, _GONE))
                parts.append(_box(start, y, 2 * width, cell - 6, fill))
        parts += [
            _text(left, 200, "keys", fill=_KEYS),
            _text(left + 148, 200, "values", fill=_VALUES),
        ]
    parts.append(
        _text(
            80,
            224,
            "One head of one layer. A row is a token; every further token adds one.",
            size=13,
            fill=_LIGHT,
        )
    )
    return _svg(740, 240, "The KV cache of one head before and after", parts)


def rope_picture(theta: float = 1e4, pairs: int = 8) -> str:
    """Channel pairs as clocks: each turns at a frequency of its own, and a kept pair keeps it."""
    kept, parts = (0, 2, 3, 6), []
    for pair in range(pairs):
        x, fill = 54 + pair * 88, _KEYS if pair in kept else _GONE
        turn = theta ** (-pair / pairs)  # radians a token, over `pairs` pairs
        ink = _INK if pair in kept else _LIGHT
        parts.append(f'<circle cx="{x}" cy="84" r="32" fill="none" stroke="{fill}" stroke-width="4"/>')
        for token in range(4):
            angle = turn * token - math.pi / 2
            tip = f'x2="{x + 26 * math.cos(angle):.1f}" y2="{84 + 26 * math.sin(angle):.1f}"'
            parts.append(
                f'<line x1="{x}" y1="84" {tip} stroke="{fill}" stroke-width="3" opacity="{1 - 0.22 * token:g}"/>'
            )
        parts.append(_text(x, 142, f"{turn:.2g}", size=13, anchor="middle", fill=ink))
        parts.append(_text(x, 162, "kept" if pair in kept else "dropped", size=13, anchor="middle", fill=ink))
    parts.append(
        _text(22, 30, "Eight channel pairs of a key: radians by which each turns from a token to the next")
    )
    parts.append(
        _text(
            22,
            192,
            "A kept pair turns as it did in training. New frequencies would mean that it reads distances wrongly.",
            size=13,
            fill=_LIGHT,
        )
    )
    return _svg(740, 208, "Rotary position embedding, and which pairs are kept", parts)


def quality_picture() -> str:
    """Quality against cache of the real model, as `benchmarks/real_tables.py --render` drew it."""
    return (ROOT / "benchmarks" / "results" / "real_tables.svg").read_text(encoding="utf-8")


PICTURES = {"cache.svg": cache_picture, "rope.svg": rope_picture, "quality.svg": quality_picture}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (ROOT / "docs" / "pictures" / name).write_text(draw(), encoding="utf-8")
