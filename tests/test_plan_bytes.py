"""A plan for bytes: against a search that tries everything, in what order, what it knows of losses, and what it refuses."""

import importlib
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from kvlatent.engines.facts import check_engine
from kvlatent.engines.kv_dtypes import kv_bytes_by_layer, kv_dtype_named, kv_dtypes_of
from kvlatent.engines.measured_losses import measured_at, measured_losses, most_loss
from kvlatent.planning.predicted_errors import MEASURED, LayerErrors
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint, plan_checkpoint
from kvlatent.workflows.plan_kv_bytes import Cache, plan_kv_bytes
from kvlatent_cli.options import read_context
from on_disk import write_checkpoint, write_text
from test_cli import answer, call, mistake

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"overrides": ["data.block_size=32", "calibration.rows=8"], "blocks": 12, "device": "cpu"}
SHAPE = {"head_dim": 64, "num_hidden_layers": 4, "max_position_embeddings": 256}
LAYERS, HEADS, HEAD_DIM = 4, 2, 64


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("plan-bytes")
    write_checkpoint(folder / "model", tiny_tokenizer, **SHAPE)
    write_text(folder / "text.txt")
    calibrate_checkpoint(folder / "model", folder / "text.txt", folder / "s.safetensors", **OPTIONS)
    return folder


def plan(place, size, **options):
    return plan_checkpoint(place / "model", kv_bytes=size, device="cpu", **options)


def counted(dtype, d_qk, d_vo, tokens):
    """Bytes of the caches of so many tokens, each number counted."""
    sizes = {"f16": 2, "bfloat16": 2, "fp8": 1, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32}
    return sum(sizes[dtype] for _ in range(LAYERS * HEADS * (d_qk + d_vo))) * tokens


def test_all_that_fits_by_trying_all(place):
    """Widths of llama.cpp are multiples of 8, an eighth of this head: so every width that fits has its row."""
    document = plan(place, 280_000, context=200, engine="llama.cpp")
    found = {(row["kv_dtype"], row["d_qk"]): row["bytes"] for row in document["options"]}
    for dtype in ("f16", "q8_0", "q4_1", "q4_0"):
        for width in range(8, HEAD_DIM + 1, 8):
            size = counted(dtype, width, width, 200)
            fits = size <= 280_000 and (dtype == "f16" or width % 32 == 0)
            assert ((dtype, width) in found) == fits, (dtype, width)
            assert not fits or found[dtype, width] == size
    assert ("f16", 48) not in found and ("f16", 40) in found and ("q8_0", 64) in found
    assert document["engine"] == "llama.cpp" and document["backend"] == "cpu" and document["table"] == "model"
    assert document["budget"] == {"kv_bytes": 280_000, "context": 200, "batch": 1}


def test_context_and_batch_multiply_and_the_longest_context_is_what_still_fits(place):
    one = plan(place, 1e6, context=100, batch=3, engine="vllm", backend="cpu")
    for row in one["options"]:
        token = counted(row["kv_dtype"], row["d_qk"], row["d_vo"], 1)
        assert row["bytes"] == 300 * token and row["bytes_per_token"] == token
        longest = row["maximum_context"]
        assert 3 * longest * token <= 1e6 < 3 * (longest + 1) * token
        assert row["share"] == token / counted("bfloat16", HEAD_DIM, HEAD_DIM, 1)
    longest = plan(place, 1e6, engine="vllm", backend="cpu")["budget"]["context"]
    assert longest == SHAPE["max_position_embeddings"]  # the model's own


def test_a_layer_with_a_window_holds_no_more_than_that():
    config = MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, sliding_window=16,
    )  # fmt: skip
    cache = Cache("vllm", None, "bf16", "model", "full")
    (full, *_) = plan_kv_bytes(config, cache, 1e6, 1000, 1, None)["options"]
    assert full["bytes"] == 2 * 16 * 2 * 128 and full["maximum_context"] is None


def test_speed_is_bytes_read_in_16_bits(place):
    (row,) = (
        row for row in plan(place, 1e6, context=128, engine="vllm")["options"]
        if (row["d_qk"], row["kv_dtype"]) == (64, "fp8")
    )  # fmt: skip
    read = row["read_bytes_per_step"] - row["bytes"]
    assert row["decode_speedup"] == pytest.approx((read + 2 * row["bytes"]) / (read + row["bytes"]))


