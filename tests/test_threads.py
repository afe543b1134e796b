"""Threads by the processors that are free."""

from collections import namedtuple

import pytest
import torch

from kvlatent_cli import threads


@pytest.fixture
def machine(monkeypatch):
    """A machine of four processors whose clocks the test sets: [seconds, busy seconds of all, of this process]."""
    clock = [0.0, 100.0, 10.0]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(threads, "_busy_seconds", lambda: clock[1])
    monkeypatch.setattr(threads, "_own_seconds", lambda: clock[2])
    monkeypatch.setattr(threads, "_processors", lambda: [0, 1, 2, 3])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield clock
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("busy", "own", "left"),
    [(3.0, 3.0, 4), (3.9, 3.0, 4), (6.0, 3.0, 3), (9.0, 3.0, 2), (15.0, 3.0, 1), (2.0, 3.0, 4)],
)
def test_what_others_take_is_left_to_them(machine, busy, own, left):
    settle = threads.watch_processors()
    machine[:] = [3.0, 100.0 + busy, 10.0 + own]
    said = settle()
    assert torch.get_num_threads() == left
    if left == 4:
        assert said is None
    else:
        assert said == (
            f"other processes keep {(busy - own) / 3:.1f} of 4 processors busy, so this one takes {left} of 4 threads; "
            "set OMP_NUM_THREADS to choose"
        )


def test_a_number_that_the_user_chose_stays(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    settle = threads.watch_processors()
    machine[:] = [3.0, 115.0, 13.0]
    assert settle() is None and torch.get_num_threads() == 4


def test_a_short_look_decides_nothing(machine):
    settle = threads.watch_processors()
    machine[:] = [0.1, 100.4, 10.0]
    assert settle() is None and torch.get_num_threads() == 4


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, threads.psutil.AccessDenied])
def test_a_system_that_hides_its_clocks_is_left_alone(monkeypatch, error):
    def hidden(percpu):
        raise error("/proc/stat")

    monkeypatch.setattr(threads.psutil, "cpu_times", hidden)
    before = torch.get_num_threads()
    assert threads.watch_processors()() is None and torch.get_num_threads() == before


def test_what_guests_take_counts_once_and_fields_may_lack(monkeypatch):
    few, many = (
        namedtuple("Times", names) for names in ("user idle", "user nice idle iowait guest guest_nice")
    )
    monkeypatch.setattr(threads, "_processors", lambda: [0, 1, 2])
    monkeypatch.setattr(
        threads.psutil, "cpu_times", lambda percpu: [few(3.0, 9.0), many(5.0, 1.0, 9.0, 2.0, 4.0, 1.0)]
    )
    assert threads._busy_seconds() == 3 + 6


def test_the_clocks_of_this_machine_run():
    before, own = threads._busy_seconds(), threads._own_seconds()
    while threads._own_seconds() - own < 0.2:
        sum(range(10_000))
    assert threads._busy_seconds() - before > 0.1 and len(threads._processors()) >= 1
