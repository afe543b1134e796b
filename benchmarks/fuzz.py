"""Thousands of wrong inputs: each has to end in success or in one sentence, and to leave everything else as it was.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--kinds ...] [--minutes M] [--out FILE]

hypothesis draws `kv_latent` dicts, recipes, damaged checkpoints and command lines (`fuzz_cases.py`). What the command line
would print a traceback for is a fault; so is a sentence of no words, a case that takes longer than ten seconds, an output
that is half there, or an input that changed. With --minutes it ends early, and says how many cases there were. One JSON
document goes to stdout; exit code 1 where there was a fault.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # names of models that are drawn are not looked for

import argparse
import json
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from fuzz_cases import KINDS, Place
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from json_document import write_document

from kvlatent.jobs.fingerprints import file_sha256
from kvlatent.jobs.record import environment
from kvlatent_cli.session import sentence_of

LIMIT_S = 10.0
_LONGEST = 2_000  # characters of a sentence
_FAULTS_KEPT = 40


class TooSlow(BaseException):
    """A case took longer than `LIMIT_S`; no handler of ours may take it for a mistake."""


def _stop(*_: object) -> None:
    raise TooSlow


class Fuzz:
    """Cases of one kind, and how they ended.

    Args:
        place: what they read.
        kind: of `KINDS`.
    """

    def __init__(self, place: Place, kind: str) -> None:
        self.place, self.kind = place, kind
        self.ended: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.slowest_s = 0.0

    def run(self, cases: int, number: int, until: float) -> dict[str, Any]:
        """That many cases, fewer where the time is over; a JSON-able summary."""

        @seed(number)
        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run_all(data: st.DataObject) -> None:
            if time.monotonic() < until:
                self.case(data.draw)

        run_all()
        return {
            "cases": self.ended.total(),
            "ended": dict(self.ended),
            "slowest_s": round(self.slowest_s, 2),
            "faults": [
                {"what": what, "times": times} for what, times in self.faults.most_common(_FAULTS_KEPT)
            ],
        }

    def case(self, draw: Any) -> None:
        """Run one, and note how it ended."""
        since = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            KINDS[self.kind][1](self.place, draw)
            end = "success"
        except TooSlow:
            end = self._fault(f"longer than {LIMIT_S:.0f} s: {_place_of(sys.exc_info()[1])}")
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise  # it wants to draw otherwise
            end = self._judge(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.ended[end] += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - since)

    def _judge(self, error: Exception) -> str:
        sentence = None if isinstance(error, AssertionError) else sentence_of(error)
        if (
            sentence is not None
            and len(sentence.split()) > 0
            and len(sentence) < _LONGEST
            and _is_raised(error)
        ):
            return "a sentence"
        cause = error.__cause__ or error
        where = _place_of(cause)
        return self._fault(f"{type(cause).__name__} at {where}: {str(error)[:300]} | {str(cause)[:150]}")

    def _fault(self, what: str) -> str:
        self.faults[what] += 1
        return "a fault"


def _is_raised(error: Exception) -> bool:
    """Whether a line of ours raises it, or the system: a ValueError of Python's own is no sentence for users."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, OSError) or (
        "kvlatent" in last.filename and (last.line or "").startswith("raise")
    )


def _place_of(error: BaseException | None) -> str:
    """The last line of ours that it came through."""
    assert error is not None
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "kvlatent" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def content_of(folder: Path) -> dict[str, str]:
    """A hash of every file."""
    return {str(file): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def measure(cases: int, number: int, kinds: list[str], until: float = float("inf")) -> dict[str, Any]:
    """Cases of every kind, in its share; what was found."""
    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Place(Path(folder))
        before = content_of(Path(folder) / "inputs")
        shares = sum(KINDS[kind][0] for kind in kinds)
        results = {}
        for kind in kinds:
            results[kind] = Fuzz(place, kind).run(cases * KINDS[kind][0] // shares, number, until)
            print(kind, json.dumps(results[kind], indent=1), file=sys.stderr)
        unchanged = content_of(Path(folder) / "inputs") == before
    return {
        "cases": sum(one["cases"] for one in results.values()),
        "faults": sum(one["ended"].get("a fault", 0) for one in results.values()),
        "input_unchanged": unchanged,
        "kinds": results,
    }


def main() -> None:
    """Run, print, fail where there was a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    since = time.monotonic()
    found = measure(args.cases, args.seed, args.kinds, since + 60 * args.minutes)
    document = {
        "benchmark": "fuzz",
        "command": shlex.join(["python", "benchmarks/fuzz.py", *sys.argv[1:]]),
        "seed": args.seed,
        "seconds": round(time.monotonic() - since, 1),
        **found,
        **environment("cpu"),
    }
    write_document(document, args.out)
    sys.exit(1 if found["faults"] or not found["input_unchanged"] else 0)


if __name__ == "__main__":
    main()
