"""Every command that reads a text: what it advises when it cannot read one is what helps."""

import json
import re
import shlex
import shutil

import pytest
from typer.testing import CliRunner

from kvlatent_cli.main import app
from on_disk import SETTINGS, WORDS, snapshot, write_checkpoint

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
SMALL = [word for setting in SETTINGS[1:] for word in ("--set", setting)]  # but for the preset
READERS = {
    "compress": ["--preset", "paper", "--tokens", 128, "--stages", 1, "--out", "OUT", *SMALL],
    "convert": ["--blocks", 2, "--align", 0, "--set", "data.block_size=32", "--out", "OUT"],
    "calibrate": ["--blocks", 2, "--set", "data.block_size=32", "--out", "OUT"],
    "plan": ["--blocks", 2, "--set", "data.block_size=32"],
    "teach": ["--tokens", 128, "--top-k", 8, "--out", "OUT", "--set", "data.block_size=32"],
    "train": ["--stage", 2, "--tokens", 128, "--out", "OUT", "--set", "stage2.objective=next_token", *SMALL],
    "study": ["--tokens", 128, "--cells", "*paper*", "--limit", 1, "--eval-tokens", 128, "--out", "OUT", *SMALL],
    "eval": ["--checks", "perplexity", "--max-tokens", 128],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """model, latent, and two files that no default reads: a field `body`, and conversations without a template."""
    folder = tmp_path_factory.mktemp("readers")
    write_checkpoint(folder / "model", tiny_tokenizer)
    done = call("convert", folder / "model", "--out", folder / "latent", "--preset", "paper")
    assert done.exit_code == 0, done.stderr
    texts = [" ".join(WORDS[n % 40 : n % 40 + 20]) + f" {n}." for n in range(200)]
    talk = [[{"from": "human", "value": "Go on."}, {"from": "gpt", "value": text}] for text in texts]
    for name, rows in (
        ("body", [{"id": "a", "body": t} for t in texts]),
        ("talks", [{"conversations": t} for t in talk]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def words_of(command, place, model, data, out) -> list:
    subject = ["widths", "--model", model] if command == "study" else [model]
    options = [out if word == "OUT" else word for word in READERS[command]]
    return [command, *subject, "--data", data, "--device", "cpu", *options]


def refused(words, *places) -> str:
    """The sentence of a call that must fail, and leave these folders as they were."""
    before = [snapshot(place) for place in places]
    done = call(*words)
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert [snapshot(place) for place in places] == before
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", READERS)
def test_the_option_that_is_named_is_the_command_s_own(place, tmp_path, command):
    model = place / ("latent" if command in ("train", "eval") else "model")
    words = words_of(command, place, model, place / "body.jsonl", tmp_path / "out")
    sentence = refused(words, place, tmp_path)
    general, ours = re.search(r"e\.g\. (--set \S+) \(kvlatent eval: (--text-field \S+)\)$", sentence).groups()
    done = call(*words, *shlex.split(ours if command == "eval" else general))
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("command", READERS)
def test_conversations_are_read_once_the_model_has_a_template(place, tmp_path, command):
    model = tmp_path / "model"
    shutil.copytree(place / ("latent" if command in ("train", "eval") else "model"), model)
    words = words_of(command, place, model, place / "talks.jsonl", tmp_path / "out")
    assert "put a template into the model's directory as chat_template.jinja" in refused(
        words, place, tmp_path
    )
    (model / "chat_template.jinja").write_text(TEMPLATE)
    done = call(*words)
    assert done.exit_code == 0, done.stderr


def test_a_template_s_refusal_is_one_sentence(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    words = words_of("calibrate", place, tmp_path / "model", place / "talks.jsonl", tmp_path / "out")
    sentence = refused(words, tmp_path)
    assert re.search(
        r"record 1 of .* cannot be written as text: the model's chat template refuses it", sentence
    )
    assert "(roles must alternate); repair or remove it" in sentence
