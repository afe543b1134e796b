"""The benchmark that fine-tunes original and latent model alike: its questions, its measure, its table, its refusals."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvlatent.checkpoints.load import load_model, load_tokenizer
from serving_setup import latent_directory, original_directory

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
SMALL = ("--sft-examples", "8", "--dpo-pairs", "4", "--batch-size", "4", "--questions", "8", "--no-bf16")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("after_recovery")


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("instruction_task")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("after")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024}
    original_directory(folder / "original", tiny_tokenizer, **sizes)
    latent_directory(folder / "latent", tiny_tokenizer, **sizes)
    return folder


def test_a_question_has_its_answer_in_its_text_once(task):
    questions = task.make_questions(3, 200)
    assert len({one.text for one in questions}) == 200
    assert {one.kind for one in questions} == set(task.KINDS)
    for one in questions:
        assert one.answer != one.wrong
        assert one.answer in one.text and one.wrong in one.text
        told, _, asked = one.text.rpartition(". ")
        if one.kind == "place":
            (fact,) = [fact for fact in told.split(". ") if asked.removeprefix("Where is the ")[:-1] in fact]
            assert fact.rstrip(".").endswith(one.answer)
        if one.kind == "next":
            words = told.removeprefix("The words are ").split(", ")
            assert words[words.index(asked.split()[-1][:-1]) + 1] == one.answer


def test_measured_questions_are_none_that_were_learnt(script, task):
    args = SimpleNamespace(sft_examples=300, dpo_pairs=100, questions=100)
    learnt = {one.text for way, n in (("sft", 300), ("dpo", 100)) for one in script.learnt_from(1, way, n)}
    held = script.held_out(1, args)
    assert len(held) == 100 and not learnt & {one.text for one in held}
    assert task.make_questions(5, 9) == task.make_questions(5, 9) != task.make_questions(6, 9)
    first = held[0].text
    assert first not in {one.text for one in task.make_questions(1999, 100, frozenset([first]))}


def test_right_is_what_greedy_decoding_says(script, place):
    """Against `generate`: answers are made of what the model writes, and then spoilt."""
    model = load_model(place / "latent")
    tokenizer = load_tokenizer(place / "latent", model.config)
    questions = []
    for number in range(6):
        prompt = [{"role": "user", "content": "the cat " * (number + 1)}]
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, max_new_tokens=3 + number % 2, do_sample=False, pad_token_id=0)
        written = tokenizer.decode(out[0, ids.shape[1] :])
        questions.append(SimpleNamespace(prompt=prompt, answer=written))
    said = []
    # The toy never ends, so the end that it is measured by is a token that it does write next.
    for question in questions:
        text = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        generated = model.generate(
            torch.tensor([ids]), max_new_tokens=len(answer) + 1, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        measured = script.answers_right(model, _Ending(tokenizer, generated[-1]), [question], bf16=False)
        assert measured == [generated[:-1] == answer]
        said.append(measured[0])
        other = _Ending(tokenizer, (generated[-1] + 1) % 300)
        assert script.answers_right(model, other, [question], bf16=False) == [False]
    assert any(said)
    together = script.answers_right(model, _Ending(tokenizer, 7), questions, bf16=False)
    alone = [script.answers_right(model, _Ending(tokenizer, 7), [one], bf16=False)[0] for one in questions]
    assert together == alone


class _Ending:
    """A tokenizer with another end."""

    def __init__(self, tokenizer, eos_token_id):
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id

    def __call__(self, *args, **more):
        return self.tokenizer(*args, **more)

    def apply_chat_template(self, *args, **more):
        return self.tokenizer.apply_chat_template(*args, **more)


def test_the_difference_is_paired_and_its_errors_by_hand(script):
    def cell(right):
        return {"right": right, "kinds": ["place"] * len(right)}

    cells = {
        ("original", "sft", 0): cell([1, 1, 0, 1]),
        ("latent", "sft", 0): cell([1, 0, 0, 1]),
        ("original", "sft", 1): cell([1, 1, 1, 1]),
        ("latent", "sft", 1): cell([1, 1, 1, 1]),
        ("latent", "sft", 2): cell([0, 0, 0, 0]),  # without a partner
    }
    found = script.compare(cells, "sft")
    assert found["seeds"] == [0, 1] and found["questions"] == 8
    assert found["difference"] == pytest.approx(-1 / 8)
    assert found["by_seed"] == pytest.approx([-0.25, 0])
    assert found["error_questions"] == pytest.approx(1 / 8)  # deviation sqrt(1/8), over sqrt(8)
    assert found["error_seeds"] == pytest.approx(0.125)
    assert found["within_two"]
    assert script.compare(cells, "dpo") is None
    cells["latent", "sft", 1] = cell([0, 1, 0, 1])
    cells["latent", "sft", 0] = cell([0, 0, 0, 0])
    assert not script.compare(cells, "sft")["within_two"]


@pytest.fixture
def call(script, place, tmp_path, monkeypatch, capsys):
    def run(*words):
        models = ("--original", place / "original", "--latent", place / "latent")
        folders = ("--out", tmp_path / "cells", "--work", tmp_path / "work")
        monkeypatch.setattr(sys, "argv", ["after_recovery.py", *map(str, (*words, *models, *folders))])
        script.main()
        return capsys.readouterr().out

    return run


def test_cells_are_run_once_and_told_in_a_table(call, tmp_path):
    call("run", "--seeds", "4", *SMALL)
    files = sorted(file.stem for file in (tmp_path / "cells").iterdir())
    assert files == sorted(
        f"{name}-{way}-4" for name in ("original", "latent") for way in ("none", "sft", "dpo")
    )
    cells = {stem: json.loads((tmp_path / "cells" / f"{stem}.json").read_text()) for stem in files}
    assert len(cells["latent-sft-4"]["losses"]) == 2 and len(cells["latent-dpo-4"]["losses"]) == 2
    assert cells["latent-none-4"]["losses"] == []
    assert str(tmp_path) not in json.dumps(cells)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    shown = call("run", "--seeds", "4", *SMALL)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert shown.count("| sft | 4 | 8 |") == 1
    assert "Not run yet, of those of seeds 0 to 2: original none 0," in shown
    assert (tmp_path / "cells.md").read_text() in shown
    with pytest.raises(
        SystemExit, match=r"original-none-4.json was measured with another beta; give another --out"
    ):
        call("run", "--seeds", "4", *SMALL, "--beta", "0.5")


def test_dpo_without_what_it_begins_from(call):
    with pytest.raises(SystemExit, match="dpo begins where sft ended"):
        call("run", "--methods", "dpo", "--seeds", "5", *SMALL)


def test_words_that_it_does_not_take(call, script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call("run", "--methods", "ppo")
    assert "--methods takes none, sft, dpo: got ppo" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["after_recovery.py", "run", "--original", "x"])
    with pytest.raises(SystemExit):
        script.main()
    assert "run needs --latent" in capsys.readouterr().err
