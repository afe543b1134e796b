"""How much is measured where nobody said: what the estimate chooses for models of many sizes, and that it is told."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench_setup import make_pair
from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.check import CheckRequest
from kvlatent.evaluation.checks import CHECKS, DEFAULT_CHECKS
from kvlatent.evaluation.checks import needle as needle_module
from kvlatent.evaluation.extent import choose_extent
from kvlatent.evaluation.speed import bench_extent
from kvlatent.evaluation.speed.bench_run import bench
from kvlatent.evaluation.standard import standard_evaluation
from kvlatent.model.time_estimate import (
    DEFAULT_SECONDS,
    affordable,
    assumed_speed,
    forward_operations,
    rows_at_once,
)
from kvlatent.text.standard_library import model_path
from on_disk import write_checkpoint, write_text
from tiny import tiny_model

NOTHING_GIVEN = {name: None for check in CHECKS for name in check.arguments}
FULL = {
    "perplexity": {"max_tokens": 50_000},
    "fidelity": {"blocks": 32},
    "order": {"length": 256, "trials": 16},
    "causality": {},
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "tiny, long": (torch.float32, TINY | {"vocab_size": 300, "max_position_embeddings": 131_072}),
    "135M": (
        torch.float32,
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
         "tie_word_embeddings": True},
    ),
    "1.2B": (
        torch.float32,
        {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
         "tie_word_embeddings": True},
    ),
    "7B": (
        torch.float16,
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    ),
}  # fmt: skip


class OnCpu(SimpleNamespace):
    """A model of whom only the sizes are looked at, taken for one on a CPU; its weights are not there."""

    device = torch.device("cpu")

    def __getattr__(self, name):
        return getattr(self.model, name)


def shaped(dtype, fields, device="cpu"):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields)).to(dtype)
    return OnCpu(model=model, device=torch.device(device))


def extent(model, *, paired=False, checks=None, **given):
    models = {"latent": model} | ({"original": model} if paired else {})
    wanted = checks or [name for name in DEFAULT_CHECKS if paired or name != "fidelity"]
    limit = model.config.max_position_embeddings
    request = CheckRequest(models, None, None, NOTHING_GIVEN | given, min(512, limit), limit, 0)
    return choose_extent(request, [c for c in CHECKS if c.name in wanted], optional=checks is None)


@pytest.fixture(scope="module")
def shapes():
    return {name: shaped(*shape) for name, shape in SHAPES.items()}


def test_operations_are_those_of_the_products():
    """Of a model without the parameters that stand for softmax and norms: a GPU's."""
    model = shaped(*SHAPES["135M"], device="cuda")
    linear = sum(
        2 * m.weight.numel() for m in model.model.get_decoder().modules() if isinstance(m, torch.nn.Linear)
    )
    for tokens in (1, 512, 8192):
        attention = 30 * 9 * (tokens * tokens / 2) * 2 * (64 + 64)
        found = forward_operations(model, tokens)
        assert found == pytest.approx(tokens * linear + attention, rel=1e-3)  # norms are in the parameters
        head = 2 * tokens * 49152 * 576
        assert forward_operations(model, tokens, scored=True) == pytest.approx(found + head)


def test_the_embedded_model_is_measured_in_full():
    """Its published figures must not change."""
    with torch.device("meta"):
        model = LlamaForCausalLM(load_config(str(model_path()))).half()
    for paired in (False, True):
        found = extent(OnCpu(model=model), paired=paired)
        expected = FULL | {"needle": {"contexts": [128, 1024], "trials": 8}}
        assert found.measured == {
            name: expected[name] for name in DEFAULT_CHECKS if paired or name != "fidelity"
        }
        assert found.sentence is None and found.seconds < DEFAULT_SECONDS
    model = OnCpu(model=model)
    assert [rows_at_once(model, length, 8) for length in (128, 1024)] == [8, 8]
    assert rows_at_once(model, 512, 8, scored=True) == 8 and rows_at_once(model, 256, 16) == 16


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", ["tiny, long", "135M", "1.2B"])
def test_by_default_every_model_ends_in_time(shapes, name, paired):
    found = extent(shapes[name], paired=paired)
    assert found.seconds <= DEFAULT_SECONDS and "two minutes on two cores" in found.sentence
    assert {"perplexity", "causality"} <= set(found.measured)
    assert found.measured["perplexity"]["max_tokens"] >= 1_000


