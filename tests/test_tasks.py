"""Tasks by lm-eval on a model in memory: scores against log-likelihoods by hand, and what is refused.

The tests write their own YAML tasks and data; nothing is fetched.
"""

import copy
import json
import logging
import math
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import SENTENCES
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.checks import task_loading
from kvlatent.evaluation.checks.tasks import compare_tasks, run_tasks
from kvlatent.evaluation.checks.text_perplexity import measure_documents
from tiny import logits

pytest.importorskip("lm_eval")

ENDINGS = (" sun.", " old man walked to the market.", " dog and the cat.")
QUESTIONS = [
    {"query": text[: 12 + 3 * place], "choices": list(ENDINGS), "label": (number + place) % 3}
    for place in range(4)
    for number, text in enumerate(SENTENCES)
]
TEXTS = [" ".join(SENTENCES), "über alles"]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}%s]
"""
NORM = ", {metric: acc_norm, aggregation: mean, higher_is_better: true}"
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 5}
filter_list: [{name: strict, filter: [{function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LENGTHS = """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 5}
process_results: !function lengths.score
metric_list:
  - {metric: "64", aggregation: !function lengths.mean, higher_is_better: true}
  - {metric: "4096", aggregation: !function lengths.mean, higher_is_better: true}
"""
LENGTHS_CODE = """
def score(doc, results):
    return {"4096": -1.0, "64": 1.0}


def mean(values):
    used = [value for value in values if value != -1]
    return sum(used) / len(used) if used else -1
