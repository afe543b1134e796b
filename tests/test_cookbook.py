"""The recipes of the cookbook on a toy, in this process but for the server, and the page that shows what they print."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from kvlatent_cli.main import app
from on_disk import WORDS
from serving_setup import original_directory

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "cookbook"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("ingredients", "cook_all"))
SMALL = ("--blocks", "2", "--steps", "1")
MORE = {
    "halve_and_serve": ("--max-tokens", "4"),
    "plan_a_budget": ("--context", "512"),
    "stack_with_a_quantised_cache": ("--texts", "2", "--length", "64"),
    "train_back_from_a_quarter": ("--tokens", "1024", "--measured", "256"),
    "fine_tune_and_export": ("--chats", "16", "--asked", "3"),
}
SAYS = {
    "halve_and_serve": ("$ kvlatent serve halved --engine transformers", "> Name three colours."),
    "plan_a_budget": ("$ kvlatent calibrate MODEL", "--kv 0.5", "--engine llama.cpp"),
    "stack_with_a_quantised_cache": ("original  quantized-int4", "halved    quantized-int4"),
    "train_back_from_a_quarter": ("--stage 2", "$ kvlatent eval trained-quarter"),
    "fine_tune_and_export": ("python examples/sft.py --model halved", "--to stock", "LlamaForCausalLM: "),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # toys: conversions warn of what they lose
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of quantised caches' library
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("cookbook")
    sizes = {"max_position_embeddings": 1024, "num_hidden_layers": 2, "num_attention_heads": 2}
    original_directory(folder / "MODEL", tiny_tokenizer, **sizes)
    return folder


@pytest.fixture
def ingredients(monkeypatch, place):
    """The shared part, with a small text, and commands that run in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("ingredients")
    texts = [" ".join(WORDS[n % 40 : n % 40 + 20]) + f" {n}." for n in range(120)]
    monkeypatch.setattr(module, "prose_documents", lambda split: list(texts))

    def run(words, cwd, stdout, text, check):
        before = Path.cwd()
        os.chdir(cwd)
        try:
            if words[1] == "-m":
                takes = words[3] in ("convert", "calibrate", "train")
                small = ["--set", "data.block_size=64"] if takes else []
                done = CliRunner().invoke(app, [*words[3:], *small])
                assert done.exit_code == 0, done.stderr
                return SimpleNamespace(stdout=done.stdout, returncode=0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [*words[1:], "--max_steps", "2"])
                runpy.run_path(words[1], run_name="__main__")
            return SimpleNamespace(stdout="", returncode=0)
        finally:
            os.chdir(before)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    return module


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_a_toy(ingredients, place, name, monkeypatch, capsys):
    words = ("--model", place / "MODEL", "--folder", place / "work", *SMALL, *MORE[name])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert (place / "work" / "halved").is_dir() or "halve(" not in (FOLDER / f"{name}.py").read_text()
    for part in SAYS[name]:
        assert part in shown
    assert str(place) not in shown


@pytest.mark.parametrize("name", [*NAMES, "cook_all"])
def test_a_recipe_takes_its_options(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    for words, status in (("--help", 0), ("--no-such-option", 2)):
        if name == "cook_all" and status:
            words = ("--only=none",)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *([words] if isinstance(words, str) else words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert ended.value.code == status
    assert "--folder" in capsys.readouterr().out or name == "cook_all"


def test_a_command_that_fails_ends_the_recipe(ingredients, place, monkeypatch):
    def run(*_, **__):
        return SimpleNamespace(stdout="", returncode=2)

    monkeypatch.setattr(ingredients, "subprocess", SimpleNamespace(run=run, PIPE=None))
    args = SimpleNamespace(model="m", folder=place)
    with pytest.raises(SystemExit, match="error: kvlatent ended with 2"):
        ingredients.run(args, "kvlatent inspect m")


def test_the_page_is_that_of_the_outputs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("cook_all")
    assert set(script.RECIPES) == set(NAMES)
    assert script.PAGE.read_text() == script.page(), "python examples/cookbook/cook_all.py --page-only"
    outputs = {path.stem for path in (FOLDER / "outputs").glob("*.txt")}
    assert outputs <= set(NAMES)
    for path in (FOLDER / "outputs").glob("*.txt"):
        assert re.search(r"^\(\d+\.\d minutes\)$", path.read_text(), re.MULTILINE)
        assert not re.search(r"(?<!\w)/(root|home|tmp|work)/", path.read_text())