def test_what_the_estimate_chooses(shapes):
    long = extent(shapes["tiny, long"], paired=True)
    assert long.measured == FULL | {"needle": {"contexts": [128, 16_384], "trials": 8}}
    assert "needle: contexts of 128 and 16,384 tokens, not 128 and 131,072" in long.sentence
    assert "give --contexts 131072 for the whole context" in long.sentence
    assert "--max-tokens" not in long.sentence
    middle = extent(shapes["135M"])
    assert middle.measured["perplexity"] == {"max_tokens": 10_000}
    assert middle.measured["needle"] == {"contexts": [128], "trials": 8}
    assert "perplexity: 10,000 of 50,000 tokens" in middle.sentence
    assert "order: 2 of 16 trials" in middle.sentence and "--max-tokens 50000" in middle.sentence
    large = extent(shapes["1.2B"])
    assert "order" not in large.measured and "order left out" in large.sentence


def test_a_gpu_measures_more():
    found = extent(shaped(*SHAPES["135M"], device="cuda"))
    assert found.sentence is None and found.measured["needle"]["contexts"] == [128, 8192]


def test_where_nothing_ends_in_time_the_least_is_measured_and_told(shapes):
    found = extent(shapes["7B"])
    assert set(found.measured) == {"perplexity", "causality"} and found.seconds > DEFAULT_SECONDS
    assert f"it takes two cores {found.seconds / 60:.0f} min or more" in found.sentence


def test_a_check_that_was_named_is_never_left_out(shapes):
    found = extent(shapes["7B"], checks=["needle", "order"])
    assert found.measured == {
        "needle": {"contexts": [128], "trials": 2},
        "order": {"length": 64, "trials": 2},
    }
    alone = extent(shapes["135M"], checks=["needle"])
    assert alone.measured["needle"]["contexts"] == [128, 512]  # all of the time, not a third


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("tiny, long", {"contexts": [128, 131_072]}, {"contexts": [128, 131_072], "trials": 8}),
        ("7B", {"contexts": [4096]}, {"contexts": [4096], "trials": 8}),
        ("7B", {"max_tokens": 1_000_000}, {"max_tokens": 1_000_000}),
        ("7B", {"data": "text.txt"}, {"max_tokens": None}),  # all of it
        ("135M", {"data": "text.txt", "max_tokens": 7}, {"max_tokens": 7}),
    ],
)
def test_what_is_asked_for_is_never_cut(shapes, name, given, expected):
    check = "needle" if "contexts" in given else "perplexity"
    assert extent(shapes[name], **given).measured[check] == expected


def test_speeds_follow_from_device_and_dtype(monkeypatch):
    cpu = torch.device("cpu")
    assert assumed_speed(cpu, torch.float16) < assumed_speed(cpu, torch.float32)
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=units: {"avx512_bf16": found})
        assert (assumed_speed(cpu, torch.bfloat16) == assumed_speed(cpu, torch.float32)) is units
    assert assumed_speed(torch.device("cuda"), torch.float32) > assumed_speed(cpu, torch.float32)


def test_a_batch_holds_few_tokens_and_few_seconds(shapes):
    assert [rows_at_once(shapes["tiny, long"], n, 8) for n in (128, 2048, 131_072)] == [8, 4, 1]
    assert [rows_at_once(shapes["135M"], n, 8) for n in (64, 128, 512)] == [8, 8, 1]
    assert rows_at_once(shapes["7B"], 128, 8) == 1


def test_the_cheapest_extension_goes_first_and_the_first_levels_are_kept():
    levels = {"a": [1.0, 2.0, 40.0], "b": [1.0, 3.0, 50.0]}
    assert affordable(levels, 100) == {"a": 2, "b": 2}
    assert affordable(levels, 45) == {"a": 2, "b": 1}
    assert affordable(levels, 4) == {"a": 1, "b": 0}
    assert affordable(levels, 1) == {"a": 0, "b": 0}


@pytest.fixture(scope="module")
def long(tmp_path_factory, tiny_tokenizer):
    """A pair of tiny models whose contexts nobody waits for, on disk, and a text."""
    folder = tmp_path_factory.mktemp("long")
    write_checkpoint(folder / "model", tiny_tokenizer, max_position_embeddings=1 << 20)
    save(convert(load_model(folder / "model"), d_qk=8, d_vo=8, preset="paper"), folder / "latent", tokenizer=tiny_tokenizer)  # fmt: skip
    write_text(folder / "text.txt", 60)
    return folder


