"""Scratch folders are gone when their step ends, and those of killed processes when the next begins."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
from filelock import FileLock

from kvlatent.jobs.scratch import scratch_folder

_KILLED = """
import os, signal, sys
from kvlatent.jobs.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "states").write_bytes(bytes(1000))
    print(folder, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_gone_at_the_end_and_after_an_error(place):
    with scratch_folder() as folder:
        (folder / "file").write_text("x")
        assert folder.is_relative_to(place)
    with pytest.raises(KeyError), scratch_folder():
        raise KeyError
    assert not list(place.iterdir())


def test_the_next_takes_away_what_a_killed_process_left_and_not_what_is_in_use(place):
    def start(how):
        return subprocess.Popen(
            [sys.executable, "-c", _KILLED, how], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        )

    with start("killed") as killed:
        left = killed.stdout.readline().strip()
        assert killed.wait() == -signal.SIGKILL and os.path.isfile(f"{left}/states")
    with start("alive") as alive:
        held = alive.stdout.readline().strip()
        assert not os.path.exists(left)
        with scratch_folder() as own, scratch_folder() as another:
            assert os.path.isfile(f"{held}/states")
            assert own.is_dir() and another.is_dir() and own != another
        alive.stdin.close()
    assert not list(place.iterdir())


def test_what_is_not_its_own_stays(place):
    (place / "kvlatent-of-a-user").mkdir()
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / ".lock").write_text("")
    (place / "kvlatent-link").symlink_to(place / "elsewhere")
    before = sorted(place.iterdir())
    with scratch_folder():
        pass
    assert sorted(place.iterdir()) == before and (place / "elsewhere" / ".lock").is_file()


def test_a_folder_that_another_process_takes_for_abandoned_is_replaced(place, monkeypatch):
    """It may look between the making of a folder and its locking: it holds the lock then, or has taken it away."""
    made, taken, mkdtemp = [], [], tempfile.mkdtemp

    def make(**options):
        made.append(mkdtemp(**options))
        if len(made) == 1:
            taken.append(FileLock(f"{made[0]}/.lock"))
            taken[0].acquire()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make)
    with scratch_folder() as folder:
        assert len(made) == 2 and folder.is_relative_to(made[1]) and folder.is_dir()
    taken[0].release()