def test_one_dtype_and_its_widths(place):
    document = plan(place, 1e6, context=100, engine="vllm", kv_dtype="int4")
    assert {(row["kv_dtype"], row["d_qk"]) for row in document["options"]} == {
        ("int4_per_token_head", 32), ("int4_per_token_head", 64),
    }  # fmt: skip
    assert document["refused"] == [
        {"kv_dtype": "int4_per_token_head", "rule": "powers of two", "widths": [40, 48, 56]}
    ]
    own = plan(place, 1e6, context=100, kv_dtype="float32")["options"]
    assert {row["kv_dtype"] for row in own} == {"float32"}
    assert {row["kv_dtype"] for row in plan(place, 1e6, context=100)["options"]} == {"bfloat16", "fp8"}


def test_what_is_refused_and_what_is_too_large_is_said(place):
    document = plan(place, 110_000, context=200, engine="vllm")
    refused = {row["kv_dtype"]: row["widths"] for row in document["refused"]}
    assert refused["nvfp4"] == [32, 40, 48, 56, 64] and refused["turboquant_k8v4"] == [40, 48, 56]
    assert "fp8" not in refused
    least = counted("bfloat16", 32, 32, 200)
    small = plan(place, least - 1, context=200, engine="vllm")
    assert {"kv_dtype": "bfloat16", "d_qk": 32, "d_vo": 32, "bytes": least} in small["too_large"]
    assert "bfloat16" not in {row["kv_dtype"] for row in small["options"]}
    exactly = plan(place, least, context=200, engine="vllm")
    assert "bfloat16" in {row["kv_dtype"] for row in exactly["options"]}
    assert plan(place, 110_000, context=200, engine="vllm", backend="sm100")["refused"][1]["widths"] == [
        32,
        40,
        48,
        56,
    ]


def test_known_losses_come_first_then_bytes(place):
    rows = plan(place, 1e6, context=100, engine="vllm")["options"]
    assert rows[0]["loss"] == {"is_original": True, "predicted": None, "measured": []}
    known = [row for row in rows if row["kv_dtype"] in ("bfloat16", "fp8")]
    assert rows[: len(known)] == known  # the loss of other dtypes was not measured
    widths = [row["d_qk"] for row in known if row["kv_dtype"] == "bfloat16"]
    assert widths == [64, 56, 48, 40, 32]  # wider ones lose less than 32, which was measured
    assert (known[1]["d_qk"], known[1]["kv_dtype"]) == (64, "fp8")
    assert known[1]["loss"]["measured"][0]["row"] == "stacking-original-fp8"
    rest = [row["bytes"] for row in rows[len(known) :]]
    assert rest == sorted(rest, reverse=True) and not any(
        row["loss"]["measured"] for row in rows[len(known) :]
    )
    half = next(row for row in known if (row["d_qk"], row["kv_dtype"]) == (32, "bfloat16"))["loss"][
        "measured"
    ]
    assert half and {row["table"] for row in half} == {"model"} and half[0]["head_dim"] == 64


def test_measured_losses_are_those_of_the_committed_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("measured_losses")
    committed = json.loads(script.OUT.read_text())
    assert committed == script.collect(), "run python benchmarks/measured_losses.py"
    assert [row.summary() for row in measured_losses()] == sorted(committed, key=lambda row: row["kl"])


def test_losses_are_compared_at_the_same_share_and_bounded_by_narrower_widths():
    bf16, fp8 = kv_dtype_named("bf16", "vllm"), kv_dtype_named("fp8", "vllm")
    half = measured_at(64, 64, 128, "head", bf16)
    assert half == measured_at(32, 32, 64, "head", bf16) and {row.model for row in half} == {
        "SmolLM2-135M-Instruct-from-4-bit-weights"
    }
    assert not measured_at(64, 32, 128, "head", bf16) and not measured_at(64, 64, 128, "head", fp8)
    assert not measured_at(64, 64, 128, "layer", bf16)
    untrained = min(row.kl for row in half if not row.tokens_trained)
    assert most_loss(64, 64, 128, "head", bf16) == most_loss(96, 80, 128, "head", bf16) == untrained
    assert most_loss(128, 128, 128, "head", bf16) == 0 and 0 < most_loss(128, 128, 128, "head", fp8) < 0.1
    assert most_loss(64, 64, 128, "head", fp8) is None
    assert untrained < most_loss(64, 64, 128, "model", fp8) == measured_at(64, 64, 128, "model", fp8)[0].kl
    assert most_loss(64, 56, 128, "head", bf16) is None


