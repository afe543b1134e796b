"""The documentation's site: every page has its place, what is generated is current, and nothing comes from elsewhere."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from kvlatent.engines.facts import ENGINES
from kvlatent.evaluation.checks import CHECKS
from snippets import ROOT

sys.path.insert(0, str(ROOT / "tools"))  # scripts, as `python tools/site_pages.py` sees them

import site_pages
import site_pictures

DOCS = ROOT / "docs"


class _Loader(yaml.SafeLoader):
    """Reads names of functions as what they are to us: text."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)


def settings():
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)


def pages(nav) -> list[str]:
    """Files of a navigation, depth first."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inner for page in pages(part)]


def test_every_page_is_in_the_navigation_once():
    listed = pages(settings()["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


@pytest.mark.parametrize("name", site_pages.PAGES)
def test_a_generated_page_is_current(name):
    assert (DOCS / name).read_text() == site_pages.PAGES[name](), "run python tools/site_pages.py"


@pytest.mark.parametrize("name", site_pictures.PICTURES)
def test_a_drawing_is_current(name):
    drawn = site_pictures.PICTURES[name]()
    assert (DOCS / "pictures" / name).read_text() == drawn, "run python tools/site_pictures.py"


def test_every_failure_has_its_signature_on_the_page():
    failures = {name for check in CHECKS for name in check.signs}
    headings = {name.lower() for name in re.findall(r"^## (.+)$", site_pages.failures_page(), re.MULTILINE)}
    assert failures <= headings


def test_pictures_are_described_and_no_page_fetches_from_elsewhere():
    assert settings()["theme"]["font"] is False
    for path in DOCS.rglob("*.md"):
        text = path.read_text()
        for words, place in re.findall(r"!\[(.*?)\]\((.+?)\)", text):
            assert words and not place.startswith("http"), f"{path.name}: {place}"
        assert "<script" not in text and "<link" not in text
    for path in Path(DOCS / "pictures").glob("*.svg"):
        assert "<title" in path.read_text()


def test_the_table_of_engines_says_what_plans_go_by():
    rows = re.findall(
        r"^\| \[(\w+[\w.]*)[^|]*\| (\w+)[^|]*\| (\w+)[^|]*\| (\w+)",
        (DOCS / "serve.md").read_text(),
        re.MULTILINE,
    )
    names = {
        "transformers": "transformers",
        "llama.cpp": "llama.cpp",
        "OpenVINO": "openvino",
        "SGLang": "sglang",
    }
    found = {names[name]: said for name, *said in rows if name in names}
    assert set(found) == set(names.values())
    for name, said in found.items():
        engine = ENGINES[name]
        unequal, by_layer = (["yes", "no"][flag] for flag in (engine.symmetric, engine.sizes == 1))
        assert said == [unequal, by_layer, "one" if engine.scopes == ("model",) else "a"], name
