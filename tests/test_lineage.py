"""How records and cards name what a checkpoint was made from: the hub's names whole, no path of this machine."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, metadata_load
from typer.testing import CliRunner

import kvlatent
from kvlatent.checkpoints.card import model_card
from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.source import name_and_fingerprint
from kvlatent.jobs.record import command_line, name_for_record
from kvlatent.workflows.steps import options_as_typed
from kvlatent_cli.main import app
from kvlatent_lab.study.subject import resolve_source
from on_disk import SETTINGS, write_checkpoint, write_text

SET = [word for setting in SETTINGS for word in ("--set", setting)]
HUB = "HuggingFaceTB/SmolLM2-135M"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: owner/base\n---\n# A model\n"


@pytest.fixture
def place(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    """A checkpoint with a card, a text, and the working directory."""
    write_checkpoint(tmp_path / "models" / "local", tiny_tokenizer)
    (tmp_path / "models" / "local" / "README.md").write_text(CARD)
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(place, monkeypatch) -> Path:
    """The checkpoint in a cache of the hub, under the name `HUB`."""
    folder = place / "hub" / "models--HuggingFaceTB--SmolLM2-135M"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(place / "models" / "local", folder / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    return folder


def call(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    return done


def test_a_name_is_cut_where_it_is_a_path(place):
    for source, name in {
        HUB: HUB,
        "gpt2": "gpt2",
        "owner/data:config:split": "owner/data:config:split",
        "owner/data::test": "owner/data::test",
        "models/local": "local",  # it is there
        "models/missing": "models/missing",  # it is not, so it can be the hub's alone
        "models/local/": "local",
        "./models/local/../local": "local",
        ".": place.name,
        "/nowhere/deep/model": "model",
        "../nowhere/model": "model",
        "a/b/model": "model",
        Path(HUB): HUB,
        place / "text.txt": "text.txt",
    }.items():
        assert name_for_record(source) == name, source


def test_every_recorded_command_keeps_the_owner(place):
    assert command_line("eval", HUB, {}) == f"kvlatent eval {HUB}"
    files = {"data": "owner/data:config:split", "eval_data": place / "text.txt", "out": "owner/out"}
    assert options_as_typed(files, {}) == {
        "data": "owner/data:config:split",
        "eval_data": "text.txt",
        "out": "out",
    }
    said = options_as_typed({"data": "owner/data", "teacher": HUB, "out": "runs/out"}, {"stage": 1})
    assert (said["data"], said["teacher"], said["out"]) == ("owner/data", HUB, "out")
    assert resolve_source(HUB, place / "text.txt", None).name == HUB
    model = kvlatent.load_model("models/local")
    assert (
        name_and_fingerprint(model, model)["name"] == "local"
        and name_and_fingerprint(model, HUB)["name"] == HUB
    )
    model.config._name_or_path = HUB
    assert name_and_fingerprint(model, model)["name"] == HUB
    model.config._name_or_path = ""
    assert name_and_fingerprint(model, model)["name"] == "LlamaForCausalLM"


def test_a_model_of_the_hub_in_run_eval_and_card(place, hub):
    call("convert", HUB, "--out", "out", "--preset", "paper")
    record = json.loads(Path("out/run.json").read_text())
    assert record["command"].startswith(f"kvlatent convert {HUB} --out out")
    assert record["source"] == {"base_model": HUB, "license": "apache-2.0", "language": ["en"]}
    card = ModelCard.load(Path("out/README.md"))
    assert card.data.base_model == HUB and card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert card.data.library_name == "transformers" and card.data.tags == [
        "kvlatent",
        "kv-cache",
        "custom_code",
    ]
    assert card.data.pipeline_tag == "text-generation" and "# Latent-attention checkpoint" in card.text
    words = ["--data", "text.txt", "--checks", "perplexity", "--block-size", 32, "--max-tokens", 64, "--json"]
    document = json.loads(call("eval", "out", "--against", HUB, *words).stdout)
    assert f"--against {HUB} " in document["record"]["command"] and document["original"]["name"] == HUB
    assert str(place) not in Path("out/README.md").read_text() + Path("out/run.json").read_text()
    # What is trained from it knows the base model from its card.
    train = ["train", "out", "--stage", 1, "--teacher", HUB, "--data", "text.txt", "--out", "two", *SET]
    call(*train, "--device", "cpu")
    assert f"--teacher {HUB} " in shlex.join(json.loads(Path("two/run.json").read_text())["command"].split())
    assert metadata_load("two/README.md")["base_model"] == HUB


def test_a_directory_is_named_by_what_is_known_of_it(place, hub):
    local = place / "models" / "local"
    assert lineage(hub / "snapshots" / ("a" * 40))["base_model"] == HUB
    assert lineage(local) == {"base_model": "owner/base", "license": "apache-2.0", "language": ["en"]}
    config = json.loads((local / "config.json").read_text())
    for said, base in {
        "owner/model": "owner/model",
        "/home/me/model": "owner/base",
        "./model": "owner/base",
        "models/local": "owner/base",  # a path of this machine
        "output/checkpoint-500": "owner/base",  # and one of another
        "": "owner/base",
        7: "owner/base",
    }.items():
        (local / "config.json").write_text(json.dumps(config | {"_name_or_path": said}))
        assert lineage(local)["base_model"] == base, said


@pytest.mark.parametrize(
    "card",
    [
        None,
        "# No metadata\n",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "---\nbase_model: /home/me/x\n---\n",
        b"\xff\xfe",
    ],
)
def test_what_is_not_known_is_left_out(place, card):
    readme = place / "models" / "local" / "README.md"
    readme.unlink()
    if card is not None:
        readme.write_bytes(card if isinstance(card, bytes) else card.encode())
    assert lineage(place / "models" / "local") == {}
    assert lineage("owner/never-downloaded") == {"base_model": "owner/never-downloaded"}
    call("convert", "models/local", "--out", "out", "--preset", "paper")
    assert set(metadata_load("out/README.md")) == {"library_name", "pipeline_tag", "tags"}


def test_metadata_that_yaml_could_misread_survives(place):
    call("convert", "models/local", "--out", "out", "--preset", "paper")
    record = json.loads(Path("out/run.json").read_text())
    record["source"] = {
        "base_model": ["a/no", "b/1.0"],
        "license": "other",
        "license_name": "yes: no #1",
        "language": "no",
    }
    Path("card.md").write_text(model_card(record))
    assert metadata_load("card.md") | record["source"] == metadata_load("card.md")