"""


def write_task(folder: Path, name: str, body: str, records=None, data="{name}.jsonl") -> None:
    """A YAML task, and the JSON lines it reads unless another `data` path is given."""
    path = folder / data.format(name=name)
    if records is not None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n{body}"
    )


def answer(model, tokenizer, query: str, tokens: int) -> str:
    """Greedy continuation up to a line break, one full forward pass a token."""
    ids, start = tokenizer(query)["input_ids"], len(tokenizer(query)["input_ids"])
    for _ in range(tokens):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_tokenizer) -> Path:
    """Five tasks and a group."""
    write_task(tmp_path, "choice", CHOICE % NORM, QUESTIONS)
    write_task(tmp_path, "letters", CHOICE % "", QUESTIONS[:5])
    write_task(tmp_path, "rolling", ROLLING, [{"text": text} for text in TEXTS])
    prompts = [{"query": text, "target": answer(tiny_llama, tiny_tokenizer, text, 5)} for text in SENTENCES]
    prompts[0]["target"] += "?"
    write_task(tmp_path, "generate", GENERATE, prompts)
    write_task(tmp_path, "lengths", LENGTHS, prompts)
    (tmp_path / "lengths.py").write_text(LENGTHS_CODE)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [choice, letters]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return tmp_path


def log_likelihoods(model, tokenizer, question) -> list[float]:
    """Of every choice, from the logits of a full forward pass over query and choice."""
    sums, start = [], len(tokenizer(question["query"])["input_ids"])
    for choice in question["choices"]:
        ids = torch.tensor([tokenizer(question["query"] + choice)["input_ids"]])
        chosen = logits(model, ids)[0].double().log_softmax(-1)[start - 1 : -1]
        sums.append(chosen.gather(1, ids[0, start:, None]).sum().item())
    return sums


def by_hand(model, tokenizer) -> tuple[list[bool], list[bool]]:
    """Which questions are answered rightly, by the log-likelihood itself and per character."""
    hits = []
    for sizes in ([1] * len(ENDINGS), [len(choice) for choice in ENDINGS]):
        scores = [
            [
                value / size
                for value, size in zip(log_likelihoods(model, tokenizer, question), sizes, strict=True)
            ]
            for question in QUESTIONS
        ]
        hits.append([row.index(max(row)) == q["label"] for row, q in zip(scores, QUESTIONS, strict=True)])
    assert hits[0] != hits[1] and 0 < sum(hits[0]) < 16  # else the two could be confused unseen
    return hits[0], hits[1]


def share(name: str, hits: list[bool]) -> dict[str, float]:
    mean = sum(hits) / len(hits)
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / (len(hits) - 1))}


def test_all_kinds_of_tasks_against_the_model_itself(folder, tiny_llama, tiny_tokenizer, capfd):
    tiny_llama.train()
    tokenizer = copy.deepcopy(tiny_tokenizer)  # lm-eval elsewhere gives the shared one a padding token
    tokenizer.pad_token = None
    names = ["both", "rolling", "generate", "lengths"]
    found = run_tasks(tiny_llama, tokenizer, names, include_path=folder, batch_size=3)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert tiny_llama.training and tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == logging.NOTSET and "DISABLE_MULTIPROC" not in os.environ
    json.dumps(found, allow_nan=False)
    assert found["lm_eval"].startswith("0.")
    tasks = found["tasks"]

    hits, norm_hits = by_hand(tiny_llama.eval(), tiny_tokenizer)
    counts = {"samples": 16, "shots": 0}
    assert tasks["choice"] == pytest.approx(share("acc", hits) | share("acc_norm", norm_hits) | counts)
    undefined = {"acc_norm": None, "acc_norm_stderr": None, "samples": 5, "shots": 0}
    assert tasks["letters"] == pytest.approx(share("acc", hits[:5]) | undefined)
    assert tasks["both"]["acc"] == pytest.approx((sum(hits) + sum(hits[:5])) / 21)
    assert tasks["both"]["samples"] == 21

    rolled, _ = measure_documents(tiny_llama, tiny_tokenizer, TEXTS)
    assert tasks["rolling"]["bits_per_byte"] == pytest.approx(rolled["bits_per_byte"], rel=1e-4)
    assert tasks["rolling"]["word_perplexity"] > tasks["rolling"]["byte_perplexity"] > 1
    assert tasks["rolling"]["word_perplexity_stderr"] is None
    expected = share("exact_match[strict]", [False, True, True, True]) | {"samples": 4, "shots": 0}
    assert tasks["generate"] == pytest.approx(expected)
    assert tasks["lengths"]["64"] == 1.0
    assert not {"4096", "4096_stderr"} & set(tasks["lengths"])


def test_limit_shots_and_a_comparison(folder, tiny_llama, tiny_tokenizer):
    fixed = (folder / "choice.yaml").read_text()
    (folder / "choice.yaml").write_text(f"{fixed}fewshot_split: test\nnum_fewshot: 1\n")
    options = {"include_path": folder, "limit": 6, "seed": 3}
    original = run_tasks(tiny_llama, tiny_tokenizer, ["choice"], **options)
    assert (original["tasks"]["choice"]["samples"], original["tasks"]["choice"]["shots"]) == (6, 1)
    latent = convert(tiny_llama, d_qk=4, d_vo=4, preset="paper")
    other = run_tasks(latent, tiny_tokenizer, ["choice"], **options)
    difference = compare_tasks(original, other)["tasks"]["choice"]
    first, second = original["tasks"]["choice"], other["tasks"]["choice"]
    assert difference["acc"] == second["acc"] - first["acc"]
    assert difference["acc_stderr"] == pytest.approx(math.hypot(first["acc_stderr"], second["acc_stderr"]))
    assert set(difference) == {"samples", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    one = run_tasks(tiny_llama, tiny_tokenizer, ["choice"], **(options | {"limit": 1}))
    assert one["tasks"]["choice"]["acc_stderr"] is None
    assert compare_tasks(one, one)["tasks"]["choice"]["acc_stderr"] is None
    with pytest.raises(ValueError, match="got {'choice': 6} and {'choice': 1}; run both alike"):
        compare_tasks(original, one)


def test_answers_pair_two_models_question_by_question(folder, tiny_llama, tiny_tokenizer):
    options = {"include_path": folder, "answers": True}
    original = run_tasks(tiny_llama, tiny_tokenizer, ["choice", "rolling"], **options)
    other = run_tasks(copy.deepcopy(tiny_llama), tiny_tokenizer, ["choice", "rolling"], **options)
    scores = original["answers"]["choice"]["acc"]
    assert len(scores) == len(QUESTIONS)
    assert sum(scores) / len(scores) == original["tasks"]["choice"]["acc"]
    assert original["answers"]["rolling"] == {}  # its metrics are sums over texts
    same = compare_tasks(original, other)["tasks"]["choice"]
    assert (same["acc"], same["acc_stderr"]) == (0, 0)
    other["answers"]["choice"]["acc"] = [1 - scores[0], *scores[1:]]
    differences = [1 - 2 * scores[0], *[0] * (len(scores) - 1)]
    error = statistics.stdev(differences) / math.sqrt(len(scores))
    assert compare_tasks(original, other)["tasks"]["choice"]["acc_stderr"] == pytest.approx(error)
    del other["answers"]
    assert compare_tasks(original, other)["tasks"]["choice"]["acc_stderr"] > error


@pytest.fixture
def only_local(monkeypatch):
    """lm-eval's own tasks are those of the folder: the list of the real ones takes half a minute to read."""
    read = task_loading._read_tasks
    monkeypatch.setattr(task_loading, "_read_tasks", lambda path, _, metadata: read(path, False, metadata))


