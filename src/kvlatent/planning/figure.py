"""The picture of a plan: predicted error against budget, for the best split and for equal widths."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from kvlatent.jobs.atomic import write_atomically
from kvlatent.planning.width_plan import CurvePoint

__all__ = ["check_picture", "draw_error_curve"]

_FORMATS = ("svg", "png", "pdf")


def check_picture(path: str | Path, *, overwrite: bool = False) -> str:
    """Its format, once it is known that a picture can be written there.

    Raises:
        FileExistsError: a file of that name exists and `overwrite` is false.
        ValueError: another suffix than .svg, .png or .pdf, or matplotlib is not installed.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in _FORMATS:
        raise ValueError(
            f"the picture is one of {', '.join(_FORMATS)}: got {path.name!r}; try {path.stem}.svg"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass overwrite (--overwrite)")
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ValueError("the picture needs matplotlib; pip install 'kvlatent[lab]'") from error
    return kind


def draw_error_curve(
    curve: Sequence[CurvePoint], path: str | Path, *, title: str = "", overwrite: bool = False
) -> Path:
    """Draw the predicted error against the share of the cache; the points of the best split bear their widths.

    The error axis is logarithmic; budgets without any error, such as the whole cache, are left out.

    Args:
        curve: from `planning.error_curve`, the same in every layer.
        path: of the picture; its suffix, .svg, .png or .pdf, is the format.
        title: above the picture.
        overwrite: replace a file of that name.

    Returns:
        The path.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false.
        ValueError: another suffix, nothing to draw, or matplotlib is not installed.
    """
    path = Path(path)
    kind = check_picture(path, overwrite=overwrite)
    matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    best = [point.best for point in curve if point.best.error > 0]
    symmetric = [point.symmetric for point in curve if point.symmetric.error > 0]
    if not best:
        raise ValueError(
            f"a picture needs a budget with an error above 0: got {len(curve)} budgets, 0 with one; give smaller budgets"
        )
    figure = figures.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for plans, style, label in ((symmetric, "s--", "d_qk = d_vo"), (best, "o-", "best split")):
        axes.plot([100 * p.kv for p in plans], [p.error for p in plans], style, markersize=4, label=label)
    for plan in best:
        axes.annotate(
            f"{plan.d_qk}/{plan.d_vo}",
            (100 * plan.kv, plan.error),
            xytext=(-2, -9),
            textcoords="offset points",
            fontsize=7,
            ha="right",
        )
    axes.set(
        yscale="log",
        xlabel="share of the cache kept, %",
        ylabel="predicted relative squared error\nof the attention output",
        title=title,
    )
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend(title="d_qk/d_vo per head", frameon=False)
    # Without a date and with a fixed salt, equal curves give equal files.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "kvlatent"}):
        write_atomically(
            path, lambda sibling: figure.savefig(sibling, format=kind, dpi=160, metadata=metadata)
        )
    return path
