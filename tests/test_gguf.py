"""A model in a GGUF file: the same model as it was written from, everywhere a model is taken, or refused in a sentence."""

import json
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from conftest import SENTENCES
from gguf_writing import TEMPLATE, write_gguf
from kvlatent.checkpoints.gguf_files import describe_weights, find_gguf
from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.load import load_config, load_model, load_tokenizer
from kvlatent.checkpoints.save import save
from kvlatent.jobs.fingerprints import identity
from kvlatent_cli.main import app
from on_disk import snapshot, write_text
from tiny import logits, tiny_model, tokens

TYPES = GGMLQuantizationType
TEXTS = [*SENTENCES, "naïve café 東京 12,345.6 <eos> <|endoftext|>\n\n  x", ""]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-mha", vocab_size=300, num_key_value_heads=2)


@pytest.fixture
def write(tmp_path, tiny_tokenizer, model):
    """Write a GGUF file into the test's own folder."""

    def call(name="m.gguf", kind=TYPES.F32, of=model, **more):
        return write_gguf(tmp_path / name, of, tiny_tokenizer, kind, **more)

    return call


@pytest.mark.parametrize("family", ["llama-mha", "llama-tied", "qwen2"])
def test_logits_are_those_of_the_model_it_was_written_from(write, family):
    """Bit for bit: the queries and keys that ggml keeps in another order are back in place."""
    original = tiny_model(family, vocab_size=300)
    loaded = load_model(write(of=original))
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(logits(loaded, tokens()), logits(original, tokens()))


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_1])
def test_weights_are_those_of_the_blocks(write, model, kind):
    loaded = load_model(write(kind=kind)).state_dict()["model.layers.1.mlp.down_proj.weight"]
    stored = quantize(model.model.layers[1].mlp.down_proj.weight.detach().numpy(), kind)
    assert loaded.dtype == torch.float32
    assert np.array_equal(loaded.numpy(), dequantize(stored, kind))
    assert not np.array_equal(loaded.numpy(), model.model.layers[1].mlp.down_proj.weight.detach().numpy())


def test_another_dtype_where_it_is_asked_for(write):
    assert load_model(write(), dtype="bfloat16").dtype == torch.bfloat16


def test_where_the_weights_come_from(write, tmp_path):
    assert describe_weights(write(kind=TYPES.Q4_1)) == "dequantised from m.gguf (Q4_1)"
    assert describe_weights(tmp_path) == "dequantised from m.gguf (Q4_1)"
    assert describe_weights(write("half.gguf", TYPES.F16)) == "read from half.gguf (F16)"
    assert describe_weights("owner/name") is None


def test_tokenizer_is_the_files_own(write, tiny_tokenizer, recwarn):
    path = write(settings=[("add_bos_token_id", (0,)), ("add_add_bos_token", (True,))])
    config = load_config(str(path))
    found = load_tokenizer(path, config)
    assert len(found) == 300 and found.chat_template == TEMPLATE and found.eos_token == "<eos>"
    for text in TEXTS:
        assert found.encode(text) == [0, *tiny_tokenizer.encode(text)]
    assert not recwarn.list