@pytest.mark.usefixtures("only_local")
def test_unknown_tasks_are_told_their_near_matches(folder, tiny_llama, tiny_tokenizer):
    (folder / "broken.yaml").write_text("task: [broken\n")
    with pytest.raises(
        ValueError, match="no task 'choise'; names like it: choice; .* \\(readable: both, choice,"
    ):
        run_tasks(tiny_llama, tiny_tokenizer, ["choise"], include_path=folder)
    with pytest.raises(ValueError, match="no task 'broken'; names like it: none; correct"):
        run_tasks(tiny_llama, tiny_tokenizer, ["choice", "broken"], include_path=folder)
    task_loading._lm_eval_tasks.cache_clear()
    with pytest.raises(ValueError, match="no task 'choice'; names like it: none; correct the name$"):
        run_tasks(tiny_llama, tiny_tokenizer, ["choice"])
    task_loading._lm_eval_tasks.cache_clear()
    with pytest.raises(ValueError, match="a folder of YAML tasks: got .*nowhere; there is none"):
        run_tasks(tiny_llama, tiny_tokenizer, ["choice"], include_path=folder / "nowhere")


def test_tasks_without_data_package_or_room_are_refused(folder, tiny_llama, tiny_tokenizer):
    def refused(name, message):
        with pytest.raises(ValueError, match=message) as caught:
            run_tasks(tiny_llama, tiny_tokenizer, [name], include_path=folder)
        assert "\n" not in str(caught.value)

    write_task(folder, "gone", CHOICE % "", data="gone.jsonl")
    refused("gone", "the data of the task 'gone' cannot be fetched: ")
    (folder / "remote.yaml").write_text(
        f"task: remote\ndataset_path: nobody/nothing\ntest_split: test\n{CHOICE % ''}"
    )
    refused(
        "remote", "'remote' cannot be fetched: .*nobody/nothing.*; check the network, or give local files"
    )
    (folder / "garbled.jsonl").write_text("{not json\n")
    write_task(folder, "garbled", CHOICE % "")
    refused("garbled", "the task 'garbled' cannot be read: .*; correct its YAML or its data")
    (folder / "needy.py").write_text("import a_package_nobody_has\n")
    write_task(folder, "needy", LENGTHS.replace("lengths.", "needy."), [{"query": "", "target": ""}])
    refused("needy", "needs the package a_package_nobody_has, .*; pip install a_package_nobody_has")
    write_task(folder, "absent", LENGTHS.replace("lengths.", "nowhere."), [{"query": "", "target": ""}])
    refused("absent", "an import failed: Cannot import module 'nowhere' .*: No module .*; correct its YAML")
    write_task(
        folder,
        "long",
        GENERATE.replace("max_gen_toks: 5", "max_gen_toks: 128"),
        [{"query": "", "target": ""}],
    )
    refused(
        "long",
        "the answers of 'long' take 128 tokens, max_position_embeddings=128; take a model of longer context",
    )


