"""A bench on an engine: both models with every type of cache, in rows like those of our own runtime."""

import pytest
from typer.testing import CliRunner

from kvlatent.engines.stored_weights import stored_weights
from kvlatent.evaluation.result_models import Bench
from kvlatent.evaluation.speed.lines import bench_lines
from kvlatent.evaluation.speed.read_rate import read_rate
from kvlatent.workflows.bench_engine import bench_engine
from kvlatent.workflows.engine_choice import choose_runnable
from kvlatent_cli.main import app
from serving_setup import HEADS, LAYERS, WIDTH, latent_directory, original_directory

NUMBERS = LAYERS * HEADS * 2 * WIDTH  # that the latent model caches for a token
BYTES = {"f16": 2, "q8_0": 34 / 32}
SHORT = {"contexts": [16, 48], "new_tokens": 4, "repeats": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("bench")
    return (
        latent_directory(folder / "latent", tiny_tokenizer),
        original_directory(folder / "original", tiny_tokenizer),
        folder / "cache",
    )


def test_original_and_latent_with_every_type_of_cache(models):
    latent, original, cache = models
    document = bench_engine(
        latent, original, engine="llama.cpp", cache=cache, kv_dtypes=["f16", "q8_0"], dtype="q8_0", **SHORT
    )
    bench = Bench.model_validate(document)
    assert bench.engine.startswith("llama.cpp in xllamacpp") and bench.dtype == "q8_0"
    places = {(row.context, row.cache, row.model): row for row in bench.rows}
    assert len(places) == len(bench.rows) == 2 * 2 * 2
    for (context, cache_type, role), row in places.items():
        numbers = NUMBERS * (2 if role == "original" else 1)
        # The engine says hundredths of a MiB, of at least 256 tokens.
        assert row.cache_bytes == pytest.approx(context * numbers * BYTES[cache_type], rel=0.05)
        assert row.prefill_s > 0 and row.decode_ms_per_token > 0
        read = (bench.original if role == "original" else bench.model).read_bytes
        assert row.bound_ms_per_token == pytest.approx(
            1e3 * (read + row.cache_bytes) / bench.read_bytes_per_s
        )
    assert [(row.context, row.cache) for row in bench.ratios] == [
        (16, "f16"),
        (16, "q8_0"),
        (48, "f16"),
        (48, "q8_0"),
    ]
    assert all(row.cache_bytes == pytest.approx(0.5, rel=0.05) for row in bench.ratios)
    assert bench.original.d_qk == [2 * WIDTH] and bench.model.d_vo == [WIDTH]
    assert 0 < bench.model.read_bytes < bench.original.read_bytes
    assert {(one["model"], one["cache"]) for one in document["record"]["caches"]} == {
        (role, kind) for role in ("original", "latent") for kind in BYTES
    }
    lines = "\n".join(bench_lines(document))
    assert "bound" in lines and "peak" not in lines and "llama.cpp in xllamacpp" in lines


def test_openvino_runs_the_same(models):
    latent, _, cache = models
    document = bench_engine(latent, engine="openvino", cache=cache, **SHORT)
    bench = Bench.model_validate(document)
    assert bench.original is None and not bench.ratios
    assert [row.cache_bytes for row in bench.rows] == [context * NUMBERS * 2 for context in (16, 48)]
    assert all(row.decode_ms_per_token > 0 and row.prefill_s > 0 for row in bench.rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"engine": "transformers"},
            "no bench runs on engine 'transformers'; choose one of llama.cpp, openvino, vllm",
        ),
        ({"contexts": [300]}, "must fit the model's context of 256 tokens: got 300"),
        ({"repeats": 2}, "needs 3 rounds or more: got repeats=2; try 5"),
        ({"kv_dtypes": ["f16", "f16"]}, "measured once each: got f16, f16; name each once"),
        ({"kv_dtypes": ["fp9"]}, "has no KV dtype 'fp9'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, sentence, models, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        bench_engine(models[0], **{"engine": "llama.cpp", "cache": tmp_path, **options})
    assert not list(tmp_path.iterdir())  # before an export, which can take minutes


def test_models_of_other_vocabularies_are_not_compared(models, tmp_path, tiny_tokenizer):
    latent, _, cache = models
    other = latent_directory(tmp_path / "other", tiny_tokenizer, vocab_size=320)
    with pytest.raises(
        ValueError, match="vocabularies have 320 and 300 entries; compare with the model it came from"
    ):
        bench_engine(latent, other, engine="llama.cpp", cache=cache, **SHORT)


def test_weights_are_those_of_the_files(models):
    latent, _, cache = models
    file = choose_runnable(latent, "llama.cpp", cache).path
    parameters = sum(tensor.numel() for tensor in _tensors(latent))
    by_checkpoint, by_file = stored_weights(latent), stored_weights(type(latent)(file))
    factors = 4 * WIDTH // 2  # of the rotary table, one each pair, in the file alone
    assert by_checkpoint.total == 4 * parameters == by_file.total - factors
    assert by_checkpoint.read == by_checkpoint.total - 4 * 300 * 64 and by_file.vocabulary == 300


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()


def test_memory_is_read_at_some_rate():
    assert 1e8 < read_rate(1) < 1e13


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--engine", "llama.cpp", "--batches", "2"),
            "--batches is of our own runtime: got it with --engine llama.cpp",
        ),
        (("--engine", "llama.cpp", "--compile"), "--compile is of our own runtime"),
        (
            ("--kv-dtype", "q8_0"),
            "--kv-dtype is of an engine's cache: got no --engine; name one, or give --caches",
        ),
    ],
)
def test_options_of_the_other_runtime_are_refused(words, sentence, models):
    done = CliRunner().invoke(app, ["bench", str(models[0]), *words])
    assert done.exit_code == 2 and sentence in done.stderr
