"""The evaluation behind `kvlatent eval`: what it holds, that both models read the same, what it refuses."""

import json
import sys
from inspect import signature
from pathlib import Path

import pytest

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation import checks as registry
from kvlatent.evaluation import diagnosis, standard
from kvlatent.evaluation.check import DATA, Check
from kvlatent.evaluation.checks import (
    CHECKS,
    causality,
    fidelity,
    needle,
    task_loading,
    tasks,
    text_perplexity,
    word_order,
)
from kvlatent.evaluation.evidence import Sign, figure
from kvlatent.evaluation.scored_text import read_documents
from kvlatent.evaluation.standard import evaluate, standard_evaluation
from kvlatent.jobs.fingerprints import identity
from kvlatent.model.config import LatentConfig
from kvlatent_cli.measure import EVALUATION
from kvlatent_cli.measured_listings import evaluation_listing
from on_disk import write_checkpoint, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("standard")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt", 60)
    latent = convert(load_model(folder / "model"), d_qk=8, d_vo=4, preset="paper")
    save(latent, folder / "latent", tokenizer=tiny_tokenizer)
    return folder


@pytest.fixture(scope="module")
def document(place):
    return standard_evaluation(
        place / "latent", place / "text.txt", against=place / "model", block_size=32, seed=3
    )


