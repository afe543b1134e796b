"""As many threads as there are processors free: more than that wait for one another at every barrier.

On a machine whose processors are busy, two OpenMP threads can be many times slower than one. What others take is
measured while the libraries load, which costs no time of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

__all__ = ["watch_processors"]

_SAID = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_ENOUGH_S = 0.5  # a shorter look says little
_FREE = ("idle", "iowait", "guest", "guest_nice")  # what guests take is part of user and nice, too


def watch_processors() -> Callable[[], str | None]:
    """Begin to look at what other processes take of the processors that this one may use.

    Returns:
        A function to call after a while, with torch imported: it lowers torch's threads to the processors that were free,
        and returns what it did as a sentence, None where it did nothing. Numbers that the user chose stay, and all do
        where the system hides its clocks.
    """
    try:
        start, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    except (OSError, psutil.Error):
        return lambda: None

    def settle() -> str | None:
        import torch

        elapsed, threads = time.monotonic() - start, torch.get_num_threads()
        if any(os.environ.get(name) for name in _SAID) or elapsed < _ENOUGH_S or threads == 1:
            return None
        others = max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / elapsed
        free = max(1, round(len(_processors()) - others))
        if free >= threads:
            return None
        torch.set_num_threads(free)
        return (
            f"other processes keep {others:.1f} of {len(_processors())} processors busy, so this one takes "
            f"{free} of {threads} threads; set OMP_NUM_THREADS to choose"
        )

    return settle


def _processors() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _busy_seconds() -> float:
    """Seconds that these processors have worked since they started, for anyone."""
    times = psutil.cpu_times(percpu=True)
    return sum(
        sum(times[number]) - sum(getattr(times[number], name, 0.0) for name in _FREE)
        for number in _processors()
        if number < len(times)
    )


def _own_seconds() -> float:
    """Seconds that this process has worked."""
    own = psutil.Process().cpu_times()
    return own.user + own.system