def errors_of(keys, values):
    """Losses that fall with the width, of layers that mind by these factors."""
    pairs = torch.linspace(1, 0, HEAD_DIM // 2 + 1, dtype=torch.float64)
    channels = torch.linspace(1, 0, HEAD_DIM + 1, dtype=torch.float64)
    scales = (torch.tensor(side, dtype=torch.float64)[:, None] for side in (keys, values))
    k, v = scales
    return LayerErrors(k * pairs**2, v * channels**2, "layer", aligned=False, unit=MEASURED)


def looked_at(keys, values):
    return lambda: (SimpleNamespace(head_dim=HEAD_DIM), errors_of(keys, values), {"tokens": 1})


def small_config(layers=LAYERS):
    return LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=HEADS, head_dim=HEAD_DIM, max_position_embeddings=128,
    )  # fmt: skip


def test_a_text_chooses_the_split_and_says_what_it_costs():
    """Keys matter four times as much, so they get the room, in every KV dtype."""
    cache = Cache(None, None, None, "layer", "full")
    document = plan_kv_bytes(small_config(), cache, 70_000, 100, 1, looked_at([4] * 4, [1] * 4))
    errors = errors_of([4] * 4, [1] * 4)
    best = {}
    for row in document["options"]:
        assert row["loss"]["predicted"] == pytest.approx(
            float(errors.keys.mean(0)[row["d_qk"] // 2] + errors.values.mean(0)[row["d_vo"]])
        )
        best.setdefault(row["kv_dtype"], row)
    for dtype, size in (("bfloat16", 2), ("fp8", 1)):
        fitting = [
            (d_qk, d_vo)
            for d_qk, d_vo in product(range(4, 65, 4), repeat=2)
            if size * LAYERS * HEADS * (d_qk + d_vo) * 100 <= 70_000
            and 3 / 8 <= d_qk / (d_qk + d_vo) <= 5 / 8
        ]
        least = min(4 * (1 - k / 64) ** 2 + (1 - v / 64) ** 2 for k, v in fitting)
        assert best[dtype]["loss"]["predicted"] == pytest.approx(least)
    assert best["bfloat16"]["d_qk"] > best["bfloat16"]["d_vo"] and document["calibration"] == {"tokens": 1}


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int4_per_token_head"])
def test_layers_differ_in_three_sizes_at_the_most_and_are_symmetric_for_vllm(dtype):
    factors = [1, 2, 4, 8, 16, 32, 64, 128]
    cache = Cache("vllm", None, dtype, "layer", "full", per_layer=True)
    config, kind = small_config(8), kv_dtype_named(dtype, "vllm")
    whole = 128 * sum(kv_bytes_by_layer(kind, 64, 64, 8, HEADS))
    document = plan_kv_bytes(config, cache, 0.8 * whole, None, 1, looked_at(factors, factors))
    (row,) = document["options"]
    assert row["d_qk"] == row["d_vo"] and 1 < len(set(row["d_qk"])) <= 3 and min(row["d_qk"]) >= 32
    assert all(kind.takes(width) for width in row["d_qk"]) and row["d_qk"] == sorted(row["d_qk"])
    size = 128 * sum(kv_bytes_by_layer(kind, row["d_qk"], row["d_vo"], 8, HEADS))
    assert row["bytes"] == size <= 0.8 * whole
    check_engine("vllm", row["d_qk"], row["d_vo"], "layer")
    even = plan_kv_bytes(
        config, Cache("vllm", None, dtype, "layer", "full"), 0.8 * whole, None, 1, looked_at(factors, factors)
    )
    assert row["loss"]["predicted"] < even["options"][0]["loss"]["predicted"]


def test_per_layer_for_vllm_from_a_text(place):
    """A share of the cache, or bytes; the table is then one per layer, which may have widths of its own."""
    saved = {"statistics": place / "s.safetensors", "engine": "vllm", "per_layer": True, **OPTIONS}
    share = plan_checkpoint(place / "model", kv=0.8, **saved)["plan"]
    assert share["table"] == "layer" and share["d_qk"] == share["d_vo"]
    assert (
        plan_checkpoint(place / "model", kv=0.8, **{**saved, "per_layer": False})["plan"]["table"] == "model"
    )
    document = plan_checkpoint(place / "model", kv_bytes=180_000, context=100, **saved)
    assert document["table"] == "layer" and document["per_layer"]
    for row in document["options"]:
        keys = row["d_qk"] if isinstance(row["d_qk"], list) else [row["d_qk"]]
        assert row["d_qk"] == row["d_vo"] and len(set(keys)) <= 3 and row["bytes"] <= 180_000
        assert row["loss"]["predicted"] is not None


def test_vllm_may_pad_what_mixes_windows_with_full_attention():
    config = small_config()
    cache = Cache("vllm", None, "fp8", "layer", "full", per_layer=True)
    document = plan_kv_bytes(config, cache, 1e6, 100, 1, looked_at([1] * 4, [1] * 4))
    assert document["notes"] == []
    beyond = plan_kv_bytes(config, cache, 1e6, 129, 1, looked_at([1] * 4, [1] * 4))
    assert beyond["notes"] == ["the original was made for 128 tokens, fewer than the 129 asked for"]
    from test_serving import config_of

    mixed = config_of("qwen2-window", head_dim=64)
    (note,) = plan_kv_bytes(mixed, cache, 1e6, 16, 1, looked_at([1] * 3, [1] * 3))["notes"]
    assert "vLLM may pad" in note


def test_a_kv_dtype_with_a_share_of_the_cache(place):
    saved = {"statistics": place / "s.safetensors", **OPTIONS}
    plain = plan_checkpoint(place / "model", kv=0.8, engine="llama.cpp", **saved)
    packed = plan_checkpoint(place / "model", kv=0.8, engine="llama.cpp", kv_dtype="q4_0", **saved)
    assert plain["plan"]["d_qk"] == 48 and packed["plan"]["d_qk"] == 32
    assert plain["plan"]["kv_dtype"] is None and packed["plan"]["kv_dtype"] == "q4_0"
    size = packed["serving"]["cache_bytes_per_token"]["latent"]
    assert size == LAYERS * HEADS * 64 * 18 / 32
    assert {row["d_qk"] for row in packed["curve"]} == {32, 64}
    some = plan_checkpoint(place / "model", context=100, batch=4, memory_bytes=1e9, **saved)["serving"]
    assert [(row["context"], row["batch"]) for row in some["decode_speedup"]] == [(100, 4)]
    assert [row["batch"] for row in some["maximum_context"]] == [4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv": 0.5}, "--kv-bytes is the budget of the cache alone, and --kv is a budget too: got both; give one of"),
        ({"memory_bytes": 1e9}, "--memory holds the weights as well: got both; give one of them"),
        ({"figure": "a.svg"}, "--figure draws shares of the cache: got both; give one of them"),
        ({"context": 0}, "--context must be at least 1: got 0; try --context 32k"),
        ({"batch": 0}, "--batch must be at least 1: got 0; try --batch 1"),
        ({"per_layer": True}, "--per-layer needs a text that tells layers apart: got none; give --data FILE or"),
        ({"engine": "vlm"}, "unknown engine 'vlm'; did you mean vllm"),
        ({"engine": "llama.cpp", "per_layer": True, "data": "text.txt"}, "llama.cpp needs the same widths in every layer"),
        ({"engine": "vllm", "table": "rows"}, "unknown table 'rows'"),
        ({"engine": "vllm", "kv_dtype": "q4_0"}, "engine vllm on cuda has no KV dtype 'q4_0'; choose one of bfloat16"),
        ({"engine": "vllm", "kv_dtype": "nvfp4"}, "a cache of engine vllm in nvfp4 takes widths 128, 256 and 512 .*: got no such width from 32 to 64; choose another"),
        ({"engine": "llama.cpp", "backend": "metal"}, "llama.cpp is known on cpu and cuda: got --backend metal; try --backend cpu"),
        ({"data": "text.txt", "statistics": "s.safetensors"}, "got both; give --data FILE or"),
        ({"kv_bytes": 1000, "engine": "vllm", "context": 200, "batch": 2},
         r"the caches of 2 x 200 tokens must fit into --kv-bytes: got 1,000 bytes, and the smallest, d_qk=32 and d_vo=32 in int4_per_token_head, has 128,000; try --kv-bytes 1MiB, --context 1$"),
    ],
)  # fmt: skip
def test_mistakes(place, options, sentence):
    files = {name: place / value for name, value in options.items() if name in ("data", "statistics")}
    with pytest.raises(ValueError, match=sentence) as caught:
        plan_checkpoint(place / "model", **{"kv_bytes": 1e6, "device": "cpu", **options, **files})
    assert "\n" not in str(caught.value)


def test_other_mistakes(place):
    with pytest.raises(
        ValueError, match="--backend says which KV dtypes there are.* got --backend cpu alone"
    ):
        plan_checkpoint(place / "model", engine="vllm", backend="cpu", data=place / "text.txt")
    with pytest.raises(
        ValueError, match="smallest widths of engine llama.cpp in q8_0 are d_qk=32 and d_vo=32; try 0.5"
    ):
        plan_checkpoint(place / "model", kv=0.4, engine="llama.cpp", kv_dtype="q8_0", data=place / "text.txt")


def test_the_command_line(place):
    words = ("plan", place / "model", "--kv-bytes", "0.3MiB", "--context", "0.25k", "--engine", "vllm")
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    for text in (
        "vllm on cuda, 256 tokens of context in 307.2 KiB of cache, head width 64, one rotary table per model",
        "KL 0.410, model-aligned-50",
        "model-aligned-50: SmolLM2-135M-Instruct-from-4-bit-weights at 32/32 of 64, bfloat16 on transformers, untrained",
        "not measured",
        "refused: 40, 48, 56 in int4_per_token_head, turboquant_k8v4, turboquant_4bit_nc, turboquant_3bit_nc: it takes powers of two",
        "read in the engine's source, not run: fp8, bfloat16",
        "the first and the last two layers stay bf16",
    ):
        assert text in done.stdout
    document = answer(*words)
    assert document["budget"]["context"] == 256 and len(document["options"]) > 5
    long = call(*words[:-2], "--context", "1k", "--batch", 2, "--kv-bytes", "2MiB", "--kv-dtype", "fp8")
    assert "kvlatent's own runtime, on transformers, 2 x 1,024 tokens" in long.stdout
    assert "made for 256 tokens, fewer than the 1,024 asked for" in long.stdout
    text = call(*words, "--statistics", place / "s.safetensors", "--kv-bytes", "1MiB")
    assert "predicted loss of the widths, nats" in text.stdout and "none: the original" in text.stdout
    small = call(*words, "--kv-bytes", "0.15MiB")
    assert "too large: bfloat16, 256 KiB at 32/32" in small.stdout
    assert "--kv-bytes is a number of MB" in mistake(*words, "--kv-bytes", "8")
    assert "got '128kk'; try 32k" in mistake(*words, "--context", "128kk")


def test_a_k_of_context_is_1024_tokens():
    texts = ("128k", "1M", "32768", "0.5K", " 8 k")
    assert [read_context("context", text) for text in texts] == [131_072, 1_048_576, 32_768, 512, 8192]
    for text in ("", "k", "-1", "0", "1.5", "128KiB", "1e5", "0.3k"):
        with pytest.raises(ValueError, match=r"--context is a number of tokens, or of k \(1,024\).*try 32k"):
            read_context("context", text)


def test_every_backend_plans(place):
    """Each engine's KV dtypes reach rows with the bytes that its facts say."""
    for engine in ("transformers-stock", "sglang", "llama.cpp-step35", "openvino", "mlx"):
        backend, known = kv_dtypes_of(engine)
        rows = plan(place, 1e7, context=64, engine=engine)["options"]
        assert {row["kv_dtype"] for row in rows} == {dtype.name for dtype in known if dtype.key_bits <= 16}, (
            backend
        )
