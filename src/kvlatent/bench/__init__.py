"""How fast a model reads and writes and what its cache takes, measured beside its original and beside quantised caches."""

from .caches import CACHES
from .measure import bench
from .shapes import SHAPES, random_pair
from .table import bench_card, bench_lines, bench_table, json_line

__all__ = [
    "CACHES",
    "SHAPES",
    "bench",
    "bench_card",
    "bench_lines",
    "bench_table",
    "json_line",
    "random_pair",
]
