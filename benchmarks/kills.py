"""Kill `convert` and `compress` again and again at random moments, continue each, and compare with runs that nobody killed.

    python benchmarks/kills.py [--number 30] [--seed 0] [--commands convert "convert --stream" compress] [--out FILE]

Each command runs on a toy, with one thread, in a fork that has its libraries already. Every other kill (SIGKILL) is at a random
time of the run; the others wait until the output is being written, and kill a random time of up to some milliseconds after
that. A killed command is repeated, and killed again, until it comes to its end; in half of the runs the output holds an
older one, which --overwrite replaces. Compared to the bit: every file of the output but for the record, whose seconds differ.
Looked at after every kill: the output is whole (as before or as it should become) or not there. The journals of training
have to have every step once. One JSON document goes to stdout; exit code 1 where anything was lost.
"""

import argparse
import faulthandler
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft  # before the forks, as it takes seconds
import torch
from json_document import write_document
from toy import make_toy

import kvlatent.evaluation.recall
import kvlatent.training.stages
import kvlatent.workflows.compress_checkpoint
import kvlatent.workflows.convert_checkpoint
from kvlatent.jobs.fingerprints import file_sha256
from kvlatent.jobs.record import environment
from kvlatent_cli.main import app

_STEPS = 40
_SETTINGS = [
    "data.block_size=32", "calibration.blocks=16", "conversion.align=5", "conversion.global_steps=0", "lora.rank=2",
    *(f"stage{stage}.{item}" for stage in (1, 2) for item in (f"tokens={_STEPS * 128}", "batch_size=4", "save_steps=5")),
]  # fmt: skip
COMMANDS = {
    "convert": ["convert", "--kv", "0.5"],
    "convert --stream": ["convert", "--kv", "0.5", "--stream"],
    "compress": ["compress", "--kv", "0.5"],
}
_RECORDS = ("run.json", "README.md")  # with the seconds that it took
_JOURNAL = "metrics.jsonl"
_WRITE_S = 0.02
_HANGS_S = 120.0  # then it says where, and ends
_OLD = {"old.txt": "an older output"}