def test_a_converted_checkpoint_is_a_plain_one(write, tmp_path, tiny_tokenizer):
    """Through the command: weights without a trace of quantisation, tokenizer files, the record and the card."""
    source = write(kind=TYPES.Q8_0)
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out"
    before = snapshot(tmp_path)
    words = ["convert", source, "--data", text, "--out", out, "--align", 1, "--set", "data.block_size=32"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    assert {name: content for name, content in snapshot(tmp_path).items() if "out/" not in name} == before
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert (out / "tokenizer.json").is_file() and str(tmp_path) not in (
        out / "tokenizer_config.json"
    ).read_text()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert [tokenizer.encode(text) for text in TEXTS] == [tiny_tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.chat_template == TEMPLATE and len(tokenizer) == 300
    again = AutoModelForCausalLM.from_pretrained(out)
    again.save_pretrained(tmp_path / "again")
    record = json.loads((out / "run.json").read_text())
    assert record["weights"] == "dequantised from m.gguf (Q8_0)"
    assert record["sha256"]["model"] == identity(source)
    assert record["command"].startswith("kvlatent convert m.gguf ")
    assert "The original's weights were dequantised from m.gguf (Q8_0)." in (out / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(shown.stdout)["weights"] == "dequantised from m.gguf (Q8_0)"


COMMANDS = {
    "inspect": ["inspect", "MODEL", "--json"],
    "calibrate": [
        "calibrate",
        "MODEL",
        "--data",
        "TEXT",
        "--out",
        "OUT",
        *["--blocks", "8", "--set", "data.block_size=32"],
    ],
    "plan": [
        "plan",
        "MODEL",
        "--data",
        "TEXT",
        *["--kv", "0.5", "--set", "data.block_size=32", "--set", "calibration.blocks=8"],
    ],
    "eval": ["eval", "MODEL", "--data", "TEXT", *["--checks", "perplexity", "--block-size", "32", "--json"]],
    "bench": [
        "bench",
        "MODEL",
        *["--contexts", "8", "--batches", "1", "--new-tokens", "2", "--repeats", "3", "--json"],
    ],
    "generate": ["generate", "MODEL", "--prompt", "The cat", "--max-new-tokens", "2"],
    "compress": ["compress", "MODEL", "--data", "TEXT", "--out", "OUT", "--dry-run"],
    "study": ["study", "widths", "--model", "MODEL", "--data", "TEXT", "--out", "OUT", "--dry-run"],
}


@pytest.mark.parametrize("given", ["m.gguf", "."])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_file_and_its_directory(write, tmp_path, command, given):
    (tmp_path / "model").mkdir()
    write("model/m.gguf")
    places = {
        "MODEL": tmp_path / "model" / given,
        "TEXT": write_text(tmp_path / "text.txt"),
        "OUT": tmp_path / "out",
    }
    done = CliRunner().invoke(app, [str(places.get(word, word)) for word in COMMANDS[command]])
    assert done.exit_code == 0, done.stderr
    if command == "inspect":
        assert json.loads(done.stdout)["weights"] == "read from m.gguf (F32)"


def test_a_latent_model_is_trained_towards_it(write, tmp_path, tiny_tokenizer):
    source, text = write(), write_text(tmp_path / "text.txt")
    words = ["--data", text, "--set", "data.block_size=32"]
    run = [["convert", source, "--out", tmp_path / "half", "--preset", "paper", "--kv", 0.5, *words]]
    words += ["--set", "stage1.batch_size=4", "--set", "lora.rank=2", "--tokens", 256]
    run += [
        ["train", tmp_path / "half", "--stage", 1, "--teacher", source, "--out", tmp_path / "one", *words]
    ]
    for command in run:
        done = CliRunner().invoke(app, [str(word) for word in command])
        assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "one" / "run.json").read_text())["weights"] == "read from m.gguf (F32)"
    assert "read from m.gguf (F32)" in (tmp_path / "one" / "README.md").read_text()


def test_what_lies_in_a_directory(write, tmp_path, model, tiny_tokenizer):
    """safetensors with their config come first, then the one GGUF; several are named."""
    path = write()
    assert find_gguf(tmp_path) == path
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) == path
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert find_gguf(tmp_path) is None and describe_weights(tmp_path) is None
    assert torch.equal(logits(load_model(tmp_path), tokens()), logits(model, tokens()))
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        write(f"two/{name}")
    with pytest.raises(
        ValueError, match=r"holds 2 models in GGUF files \(a.gguf, b.gguf\); give one of the files"
    ):
        load_model(tmp_path / "two")


def test_identity_changes_with_the_file(write, tmp_path):
    path = write()
    first = identity(path), identity(tmp_path)
    write(kind=TYPES.F16)
    assert not set(first) & {identity(path), identity(tmp_path)}


def test_a_model_that_was_read_is_not_read_again_from_another_file(write, model):
    """What is kept of a file goes with its size and time."""
    path = write(kind=TYPES.Q8_0)
    assert describe_weights(path) == "dequantised from m.gguf (Q8_0)"
    write(kind=TYPES.F32)
    assert describe_weights(path) == "read from m.gguf (F32)"


def test_outputs_are_apart_from_it(write, tmp_path, model, tiny_tokenizer):
    import kvlatent

    path, text = write(), write_text(tmp_path / "text.txt")
    latent = kvlatent.convert(load_model(path), d_qk=8, d_vo=8, preset="paper")
    with pytest.raises(ValueError, match="an output must be apart from what it is made from"):
        save(latent, tmp_path, overwrite=True)
    for given, out in ((path, tmp_path), (tmp_path, tmp_path / "out")):
        words = ["convert", given, "--data", text, "--out", out, "--overwrite"]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code != 0 and "apart from what it is made from" in done.stderr
    save(latent, tmp_path / "beside")  # of the file alone its folder is no part
    assert path.is_file()


