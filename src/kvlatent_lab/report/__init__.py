"""One self-contained HTML page from result files."""

from kvlatent_lab.report.page import report

__all__ = ["report"]
