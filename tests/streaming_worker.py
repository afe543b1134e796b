"""A process that `test_streaming.py` starts: it forks conversions, kills them at random moments and lets others go on.

It imports everything once, so that a moment at random falls into the work and not into the imports.

Usage: streaming_worker.py DIRECTORY KILLS; DIRECTORY holds model and text.txt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from kvlatent.workflows.convert_checkpoint import convert_checkpoint

OPTIONS = {
    "d_qk": 8,
    "d_vo": 8,
    "stream": True,
    "device": "cpu",
    "overrides": [
        "data.block_size=32",
        "conversion.align=6",
        "calibration.blocks=8",
        "conversion.global_steps=0",
    ],
}


def fork(folder: Path, out: str) -> int:
    """Start a conversion in a process of its own; its number."""
    process = os.fork()
    if process:
        return process
    try:
        convert_checkpoint(folder / "model", folder / out, data=folder / "text.txt", **OPTIONS)
        os._exit(0)
    finally:  # not reached but by an error
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Convert undisturbed, then with kills; says after each how many layers were finished."""
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    start = time.monotonic()
    assert os.waitpid(fork(folder, "whole"), 0)[1] == 0
    seconds, chance, layers = time.monotonic() - start, random.Random(1), []
    for _ in range(kills):
        process = fork(folder, "killed")
        time.sleep(chance.uniform(0.3, 0.9) * seconds / 2)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        finished = len(list((folder / "killed.partial").glob("step-layer-*.json")))
        layers.append([os.waitstatus_to_exitcode(status), finished])
        if status == 0:
            break
    if not (folder / "killed").exists():
        assert os.waitpid(fork(folder, "killed"), 0)[1] == 0
    (folder / "kills.json").write_text(json.dumps(layers))


if __name__ == "__main__":
    main()
