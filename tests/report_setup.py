"""Result files of every kind: those that are committed, and small ones of the same form, of the same original."""

import copy
import json
import math
from pathlib import Path

from kvlatent.model.config import LatentConfig
from kvlatent.model.table import RotaryTable

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WIDTHS = [(32, 32), (36, 28), (32, 32), (36, 28)]
CONFIG = LatentConfig(
    d_qk=tuple(d_qk for d_qk, _ in WIDTHS),
    d_vo=tuple(d_vo for _, d_vo in WIDTHS),
    tables=tuple(
        tuple(
            RotaryTable(tuple(10_000 ** (-(i + head / 2) * 2 / d_qk) for i in range(d_qk // 2)))
            for head in range(2)
        )
        for d_qk, _ in WIDTHS
    ),
    channels=tuple((tuple(range(d_qk)),) * 2 for d_qk, _ in WIDTHS),
    original_head_dim=64,
    original_model_type="llama",
)


def committed(name):
    """A document of `benchmarks/results`, new on every call."""
    return json.loads((RESULTS / name).read_text())


def evaluation(**changes):
    """What `kvlatent eval` wrote of the embedded model."""
    return {**committed("eval_embedded_calibrated.json"), **changes}


MODEL, LATENT = evaluation()["original"], {**evaluation()["model"], "latent": CONFIG.to_dict()}


def perplexity_alone(text=None, **changes):
    """An evaluation of nothing else; `changes` of both models' figures, and of the text that was read."""
    document = evaluation()
    for name in ("latent", "original"):
        for left_out in ("needle", "order", "causality"):
            document["figures"][name].pop(left_out)
        document["figures"][name] |= changes
    del document["figures"]["fidelity"]
    document["record"]["text"] = {"name": "valid.txt", "sha256": "ab" * 32} | (text or {})
    return document


def bench(**changes):
    """What `kvlatent bench` wrote of the embedded model, and longest contexts."""
    longest = [
        {"batch": 1, "cache": "dynamic", "model": "latent", "tokens": 242_000},
        {"batch": 1, "cache": "quantized-int4", "model": "latent", "tokens": None},
    ]
    largest = {"memory_bytes": 1_000_000_000, "rows": longest}
    return {**committed("bench_embedded.json"), "largest_context": largest, **changes}


def comparison():
    return committed("choices_embedded.json")


def conversion(**changes):
    return {**committed("conversion_embedded.json"), **changes}


def study(name, cell, settings, figures, **changes):
    """One cell of a study."""
    document = committed("study_lora_rank_embedded/rank0-seed0.json")
    changed = {"study": name, "cell": cell, "settings": {"seed": 0, **settings}, "figures": figures}
    return {**document, **changed, **changes}


def cost(ratio, share):
    """What every cell of a study measures."""
    return {
        "perplexity": 8.68 * ratio,
        "ratio": ratio,
        "original_perplexity": 8.68,
        "tokens": 50_000,
        "cache_bytes_per_token": 2048.0 * share,
        "original_cache_bytes_per_token": 2048.0,
        "cache_ratio": share,
    }


def run(**changes):
    """`run.json` of a compress, and the lines of its `metrics.jsonl`."""
    strategies = [
        {"paper": None if i % 2 else 0.61, "energy": 0.04 + 0.01 * i, "calibrated": 0.01 + 0.004 * i}
        for i in range(4)
    ]
    layers = [
        {"layer": i, "d_qk": d_qk, "d_vo": d_vo, "errors": strategies[i], "reasons": {}}
        for i, (d_qk, d_vo) in enumerate(WIDTHS)
    ]
    steps = [
        {"stage": stage, "step": step, "tokens": 4096 * step, "loss": 14 * math.exp(-step / 25) / stage}
        for stage, count in ((1, 50), (2, 150))
        for step in range(1, count + 1)
    ]
    figures = {
        name: {"perplexity": value, "standard_error": 0.27, "tokens": 29558, "cache_bytes_per_token": size}
        for name, value, size in (("original", 8.68, 8192.0), ("converted", 9.41, 4096.0), ("stage1", 9.02, 4096.0))
    }  # fmt: skip
    figures["latent"] = {
        **figures["stage1"],
        "perplexity": 8.76,
        "ratio": 1.009,
        "ratio_standard_error": 0.001,
    }
    summary = {"steps": 50, "tokens": 204_800, "minutes": 1.5, "first_loss": 14.0, "last_loss": 2.9}
    training = {"stage1": summary, "stage2": {**summary, "steps": 150}}
    environment = {name: comparison()[name] for name in ("python", "versions", "machine")}
    document = {
        "command": "kvlatent compress stdlib-llama --data train.txt --out half",
        **environment,
        "plan": {"d_qk": 32, "d_vo": 32, "head_dim": 64},
        "sha256": {"model": MODEL["fingerprint"], "data": "aa", "eval_data": None},
        "conversion": {"seconds": 87.2, "layers": layers},
        "training": training,
        "figures": figures,
    }
    return copy.deepcopy({**document, **changes}), steps


def write(path, document):
    """Write JSON below folders that may not exist yet; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def write_run(folder):
    """A checkpoint that a run made."""
    document, steps = run()
    write(folder / "run.json", document)
    write(folder / "config.json", {"model_type": "kv_latent_llama"})
    write(folder / "model.safetensors", "")
    write(folder / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    return folder
