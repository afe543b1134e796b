"""Checkpoints as people have them, each a little off: what is saved at full width gives the source's own logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.inspect_checkpoint import describe
from kvlatent.workflows.run_plan import plan_run
from tiny import FAMILIES, logits, tiny_model, tokens

KINDS = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def edit_config(folder, drop=(), **fields):
    path = folder / "config.json"
    data = {name: value for name, value in json.loads(path.read_text()).items() if name not in drop} | fields
    path.write_text(json.dumps(data))


def source(folder, name, dtype=torch.float32, **sizes):
    """A tiny model of the family on disk, and its config's path."""
    tiny_model(name, vocab_size=304, **sizes).to(dtype).save_pretrained(folder)
    return folder


def says_tied_but_is_not(folder, name):
    source(folder, name, tie_word_embeddings=False)
    edit_config(folder, tie_word_embeddings=True)


def tied_and_both_are_there(folder, name):
    source(folder, name, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


def tied_and_only_the_head_is_there(folder, name):
    source(folder, name, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def bfloat16_without_a_dtype(folder, name):
    source(folder, name, torch.bfloat16)
    edit_config(folder, drop=("dtype", "torch_dtype"))


def whole_file_beside_a_stale_index(folder, name):
    tiny_model(name, num_hidden_layers=2).save_pretrained(folder, max_shard_size="50KB")
    for shard in sorted(folder.glob("model-*.safetensors"))[1:]:
        shard.unlink()
    source(folder, name)
    assert (folder / "model.safetensors.index.json").is_file()


def weights_under_another_name(folder, name):
    source(folder, name)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    edit_config(folder, transformers_weights="consolidated.safetensors")


ODD = (
    says_tied_but_is_not,
    tied_and_both_are_there,
    tied_and_only_the_head_is_there,
    bfloat16_without_a_dtype,
    whole_file_beside_a_stale_index,
    weights_under_another_name,
)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_full_width_saves_what_upstream_loads(tmp_path, odd, name, tiny_tokenizer):
    odd(tmp_path / "source", name)
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", kv=1.0)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto").eval()
    saved = load_model(tmp_path / "out")
    assert saved.dtype == wanted.dtype
    assert torch.equal(logits(saved, tokens()), logits(wanted, tokens()))
    tied = wanted.lm_head.weight is wanted.model.embed_tokens.weight
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    # What a release would read that believes the flag alone.
    assert not tied or torch.equal(stored["model.embed_tokens.weight"], wanted.lm_head.weight)


def test_a_latent_checkpoint_that_lies_about_its_ties_is_saved_as_loaded(tmp_path):
    """Trained or saved again, it stays untied, and the flag says so."""
    source(tmp_path / "m", "llama", tie_word_embeddings=False)
    convert_checkpoint_at_half(tmp_path)
    edit_config(tmp_path / "half", tie_word_embeddings=True)
    model = load_model(tmp_path / "half")
    wanted = logits(model, tokens())
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(load_model(tmp_path / "again"), tokens()), wanted)


def convert_checkpoint_at_half(place):
    from kvlatent.checkpoints.save import save
    from kvlatent.conversion.convert_model import convert

    save(convert(load_model(place / "m"), d_qk=16, d_vo=16, preset="paper"), place / "half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["5GB", "60KB"])
def test_without_a_dtype_the_weights_say_it(tmp_path, dtype, shards):
    """Whatever reads the config: what is loaded, planned and described has the weights' own bytes."""
    tiny_model("llama").to(dtype).save_pretrained(tmp_path, max_shard_size=shards)
    edit_config(tmp_path, drop=("dtype", "torch_dtype"))
    assert load_config(str(tmp_path)).dtype == dtype
    assert load_model(tmp_path).dtype == dtype
    assert plan_run(tmp_path, kv=0.5, has_text=False, stages="none").stored_dtype == dtype
    found = describe(tmp_path)
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    assert found["cache_bytes_per_token"]["original"] == 2 * 32 * 2 * 3 * dtype.itemsize


def test_upstream_reads_the_same_weights(tmp_path):
    """A missing shard of the stale index is no fault; a damaged whole file is one, whatever the index says."""
    whole_file_beside_a_stale_index(tmp_path, "llama")
    assert torch.equal(
        logits(load_model(tmp_path), tokens()), logits(tiny_model("llama", vocab_size=304), tokens())
    )
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(data)
    assert load_model(tmp_path) is not None


def test_the_kinds_are_all_families():
    assert {name.partition("-")[0] for name in FAMILIES} == set(KINDS)
