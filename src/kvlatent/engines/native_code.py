"""C++ that ships as source: compiled for this processor at first use, kept for the next process.

A wheel would have to be built for every processor, and compiled for the oldest of them. The compiler's output lies in
the user's cache folder, under a name that changes with source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["NoNativeCode", "load_native"]

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")


class NoNativeCode(RuntimeError):
    """The library cannot be compiled or loaded here; the message says why."""


def load_native(source: Path, folder: Path | None = None) -> ctypes.CDLL:
    """The shared library of one C++ file.

    Args:
        source: the file.
        folder: where compiled libraries are kept; left out, the user's cache folder.

    Raises:
        NoNativeCode: no compiler is found, it refuses the file, or the result cannot be loaded.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NoNativeCode(
            f"no C++ compiler is on the PATH ({', '.join(_COMPILERS)}); install one, such as g++"
        )
    try:
        path = _place(source, compiler, folder)
        if not path.is_file():
            _compile(source, compiler, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
        raise NoNativeCode(f"{compiler} does not compile {source.name}: {reason.strip()}") from error
    except OSError as error:
        raise NoNativeCode(f"{source.name} cannot be compiled or loaded: {error}") from error


def _place(source: Path, compiler: str, folder: Path | None) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (source.read_text(encoding="utf-8"), compiler, version, *_FLAGS, platform.machine(), _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    # Not a shared temporary folder: what lies there under a known name is loaded as code.
    folder = Path.home() / ".cache" / "kvlatent" if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="kvlatent-"))
    return folder / f"{source.stem}-{name}.so"


def _processor() -> str:
    """What instructions the processor has, as Linux lists them; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _compile(source: Path, compiler: str, path: Path) -> None:
    """Whole or not at all: two processes may compile at once, and one may be killed."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = [compiler, *_FLAGS, "-o", str(unfinished), str(source)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
