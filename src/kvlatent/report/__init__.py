"""One self-contained HTML page from result files."""

from .page import report

__all__ = ["report"]
