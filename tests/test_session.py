"""What people see while a command works: how far it is, and the time left, however silent the work."""

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from kvlatent.jobs.record import with_error
from kvlatent_cli import session as module
from kvlatent_cli.listings import list_pairs
from kvlatent_cli.session import Session, session


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


@pytest.fixture
def lines(capsys):
    """What was said so far on stderr, which is no terminal."""
    said = []

    def read():
        said.extend(capsys.readouterr().err.splitlines())
        return said

    return read


def started():
    return Session(False, Console(file=io.StringIO()))


def test_the_first_line_comes_within_five_seconds_and_a_line_now_and_then(clock, lines):
    current = started()
    current.report("needle", 0, 80, "")
    clock(2)
    current._show_progress()
    assert lines() == []
    clock(1)
    current._show_progress()
    assert lines() == ["needle: 0/80"]
    for _ in range(30):
        clock(1)
        current._show_progress()
    assert lines() == ["needle: 0/80"] * 3


def test_the_time_left_follows_from_the_pace_and_runs_down(clock, lines):
    current = started()
    current.report("needle", 0, 0, "")  # reading the text, which is no part of the pace
    clock(30)
    current.report("needle", 0, 80, "")
    clock(10)
    current.report("needle", 20, 80, "")
    assert current._left() == "about 30 s left"
    clock(12)
    assert current._left() == "about 18 s left"  # while a batch is read
    clock(40)
    assert current._left() == "about 0 s left"
    current.report("order", 0, 0, "")
    assert current._left() == ""


def test_a_terminal_shows_the_time_left(clock, monkeypatch):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    current = started()
    current.report("needle", 0, 80, "")
    clock(10)
    current.report("needle", 20, 80, "")
    assert current.progress.tasks[0].fields["left"] == "about 30 s left"


def test_work_that_says_nothing_is_seen_to_work(lines, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_LINE_AFTER_S", 0.0)
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    with session() as run:
        run.report("a forward pass", 0, 0, "")
        before, deadline = len(lines()), time.monotonic() + 20
        while len(lines()) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lines()[before] == "a forward pass: at work"


def test_a_quick_command_says_nothing(lines):
    module._silence()  # imports what the session would import
    with session() as run:
        run.report("a forward pass", 0, 0, "")
    assert lines() == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (None, "-"),
        (0, "0"),
        (65_536, "65,536"),
        (6.3960125756707145, "6.39601"),
        (0.0004041408537887037, "0.000404141"),
        ([50, 200], "50, 200"),
        ((64, 32), "64, 32"),
        ({"original": 4096, "dtype": "float32"}, "original 4,096, dtype float32"),
        ([{"d_qk": 2, "d_vo": [4, 2]}, {"d_qk": 4, "d_vo": 4}], "d_qk 2, d_vo 4, 2; d_qk 4, d_vo 4"),
    ],
)
def test_a_value_is_listed_in_words(value, text):
    assert list(list_pairs({"name": value}).columns[1].cells) == [text]


def test_a_rounding_error_has_no_sign():
    assert with_error(-1e-9, 1e-9, 4) == "0.0000 ± 0.0000"
    assert (with_error(-1e-9, None, 4), with_error(-0.5, None, 4)) == ("0.0000", "-0.5000")


def test_bars_of_libraries_stay_out_of_sight():
    """transformers' reader of GGUF makes its bar by tqdm itself, which no switch of a library turns off."""
    script = (
        "from kvlatent_cli.session import session\n"
        "with session():\n"
        "    import transformers.modeling_gguf_pytorch_utils as reader\n"
        "    list(reader.tqdm(range(3), desc='dequantise'))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True
    )
    assert "dequantise" not in ran.stderr + ran.stdout
