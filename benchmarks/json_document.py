"""What a benchmark found as one JSON document: on stdout, and in a file where one was asked for."""

import json
from pathlib import Path
from typing import Any


def write_document(document: dict[str, Any], out: Path | None) -> None:
    """Print it, and write it to `out`, unless that is None."""
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")
