"""docs/families.md, the table of families: what the tests found of each.

`python benchmarks/family_table.py` runs those tests (some minutes), keeps their outcomes in results/families.json and writes
the page; names of columns run these alone, and `--write` none. A test compares both with the rows and with the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTCOMES = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
FIRST, MORE = "test_calibrated_families.py", "test_more_families.py"
TESTS = {
    "exact": ("test_full_width_is_the_original_bit_for_bit",),
    "converts": ("test_cached_padded_and_truncated_inputs_give_the_same_logits",),
    "trains": ("test_both_stages_train_the_attention_and_leave_experts_alone",),
    "stock": ("test_every_family_computes_the_same", "test_plain_checkpoints_hold_what_is_plain"),
    "openvino": ("test_openvino_computes_the_same_or_says_why_not",),
}
"""The tests behind each column, by name; those of one column stand in several files."""
FILES = {
    "stock": ("test_export_stock.py", MORE),
    "openvino": ("test_openvino.py", MORE),
}
_MULTIMODAL = (
    "## Inside multimodal models",
    "",
    "`convert`, `calibrate`, `plan`, `compress`, `train`, `slice`, `eval`, `inspect` and `generate` take the directory of a",
    "`...ForConditionalGeneration` whose language model is of a family above (tried: Gemma-3, Mistral-3, LLaVA, LFM2-VL), and so do",
    "`kvlatent.calibrate` and `kvlatent.convert` the loaded model. They work on the language model inside and measure it on text; what",
    "is written is the whole again, towers and projectors as the original's files have them, with processors and templates. At full",
    "width text and images give the original's bits. It loads by",
    "`AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)`, and by `kvlatent.load_model` as the language model",
    "inside. `export`, engines other than transformers and a streamed `train` take language models alone: `kvlatent.save` writes one.",
    "Positions with several axes (Qwen-VL, Qwen3.5 with images) are refused: a latent attention turns keys by one.",
)
_OPENVINO_FIRST = "test_every_family_computes_the_same"


class Outcomes:
    """A pytest plugin that keeps what became of each toy in each column."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, bool]] = {}

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Note a call's outcome; a toy passes where all its tests do."""
        if call.when != "call":
            return
        toy = item.callspec.params["name"]
        column = column_of(item.path.name, item.originalname)
        row = self.found.setdefault(toy, {})
        row[column] = row.get(column, True) and call.excinfo is None


def column_of(file: str, test: str) -> str:
    """The column that a test stands behind."""
    if test == _OPENVINO_FIRST:
        return "openvino" if file == "test_openvino.py" else "stock"
    return next(column for column, tests in TESTS.items() if test in tests)


def ids_of_tests(*columns: str) -> list[str]:
    """What pytest is called with, for these columns or all."""
    ids = []
    for column, tests in TESTS.items():
        if columns and column not in columns:
            continue
        for file in FILES.get(column, (FIRST, MORE)):
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            names = {*tests, _OPENVINO_FIRST} if column == "openvino" else tests
            ids += [f"tests/{file}::{name}" for name in sorted(names) if f"def {name}(" in text]
    return list(dict.fromkeys(ids))


def page(outcomes: dict[str, dict[str, bool]], toys: dict[str, str]) -> str:
    """The document.

    Args:
        outcomes: by toy and column; toys: the model type of each.
    """
    from kvlatent.model.family_rows import FAMILIES
    from kvlatent.model.refusals import REFUSED

    lines = [
        "# Families",
        "",
        "What the tests found of each architecture on tiny random models; `python benchmarks/family_table.py` runs them and",
        "writes this page. *Exact*: at full width the logits are the original's, bit for bit. *Converts*: half the cache, by",
        "text, gives the same logits with and without cache, padding and a future. *Trains*: both stages. *Plain*: `export --to",
        "stock`, for every engine that reads Llama, Mistral, Qwen2 or Qwen3. Experts stay as they are in training: LoRA goes to",
        "linear layers, and a mixture trains its attention.",
        "",
        "| `model_type` | exact | converts | trains | plain | OpenVINO | has besides |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_type, family in FAMILIES.items():
        rows = [outcomes.get(toy, {}) for toy, of in toys.items() if of == model_type]
        cells = [_cell(rows, column) for column in ("exact", "converts", "trains")]
        cells.append("no" if family.besides else _cell(rows, "stock"))
        cells.append("no" if family.expert_parameters else _cell(rows, "openvino"))
        lines.append(f"| `{model_type}` | {' | '.join(cells)} | {family.besides or '-'} |")
    lines += ["", *_MULTIMODAL, "", "## Refused", ""]
    for reason, types in REFUSED.items():
        lines.append(f"- {', '.join(f'`{one}`' for one in types)}: {reason}.")
    for family in FAMILIES.values():
        lines += [f"- `{family.model_type}` with `{field}`: {reason}." for field, reason in family.refused]
    lines += [
        '- Others: encoder-decoders, soft-capped logits, caches that are latent already (DeepSeek), `rope_type` "dynamic", and',
        "  architectures without a row. The sentence names what is in the way.",
        "",
    ]
    return "\n".join(lines)


def _cell(rows: list[dict[str, bool]], column: str) -> str:
    found = [row[column] for row in rows if column in row]
    return "-" if not found else "yes" if all(found) else "fails"


def toys() -> dict[str, str]:
    """Model type of every toy of tests/tiny.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import FAMILIES, MORE_FAMILIES

    return {name: entry[0].model_type for name, entry in (FAMILIES | MORE_FAMILIES).items()}


def main() -> None:
    """Run the tests, unless told only to write; write the outcomes and the page."""
    columns = [argument for argument in sys.argv[1:] if argument in TESTS]
    kept = json.loads(OUTCOMES.read_text(encoding="utf-8")) if OUTCOMES.is_file() and sys.argv[1:] else {}
    if "--write" not in sys.argv:
        import pytest

        plugin = Outcomes()
        pytest.main(["-q", "-p", "no:cacheprovider", *ids_of_tests(*columns)], plugins=[plugin])
        for toy, row in plugin.found.items():
            kept[toy] = kept.get(toy, {}) | row
        OUTCOMES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(kept, toys()), encoding="utf-8")


if __name__ == "__main__":
    main()
