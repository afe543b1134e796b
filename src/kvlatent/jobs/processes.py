"""The processes that a run is spread over: how many, who writes, and how all learn what one of them found.

torchrun and `accelerate launch` start them; accelerate reads what they set. One process is the same code with nobody to talk to.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["any_process", "is_main", "is_spread", "join_processes", "on_main"]

Found = TypeVar("Found")

_PATIENCE = timedelta(
    hours=6
)  # the others wait while one brings a text into blocks; torch's minutes would end the run


def join_processes(device: str) -> int:
    """Meet the other processes of this run, if there are any; returns how many there are.

    Args:
        device: "cpu" or "cuda".
    """
    from accelerate import PartialState

    PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return _count()


def is_spread() -> bool:
    """Whether a launcher started this process, possibly as the only one."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this is the process that writes and reports, or the only one."""
    return _count() == 1 or dist.get_rank() == 0


def on_main(work: Callable[[], Found]) -> Found:
    """Do something in one process; all of them get what it returned, or raise what it raised.

    Args:
        work: what it returns or raises can be pickled.
    """
    if _count() == 1:
        return work()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except Exception as error:  # noqa: BLE001 - whatever it was, the others wait for an answer
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def any_process(is_so: bool) -> bool:
    """Whether it is so in any process; all of them have to ask."""
    if _count() == 1:
        return is_so
    told: list[Any] = [None] * _count()
    dist.all_gather_object(told, is_so)
    return any(told)


def _count() -> int:
    return dist.get_world_size() if is_spread() else 1
