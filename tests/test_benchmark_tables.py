"""The tables in docs/reproducing-the-paper.md are those of the committed results, and the scripts that docs quote exist."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from paper_tables import TABLES, Results


@pytest.mark.parametrize("name", TABLES)
def test_document_holds_the_table_of_the_committed_results(name):
    table = TABLES[name](Results(ROOT / "benchmarks" / "results"))
    assert len(table.splitlines()) > 2
    assert table in (ROOT / "docs" / "reproducing-the-paper.md").read_text(encoding="utf-8")


def test_a_study_that_was_not_run_is_a_dash(tmp_path):
    lines = TABLES["widths"](Results(tmp_path)).splitlines()[2:]
    assert lines[0] == "| 32/32 | 50 % | - | - | - | - | - | - |"
    assert not TABLES["stages"](Results(tmp_path)).splitlines()[2:]