def test_lineage_is_what_the_file_says(write, tmp_path):
    said = [
        ("add_license", ("apache-2.0",)),
        ("add_languages", (["en"],)),
        ("add_source_repo_url", ("https://huggingface.co/owner/tiny",)),
    ]
    assert lineage(write(settings=said)) == {
        "base_model": "owner/tiny",
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert lineage(write("plain.gguf")) == {}


# Bad input: one sentence each, before anything is written.


def refusal(path):
    """The sentence with which a path is refused, and the same by config, weights and tokenizer."""
    with pytest.raises(ValueError) as told:
        load_model(path)
    with pytest.raises(ValueError) as also:
        load_config(str(path))
    assert str(told.value) == str(also.value)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_an_architecture_that_nobody_reads(write, model, monkeypatch, tmp_path):
    import gguf_writing

    monkeypatch.setattr(
        gguf_writing, "GGUFWriter", lambda path, _: __import__("gguf").GGUFWriter(path, "mamba7")
    )
    assert "holds a model of architecture 'mamba7'; supported are llama, " in refusal(write())


def test_an_architecture_that_only_transformers_reads(write, tiny_tokenizer, monkeypatch):
    import gguf_writing

    monkeypatch.setattr(
        gguf_writing, "GGUFWriter", lambda path, _: __import__("gguf").GGUFWriter(path, "gpt2")
    )
    assert "holds a model of architecture 'gpt2'; supported are llama, " in refusal(write())


def test_a_type_that_the_reader_lacks(write):
    """One that it knows by name only, and one of a later day."""
    rows = np.zeros((4, 64), np.int8)
    sentence = refusal(write(tensors=[("extra.weight", rows, TYPES.I8)]))
    assert "has tensors of the type I8, which the package gguf does not dequantise" in sentence
    path = write("later.gguf", tensors=[("zzzz.weight", np.zeros((4, 64), np.float32), None)])
    content = path.read_bytes()
    at = content.index(b"zzzz.weight") + len("zzzz.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + struct.pack("<I", 4321) + content[at + 4 :])
    assert "has tensors of the type 4321, which the package gguf does not dequantise" in refusal(path)


def test_parts_of_a_split(write, tmp_path):
    settings = [("add_uint16", ("split.count", 2))]
    first = write("m-00001-of-00002.gguf", settings=settings)
    missing = "one of 2 parts of a model, and 1 of them are not beside it, e.g. m-00002-of-00002.gguf"
    assert missing in refusal(first) and missing in refusal(tmp_path)
    write("m-00002-of-00002.gguf", settings=settings)
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
def test_a_truncated_file(write, share):
    path = write()
    content = path.read_bytes()
    path.write_bytes(content[: max(5, int(share * len(content)))])
    assert "is truncated or damaged (" in refusal(path)


def test_a_file_whose_model_would_be_read_as_another(write, model):
    scaled = [("add_rope_scaling_type", (__import__("gguf").RopeScalingType.YARN,))]
    assert "has rotary scaling of type yarn, so it would be another model" in refusal(write(settings=scaled))
    window = [("add_sliding_window", (16,))]
    assert "has a window of 16 tokens" in refusal(write(settings=window))
    narrow = [("add_key_length", (8,))]
    assert "has heads of 8 channels, not 32" in refusal(write(settings=narrow))


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_tensors_that_the_reader_leaves_out(write, name):
    path = write(tensors=[(name, np.ones(16, np.float32), None)])
    with pytest.raises(
        ValueError, match=f"leaves out 1 of the 31 tensors of .*, e.g. {name}, so it would be"
    ):
        load_model(path)


def test_settings_that_are_missing(write, monkeypatch):
    import gguf_writing

    monkeypatch.setattr(gguf_writing, "_add_sizes", lambda writer, config: writer.add_context_length(8))
    assert "m.gguf lack llama.block_count, llama.embedding_length, " in refusal(write())


def test_a_missing_tensor(write, model):
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    broken = tiny_model("llama-mha", vocab_size=300, num_key_value_heads=2)
    broken.state_dict = lambda: kept
    with pytest.raises(
        ValueError, match="do not fit its config: 1 missing keys, e.g. model.layers.1.mlp.up_proj"
    ):
        load_model(write(of=broken))
