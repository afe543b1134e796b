"""GGUF files that are refused, each in one sentence, before anything is written: damaged, partial, foreign, or half read."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as TYPES

import gguf_writing
from kvlatent.checkpoints.load import load_config, load_model
from tiny import tiny_model


def refusal(path):
    """The sentence with which a path is refused, and the same by config, weights and tokenizer."""
    with pytest.raises(ValueError) as told:
        load_model(path)
    with pytest.raises(ValueError) as also:
        load_config(str(path))
    assert str(told.value) == str(also.value)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("name", ["mamba7", "gpt2"])
def test_an_architecture_that_is_not_supported(make_gguf, name):
    """By no one, and by us, though transformers reads it."""
    assert f"holds a model of architecture {name!r}; supported are llama, " in refusal(make_gguf(arch=name))


def test_a_type_that_the_reader_lacks(make_gguf):
    """One that it knows by name only, and one of a later day."""
    rows = np.zeros((4, 64), np.int8)
    sentence = refusal(make_gguf(tensors=[("extra.weight", rows, TYPES.I8)]))
    assert "has tensors of the type I8, which the package gguf does not dequantise" in sentence
    path = make_gguf("later.gguf", tensors=[("zzzz.weight", np.zeros((4, 64), np.float32), None)])
    content = path.read_bytes()
    at = content.index(b"zzzz.weight") + len("zzzz.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + struct.pack("<I", 4321) + content[at + 4 :])
    assert "has tensors of the type 4321, which the package gguf does not dequantise" in refusal(path)


def test_parts_of_a_split(make_gguf, tmp_path):
    settings = [("add_uint16", ("split.count", 2))]
    first = make_gguf("m-00001-of-00002.gguf", settings=settings)
    missing = "one of 2 parts of a model, and 1 of them are not beside it, e.g. m-00002-of-00002.gguf"
    assert missing in refusal(first) and missing in refusal(tmp_path)
    make_gguf("m-00002-of-00002.gguf", settings=settings)
    whole = "reads GGUF from one file only; join them: llama-gguf-split --merge m-00001-of-00002.gguf m.gguf"
    assert whole in refusal(first) and whole in refusal(tmp_path)
    renamed = first.rename(tmp_path / "first.gguf")
    assert "one of 2 parts of a model, under a name of its own" in refusal(renamed)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_gguf(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert "is no GGUF (it does not begin with the letters GGUF)" in refusal(path)
    assert "is no GGUF" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.6, 0.999])
def test_a_truncated_file(make_gguf, share):
    path = make_gguf()
    content = path.read_bytes()
    path.write_bytes(content[: max(5, int(share * len(content)))])
    assert "is truncated or damaged (" in refusal(path)


def test_a_file_whose_model_would_be_read_as_another(make_gguf, gguf_original):
    scaled = [("add_rope_scaling_type", (gguf.RopeScalingType.YARN,))]
    assert "has rotary scaling of type yarn, so it would be another model" in refusal(
        make_gguf(settings=scaled)
    )
    window = [("add_sliding_window", (16,))]
    assert "has a window of 16 tokens" in refusal(make_gguf(settings=window))
    narrow = [("add_key_length", (8,))]
    assert "has heads of 8 channels, not 32" in refusal(make_gguf(settings=narrow))


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_tensors_that_the_reader_leaves_out(make_gguf, name):
    path = make_gguf(tensors=[(name, np.ones(16, np.float32), None)])
    with pytest.raises(
        ValueError, match=f"leaves out 1 of the 31 tensors of .*, e.g. {name}, so it would be"
    ):
        load_model(path)


def test_settings_that_are_missing(make_gguf, monkeypatch):
    monkeypatch.setattr(gguf_writing, "_add_sizes", lambda writer, config: writer.add_context_length(8))
    assert "m.gguf lack llama.block_count, llama.embedding_length, " in refusal(make_gguf())


def test_a_missing_tensor(make_gguf, gguf_original):
    kept = {
        name: tensor
        for name, tensor in gguf_original.state_dict().items()
        if "layers.1.mlp.up_proj" not in name
    }
    broken = tiny_model("llama-mha", vocab_size=300, num_key_value_heads=2)
    broken.state_dict = lambda: kept
    with pytest.raises(
        ValueError, match="do not fit its config: 1 missing keys, e.g. model.layers.1.mlp.up_proj"
    ):
        load_model(make_gguf(of=broken))