def test_everything_is_measured_and_can_be_written(place, document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["kind"] == "evaluation"
    assert document["model"]["name"] == "latent" and document["original"]["name"] == "model"
    assert document["original"]["fingerprint"] == identity(place / "model")
    assert (
        LatentConfig.from_dict(document["model"]["latent"]).d_qk == 8 and "latent" not in document["original"]
    )
    for role in ("latent", "original"):
        assert set(document["figures"][role]) >= {
            "perplexity",
            "bits_per_byte",
            "needle",
            "order",
            "causality",
        }
    assert document["record"]["seed"] == 3 and document["record"]["text"]["name"] == "text.txt"
    assert str(place) not in json.dumps(document)


def test_figures_are_those_of_the_checks_alone(place, document):
    figures = document["figures"]
    model = load_model(place / "latent")
    alone, _ = text_perplexity.measure_documents(
        model, load_tokenizer(place / "model", model.config), read_documents(place / "text.txt"), window=32
    )
    assert figures["latent"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    ratio = figures["latent"]["perplexity"] / figures["original"]["perplexity"]
    assert figures["ratio"] == pytest.approx(ratio, rel=1e-9) and figures["ratio"] != 1
    assert figures["cache_ratio"] == (8 + 4) / (16 + 16)
    assert figures["fidelity"]["kl"] > 0 and figures["latent"]["causality"] == 0
    both = [figures[role]["order"] for role in ("latent", "original")]
    assert both[0]["trials"] == both[1]["trials"] and both[0]["margin"] != both[1]["margin"]


def test_a_model_against_itself_is_whole(place):
    found = standard_evaluation(
        place / "model",
        place / "text.txt",
        against=place / "model",
        block_size=32,
        checks=["perplexity", "fidelity"],
    )
    figures = found["figures"]
    assert (
        figures["ratio"] == 1
        and figures["fidelity"]["kl"] == 0
        and figures["fidelity"]["top1_agreement"] == 1
    )
    assert "needle" not in figures["latent"]
    assert [finding["name"] for finding in found["diagnosis"]["findings"]] == ["none"]


def test_without_a_text_the_standard_library_is_read(place):
    found = standard_evaluation(place / "latent", max_tokens=600, block_size=64, checks=["perplexity"])
    assert found["figures"]["latent"]["tokens"] == 600 and found["original"] is None
    assert "standard library" in found["record"]["text"]["name"]
    assert found["diagnosis"]["not_measured"]


def test_mistakes(place, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="unknown check 'speed'; choose of perplexity, fidelity"):
        standard_evaluation(place / "latent", checks=["speed"])
    with pytest.raises(ValueError, match="a loaded model comes without its tokenizer: pass tokenizer="):
        standard_evaluation(load_model(place / "latent"), place / "text.txt")
    write_checkpoint(tmp_path / "other", tiny_tokenizer, vocab_size=301)
    with pytest.raises(ValueError, match="their vocabularies have 300 and 301 entries"):
        standard_evaluation(place / "latent", place / "text.txt", against=tmp_path / "other")
    with pytest.raises(ValueError, match="unknown check 'tasks'"):
        standard_evaluation(place / "latent", checks=["tasks"])
    with pytest.raises(
        TypeError,
        match="has no option 'strides'; it has data, block_size, stride, batch_size, max_tokens, contexts",
    ):
        standard_evaluation(place / "latent", strides=8)


MEASURING = {
    "measure_text": text_perplexity,
    "fidelity": fidelity,
    "needle": needle,
    "order": word_order,
    "causality": causality,
    "run_tasks": tasks,
}
CHECKING = {
    "check_window": text_perplexity,
    "check_fidelity": fidelity,
    "check_needle": needle,
    "check_order": word_order,
    "check_tasks": tasks,
}


@pytest.fixture
def measured(monkeypatch):
    """Names of the measurements that began; none of them does anything."""
    begun = []
    for name, module in MEASURING.items():
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: begun.append(name))
    return begun


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": [64, 300]}, "got 300 tokens, max_position_embeddings=128; ask for 128"),
        ({"contexts": [64, 20]}, "the context has 20; ask for contexts of 24 tokens or more"),
        ({"contexts": []}, "the grid needs a context and a depth: got 0 and 5"),
        ({"template": "The number is {value}."}, "must name {key}: got 'The number is {value}.'"),
        ({"seed": -1}, "a seed is between 0 and 4294967295: got -1; try 0"),
        ({"seed": 2**32}, "got 4294967296; try 0"),
        (
            {"block_size": 4096},
            "got --block-size 4096, the model's context has 128; give 128, or leave it out",
        ),
        ({"block_size": 1}, "got --block-size 1, the model's context has 128"),
        ({"block_size": 16}, "a span of 8 needs 25 tokens, got length=16; take shorter spans or a longer"),
        ({"stride": 600}, "the stride is between 1 and the window: got stride=600, window=128"),
        ({"max_tokens": 0}, "max_tokens is at least 1: got 0; leave it out"),
        (
            {"batch_size": 0, "checks": ["needle"]},
            "batch_size must be at least 1: got batch_size=0; raise it",
        ),
        ({"checks": []}, "got 0 checks and 0 tasks; name some of perplexity, fidelity, .* or leave --checks"),
        ({"tasks": []}, "--tasks names at least one task: got 0; name one, such as arc_easy"),
        (
            {"limit": 5},
            "--limit is for tasks only: got 5, and what is measured is perplexity, fidelity, needle,",
        ),
        (
            {"include_path": "x"},
            "--include-path is for tasks only: got x, .*; leave it out, or ask for tasks",
        ),
        (
            {"contexts": [64, 128], "checks": ["order"]},
            "--contexts is for needle only: got 64,128, .* is order;",
        ),
        ({"template": "{key}: {value}", "checks": ["order"]}, "--template is for needle only: got {key}: "),
        (
            {"stride": 8, "checks": ["fidelity"]},
            "--stride is for perplexity only: got 8, .* is fidelity; leave",
        ),
        ({"max_tokens": 8, "checks": ["order"]}, "--max-tokens is for perplexity only: got 8"),
        (
            {"block_size": 32, "checks": ["needle"]},
            "--block-size is for perplexity and fidelity and order only",
        ),
        (
            {"batch_size": 2, "checks": ["causality"], "data": None},
            "--batch-size is for .* tasks only: got 2",
        ),
        ({"checks": ["causality"]}, "--data is for perplexity and .* only: got .*text.txt, .* is causality"),
        (
            {"checks": ["needle", "fidelity"], "against": None},
            "with fidelity and no --against; name the original",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(place, measured, options, message):
    given = {"data": place / "text.txt", "against": place / "model"} | options
    with pytest.raises(ValueError, match=message) as caught:
        standard_evaluation(place / "latent", **given)
    assert measured == [] and "\n" not in str(caught.value)


def test_tasks_are_found_before_anything_is_measured(place, measured, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    read = task_loading._read_tasks
    monkeypatch.setattr(task_loading, "_read_tasks", lambda path, _, metadata: read(path, False, metadata))
    (tmp_path / "colours.yaml").write_text("task: colours\noutput_type: multiple_choice\n")
    options = {"include_path": tmp_path, "tasks": ["colour"]}
    with pytest.raises(ValueError, match="no task 'colour'; names like it: colours"):
        standard_evaluation(place / "latent", place / "text.txt", **options)
    with pytest.raises(ValueError, match="limit must be at least 1: got limit=0; raise it or leave it out"):
        standard_evaluation(place / "latent", place / "text.txt", **options, limit=0)
    with pytest.raises(ValueError, match="the task 'colours' cannot be read"):  # it has no data
        standard_evaluation(place / "latent", checks=[], **options | {"tasks": ["colours"]})
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ValueError, match="tasks need lm-eval, which is not installed"):
        standard_evaluation(place / "latent", place / "text.txt", **options)
    assert measured == []


def test_a_short_text_is_refused_before_anything_is_measured(place, measured, tmp_path):
    (tmp_path / "short.txt").write_text("A cat.")
    with pytest.raises(
        ValueError, match="one window of 128 tokens: got .*; give more text, a shorter window, or"
    ):
        standard_evaluation(place / "latent", tmp_path / "short.txt")
    with pytest.raises(
        ValueError, match="the text must fill a block: .*; give more text or a smaller block_size"
    ):
        standard_evaluation(
            place / "latent",
            tmp_path / "short.txt",
            against=place / "model",
            checks=["perplexity", "fidelity"],
        )
    assert measured == []


def test_models_of_other_shapes_are_refused_before_anything_is_measured(
    place, measured, tmp_path, tiny_tokenizer
):
    write_checkpoint(tmp_path / "deep", tiny_tokenizer, num_hidden_layers=3)
    with pytest.raises(ValueError, match="must have the same num_hidden_layers: got 3 and 2"):
        standard_evaluation(place / "latent", place / "text.txt", against=tmp_path / "deep")
    write_checkpoint(tmp_path / "short", tiny_tokenizer, max_position_embeddings=64)
    with pytest.raises(ValueError, match="got --block-size 100, the model's context has 64"):
        standard_evaluation(place / "latent", place / "text.txt", against=tmp_path / "short", block_size=100)
    assert measured == []


@pytest.mark.parametrize("size", [None, 3])
def test_a_batch_size_reaches_every_check(place, monkeypatch, size):
    seen = {}

    def watch(name, real):
        def call(*given, **options):
            seen.setdefault(name, set()).add(options.get("batch_size"))
            return {"tasks": {}} if real.__module__ == tasks.__name__ else real(*given, **options)

        return call

    watched = {name: module for name, module in (MEASURING | CHECKING).items() if module is not causality}
    for name, module in watched.items():
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    options = {"batch_size": size, "tasks": ["a"], "contexts": [64], "block_size": 32}
    standard_evaluation(place / "latent", place / "text.txt", against=place / "model", **options)
    assert seen == {name: {size} for name in watched}


def test_a_model_of_a_very_short_context_can_be_asked_whether_it_looks_ahead(tmp_path, tiny_tokenizer):
    write_checkpoint(tmp_path / "model", tiny_tokenizer, max_position_embeddings=16)
    found = standard_evaluation(tmp_path / "model", checks=["causality"])
    assert found["figures"]["latent"] == {"causality": 0.0}


def test_windows_nobody_chose_fit_the_context(place):
    found = standard_evaluation(place / "latent", place / "text.txt", checks=["perplexity"], max_tokens=300)
    assert found["figures"]["latent"]["window"] == 128


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 32}, {"block_size": 16, "max_tokens": 300}, {"batch_size": 3}]
)
def test_evaluate_gives_the_numbers_of_the_command(place, options):
    pair = {"against": place / "model"}
    found = evaluate(place / "latent", place / "text.txt", **pair, **options)
    command = standard_evaluation(
        place / "latent", place / "text.txt", **pair, checks=["perplexity"], **options
    )
    assert found == command["figures"]
    assert found["latent"]["window"] == options.get("block_size", 128) and found["ratio"] != 1


