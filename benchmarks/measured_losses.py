"""What is measured of narrow caches, for `kvlatent plan`: collects the finished rows of the real models' tables.

    python benchmarks/measured_losses.py

It reads the folders `benchmarks/results/real_tables*`, and of `benchmarks/results/stacking` what quantised caches of engines
cost, the original's and a narrow model's, and writes `src/kvlatent/engines/measured_losses.json`, which the package carries.
Left out is the paper's preset, which no default makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvlatent.engines.kv_dtypes import kv_dtype_named

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "benchmarks/results"
OUT = ROOT / "src/kvlatent/engines/measured_losses.json"
TEXT = "fineweb"
MODEL = "SmolLM2-135M-Instruct-from-4-bit-weights"
HEAD_DIMS = {MODEL: 64}


def collect(tables: Path = TABLES) -> list[dict[str, Any]]:
    """Rows of all tables under a folder, as `MeasuredLoss` has them."""
    folders = sorted(path for path in tables.glob("real_tables*") if path.is_dir())
    return [row for folder in folders for row in _rows(folder)] + _stacked(tables)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The finished rows of calibrated conversions whose layers have the same widths."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    original = files["original"]["figures"][f"text {TEXT}"]["perplexity"]
    return [
        _row(name + folder.name.removeprefix("real_tables").replace("_", " "), file, original)
        for name, file in files.items()
        if (settings := file.get("settings", {})).get("preset") == "calibrated"
        and not settings.get("per_layer")
    ]


def _stacked(tables: Path) -> list[dict[str, Any]]:
    """Cells of the stacking table whose cache is quantised; the narrow model's has one table for the model."""
    model = json.loads((tables / "real_tables" / "study.json").read_text())["decides"]["model"]
    cells = [json.loads(path.read_text()) for path in sorted((tables / "stacking").glob("*.json"))]
    return [
        {
            "row": f"stacking-{cell['model']}-{cell['kv_dtype']}",
            "model": MODEL,
            "head_dim": HEAD_DIMS[MODEL],
            "table": "model",
            "engine": cell["runs_on"],
            "tokens_trained": 0,
            "text": TEXT,
            "perplexity_ratio": cell["ratio"],
            **{name: cell[name] for name in ("d_qk", "d_vo", "kv_dtype", "kl", "kl_standard_error")},
        }
        for cell in cells
        if not kv_dtype_named(cell["kv_dtype"], cell["runs_on"]).is_lossless
        and cell["sha256"]["original"] == model
    ]


def _row(name: str, file: dict[str, Any], original: float) -> dict[str, Any]:
    settings, figures = file["settings"], file["figures"]
    text, quantised = figures[f"text {TEXT}"], settings["cache"].startswith("quantized-")
    return {
        "row": name,
        "model": file["model"],
        "head_dim": HEAD_DIMS[file["model"]],
        "d_qk": settings["d_qk"],
        "d_vo": settings["d_vo"],
        "table": settings["table"],
        "engine": "transformers",
        "kv_dtype": settings["cache"].removeprefix("quantized-") if quantised else file["record"]["dtype"],
        "tokens_trained": figures.get("training", {}).get("tokens_trained", 0),
        "text": TEXT,
        "kl": text["kl"],
        "kl_standard_error": text["kl_standard_error"],
        "perplexity_ratio": text["perplexity"] / original,
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(collect(), indent=2) + "\n")