@pytest.mark.parametrize(
    ("module", "installs"),
    [
        ("sklearn.metrics", "scikit-learn"),
        ("antlr4", '"lm_eval\\[math\\]"'),
        ("wonderwords", '"lm_eval\\[ruler\\]"'),
        ("plain", "plain"),
    ],
)
def test_a_missing_module_is_named_as_pip_knows_it(
    folder, tiny_llama, tiny_tokenizer, monkeypatch, module, installs
):
    monkeypatch.setattr(task_loading, "find_spec", lambda name: None)
    monkeypatch.setattr(task_loading, "sys", SimpleNamespace(modules={}))
    (folder / "needy.py").write_text(f"raise ModuleNotFoundError('no', name={module!r})\n")
    write_task(folder, "needy", LENGTHS.replace("lengths.", "needy."), [{"query": "", "target": ""}])
    name = module.partition(".")[0]
    with pytest.raises(ValueError, match=f"needs the package {name}, .*; pip install {installs}$"):
        run_tasks(tiny_llama, tiny_tokenizer, ["needy"], include_path=folder)


def test_what_is_installed_is_not_to_be_installed(folder, tiny_llama, tiny_tokenizer):
    (folder / "needy.py").write_text("from json import a_name_nobody_has\n")
    write_task(folder, "needy", LENGTHS.replace("lengths.", "needy."), [{"query": "", "target": ""}])
    with pytest.raises(ValueError, match="cannot import name 'a_name_nobody_has' from 'json'") as caught:
        run_tasks(tiny_llama, tiny_tokenizer, ["needy"], include_path=folder)
    assert "pip install" not in str(caught.value)
    (folder / "needy.py").write_text("import json.a_module_nobody_has\n")
    with pytest.raises(ValueError, match="No module named 'json.a_module_nobody_has'") as caught:
        run_tasks(tiny_llama, tiny_tokenizer, ["needy"], include_path=folder)
    assert "pip install" not in str(caught.value)


def test_the_first_line_that_says_something_is_shown(folder, tiny_llama, tiny_tokenizer):
    (folder / "needy.py").write_text("raise RuntimeError('\\n\\n  bad luck\\nand more')\n")
    write_task(folder, "needy", LENGTHS.replace("lengths.", "needy."), [{"query": "", "target": ""}])
    with pytest.raises(ValueError, match="the task 'needy' cannot be read: bad luck; correct"):
        run_tasks(tiny_llama, tiny_tokenizer, ["needy"], include_path=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "at least one task: got 0"),
        ({"limit": 0}, "limit must be at least 1: got limit=0"),
        ({"batch_size": 0}, "batch_size must be at least 1: got batch_size=0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tiny_llama, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        run_tasks(tiny_llama, tiny_tokenizer, **({"tasks": ["choice"]} | options))
    with pytest.raises(TypeError, match="pass \\[name\\]"):
        run_tasks(tiny_llama, tiny_tokenizer, "choice")


def test_missing_lm_eval_is_one_command(tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ValueError, match='pip install "kvlatent\\[eval\\]"'):
        run_tasks(tiny_llama, tiny_tokenizer, ["choice"])


def test_padding_above_the_embedding_is_not_looked_up(folder, tiny_llama, tiny_tokenizer):
    """A pad token that somebody added, one above the embedding: answers of unequal length are padded all the same."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    plain = run_tasks(tiny_llama, tokenizer, ["generate"], include_path=folder, batch_size=3)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == tiny_llama.config.vocab_size
    assert run_tasks(tiny_llama, tokenizer, ["generate"], include_path=folder, batch_size=3) == plain
    assert tokenizer.pad_token == "<added>"
