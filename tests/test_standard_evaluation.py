"""The evaluation behind `kvlatent eval`: what it holds, that both models read the same, what it refuses."""

import json
from pathlib import Path

import pytest

from kvlatent.config import LatentConfig
from kvlatent.conversion import convert
from kvlatent.evaluation.sliding import read_documents, sliding_perplexity
from kvlatent.evaluation.standard import CHECKS, standard_evaluation
from kvlatent.hub import load_model, load_tokenizer, save
from kvlatent.workspace import identity
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
    alone = sliding_perplexity(
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
    assert "tasks" not in CHECKS
