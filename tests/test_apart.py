"""No command replaces, holds or writes into what it reads, however the place is spelled; neighbours are left alone."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kvlatent
from kvlatent.jobs.apart import check_apart
from kvlatent.text.standard_library import model_path
from kvlatent_cli.main import app
from on_disk import SETTINGS, snapshot, write_checkpoint, write_text

SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer) -> Path:
    """Every kind of input, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("apart")
    for name in ("data", "eval", "recipe"):
        (folder / name).mkdir()
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "data" / "text.txt")
    write_text(folder / "eval" / "text.txt", seed=1)
    (folder / "recipe" / "recipe.yaml").write_text("data: {block_size: 32}\n")
    call(
        "calibrate",
        folder / "model",
        "--data",
        folder / "data" / "text.txt",
        "--out",
        folder / "s.safetensors",
        *SET,
    )
    (folder / "statistics").mkdir()
    (folder / "s.safetensors").rename(folder / "statistics" / "s.safetensors")
    done = call("convert", folder / "model", "--out", folder / "latent", "--preset", "paper")
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy to destroy; the working directory is beside it."""
    for module in (
        "kvlatent.workflows.run_plan",
        "kvlatent.workflows.train_checkpoint",
    ):  # it times this machine
        monkeypatch.setattr(f"{module}.estimate_seconds", lambda *_: 1.0)
    shutil.copytree(made, tmp_path / "place")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "place"


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def inputs(place: Path) -> dict[str, Path]:
    return {
        "model": place / "model",
        "data": place / "data" / "text.txt",
        "eval": place / "eval" / "text.txt",
        "statistics": place / "statistics" / "s.safetensors",
        "teacher": place / "model",
        "latent": place / "latent",
        "recipe": place / "recipe" / "recipe.yaml",
    }


def commands(place: Path) -> dict[str, tuple[list, list[str]]]:
    """Words of every command that writes, without its output, and which of the inputs it reads."""
    at = inputs(place)
    data, recipe, statistics = (
        ["--data", at["data"]],
        ["--recipe", at["recipe"]],
        ["--statistics", at["statistics"]],
    )
    evaluated = ["--eval-data", at["eval"]]
    return {
        "convert": (
            ["convert", at["model"], *data, *evaluated, *recipe, "--overwrite"],
            ["model", "data", "eval", "recipe"],
        ),
        "convert-statistics": (["convert", at["model"], *statistics, "--overwrite"], ["model", "statistics"]),
        "compress": (
            ["compress", at["model"], *data, *evaluated, *recipe, *SET[2:], *statistics, "--overwrite"],
            ["model", "data", "eval", "recipe", "statistics"],
        ),
        "train": (
            [
                "train",
                at["latent"],
                "--stage",
                1,
                "--teacher",
                at["model"],
                *data,
                *recipe,
                *SET,
                "--overwrite",
            ],
            ["latent", "teacher", "data", "recipe"],
        ),
        "teach": (["teach", at["model"], *data, *recipe, "--overwrite"], ["model", "data", "recipe"]),
        "study": (
            ["study", "stages", "--model", at["model"], *data, *evaluated, *recipe],
            ["model", "data", "eval", "recipe"],
        ),
    }


def spellings(out: Path, links: Path) -> dict[str, str]:
    """One place by other names."""
    (links / "link").symlink_to(out)
    (links / "folder").symlink_to(out.parent)
    return {
        "plain": str(out),
        "slash": f"{out}/",
        "relative": os.path.relpath(out),
        "dots": f"{out.parent}/nothing/../{out.name}",
        "link": str(links / "link"),
        "linked-folder": str(links / "folder" / out.name),
    }


def refused(place: Path, words: list, out: str, verb: str) -> None:
    before = snapshot(place)
    done = call(*words, "--out", out)
    assert done.exit_code == 2, (words, out, done.stderr, done.exception)
    assert done.stderr.splitlines()[-1].startswith(
        "error: an output must be apart from what it is made from: "
    )
    assert f" {verb} the " in done.stderr and "place of its own" in done.stderr
    assert snapshot(place) == before


@pytest.mark.parametrize("command", ["convert", "convert-statistics", "compress", "teach", "train", "study"])
def test_an_output_directory_may_not_be_hold_or_lie_in_an_input(place, tmp_path, command):
    words, read = commands(place)[command]
    for name in read:
        path = inputs(place)[name]
        if not (command == "train" and name == "latent"):  # in place
            refused(place, words, path, "is")
        for verb, out in (("lies in", path / "new" / "out"), ("holds", path.parent)):
            for spelling in spellings(out, _fresh(tmp_path)).values():
                refused(place, words, spelling, verb)


def _fresh(tmp_path: Path) -> Path:
    folder = tmp_path / f"links-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("command", ["convert", "compress", "study"])
def test_the_model_itself_by_any_name(place, tmp_path, command):
    words, _ = commands(place)[command]
    for out in spellings(place / "model", _fresh(tmp_path)).values():
        refused(place, words, out, "is")
        if command != "study":
            refused(place, [*words, "--dry-run"], out, "is")
    without = [word for word in words if word != "--overwrite"]
    refused(place, without, place / "model", "is")  # not: "already holds something; pass --overwrite"


@pytest.mark.parametrize("command", ["calibrate", "plan"])
def test_an_output_file_may_not_be_an_input_or_lie_in_one(place, tmp_path, command):
    at = inputs(place)
    hard = tmp_path / "hard.txt"
    os.link(at["data"], hard)
    words = [command, at["model"], "--data", at["data"], "--recipe", at["recipe"], "--overwrite"]
    flag = "--out" if command == "calibrate" else "--figure"
    for out in (at["data"], hard, at["recipe"], at["model"] / "model.safetensors", at["model"] / "new.svg"):
        for spelling in spellings(Path(out), _fresh(tmp_path)).values():
            before = snapshot(place)
            done = call(*words, flag, spelling.rstrip("/"))
            assert done.exit_code == 2 and "must be apart from what it is made from" in done.stderr
            assert snapshot(place) == before
    words = [
        "plan",
        at["model"],
        "--statistics",
        at["statistics"],
        "--overwrite",
        "--figure",
        at["statistics"],
    ]
    assert "is the statistics" in call(*words).stderr


def test_training_in_place_keeps_what_it_reads(place):
    """The directory itself may be replaced; what lies in it, or in its unfinished work, would be lost."""
    at = inputs(place)
    words = ["train", at["latent"], "--stage", 1, *SET]
    for name, flag in (("data", "--data"), ("teacher", "--teacher"), ("recipe", "--recipe")):
        for folder in (at["latent"], place / "latent.partial"):
            inside = folder / "kept" / at[name].name
            inside.parent.mkdir(parents=True)
            (shutil.copytree if at[name].is_dir() else shutil.copy)(at[name], inside)
            given = {"--data": at["data"], "--teacher": at["teacher"], flag: inside}
            before = snapshot(place)
            done = call(*words, *(word for pair in given.items() for word in pair), "--overwrite")
            assert done.exit_code == 2 and f"holds the {name}" in done.stderr, done.stderr
            assert snapshot(place) == before
            shutil.rmtree(inside.parent)
        shutil.rmtree(place / "latent.partial")
    done = call(*words, "--data", at["data"], "--teacher", at["latent"])
    assert done.exit_code == 2
    done = call(*words, "--data", at["data"], "--teacher", at["teacher"])
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("kind", ["partial", "left over"])
def test_what_is_replaced_beside_the_output_is_no_input_either(place, kind):
    at = inputs(place)
    beside = place / ("out.partial" if kind == "partial" else ".out.tmp-99999999")
    beside.mkdir()
    kept = Path(shutil.copy(at["data"], beside))
    words = [
        "compress",
        at["model"],
        "--data",
        kept,
        *SET,
        "--stages",
        "none",
        "--out",
        place / "out",
        "--overwrite",
    ]
    done = call(*words)
    assert done.exit_code == 2 and f"{beside} holds the data" in done.stderr
    assert kept.read_bytes() == at["data"].read_bytes()


def test_links_of_a_checkpoint_lead_to_inputs(place):
    """A folder of links, as a snapshot in the cache of the hub is, stands for the files behind them."""
    linked = place / "linked"
    linked.mkdir()
    for file in (place / "model").iterdir():
        (linked / file.name).symlink_to(file)
    refused(place, ["convert", linked, "--preset", "paper", "--overwrite"], place / "model", "holds")


def test_a_link_to_an_input_is_part_of_it(place):
    (place / "kept").mkdir()
    (place / "kept" / "text.txt").symlink_to(place / "data" / "text.txt")
    words = ["convert", place / "model", "--data", place / "kept" / "text.txt", "--overwrite"]
    refused(place, words, place / "kept", "holds")


def test_the_hub_cache_of_a_model_is_an_input(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind in ("models", "datasets"):
        (tmp_path / "hub" / f"{kind}--owner--name" / "snapshots").mkdir(parents=True)
        for out in (tmp_path / "hub", tmp_path / "hub" / f"{kind}--owner--name" / "snapshots"):
            with pytest.raises(ValueError, match=r"the (model|data) owner/name"):
                check_apart(out, {"model": "owner/name", "data": "owner/name:config:split"})
    check_apart(tmp_path / "out", {"model": "owner/name", "data": "owner/name:config:split"})
    check_apart(tmp_path / "hub" / "models--owner--other", {"model": "owner/name"})


def test_neighbours_pass(place, monkeypatch):
    """Names that begin alike, a way through an input, an output yet to be made, a hub id that ends like the output."""
    monkeypatch.chdir(place)
    (place / "model-small").mkdir()
    for out in ("model-small", "model/../out", "new/deep/out", str(place / "model.2"), "name", "owner"):
        check_apart(out, {"model": "model", "teacher": "owner/name", "data": "data/text.txt", "recipe": None})
    before = snapshot(place / "model")
    for out in ("model-small", "model/../out"):
        assert call("convert", "model", "--out", out, "--preset", "paper").exit_code == 0
    assert snapshot(place / "model") == before and (place / "out" / "run.json").is_file()


def test_the_demo_does_not_replace_the_embedded_model(tmp_path, monkeypatch):
    shutil.copytree(model_path(), tmp_path / "assets" / "model")
    monkeypatch.setattr("kvlatent.workflows.demo_run.model_path", lambda: tmp_path / "assets" / "model")
    before = snapshot(tmp_path)
    for out in (tmp_path / "assets" / "model", tmp_path / "assets"):
        done = call("demo", "--out", out, "--overwrite")
        assert done.exit_code == 2 and "the model" in done.stderr
    assert snapshot(tmp_path) == before


def test_saving_from_python_keeps_the_original(place):
    original = kvlatent.load_model(place / "model")
    latent = kvlatent.convert(original, d_qk=8, d_vo=8, preset="paper")
    before = snapshot(place)
    for model in (latent, kvlatent.convert(original, preset="paper")):
        for out in (place / "model", place, place / "model" / "latent"):
            with pytest.raises(ValueError, match="must be apart"):
                kvlatent.save(model, out, overwrite=True)
    assert snapshot(place) == before
    again = AutoModelForCausalLM.from_pretrained(place / "latent")
    with torch.no_grad():
        again.model.norm.weight.add_(1)
    kvlatent.save(again, place / "latent", overwrite=True)  # a latent model may be saved where it was
    saved = AutoModelForCausalLM.from_pretrained(place / "latent")
    assert torch.equal(saved.model.norm.weight, again.model.norm.weight)
    with pytest.raises(ValueError, match="holds the model"):
        kvlatent.save(saved, place, overwrite=True)


def test_the_folder_around_the_working_directory_is_kept(place, monkeypatch):
    (place / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(place / "here" / "deep")
    done = call("convert", place / "model", "--preset", "paper", "--out", "..", "--overwrite")
    assert done.exit_code == 2 and "cannot be replaced as a whole" in done.stderr
    assert (place / "here" / "deep").is_dir()
