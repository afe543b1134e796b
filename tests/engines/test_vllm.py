"""Latent checkpoints on vLLM through the plugin: log-probabilities, greedy tokens, bytes of the cache, refusals.

`make engines` runs these, in an environment that has vLLM (CPU); elsewhere they are skipped.
"""

import json
import os
import subprocess
import sys
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
LIMIT = 2e-4
NEW_TOKENS = 64
FP32_BYTES = 4


def serve(folder, prompts, new_tokens=NEW_TOKENS, environment=None, **options):
    """What vLLM answers in a fresh process, or its log where it refuses; and the log."""
    request = {"model": str(folder), "prompts": prompts, "new_tokens": new_tokens, "options": options}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "", "HF_HUB_OFFLINE": "1", **(environment or {})},
    )
    log = done.stdout + done.stderr
    return (json.loads(done.stdout.strip().splitlines()[-1]) if not done.returncode else None), log


def compare(model, prompts, answers):
    """Largest distance of a log-probability; and that the greedy tokens are ours."""
    largest = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            ours = model.generate(
                ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0,
                eos_token_id=None,
            )[0]  # fmt: skip
            assert ours[len(prompt) :].tolist() == answer["tokens"]
            expected = model(ours[None]).logits[0].log_softmax(-1)
        assert len(answer["log_probabilities"]) == len(ours) - 1
        for row, values in zip(expected, answer["log_probabilities"], strict=False):
            largest = max(largest, *(abs(row[int(token)].item() - value) for token, value in values.items()))
    return largest


def bytes_per_token(cache):
    return sum(cache["page_bytes"]) / cache["block_size"]


def prompts(count=5):
    return [row.tolist()[: 12 + 9 * index] for index, row in enumerate(tokens(batch=count, length=60))]


CASES = {
    "unequal, a table a layer": ("llama", [32, 16, 48], [64, 24, 16]),
    "equal in each layer": ("llama", [32, 48, 64], [32, 48, 64]),
    "qwen3, norm at full width": ("qwen3", 32, 16),
    "windows by layer type": ("qwen2-window", 16, 32),
    "windows everywhere": ("mistral", 16, 32),
    "fused projections": ("phi3", 16, 24),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_tokens_and_bytes(case, tmp_path):
    name, d_qk, d_vo = CASES[case]
    wide = tiny_model(name, head_dim=64) if name == "llama" else tiny_model(name)
    latent = convert(wide, d_qk=d_qk, d_vo=d_vo, preset="paper" if isinstance(d_qk, int) else "own-frequency")
    save(latent, tmp_path / "m")
    answered, log = serve(tmp_path / "m", prompts())
    assert answered is not None, log
    assert compare(latent, prompts(), answered["answers"]) <= LIMIT
    assert "self-check passed" in log
    config, cache = latent_config_of(latent.config), answered["cache"]
    widths = cache_widths(config, 3, "cpu")
    heads = latent.config.num_key_value_heads
    assert bytes_per_token(cache) == 2 * sum(widths) * heads * FP32_BYTES
    assert cache["allocated_bytes"] == cache["num_blocks"] * sum(cache["page_bytes"])
    if case == "equal in each layer":
        assert cache["specs"] == ["UniformTypeKVCacheSpecs"]
        assert bytes_per_token(cache) == config.cache_bytes_per_token(3, heads, FP32_BYTES)
        assert "nothing is padded" in log
    else:
        assert "vLLM keeps keys and values at one width" in log


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "m"
    save(convert(tiny_model("llama"), d_qk=32, d_vo=16, preset="paper"), folder)
    return folder


def test_without_a_self_check_it_is_served_and_said(saved, tmp_path):
    text = (saved / SELF_CHECK).read_text()
    (saved / SELF_CHECK).unlink()
    try:
        answered, log = serve(saved, prompts(1), new_tokens=1)
    finally:
        (saved / SELF_CHECK).write_text(text)
    assert answered is not None, log
    assert "has no self_check.json, so it is served without" in log and "self-check passed" not in log


@pytest.mark.parametrize("damage", ["numbers", "file"])
def test_a_corrupted_vector_is_refused(saved, damage):
    text = (saved / SELF_CHECK).read_text()
    data = json.loads(text)
    data["log_probabilities"][5][0] -= 0.01
    (saved / SELF_CHECK).write_text(json.dumps(data) if damage == "numbers" else text[:100])
    try:
        answered, log = serve(saved, prompts(1), new_tokens=1)
    finally:
        (saved / SELF_CHECK).write_text(text)
    assert answered is None
    said = "log-probabilities differ by 0.01" if damage == "numbers" else "self_check.json is damaged"
    assert said in log


def test_two_devices_are_refused(saved):
    answered, log = serve(saved, prompts(1), new_tokens=1, tensor_parallel_size=2)
    assert answered is None and "a latent checkpoint runs on one device of vLLM" in log
