"""Result files of every kind, invented but of the form that the commands write, for a model of 4 layers."""

import json
import math
import random
from pathlib import Path

from kvlatent.model.config import LatentConfig
from kvlatent.model.table import RotaryTable

FINGERPRINT = "0123456789abcdef" * 4
MODEL = {"name": "tiny-stories", "fingerprint": FINGERPRINT}
LATENT = {"name": "tiny-stories-half", "fingerprint": "fedcba9876543210" * 4}
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
CONTEXTS, DEPTHS = [128, 256, 512, 1024], [0.0, 0.25, 0.5, 0.75, 1.0]
SPANS, PLACES = [2, 3, 4, 6, 8], [0.1, 0.5, 0.9]


def record(command, seed=0, seconds=12.5, threads=1):
    """How a figure came about, as `kvlatent.jobs.record.environment` says it."""
    return {
        "command": command,
        "seed": seed,
        "seconds": seconds,
        "python": "3.11.7",
        "versions": {"kvlatent": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": None},
        "machine": {
            "processor": "AMD EPYC",
            "cores": 2,
            "torch_threads": threads,
            "accelerator": None,
        },
    }


def needle(level, generator):
    """A grid that falls with the context."""
    grid = [
        [min(1.0, max(0.0, level - 0.1 * i + 0.04 * generator.random())) for _ in DEPTHS]
        for i in range(len(CONTEXTS))
    ]
    ranks = [[0.5 + 0.5 * value for value in row] for row in grid]
    return {
        "contexts": CONTEXTS,
        "depths": DEPTHS,
        "exact": grid,
        "rank": ranks,
        "trials": 20,
        "needle_tokens": 8,
        "seed": 0,
    }


def order(level, generator):
    """Margins that rise with the span."""
    grid = [
        [level * math.log(span + 1) + 0.2 * generator.random() - 0.1 * place for place in PLACES]
        for span in SPANS
    ]
    preferred = [[1 - 0.5 * math.exp(-value) for value in row] for row in grid]
    errors = [[0.05 + 0.01 * j for j in range(len(PLACES))] for _ in SPANS]
    return {
        "spans": SPANS,
        "depths": PLACES,
        "margin": grid,
        "margin_standard_error": errors,
        "preferred": preferred,
        "trials": 40,
        "seed": 0,
    }


def evaluation(seed=0, **changes):
    """`kvlatent eval --json`: original and latent, everything measured."""
    generator = random.Random(seed)
    layers = [
        {
            "layer": i,
            "relative_error": 0.004 * 1.9**i,
            "attention_kl": 0.01 + 0.006 * i,
            "entropy_original": 2.4 - 0.2 * i,
            "entropy_latent": 2.45 - 0.2 * i,
            "entropy_ratio": (2.45 - 0.2 * i) / (2.4 - 0.2 * i),
        }
        for i in range(4)
    ]
    task = {
        "acc": 0.412,
        "acc_stderr": 0.014,
        "acc_norm": 0.437,
        "acc_norm_stderr": 0.0141,
        "samples": 1200,
    }
    worse = {"acc": 0.405, "acc_stderr": 0.0139, "samples": 1200}
    document = {
        "kind": "evaluation",
        "model": {**LATENT, "latent": CONFIG.to_dict()},
        "original": MODEL,
        "figures": {
            "original": {
                "perplexity": {
                    "perplexity": 8.6831,
                    "standard_error": 0.2712,
                    "loss": 2.1614,
                    "tokens": 29558,
                    "bytes": 118000,
                    "bits_per_byte": 0.7811,
                    "window": 512,
                    "stride": 256,
                },
                "cache_bytes_per_token": 8192.0,
                "needle": needle(1.0, generator),
                "order": order(1.3, generator),
                "tasks": {"tasks": {"arc_easy": task}, "lm_eval": "0.4.13"},
            },
            "latent": {
                "perplexity": {
                    "perplexity": 8.7611,
                    "standard_error": 0.2731,
                    "loss": 2.1703,
                    "tokens": 29558,
                    "bytes": 118000,
                    "bits_per_byte": 0.7843,
                    "window": 512,
                    "stride": 256,
                },
                "ratio": 1.00898,
                "ratio_standard_error": 0.00102,
                "cache_bytes_per_token": 4096.0,
                "fidelity": {
                    "kl": 0.01134,
                    "kl_standard_error": 0.0004,
                    "top1_agreement": 0.9462,
                    "tokens": 29558,
                    "layers": layers,
                },
                "needle": needle(0.93, generator),
                "order": order(1.22, generator),
                "tasks": {"tasks": {"arc_easy": worse}, "lm_eval": "0.4.13"},
            },
        },
        "diagnosis": {
            "findings": [
                {
                    "name": "positional confusion",
                    "evidence": {
                        "needle_exact_kept": {"value": 0.71, "threshold": 0.8, "standard_error": 0.03}
                    },
                    "advice": "Widen keys and values (--kv) and train stage II on longer blocks.",
                }
            ],
            "not_measured": ["causality: needs the causality of the latent model"],
            "summary": "Found positional confusion (needle_exact_kept 0.71, threshold 0.8); not judged: non-causal.",
        },
        "record": {
            **record("kvlatent eval tiny-stories-half --data valid.txt --against tiny-stories"),
            "text": {"name": "valid.txt", "sha256": "ab" * 32},
        },
    }
    return {**document, **changes}


def bench():
    """`kvlatent bench --json`: two batches, four contexts, plain and quantised caches."""
    rows, ratios, stacked = [], [], []
    for batch in (1, 8):
        for context in (256, 1024, 4096, 16384):
            times = {}
            for cache, packed in (("dynamic", 1.0), ("quantized-int4", 0.28)):
                for model, part in (("original", 1.0), ("latent", 0.5)):
                    held = 8192.0 * context * batch * part * packed
                    step = 2.0 + held / 3.0e7 + (0.8 if packed < 1 else 0.0) + 0.05 * (model == "latent")
                    times[model, cache] = step, held
                    rows.append(
                        {
                            "batch": batch,
                            "context": context,
                            "model": model,
                            "cache": cache,
                            "prefill_s": 0.001 * context * batch * (1 + context / 8000) * (0.8 + 0.2 * part),
                            "decode_ms_per_token": step,
                            "decode_ms_per_token_quartiles": [0.97 * step, 1.04 * step],
                            "tokens_per_s": 1e3 * batch / step,
                            "cache_bytes": held,
                            "peak_bytes": 3e7 + held,
                        }
                    )
                    first = times["original", "dynamic"]
                    against = {
                        "batch": batch,
                        "context": context,
                        "cache": cache,
                        "prefill": 1.05,
                        "decode": first[0] / step,
                        "decode_quartiles": [0.97 * first[0] / step, 1.03 * first[0] / step],
                        "cache_bytes": held / first[1],
                        "predicted_decode": (1.5e7 + first[1]) / (1.5e7 + held),
                    }
                    stacked.append({**against, "model": model})
                    if model == "latent":
                        before = times["original", cache]
                        faster = before[0] / step
                        ratios.append(
                            {
                                **against,
                                "decode": faster,
                                "decode_quartiles": [0.97 * faster, 1.03 * faster],
                                "predicted_decode": (1.5e7 + before[1]) / (1.5e7 + held),
                            }
                        )
    longest = [
        {"batch": 1, "cache": "dynamic", "model": "original", "tokens": 121000},
        {"batch": 1, "cache": "dynamic", "model": "latent", "tokens": 242000},
        {"batch": 1, "cache": "quantized-int4", "model": "latent", "tokens": None},
    ]
    return {
        "kind": "bench",
        "model": LATENT,
        "original": MODEL,
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "compile": False,
        "rows": rows,
        "ratios": ratios,
        "stacked": stacked,
        "largest_context": {"memory_bytes": 1_000_000_000, "rows": longest},
        "record": record("kvlatent bench tiny-stories-half --against tiny-stories", threads=2),
    }


def study(name, cell, settings, figures, seed=0):
    """One cell of a study."""
    return {
        "kind": "study",
        "study": name,
        "cell": cell,
        "model": MODEL,
        "settings": {**settings, "seed": seed},
        "figures": figures,
        "record": record(f"kvlatent study {name} --cell {cell}", seed=seed, seconds=31.0),
    }


def cost(ratio, share):
    """What every cell of a study measures."""
    return {
        "perplexity": 8.68 * ratio,
        "ratio": ratio,
        "original_perplexity": 8.68,
        "tokens": 29558,
        "cache_bytes_per_token": 8192.0 * share,
        "original_cache_bytes_per_token": 8192.0,
        "cache_ratio": share,
    }


def studies():
    """Cells of all studies, with three seeds where a question needs error bars."""
    generator = random.Random(1)
    cells = []
    for d_qk, d_vo in ((32, 32), (16, 16), (8, 8), (16, 64), (64, 16), (32, 8), (8, 32), (32, 16), (16, 32)):
        for preset, factor in (("calibrated", 0.011), ("paper", 3.5)):
            share = (d_qk + d_vo) / 128
            ratio = 1 + factor * (1 / share - 1) ** 1.7 * (1 + abs(d_qk - d_vo) / 60)
            settings = {"preset": preset, "d_qk": d_qk, "d_vo": d_vo, "stage1_tokens": 0, "stage2_tokens": 0}
            figures = {"ratio_standard_error": 0.02 * (ratio - 1), **cost(ratio, share)}
            cells.append(study("widths", f"{preset}-{d_qk}x{d_vo}-seed0", settings, figures))
    for rank in (0, 4, 8, 16, 32, 64):
        settings = {
            "preset": "paper",
            "d_qk": 32,
            "d_vo": 32,
            "lora_rank": rank,
            "lora_alpha": max(1, 2 * rank),
        }
        for seed in range(3):
            figures = cost(1.35 - 0.05 * math.log1p(rank) + 0.01 * generator.random(), 0.5)
            cells.append(study("lora-rank", f"rank{rank}-seed{seed}", settings, figures, seed))
    for width in (32, 16, 8):
        for preset, base in (("calibrated", 0.02), ("paper", 0.3)):
            for first, second in ((0, 100), (20, 80), (50, 50), (0, 50), (10, 40)):
                settings = {"preset": preset, "d_qk": width, "d_vo": width}
                settings |= {"stage1_tokens": 1000 * first, "stage2_tokens": 1000 * second}
                gain = (first / (first + second) - 0.3) ** 2 - 0.09
                for seed in range(3):
                    worse = base * 32 / width * (1 + 4 * gain * (32 / width - 2) + 0.1 * generator.random())
                    figures = {
                        "standard_error": 0.2,
                        **cost(1 + worse * 120 / (20 + first + second), width / 64),
                    }
                    name = f"{preset}-{width}x{width}-stages-{first}-{second}-seed{seed}"
                    cells.append(study("stages", name, settings, figures, seed))
    for objective, base in (("next_token", 1.06), ("kl", 1.05), ("mix", 1.045)):
        for rate in (3e-4, 1e-3, 3e-3, 1e-2):
            settings = {"preset": "paper", "stage2_objective": objective, "stage2_learning_rate": rate}
            for seed in range(2):
                figures = cost(base + 0.1 * math.log10(rate / 2e-3) ** 2 + 0.004 * generator.random(), 0.5)
                cells.append(
                    study("objective", f"{objective}-rate{rate:g}-seed{seed}", settings, figures, seed)
                )
    positions = sorted({round(1.1**step) - 1 for step in range(80)})
    for width in (16, 32):
        before = {"original_order": order(1.3, generator), "original_needle": needle(1.0, generator)}
        for table, factor in (
            ("standard", 0.6),
            ("frequency-aware", 1.3),
            ("own-frequency", 0.3),
            ("calibrated", 0.05),
        ):
            high = {"standard": 0.0, "frequency-aware": 0.25, "own-frequency": 0.05}.get(table, 0.1)
            curves = {
                name: [
                    sum(math.cos(x * 10_000 ** -(start + (1 - start) * i / n)) for i in range(n)) / n
                    for x in positions
                ]
                for name, start, n in (("original", 0.0, 32), ("latent", high, width // 2))
            }
            figures = {
                **cost(1 + factor * (64 / width - 1), (64 + width) / 128),
                "needle": needle(1 - 0.3 * factor, generator),
                "order": order(1.3 - factor / 2, generator),
                "attenuation": {"positions": positions, **curves},
                **before,
            }
            settings = {"d_qk": width, "d_vo": 64, "rope": table}
            settings |= {} if table == "calibrated" else {"keys": "stride"}
            cells.append(study("rope", f"{table}-{width}-seed0", settings, figures))
    for model, base, share in (("original", 1.0, 1.0), ("calibrated", 1.01, 0.5)):
        for press, slope in (("none", 0.0), ("knorm", 0.12), ("snapkv", 0.05), ("streaming-llm", 0.3)):
            for evicted in (0.0,) if press == "none" else (0.5, 0.75):
                settings = {"model": model, "press": press, "evicted": evicted, "d_qk": int(64 * share)}
                figures = cost(base * (1 + slope * evicted**2), share * (1 - evicted))
                cells.append(study("token-eviction", f"{model}-{press}-{evicted}-seed0", settings, figures))
    failed = study("widths", "paper-4x4-seed0", {"preset": "paper", "d_qk": 4, "d_vo": 4}, {})
    failed["record"]["failed"] = "the frequency-aware table needs a rotated width divisible by 8"
    cells.append(failed)
    return cells


def run():
    """`run.json` of a compress, and its `metrics.jsonl`."""
    layers = [
        {
            "layer": i,
            "d_qk": 32 + 4 * (i % 2),
            "d_vo": 32 - 4 * (i % 2),
            "errors": {
                "paper": None if i % 2 else 0.61,
                "stride": 0.31 + 0.02 * i,
                "energy": 0.04 + 0.01 * i,
                "calibrated": 0.012 + 0.004 * i,
            },
            "reasons": {},
        }
        for i in range(4)
    ]
    steps = []
    for stage, count, start in ((1, 50, 14.0), (2, 150, 0.4)):
        for step in range(1, count + 1):
            loss = start * (0.2 + 0.8 * math.exp(-step / 25)) * (1 + 0.05 * math.sin(step * 1.7))
            steps.append({"stage": stage, "step": step, "tokens": 4096 * step, "loss": loss})
    figures = {
        name: {
            "perplexity": value,
            "standard_error": 0.27,
            "tokens": 29558,
            "cache_bytes_per_token": size,
        }
        for name, value, size in (
            ("original", 8.6831, 8192.0),
            ("converted", 9.41, 4096.0),
            ("stage1", 9.02, 4096.0),
            ("latent", 8.7611, 4096.0),
        )
    }
    figures["latent"] |= {"ratio": 1.00898, "ratio_standard_error": 0.00102}
    training = {
        f"stage{stage}": {
            "stage": stage,
            "steps": count,
            "tokens": 4096 * count,
            "minutes": 1.5 * stage,
            "first_loss": first,
            "last_loss": last,
            "tokens_per_second": 2200.0,
        }
        for stage, count, first, last in ((1, 50, 14.0, 2.9), (2, 150, 0.4, 0.09))
    }
    document = {
        "plan": {"d_qk": 32, "d_vo": 32},
        "sha256": {"model": FINGERPRINT, "data": "aa", "eval_data": None},
        "conversion": {"seconds": 87.2, "layers": layers},
        "training": training,
        "figures": figures,
    }
    return {
        **record("kvlatent compress tiny-stories --data train.txt --out tiny-stories-half"),
        **document,
    }, steps


def conversion():
    """`benchmarks/conversion.py`."""
    cells = {}
    for name, d_qk, d_vo, ratio in (
        ("ours-32x32-head-aligned-seed0", 32, 32, 1.0090),
        ("ours-32x32-head-aligned-seed1", 32, 32, 1.0094),
        ("ours-16x16-head-aligned-seed0", 16, 16, 1.0434),
        ("paper-32x32", 32, 32, 4.5708),
        ("keys-32-statistics", 32, 64, 1.0226),
    ):
        cells[name] = {
            "cell": name,
            "d_qk": d_qk,
            "d_vo": d_vo,
            "seed": 0,
            "ratio": ratio,
            "ratio_standard_error": 0.001 * ratio,
            "command": f"python benchmarks/conversion.py --cells {name}",
            "conversion_seconds": 3.5,
        }
    cells["values-48-sliced"] = {
        "cell": "values-48-sliced",
        "d_qk": 64,
        "d_vo": 48,
        "impossible": "it is",
    }
    shared = {key: value for key, value in record("").items() if key in ("python", "versions", "machine")}
    return {"cells": cells, "sha256": {"model": FINGERPRINT}, **shared}


def comparison():
    """`benchmarks/choices.py`."""
    rows = {
        "original": {"perplexity": 8.68, "tokens": 49434},
        "preset paper (stride, frequency-aware, slice, 1/sqrt(d_qk))": {
            "perplexity": 39.51,
            "ratio": 4.5516,
            "ratio_standard_error": 0.0745,
        },
        "values only: product SVD": {
            "perplexity": 8.737,
            "ratio": 1.0065,
            "ratio_standard_error": 0.0008,
        },
    }
    return {
        "width": 32,
        "sha256": {"model": FINGERPRINT},
        "rows": rows,
        **record("python benchmarks/choices.py"),
    }


def write(path, document):
    """Write JSON below folders that may not exist yet; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def everything(folder):
    """A folder with results of every kind; returns it."""
    folder = Path(folder)
    write(folder / "evaluation.json", evaluation())
    write(folder / "bench.json", bench())
    for cell in studies():
        write(folder / "study" / cell["study"] / f"{cell['cell']}.json", cell)
    made, steps = run()
    checkpoint = folder / "tiny-stories-half"
    write(checkpoint / "run.json", made)
    write(checkpoint / "config.json", {"model_type": "kv_latent_llama"})
    write(checkpoint / "model.safetensors", "")
    write(checkpoint / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    write(
        folder / "study" / "stages" / "study.json", {"kind": "study-folder", "study": "stages", "decides": {}}
    )
    write(folder / "study" / "stages" / "work" / "original.json", {"half": "done"})
    write(folder / "conversion.json", conversion())
    write(folder / "choices.json", comparison())
    return folder
