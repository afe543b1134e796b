"""English prose that every Python installation carries: the docstrings of the standard library, and the language reference.

A model that was pretrained on the web reads English, and no corpus of it lies on every machine. Held out are the
docstrings of the same modules as ever (`standard_library.HELD_OUT`), which share no sentence with the reference.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from typing import Literal

from kvlatent.text.standard_library import stdlib_documents

__all__ = ["prose_documents"]

_SHORTEST = 200  # characters of a docstring; below that it is a label more than prose
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def prose_documents(split: Literal["train", "held_out"]) -> list[str]:
    """Texts, one string a module (its longer docstrings), and for `train` one a topic of the language reference.

    Raises ``ValueError`` for another split.
    """
    docstrings = ("\n\n".join(_docstrings(source)) for source in stdlib_documents(split))
    return [text for text in docstrings if text] + (_topics() if split == "train" else [])


def _docstrings(source: str) -> Iterator[str]:
    """The longer docstrings of a module's source, in order."""
    try:
        with warnings.catch_warnings():  # of escapes in string literals
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # a template, or a file that tests broken syntax
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text and len(text) >= _SHORTEST:
            yield text


def _topics() -> list[str]:
    """What `help("class")` and its like show; a Python without its documentation has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text for _, text in sorted(topics.items())]
