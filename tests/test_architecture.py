"""The house as docs/architecture.md draws it: its rooms, its names, and the page that walks through them."""

import re
import sys
import tomllib
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvlatent.checkpoints.remote_code import remote_code
from kvlatent_cli.main import app
from tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def rooms():
    """Modules and packages at the top of the library."""
    top = (ROOT / "src" / "kvlatent").iterdir()
    return {
        path.stem
        for path in top
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and path.stem != "__init__")
    }


def test_few_rooms_on_few_floors():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (one["layers"] for one in settings["contracts"] if one.get("containers") == ["kvlatent"])
    assert len(layers) <= 7
    assert {room for layer in layers for room in layer.split(" | ")} == rooms()
    assert len(rooms()) <= 16


def test_no_module_name_twice():
    names = [path.stem for path in (ROOT / "src").rglob("*.py") if not path.stem.startswith("__")]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert rooms() <= set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


def steps_of_the_walkthrough():
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    return re.findall(r"`(kvlatent(?:_\w+)?(?:\.\w+)+)`", text)


@pytest.mark.parametrize("name", dict.fromkeys(steps_of_the_walkthrough()))
def test_every_name_of_the_walkthrough_exists(name):
    """`package.module.function` or `package.module.Class.method`, imported as written."""
    parts, at = name.split("."), 1
    thing = import_module(parts[0])
    while at < len(parts):
        try:
            thing = import_module(".".join(parts[: at + 1]))
        except ModuleNotFoundError:
            break
        at += 1
    for attribute in parts[at:]:
        thing = getattr(thing, attribute)
    assert at < len(parts), "a module is no step: name its function"


def test_the_walkthrough_is_in_the_order_of_the_calls(tmp_path, tiny_tokenizer, corpus_file):
    """A conversion, traced: every function of the page is called, and first called in the order of the page."""
    text = (ROOT / "docs" / "walkthrough.md").read_text().partition("## The cache")[0]
    names = list(dict.fromkeys(re.findall(r"`(kvlatent(?:_\w+)?(?:\.\w+)+)`", text)))
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    called: dict[str, None] = {}
    remote_code.cache_clear()  # an earlier test may have asked for it

    def see(frame, event, _):
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("kvlatent"):
            called.setdefault(f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}")

    words = ["--d-qk", "16", "--d-vo", "16", "--align", "2", "--set", "data.block_size=192"]
    command = [
        "convert",
        str(tmp_path / "m"),
        "--data",
        str(corpus_file),
        "--out",
        str(tmp_path / "o"),
        *words,
    ]
    sys.setprofile(see)
    try:
        done = CliRunner().invoke(app, command)
    finally:
        sys.setprofile(None)
    assert done.exit_code == 0, done.stderr
    classes = [name for name in names if name.rpartition(".")[2][0].isupper()]
    assert [name for name in names if name not in classes] == [
        name for name in called if name in names and name not in classes
    ]
    assert len(names) >= 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_the_documents_exists(document):
    """Files of the project that a document names; a section that names a commit speaks of the past."""
    missing = []
    for paragraph in re.split(r"\n#+ ", document.read_text()):
        if re.search(r"\bcommit\s+[0-9a-f]{7}\b", paragraph):
            continue
        for name in re.findall(r"(?<![\w/])(?:src|tests|docs|recipes|benchmarks)/[\w./*-]*[\w*]", paragraph):
            if not list(ROOT.glob(name)):
                missing.append(name)
        for name in re.findall(r"\]\((?!http)([\w./-]+)\)", paragraph):
            if not (document.parent / name).exists():
                missing.append(name)
    assert missing == []
