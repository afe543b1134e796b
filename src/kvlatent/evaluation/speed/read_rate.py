"""How fast the machine reads memory, measured as a step of decoding reads: everything once, with all threads."""

from __future__ import annotations

import time

import torch

__all__ = ["read_rate"]

_BYTES, _READS = 2**28, 4  # far beyond any cache of a processor


def read_rate(threads: int) -> float:
    """Bytes a second of a sum over a quarter of a gigabyte, the best of four."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = torch.ones(_BYTES // 4)
        seconds = []
        for _ in range(_READS):
            start = time.perf_counter()
            block.sum()
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return _BYTES / min(seconds)
