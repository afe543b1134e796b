"""Random weights in known shapes, and the script that benches them or a pair of checkpoints."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from bench_setup import HEADS
from kvlatent_lab.model_shapes import SHAPES, random_pair
from tiny import SIZES, tokens


def test_a_random_pair_shares_all_but_the_attention():
    shape = {**SIZES, "head_dim": 32}
    original, latent = random_pair(shape, 16, 12, layers=2, context=999, dtype="bfloat16", seed=1)
    assert latent.dtype == torch.bfloat16 and latent.config.max_position_embeddings == 999
    assert len(latent.model.layers) == 2
    assert (
        latent.model.layers[0].mlp.up_proj.weight.data_ptr()
        == original.model.layers[0].mlp.up_proj.weight.data_ptr()
    )
    assert latent.model.layers[0].self_attn.v_proj.weight.shape == (2 * 12, 64)
    assert len(latent.config.kv_latent["tables"][0]) == HEADS
    assert not any(p.requires_grad for model in (original, latent) for p in model.parameters())
    again, model_wide = random_pair(shape, 16, 12, layers=2, table="model", seed=1)
    assert torch.equal(again.lm_head.weight, original.lm_head.weight)
    assert len(model_wide.config.kv_latent["tables"]) == 1
    assert latent(tokens(1, 5)).logits.isfinite().all()
    with pytest.raises(ValueError, match="unknown shape 'llama-3-8B-x'; did you mean llama-3-8b"):
        random_pair("llama-3-8B-x", 16, 16)


def test_shapes_are_those_that_were_published():
    sizes = {"llama-2-7b": 6.74e9, "llama-3-8b": 8.03e9, "llama-3.2-1b": 1.2358e9, "llama-3-70b": 70.6e9}
    assert set(sizes) == set(SHAPES)
    from transformers import LlamaForCausalLM

    for name, expected in sizes.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
        model.tie_weights()
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=2e-3)


@pytest.fixture
def speed(monkeypatch):
    """The script, with a tiny shape."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(SHAPES, "tiny", {**SIZES, "head_dim": 32})
    return importlib.import_module("speed")


def test_the_script_writes_a_file_a_setting_and_repeats_none(speed, tmp_path, capsys, monkeypatch):
    words = ["--out", str(tmp_path), "--shapes", "tiny", "--d-qk", "16", "--d-vo", "8", "--contexts", "8"]
    words += ["--new-tokens", "2", "--repeats", "3", "--caches", "dynamic", "--attention", "eager", "sdpa"]
    bench_, broken_once = speed.bench, []

    def bench(*models, attention, **options):
        if attention == "eager" and not broken_once:
            broken_once.append(attention)
            raise RuntimeError("no such kernel")
        return bench_(*models, attention=attention, **options)

    monkeypatch.setattr(speed, "bench", bench)
    speed.main(words)
    assert "eager.json: RuntimeError: no such kernel" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["sdpa.json"]
    speed.main(words)
    assert "times faster" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eager.json", "sdpa.json"]
    found = json.loads((tmp_path / "eager.json").read_text())
    assert found["attention"] == "eager" and found["model"]["name"] == "tiny"
    command = found["record"]["command"]
    assert str(tmp_path) not in command and "--shapes tiny" in command
    assert "--attention eager --compile no" in command and "sdpa" not in command


def test_the_script_asks_for_one_pair(speed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--out", str(tmp_path), "--model", "latent"])
    assert "give --shapes, or both --model and --against" in capsys.readouterr().err
    compiled = speed.parse(["--out", "x", "--shapes", "tiny"])
    assert speed.caches_of(compiled, True) == ["dynamic", "static"]
    assert speed.caches_of(compiled, False) == ["dynamic", "quantized-int4"]
