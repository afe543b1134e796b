"""Labels beside the points of a picture, each where it covers neither a point nor another label.

A legend would make the reader go to and fro between names and lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

__all__ = ["place_labels"]

_MARK = 4.0  # half of a point's size on the page, with the room around it
_STEPS = (9, 18, 27, 36, 48, 60)  # how far a label may move away, in points of the page


def place_labels(axes: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write every label at the nearest free place around its point; where none is free, at the nearest.

    Args:
        axes: scaled for good.
        labels: text (none is written of an empty one), x, y and colour of every point.
    """
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer, scale = canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    taken = [_around(axes.transData.transform((x, y)), _MARK * scale) for _, x, y, _ in labels]
    for text, x, y, colour in labels:
        if not text:
            continue
        label = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        )
        for place in (places := list(_places())):
            _move(label, place)
            box = label.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        else:
            _move(label, places[0])
        taken.append(label.get_window_extent(renderer))


def _places() -> list[tuple[float, float, str]]:
    """Offsets in points and the side that the text is bound to, the nearest first."""
    found = [(7.0, -3.0, "left"), (-7.0, -3.0, "right")]
    for step in _STEPS:
        for away in (step, -step - 6):
            found += [(0.0, float(away), "center"), (4.0, float(away), "left"), (-4.0, float(away), "right")]
    return found


def _move(label: Any, place: tuple[float, float, str]) -> None:
    label.set_position(place[:2])
    label.set_horizontalalignment(place[2])


def _around(centre: Any, half: float) -> Bbox:
    x, y = centre
    return Bbox([[x - half, y - half], [x + half, y + half]])