@dataclass
class Command:
    """One command on the toy, and what was seen of it.

    Args:
        words: of the command line, without the output.
        out: the directory that it writes.
        chance: of the moments.
    """

    words: list[str]
    out: Path
    chance: random.Random
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    runs: int = 0

    def start(self) -> int:
        """The process id of a fork that runs it."""
        child = os.fork()
        if child:
            return child
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open(self.out.with_name("stderr.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = 1
        faulthandler.dump_traceback_later(_HANGS_S, exit=True)
        try:
            app([*self.words, "--out", str(self.out)], standalone_mode=False)
            code = 0
        except BaseException as error:  # noqa: BLE001 - whatever it was, the fork ends here
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = getattr(error, "exit_code", 1)
        os._exit(code)

    @property
    def trains(self) -> bool:
        """Whether the output has a journal of steps."""
        return self.words[0] == "compress"

    def run_undisturbed(self) -> None:
        """Once to the end; what came out is what is expected of every other run."""
        since = time.monotonic()
        self._end(self.start())
        self.seconds, self.expected = time.monotonic() - since, content_of(self.out)
        self.faults += lost_steps(self.out) if self.trains else []
        shutil.rmtree(self.out)

    def run_killed(self, left: int) -> None:
        """To the end with at most that many kills on the way."""
        older = self.chance.random() < 0.5
        if older:
            self.out.mkdir()
            for name, text in _OLD.items():
                (self.out / name).write_text(text)
            self.words.append("--overwrite")
        ended = False
        while not ended:
            child = self.start()
            in_write = self.kills["a write"] < self.kills["any moment"]
            if left > 0 and self._kill(child, in_write):
                self.kills["a write" if in_write else "any moment"] += 1
                left -= 1
                ended = self._look(older)
            else:
                self._end(child)
                ended = True
        if content_of(self.out) != self.expected:
            self.faults.append(
                f"run {self.runs}: other bits in {differing(content_of(self.out), self.expected)}"
            )
        self.faults += lost_steps(self.out) if self.trains else []
        self.faults += [f"run {self.runs}: {name} was left behind" for name in self._beside()]
        self.runs += 1
        shutil.rmtree(self.out)
        self.words = [word for word in self.words if word != "--overwrite"]

    def _kill(self, child: int, in_write: bool) -> bool:
        """Kill it at its moment; whether it was still there then."""
        moment = time.monotonic() + self.chance.uniform(0.02, 1.0) * self.seconds
        while time.monotonic() < moment or in_write:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            if in_write and self._is_writing():
                time.sleep(self.chance.uniform(0.0, _WRITE_S))
                break
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        if ended is None or ended.si_code != os.CLD_KILLED:  # it came to its end first, which `_end` looks at
            return False
        os.waitpid(child, 0)
        return True

    def _look(self, older: bool) -> bool:
        """Note what a kill left; whether that is the finished output."""
        if not self.out.exists():
            between = older and not any(".old-" in name for name in self._beside())
            self.found["the old one was lost" if between else "no output"] += 1
            if between:
                self.faults.append("the old output was gone, and the new one was not there")
            return False
        names = {file.name for file in self.out.iterdir()}
        if older and names == set(_OLD):
            self.found["the old output"] += 1
            return False
        whole = content_of(self.out) == self.expected
        self.found["the new output" if whole else "half an output"] += 1
        if not whole:
            self.faults.append(f"half an output: {sorted(names)}")
        # Finished but for what it removes beside it: repeated as it is, as a user would.
        return whole and not self._beside()

    def _is_writing(self) -> bool:
        """Whether files of the output are there that are not in their place yet."""
        shards = self.out.with_name(f"{self.out.name}.partial") / self.out.name  # a streamed conversion's
        return any(".tmp-" in name for name in self._beside()) or any(shards.glob("*"))

    def _beside(self) -> list[str]:
        """What the command keeps beside its output."""
        names = (file.name for file in self.out.parent.iterdir())
        return [name for name in names if name.lstrip(".").startswith(f"{self.out.name}.")]

    def _end(self, child: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            said = self.out.with_name("stderr.txt").read_text()
            raise SystemExit(f"{shlex.join(self.words)} ended with {code}: {said[-4000:]}")

    def result(self) -> dict[str, Any]:
        """All that was counted."""
        return {
            "kills": dict(self.kills),
            "runs_to_the_end": self.runs,
            "same_bits": not any("other bits" in fault for fault in self.faults),
            "found_after_a_kill": dict(self.found),
            "undisturbed_seconds": round(self.seconds, 2),
            "faults": self.faults,
        }


def content_of(folder: Path) -> dict[str, str]:
    """A hash of every file but records and journals, whose seconds differ from run to run."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(folder)): file_sha256(file)
        for file in files
        if file.name not in (*_RECORDS, _JOURNAL)
    }


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of files that are not in both, or not alike."""
    return sorted({name for name, _ in found.items() ^ expected.items()})


def lost_steps(out: Path) -> list[str]:
    """A sentence for each stage of training that has not every step once in its journal, which has to be there."""
    if not (out / _JOURNAL).exists():
        return [f"there is no {_JOURNAL}"]
    rows = [json.loads(line) for line in (out / _JOURNAL).read_text().splitlines()]
    sentences = []
    for stage in (1, 2):
        steps = [row["step"] for row in rows if row["stage"] == stage and "loss" in row]
        if steps != list(range(1, _STEPS + 1)):
            sentences.append(f"stage {stage} has the steps {steps} instead of 1 to {_STEPS}")
    return sentences


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each command whole, then killed."""
    model, text = make_toy(folder)
    before = content_of(model)
    results = {}
    for name in args.commands:
        settings = [word for item in _SETTINGS for word in ("--set", item)]
        words = [COMMANDS[name][0], str(model), "--data", str(text), *COMMANDS[name][1:], *settings]
        (folder / name).mkdir()
        command = Command(words, folder / name / "out", random.Random(f"{args.seed} {name}"))
        command.run_undisturbed()
        while (done := sum(command.kills.values())) < args.number:
            command.run_killed(args.number - done)
        results[name] = command.result()
        print(name, json.dumps(results[name]), file=sys.stderr)
    return {"commands": results, "input_unchanged": content_of(model) == before}


def main() -> None:
    """Measure, print, fail where anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=30, help="of kills, of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    assert all((peft, kvlatent.evaluation.recall, kvlatent.training.stages))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kvlatent-") as folder:
        found = measure(args, Path(folder))
    nothing_lost = found["input_unchanged"] and not any(one["faults"] for one in found["commands"].values())
    document = {
        "benchmark": "kills",
        "command": shlex.join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
        "seed": args.seed,
        "nothing_lost": nothing_lost,
        **found,
        **environment("cpu"),
    }
    write_document(document, args.out)
    sys.exit(0 if nothing_lost else 1)


if __name__ == "__main__":
    main()
