"""A share of the cache that has no even split is refused in the user's own numbers, with advice that works."""

import re
from itertools import product

import pytest
from transformers import LlamaConfig, Qwen3Config

from kvlatent.planning.shares import share_without_widths
from kvlatent.workflows.run_plan import plan_run

SHARES = (0.125, 0.25, 0.28, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0)
ENGINES = (None, "vllm", "llama.cpp", "openvino")


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    monkeypatch.setattr(
        "kvlatent.workflows.run_plan.estimate_seconds", lambda *_: 1.0
    )  # it times this machine


@pytest.fixture(scope="module", params=[64, 80, 96, 128])
def model(request, tmp_path_factory):
    """A config is all that a plan reads."""
    folder = tmp_path_factory.mktemp("shares") / "model"
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    LlamaConfig(**shape, vocab_size=300, head_dim=request.param).save_pretrained(folder)
    return folder


def plan(model, **options):
    return plan_run(model, device="cpu", stages="none", **options)


def advised(sentence: str) -> list[dict]:
    """What the sentence tells the user to try."""
    _, advice = sentence.split("; try ")
    shares = [{"kv": float(kv)} for kv in re.findall(r"--kv ([0-9.]+)", advice)]
    widths = re.findall(r"--d-qk (\d+) --d-vo (\d+), which keep ([0-9.]+)", advice)
    return shares + [{"d_qk": int(k), "d_vo": int(v), "keeps": float(kept)} for k, v, kept in widths]


@pytest.mark.parametrize("preset", ["calibrated", "own-frequency", "paper"])
def test_a_refused_share_speaks_of_what_was_given(model, preset):
    refused = 0
    for kv, engine, has_text in product(SHARES, ENGINES, (True, False)):
        options = {"preset": preset, "engine": engine, "has_text": has_text}
        try:
            made = plan(model, kv=kv, **options)
        except ValueError as error:
            sentence = str(error)
        else:
            assert made.summary()["share"] <= kv + 1e-9
            continue
        assert f"--kv {kv:g}" in sentence and "got d_" not in sentence and "d_qk must" not in sentence
        if "fits only some widths" not in sentence:
            assert f"the smallest widths of engine {engine}" in sentence
            continue
        refused += 1
        for way in advised(sentence):
            keeps = way.pop("keeps", None)
            summary = plan(model, **way, **options).summary()
            if keeps is not None:
                assert summary["share"] == pytest.approx(keeps, abs=1e-4) and keeps <= kv
    assert (refused > 0) == (preset != "calibrated")


def test_the_sentence(tmp_path):
    LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, head_dim=64
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        plan(tmp_path, preset="own-frequency", kv=0.75)
    assert str(caught.value) == (
        "the preset own-frequency fits only some widths of a head, and none of them keeps --kv 0.75 of both keys and "
        "values: got head_dim=64; try --kv 0.5, or --kv 1, or --d-qk 64 --d-vo 32, which keep 0.75 of the cache"
    )
    # Equal widths alone run on vllm, and none between 32 and 64 is a stride.
    with pytest.raises(ValueError, match="own-frequency with engine vllm .*; try --kv 0.5, or --kv 1$"):
        plan(tmp_path, preset="own-frequency", kv=0.75, engine="vllm")
    with pytest.raises(ValueError, match="^the conversion fits"):
        plan(tmp_path, preset="paper", overrides=["conversion.values=svd"], kv=0.75)
    with pytest.raises(ValueError, match="got d_qk=48"):  # which was given
        plan(tmp_path, preset="own-frequency", d_qk=48)


def test_half_that_nobody_asked_for_is_called_the_default(tmp_path):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    LlamaConfig(**shape, head_dim=36).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"none of them keeps --kv 0.5 \(the default\)"):
        plan(tmp_path, preset="own-frequency")


def test_another_fault_is_not_taken_for_the_widths(tmp_path):
    """A QK-norm that cannot be sliced by head stays the reason, whatever the share."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    Qwen3Config(**shape, head_dim=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a sliced QK-norm has one weight for all heads"):
        plan(tmp_path, overrides=["conversion.qk_norm=sliced"], kv=0.75)
    assert share_without_widths("it", 0.75, (32, 64), 64, lambda *_: False) is None
