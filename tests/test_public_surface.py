"""What users and scripts hold on to: public names, commands and flags, start-up time; and the caps on size."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import kvlatent
from kvlatent_cli.main import app

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in (ROOT / "src").rglob("*.py"))

SHARED = ["--device", "--dtype", "--json"]
WIDTHS = ["--kv", "--engine", "--per-layer"]
RECIPE = ["--recipe", "--set"]
CONVERSION = [
    *WIDTHS,
    "--d-qk",
    "--d-vo",
    "--preset",
    "--table",
    "--align",
    "--global-steps",
    "--minutes",
    "--blocks",
    "--statistics",
    "--eval-data",
    "--explain",
    *RECIPE,
]
FLAGS = {
    "compress": ["MODEL", "--data", "--out", *CONVERSION, "--tokens", "--stages", "--teacher", "--seed", "--overwrite", "--allow-change", "--dry-run", *SHARED],
    "convert": ["MODEL", "--out", *CONVERSION, "--data", "--stream", "--overwrite", "--dry-run", *SHARED],
    "export": ["DIR", "--to", "--out", "--dtype", "--pad", "--experimental", "--overwrite", "--json"],
    "slice": ["DIR", "--kv", "--d-qk", "--d-vo", "--out", "--overwrite", "--json"],
    "serve": ["DIR", "--engine", "--host", "--port", "--context", "--kv-dtype", "--dtype", "--json"],
    "calibrate": ["MODEL", "--data", "--out", "--blocks", *RECIPE, "--seed", "--overwrite", *SHARED],
    "plan": ["MODEL", *WIDTHS, "--kv-bytes", "--context", "--batch", "--kv-dtype", "--backend", "--data", "--statistics", "--table", "--memory", "--figure", "--blocks", *RECIPE, "--seed", "--overwrite", *SHARED],
    "teach": ["MODEL", "--data", "--top-k", "--out", *RECIPE, "--tokens", "--seed", "--overwrite", *SHARED],
    "train": ["DIR", "--stage", "--data", "--teacher", "--out", "--recipe", "--set", "--tokens", "--stream", "--seed", "--overwrite", "--allow-change", "--dry-run", "--cards", *SHARED],
    "eval": ["DIR", "--data", "--against", "--checks", "--tasks", "--include-path", "--limit", "--block-size", "--stride", "--batch-size", "--max-tokens", "--contexts", "--template", "--separator", "--text-field", "--seed", *SHARED],
    "bench": ["DIR", "--against", "--contexts", "--batches", "--caches", "--new-tokens", "--repeats", "--memory", "--attention", "--compile", "--engine", "--kv-dtype", "--seed", *SHARED],
    "study": ["NAME", "--out", "--model", "--data", "--eval-data", "--seeds", "--tokens", "--eval-tokens", "--cells", "--limit", "--threads", "--python", *RECIPE, "--device", "--dry-run", "--json"],
    "report": ["PATH...", "--out", "--overwrite", "--json"],
    "generate": ["DIR", "--prompt", "--max-new-tokens", "--temperature", "--seed", *SHARED],
    "inspect": ["DIR", "--json"],
    "demo": ["--out", "--model", "--preset", "--tokens", "--minutes", "--overwrite", "--json"],
}  # fmt: skip


def test_public_names():
    assert set(kvlatent.__all__) >= {
        "LatentConfig", "Recipe", "Statistics", "calibrate", "compress", "convert", "evaluate", "export", "plan", "slice_checkpoint", "teach", "train",
    }  # fmt: skip
    assert len(kvlatent.__all__) <= 16
    for name in kvlatent.__all__:
        assert getattr(kvlatent, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        kvlatent.shrink  # noqa: B018


def test_commands_and_flags_are_frozen():
    commands = typer.main.get_command(app).commands
    found = {}
    for name, command in commands.items():
        words = []
        for parameter in command.params:
            is_argument = parameter.param_type_name == "argument"
            words.append(parameter.metavar if is_argument else parameter.opts[0])
        found[name] = sorted(words)
    assert found == {name: sorted(flags) for name, flags in FLAGS.items()}


def test_every_command_and_option_is_explained():
    for command in typer.main.get_command(app).commands.values():
        assert command.help
        assert all(parameter.help for parameter in command.params)


def test_help_answers_in_half_a_second_and_without_torch():
    assert min(_seconds_of_help() for _ in range(3)) < 0.5
    code = "import sys, kvlatent_cli.main; print([m for m in ('torch', 'transformers', 'kvlatent') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _seconds_of_help() -> float:
    """Of the processor: other processes on the machine make the clock's longer."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "kvlatent_cli", "--help"], capture_output=True, text=True, check=True
    )
    after = os.times()
    assert "compress" in done.stdout
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            explained = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno - 1
            assert node.end_lineno - explained <= 50, node.name


def test_only_the_console_package_prints():
    for path in SOURCES:
        if "kvlatent_cli" in path.parts:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), (
            path.name
        )


def test_public_functions_are_not_shadowed_by_their_modules():
    """A submodule of the same name would replace the function once it is imported."""
    code = """
import importlib, pkgutil, kvlatent
for module in pkgutil.walk_packages(kvlatent.__path__, "kvlatent."):
    importlib.import_module(module.name)
print([name for name in ("calibrate", "compress", "convert", "evaluate", "export", "plan", "teach", "train") if not callable(getattr(kvlatent, name))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
