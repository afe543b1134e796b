"""docs/families.md is what the committed outcomes of the tests say, of the rows and toys that there are."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from family_table import FILES, OUTCOMES, PAGE, ROOT, TESTS, column_of, ids_of_tests, page, toys

from kvlatent.model.families import FAMILIES


def test_the_page_is_that_of_the_outcomes():
    outcomes = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    again = "run `python benchmarks/family_table.py` and commit what it writes"
    assert PAGE.read_text(encoding="utf-8") == page(outcomes, toys()), again
    assert outcomes.keys() == toys().keys() and set(toys().values()) == set(FAMILIES), again
    by_type = {}
    for toy, model_type in toys().items():
        for column, passed in outcomes[toy].items():
            assert passed, (toy, column)
            by_type.setdefault(model_type, set()).add(column)
    assert all(columns == set(TESTS) for columns in by_type.values())


def test_the_tests_behind_the_columns_exist():
    ids = ids_of_tests()
    assert {column_of(Path(file).name, name) for file, name in (one.split("::") for one in ids)} == set(TESTS)
    for one in ids:
        file, _, name = one.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    assert set(FILES) <= set(TESTS)


def test_a_failure_is_said():
    outcomes = {toy: dict.fromkeys(TESTS, True) for toy in toys()}
    outcomes["granite"]["exact"] = False
    lines = {
        line.split("`")[1]: line for line in page(outcomes, toys()).splitlines() if line.startswith("| `")
    }
    assert lines["granite"].startswith("| `granite` | fails | yes |") and " fails " not in lines["llama"]
    del outcomes["granite"]["trains"]
    assert "| - |" in page(outcomes, toys())
