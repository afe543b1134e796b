"""The small Llama that ships with the package, and the two questions asked of it.

The model under :func:`model_path` was pretrained by ``benchmarks/pretrain_embedded.py`` on the source
text of the Python standard library, with the modules named in :data:`HELD_OUT` (and their tests) left
out. Every Python installation carries that text, so a demo or a test can measure perplexity on text the
model never saw without any download. Perplexity alone forgives a cache that lost distant tokens, so the
second question is copying: a random string, text, the first two tokens of the string again - can the
model still read the other fourteen from its cache?

torch is imported inside the functions that need it; importing this module costs nothing.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

MODEL_PATH = Path(__file__).resolve().parents[1] / "assets" / "stdlib-llama"

#: Top-level standard library modules that never occur in the training text, nor do their tests.
HELD_OUT: tuple[str, ...] = (
    *("argparse", "calendar", "configparser", "csv", "difflib", "fractions", "heapq", "ipaddress"),
    *("json", "plistlib", "queue", "shelve", "statistics", "tarfile", "textwrap"),
)

# Not text: character tables, generated documentation, other people's packages, fixtures with odd encodings.
_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"})
_TEST_PACKAGES = frozenset({"test", "tests", "idle_test", "testmock"})


def model_path() -> Path:
    """Directory of the embedded model, ready for ``from_pretrained``.

    Raises ``FileNotFoundError`` when the package was installed without its data files.
    """
    if not (MODEL_PATH / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing from {MODEL_PATH}; reinstall kvlatent")
    return MODEL_PATH


def _is_held_out(parts: Sequence[str]) -> bool:
    stems = [part.removesuffix(".py") for part in parts]
    return any(
        stem in (name, f"test_{name}", f"{name}_tests") or stem.startswith(f"test_{name}_")
        for stem in stems
        for name in HELD_OUT
    )


def _is_test(parts: Sequence[str]) -> bool:
    return any(part in _TEST_PACKAGES for part in parts[:-1]) or parts[-1].startswith("test_")


def stdlib_documents(split: Literal["train", "held_out"], include_tests: bool = False) -> list[str]:
    """Source texts of the running interpreter's standard library, one string a file, in path order.

    ``held_out`` gives the files of the modules in :data:`HELD_OUT`, ``train`` all the others; no file is
    in both. ``include_tests`` adds the test packages where the distribution ships them. Files that are
    empty, unreadable or not UTF-8 are skipped, and a missing module is no error: the list is then shorter.

    Raises ``ValueError`` for another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[str] = []
    for path in sorted(_source_files(root), key=lambda item: item.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _is_held_out(parts) != (split == "held_out") or (_is_test(parts) and not include_tests):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            documents.append(text.replace("\r\n", "\n"))
    return documents


def _source_files(root: Path) -> Iterable[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith("config-")]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