def test_a_check_is_one_record(place, monkeypatch):
    """Its argument, refusal, extents, figures, rows, lines and sign, from nowhere but the record."""

    def refuse(request, settings):
        if request.given["hue"] == 0:
            raise ValueError("a hue is 1 or more: got 0; try 7")

    def run(request, settings, progress):
        progress.step("colour").to(1, 1)
        hues = {role: {"colour": request.given["hue"]} for role in request.models}
        return hues | {"palette": settings["size"]}

    def sign(figures, missing):
        value = (figures.get("latent") or {}).get("colour")
        return Sign({"hue": figure(value, 5)}, "Paint it.") if value else Sign({})

    colour = Check(
        name="colour",
        arguments=("hue",),
        refuse=refuse,
        run=run,
        extents=lambda request: [({"size": 2}, 0.0)],
        rows=lambda latent: {"hue": lambda f: str(f["colour"])},
        lines=lambda figures: [f"palette of {figures['palette']}"] if "palette" in figures else [],
        signs={"fading": sign},
    )
    for module in (registry, standard, diagnosis):
        monkeypatch.setattr(module, "CHECKS", (*CHECKS, colour))
    monkeypatch.setattr(standard, "DEFAULT_CHECKS", ("colour",))
    with pytest.raises(ValueError, match="a hue is 1 or more: got 0"):
        standard_evaluation(place / "latent", checks=["colour"], hue=0)
    steps = []
    document = standard_evaluation(
        place / "latent", checks=["colour"], hue=7, progress=lambda *event: steps.append(event)
    )
    assert document["figures"] == {"latent": {"colour": 7}, "palette": 2}
    assert document["record"]["extent"]["measured"] == {"colour": {"size": 2}}
    assert ("colour", 0, 0, "") in steps and ("colour", 1, 1, "") in steps
    (finding,) = document["diagnosis"]["findings"]
    assert finding["name"] == "fading" and finding["advice"] == "Paint it."
    listing, *lines = evaluation_listing(document)
    assert [column._cells for column in listing.columns] == [["hue"], ["7"]]
    assert "palette of 2" in lines


def test_the_command_offers_what_the_checks_read_and_nothing_else():
    of_no_check = signature(standard_evaluation).parameters.keys() - {DATA}
    read = {name for check in CHECKS for name in check.arguments}
    assert {option.name for option in EVALUATION} - of_no_check == read
    assert all(f"`{name}`" in standard_evaluation.__doc__ for name in read)
