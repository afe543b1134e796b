"""What every command has around it: silence from libraries, progress on stderr, errors as one sentence.

Exit codes: 0 done, 2 a mistake of the user's (one sentence on stderr), 130 interrupted, 1 a defect (traceback).
`KVLATENT_TRACEBACK=1` shows the traceback of a mistake too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Generator
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .listings import duration
from .printing import answer_console, print_listing, progress_bar
from .threads import watch_processors

_DISK = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file is larger than this system allows"}
_DISK_SIGNS = (
    "No space left",
    "File too large",
    "PytorchStreamWriter failed",
    "unexpected pos",  # torch.save, closing an archive that the disk cut short
    "inline_container",
    "I/O error",
)
_OTHERS_WAIT_S = 10.0  # most mistakes are seen by all processes: where the first says it, torchrun has ended the others by then
_CHATTY = ("huggingface_hub", "httpx", "httpx2", "httpcore", "urllib3", "fsspec")
_START = "start"  # the step before a command's first: its imports, and what has no progress
_SHOWN_AFTER_S = 2.0
_FIRST_LINE_AFTER_S, _LINE_EVERY_S = 2.5, 15.0


@contextlib.contextmanager
def session(as_json: bool = False) -> Generator[Session]:
    """Run a command's work: stdout is kept for its answer, mistakes become a sentence and exit code 2."""
    stdout = sys.stdout
    current = Session(as_json, answer_console(stdout), is_quiet=_rank() > 0)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), current.shown():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module="kvlatent")  # our own; a library's are not for users
            warnings.showwarning = current.say_warning  # ty: ignore[invalid-assignment]
            current.report(_START, 0, 0, "loading libraries")  # which can take longer than their work
            settle_threads = watch_processors()
            _silence()
            if (sentence := settle_threads()) is not None:
                current.say(sentence)
            yield current
            current.close()
    except KeyboardInterrupt:
        print("interrupted; repeat the command to continue where it can", file=sys.stderr)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except SystemExit as ended:  # asked to end from outside
        if _rank() == 0:
            print(ended, file=sys.stderr)
        raise
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or os.environ.get("KVLATENT_TRACEBACK"):
            raise
        if _rank() > 0:
            time.sleep(_OTHERS_WAIT_S)
        print(f"error: {sentence}", file=sys.stderr)
        raise typer.Exit(2) from None
    current.flush()


