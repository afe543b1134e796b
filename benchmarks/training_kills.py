"""Kill a training again and again, at random moments in steps and in writes, and compare what comes out with a run nobody killed.

    python benchmarks/training_kills.py [--number 30] [--seed 0] [--out FILE]

A toy goes through both stages in a child process with one thread, dropout and a checkpoint every second step. A watcher kills it
(SIGKILL) at a random time of its work; every other child is killed while a file of a checkpoint or of a result is being written:
at a random one of its writes, with a random part of the file's bytes there. Once so many kills are done, the last child runs to
the end. The weights have to be those of the run that nobody killed, bit for bit, and the journal has to have every step once.
One JSON document goes to stdout.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # before the forks, it takes seconds
import safetensors.torch
import torch
from json_document import write_document
from transformers import LlamaConfig, LlamaForCausalLM

import kvlatent.training.checkpointing
import kvlatent.training.resume
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import environment
from kvlatent.selection.choices import PAPER
from kvlatent.training.resume import read_journal
from kvlatent.training.stages import train_stage
from kvlatent.training.trainable import prepare_for_training

STEPS, BATCH, LENGTH, VOCABULARY = 120, 2, 16, 61
LONGEST_S = 2.0  # a child that is killed by the clock lives at most so long


def train_both(folder: Path) -> str:
    """Both stages, or what is left of them; a hash of all weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    original = LlamaForCausalLM(config).eval()
    items = [f"tokens={STEPS * BATCH * LENGTH}", f"batch_size={BATCH}", "save_steps=2", "learning_rate=0.01"]
    stages = [f"stage{stage}.{item}" for stage in (1, 2) for item in items]
    recipe = Recipe.load(None, ["dtype=float32", "lora.rank=4", "lora.dropout=0.1", *stages])
    student = convert(original, d_qk=8, d_vo=8, choices=PAPER)
    prepare_for_training(student, recipe)
    generator = torch.Generator().manual_seed(1)
    blocks = []
    for _ in range(36):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        blocks.append({"input_ids": ids, "position_ids": torch.arange(LENGTH), "labels": labels})
    for stage in (1, 2):
        train_stage(student, original, stage, blocks, recipe, folder / f"stage{stage}")
    digest = hashlib.sha256()
    for name, parameter in sorted(student.named_parameters()):
        digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def die_in_write(number: int, share: float) -> None:
    """End this process in its nth write of tensors, with a share of the file's bytes on the disk."""
    left = [number]

    def cut(write: Callable[..., Any]) -> Callable[..., Any]:
        def half(content: Any, path: Any, *args: Any, **options: Any) -> Any:
            written = write(content, path, *args, **options)
            left[0] -= 1
            if left[0] == 0:
                os.truncate(path, int(share * os.path.getsize(path)))
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        return half

    torch.save = cut(torch.save)
    for module in (kvlatent.training.checkpointing, kvlatent.training.resume):
        vars(module)["save_file"] = cut(safetensors.torch.save_file)


def run_child(folder: Path, in_write: tuple[int, float] | None, after_s: float | None) -> int:
    """Fork, train, perhaps kill; the exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            if in_write is not None:
                die_in_write(*in_write)
            (folder / "hash.txt").write_text(train_both(folder))
        except BaseException as error:  # noqa: BLE001 - whatever it was, the fork ends here
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_many(folder: Path, number: int, chance: random.Random) -> list[dict[str, Any]]:
    """Kills until there were `number`, then a run to the end; a row each."""
    rows: list[dict[str, Any]] = []
    killed = 0
    while killed < number:
        writes = killed % 2 == 1
        in_write = (chance.randint(1, 6), chance.random()) if writes else None
        after_s = None if writes else chance.uniform(0.02, LONGEST_S)
        if (folder / "hash.txt").exists():  # it was done before all kills were: once more from the start
            raise RuntimeError(f"the run ended after {killed} kills; make it longer")
        code = run_child(folder, in_write, after_s)
        state = {
            stage: max((row["step"] for row in read_journal(folder / stage / "metrics.jsonl")), default=0)
            for stage in ("stage1", "stage2")
        }
        rows.append({"in": "a write" if writes else "a step", "code": code, "journal": state})
        killed += code == -signal.SIGKILL
        if code not in (-signal.SIGKILL, 0):
            raise RuntimeError(f"a killed run did not continue: exit code {code} after {killed} kills")
    rows.append({"in": "none", "code": run_child(folder, None, None), "journal": {}})
    return rows


def measure(number: int, seed: int) -> dict[str, Any]:
    """Run it whole, run it killed, compare."""
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        whole.mkdir()
        killed.mkdir()
        if run_child(whole, None, None) != 0:
            raise RuntimeError("the run that nobody kills failed")
        rows = kill_many(killed, number, random.Random(seed))
        journals = {
            stage: [row["step"] for row in read_journal(killed / stage / "metrics.jsonl")]
            for stage in ("stage1", "stage2")
        }
        same = (whole / "hash.txt").read_text() == (killed / "hash.txt").read_text()
        broken = sum(1 for _ in killed.glob("stage*/broken-*"))
    kinds = [row["in"] for row in rows if row["code"] == -signal.SIGKILL]
    return {
        "benchmark": "training_kills",
        "kills": {kind: kinds.count(kind) for kind in ("a step", "a write")},
        "same_weights": same,
        "every_step_once": all(steps == list(range(1, STEPS + 1)) for steps in journals.values()),
        "broken_checkpoints_aside": broken,
        "rows": rows,
        "seed": seed,
        **environment("cpu"),
    }


def main() -> None:
    """Kill, print, fail where the weights differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    assert peft
    torch.set_num_threads(1)
    document = measure(args.number, args.seed)
    write_document(document, args.out)
    sys.exit(0 if document["same_weights"] and document["every_step_once"] else 1)


if __name__ == "__main__":
    main()
