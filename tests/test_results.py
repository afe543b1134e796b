"""How evaluations and studies look in a terminal: every finding of the document is a row or a line."""

from rich.console import Console

from kvlatent.evaluation.diagnosis import diagnose
from kvlatent_cli.measured_listings import evaluation_listing, study_listing


def printed(parts) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=False)
    return capture.get()


def evaluation(figures) -> dict:
    model = {"name": "small", "fingerprint": "0"}
    return {"model": model, "original": None, "figures": figures, "diagnosis": diagnose(figures)}


def test_causality_is_a_row():
    text = printed(evaluation_listing(evaluation({"latent": {"causality": 0.25}})))
    (row,) = [line.split() for line in text.splitlines() if "past logits" in line]
    assert row == [*["past", "logits", "moved", "by", "the", "future"], "0.25"]
    assert "past logits" not in printed(evaluation_listing(evaluation({"latent": {"order": ORDER}})))


ORDER = {"margin": [[1.0]], "preferred": [[1.0]]}


def test_what_could_not_be_decided_is_said_with_its_numbers():
    figures = {"latent": {}, "ratio": 1.3, "ratio_standard_error": 0.001, "cache_ratio": 0.5}
    figures["fidelity"] = {"kl": 0.15, "kl_standard_error": 0.001, "top1_agreement": 0.9, "layers": []}
    text = printed(evaluation_listing(evaluation(figures)))
    assert "not judged: forgetting: perplexity_ratio 1.3 (threshold 1.22), kl 0.15 (threshold 0.2)" in text
    assert "not judged: causality" not in text  # nobody asked for it


def test_a_study_names_cells_of_others_and_damaged_ones():
    document = {
        "study": "widths",
        "out": "w",
        "cells": ["a", "b", "c"],
        "finished": ["a"],
        "elsewhere": ["b"],
    }
    document |= {"redone": {"d": "it is cut"}, "failed": {}, "impossible": {}}
    assert "being measured by another process: b" in printed(study_listing(document))
    row = {"settings": {"d_qk": 8}, "seeds": [0], "figures": {"ratio": {"mean": 1.0, "standard_error": None}}}
    damaged = {"c": "not JSON; delete it", "d": "it is cut"}
    text = printed(study_listing(document | {"summary": {"rows": [row], "damaged": damaged}}))
    assert "damaged: c: not JSON; delete it" in text
    assert "redone: d: it is cut" in text and "damaged: d" not in text