class Session:
    """One command at work: what was typed, its progress, and its answer.

    Args:
        as_json: the answer is one JSON document instead of lines and listings.
        console: of stdout.
        is_quiet: another process of the same run speaks.

    Attributes:
        typed: options by the spelling of their flags, for a record.
    """

    def __init__(self, as_json: bool, console: Console, is_quiet: bool = False) -> None:
        self.as_json, self.console, self.is_quiet = as_json, console, is_quiet
        self.answer: list[Any] = []
        self.typed: dict[str, Any] = {}
        self.progress = progress_bar()
        self._lock = threading.RLock()  # the step's state is read by a thread beside the work
        self._step, self._note, self._task = "", "", None
        self._done = self._total = self._first = 0
        self._since = self._measured = self._reported = time.monotonic()
        self._speaks_at = self._since + _FIRST_LINE_AFTER_S

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Keep the progress in sight while the work is silent: one forward pass, or an import, can take minutes."""
        if self.is_quiet:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                self._show_progress()

        watcher = threading.Thread(target=watch, daemon=True)
        with self.progress:
            watcher.start()
            try:
                yield
            finally:
                ended.set()
                watcher.join()

    def report(self, step: str, done: int, total: int, note: str) -> None:
        """Show how far a step is: a bar in a terminal, elsewhere a line now and then and at its end."""
        with self._lock:
            now = time.monotonic()
            if step != self._step:
                self.close()
                self._step, self._since, self._total = step, now, -1
                self._task = self.progress.add_task(step, total=total or None, note=note, left="")
            if total != self._total or done < self._done:  # the pace is that of the part that is counted now
                self._total, self._first, self._measured = total, done, now
            self._done, self._note, self._reported = done, note, now
            self._show_progress()

    def _show_progress(self) -> None:
        with self._lock:
            if self._task is not None:
                counts: dict[str, Any] = {"completed": self._done, "total": self._total or None}
                self.progress.update(self._task, **counts, note=self._note, left=self._left())
            if self.progress.disable and self._step and time.monotonic() >= self._speaks_at:
                self.say(self._line())

    def _line(self) -> str:
        """How far the step is: done of total, note, and the time left."""
        parts = [f"{self._done:,}/{self._total:,}"] if self._total else []
        parts += [part for part in (self._note, self._left()) if part]
        return f"{self._step}: {', '.join(parts) or 'at work'}"

    def _left(self) -> str:
        """The time left of the step, at its pace since its first report with this total; "" before anything is done."""
        more = self._done - self._first
        if self._total <= 0 or more <= 0:
            return ""
        left = (self._reported - self._measured) * (self._total - self._done) / more
        return f"about {duration(max(0.0, left - (time.monotonic() - self._reported)))} left"

    def say(self, text: str) -> None:
        """A line for people, on stderr."""
        if self.is_quiet:
            return
        self._speaks_at = time.monotonic() + _LINE_EVERY_S
        self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def say_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """A warning for people, on stderr; in the place of `warnings.showwarning`."""
        self.say(f"warning: {message}")

    def show(self, document: Any, *parts: str | Table) -> None:
        """Set the answer: the document under --json, lines and listings otherwise."""
        self.answer = [document] if self.as_json else list(parts)

    def flush(self) -> None:
        """Print the answer on stdout, once."""
        answer, self.answer = [] if self.is_quiet else self.answer, []
        for part in answer:
            if self.as_json:
                self.console.file.write(json.dumps(part, indent=2) + "\n")
            elif isinstance(part, str):
                self.console.file.write(part + "\n")  # as it is: rich would read markup in a model's words
            else:
                print_listing(self.console, part)
        self.console.file.flush()

    def close(self) -> None:
        """End the current step."""
        with self._lock:
            elapsed = time.monotonic() - self._since
            if self._task is not None:
                self.progress.remove_task(self._task)
            if self._step not in ("", _START) and elapsed > _SHOWN_AFTER_S:
                self.say(f"{self._step}: {elapsed:.0f} s" + (f", {self._note}" if self._note else ""))
            self._step, self._task = "", None


def keep_boards(out: str | os.PathLike[str]) -> None:
    """Have TensorBoard's callback write beside the output: where it writes by itself goes when the run is finished."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{os.fspath(out)}.runs")


def check_one_process(command: str) -> None:
    """Raise `ValueError` where torchrun started a command in several processes that would all write the same."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ValueError(
            f"kvlatent {command} runs in one process: got {count}, started by torchrun or accelerate launch; only kvlatent "
            "train spreads over several, so call this one by itself first"
        )


def _rank() -> int:
    """Which of the processes of a run this is; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def sentence_of(error: BaseException) -> str | None:
    """One sentence for a mistake of the user's or a full disk; None for a defect of ours."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for one in chain:
        if isinstance(one, OSError) and one.errno in _DISK:
            where = f" while writing {one.filename}" if one.filename else ""
            return (
                f"{_DISK[one.errno]}{where}; nothing half-written is left, make room and repeat the command"
            )
        if type(one).__name__ in ("RuntimeError", "SafetensorError") and any(
            s in str(one) for s in _DISK_SIGNS
        ):
            return f"writing failed ({_one_line(one)}); nothing half-written is left, make room and repeat the command"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if isinstance(error, (ValueError, OSError)):
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _silence() -> None:
    """Turn off the chatter and the bars of the libraries (called where torch may be imported)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # which has to be there when tqdm is first imported
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    for name in _CHATTY:  # each retry of an unreachable hub is a warning
        logging.getLogger(name).setLevel(logging.ERROR)