def test_the_document_says_what_was_chosen_and_progress_comes_before_the_first_forward(long, monkeypatch):
    monkeypatch.setattr("kvlatent.evaluation.extent.DEFAULT_SECONDS", 0.1)
    told, said = [], []
    real = LlamaForCausalLM.forward

    def forward(self, *args, **options):
        assert told
        told.append("forward")
        return real(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    found = standard_evaluation(
        long / "model", long / "text.txt", checks=["perplexity", "needle", "order", "causality"],
        progress=lambda *event: told.append(event), say=said.append,
    )  # fmt: skip
    chosen = found["record"]["extent"]
    assert said == [chosen["sentence"]] and "needle: " in said[0]
    grid = found["figures"]["latent"]["needle"]
    assert chosen["measured"]["needle"] == {"contexts": grid["contexts"], "trials": grid["trials"]}
    assert max(grid["contexts"]) < 1 << 20
    assert chosen["measured"]["order"]["trials"] == found["figures"]["latent"]["order"]["trials"]
    assert json.loads(json.dumps(chosen)) == chosen
    assert told[0] == ("load", 0, 0, "")
    for name in ("perplexity", "needle", "order"):
        events = [event for event in told if event[0] == f"{name}, latent"]
        counted = [event for event in events if event[2]]
        assert events[0] == (f"{name}, latent", 0, 0, "")
        assert counted[0][1] == 0 and counted[-1][1] == counted[-1][2]
        begin = told.index(events[0])
        assert "forward" not in told[begin : told.index(counted[0])] and "forward" in told[begin:]
    assert ("causality, latent", 0, 0, "") in told


def test_both_models_read_the_same(long, monkeypatch):
    monkeypatch.setattr("kvlatent.evaluation.extent.DEFAULT_SECONDS", 0.2)
    seen = []
    monkeypatch.setattr(needle_module, "needle", lambda *_, **options: seen.append(options["contexts"]))
    standard_evaluation(long / "latent", long / "text.txt", against=long / "model", checks=["needle"])
    assert len(seen) == 2 and seen[0] == seen[1]


# Bench


@pytest.fixture(scope="module")
def pair():
    return make_pair()


def bench_of(model, limit, **given):
    sizes = dict.fromkeys(("contexts", "new_tokens", "repeats")) | given
    return bench_extent.extent_of([model, model], ["dynamic", "quantized-int4"], [1], limit=limit, **sizes)


def test_a_bench_ends_in_time_too(shapes):
    small = shaped(torch.float32, TINY | {"vocab_size": 300, "max_position_embeddings": 131_072})
    found = bench_of(small, 131_072)
    assert (found.contexts, found.new_tokens, found.repeats) == ((256, 1024, 4096), 16, 5)
    assert found.sentence is None
    assert bench_of(small, 1024).contexts == (256, 1008)
    for name in ("135M", "1.2B"):
        found = bench_of(shapes[name], 8192)
        assert found.seconds <= DEFAULT_SECONDS
        assert "not 256, 1,024 and 4,096; give" in found.sentence or "new tokens" in found.sentence
        assert "give --contexts 256,1024,4096 for all" in found.sentence
    assert "it takes two cores" in bench_of(shapes["7B"], 4096).sentence


def test_what_a_bench_is_asked_for_is_never_cut(shapes):
    found = bench_of(shapes["7B"], 4096, contexts=(4000,), repeats=9)
    assert (found.contexts, found.new_tokens, found.repeats, found.sentence) == ((4000,), 16, 9, None)
    found = bench_of(shapes["1.2B"], 8192, new_tokens=32, repeats=7)
    assert (found.new_tokens, found.repeats) == (32, 7) and found.contexts != (256, 1024, 4096)


@pytest.mark.parametrize("name", ["llama", "mistral"])  # the latter has windows, which quantised caches lack
def test_default_caches_that_do_not_work_are_left_out_and_told(name, monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda *_: False)
    said = []
    found = bench(tiny_model(name), contexts=(8,), new_tokens=1, repeats=3, say=said.append)
    assert found["settings"]["caches"] == ["dynamic"]
    reason = "needs the package optimum-quanto" if name == "llama" else "needs full attention"
    assert (
        len(said) == 1
        and said[0].startswith("a default cache is left out: cache quantized-int4 ")
        and reason in said[0]
    )
    assert found["record"]["extent"]["sentences"] == said
    with pytest.raises(ValueError, match=reason):
        bench(tiny_model(name), contexts=(8,), caches=("dynamic", "quantized-int4"))


def test_a_bench_says_what_it_chose(pair, monkeypatch):
    monkeypatch.setattr("kvlatent.evaluation.speed.bench_extent.DEFAULT_SECONDS", 0.02)
    said = []
    found = bench(pair[1], caches=("dynamic",), say=said.append)
    assert found["settings"]["contexts"] == [16] and found["settings"]["repeats"] == 3
    assert "contexts 16, not 240" in said[0] and found["record"]["extent"]["sentences"] == said
