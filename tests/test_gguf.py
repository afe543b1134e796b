"""A model in a GGUF file: the same model as it was written from, everywhere a model is taken, or refused in a sentence."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from conftest import SENTENCES
from gguf_writing import TEMPLATE
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


@pytest.mark.parametrize("family", ["llama-mha", "llama-tied", "qwen2"])
def test_logits_are_those_of_the_model_it_was_written_from(make_gguf, family):
    """Bit for bit: the queries and keys that ggml keeps in another order are back in place."""
    original = tiny_model(family, vocab_size=300)
    loaded = load_model(make_gguf(of=original))
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(logits(loaded, tokens()), logits(original, tokens()))


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_1])
def test_weights_are_those_of_the_blocks(make_gguf, gguf_original, kind):
    loaded = load_model(make_gguf(kind=kind)).state_dict()["model.layers.1.mlp.down_proj.weight"]
    stored = quantize(gguf_original.model.layers[1].mlp.down_proj.weight.detach().numpy(), kind)
    assert loaded.dtype == torch.float32
    assert np.array_equal(loaded.numpy(), dequantize(stored, kind))
    assert not np.array_equal(
        loaded.numpy(), gguf_original.model.layers[1].mlp.down_proj.weight.detach().numpy()
    )


def test_another_dtype_where_it_is_asked_for(make_gguf):
    assert load_model(make_gguf(), dtype="bfloat16").dtype == torch.bfloat16


def test_it_is_saved_as_a_plain_checkpoint(make_gguf, tmp_path):
    """transformers refuses to save what it holds for quantised."""
    loaded = load_model(make_gguf(kind=TYPES.Q8_0))
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load_model(tmp_path / "plain"), tokens()), logits(loaded, tokens()))


def test_where_the_weights_come_from(make_gguf, tmp_path):
    assert describe_weights(make_gguf(kind=TYPES.Q4_1)) == "dequantised from m.gguf (Q4_1)"
    assert describe_weights(tmp_path) == "dequantised from m.gguf (Q4_1)"
    assert describe_weights(make_gguf("half.gguf", TYPES.F16)) == "read from half.gguf (F16)"
    assert describe_weights("owner/name") is None


def test_tokenizer_is_the_files_own(make_gguf, tiny_tokenizer, recwarn):
    path = make_gguf(settings=[("add_bos_token_id", (0,)), ("add_add_bos_token", (True,))])
    config = load_config(str(path))
    found = load_tokenizer(path, config)
    assert len(found) == 300 and found.chat_template == TEMPLATE and found.eos_token == "<eos>"
    for text in TEXTS:
        assert found.encode(text) == [0, *tiny_tokenizer.encode(text)]
    assert not recwarn.list


def test_a_converted_checkpoint_is_a_plain_one(make_gguf, tmp_path, tiny_tokenizer):
    """Through the command: weights without a trace of quantisation, tokenizer files, the record and the card."""
    source = make_gguf(kind=TYPES.Q8_0)
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
def test_every_command_takes_the_file_and_its_directory(make_gguf, tmp_path, command, given):
    (tmp_path / "model").mkdir()
    make_gguf("model/m.gguf")
    places = {
        "MODEL": tmp_path / "model" / given,
        "TEXT": write_text(tmp_path / "text.txt"),
        "OUT": tmp_path / "out",
    }
    done = CliRunner().invoke(app, [str(places.get(word, word)) for word in COMMANDS[command]])
    assert done.exit_code == 0, done.stderr
    if command == "inspect":
        assert json.loads(done.stdout)["weights"] == "read from m.gguf (F32)"


def test_a_latent_model_is_trained_towards_it(make_gguf, tmp_path, tiny_tokenizer):
    source, text = make_gguf(), write_text(tmp_path / "text.txt")
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


def test_what_lies_in_a_directory(make_gguf, tmp_path, gguf_original, tiny_tokenizer):
    """safetensors with their config come first, then the one GGUF; several are named."""
    path = make_gguf()
    assert find_gguf(tmp_path) == path
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) == path
    gguf_original.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert find_gguf(tmp_path) is None and describe_weights(tmp_path) is None
    assert torch.equal(logits(load_model(tmp_path), tokens()), logits(gguf_original, tokens()))
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        make_gguf(f"two/{name}")
    with pytest.raises(
        ValueError, match=r"holds 2 models in GGUF files \(a.gguf, b.gguf\); give one of the files"
    ):
        load_model(tmp_path / "two")


def test_identity_changes_with_the_file(make_gguf, tmp_path):
    path = make_gguf()
    first = identity(path), identity(tmp_path)
    make_gguf(kind=TYPES.F16)
    assert not set(first) & {identity(path), identity(tmp_path)}


def test_a_model_that_was_read_is_not_read_again_from_another_file(make_gguf, gguf_original):
    """What is kept of a file goes with its size and time."""
    path = make_gguf(kind=TYPES.Q8_0)
    assert describe_weights(path) == "dequantised from m.gguf (Q8_0)"
    make_gguf(kind=TYPES.F32)
    assert describe_weights(path) == "read from m.gguf (F32)"


def test_outputs_are_apart_from_it(make_gguf, tmp_path, gguf_original, tiny_tokenizer):
    import kvlatent

    path, text = make_gguf(), write_text(tmp_path / "text.txt")
    latent = kvlatent.convert(load_model(path), d_qk=8, d_vo=8, preset="paper")
    with pytest.raises(ValueError, match="an output must be apart from what it is made from"):
        save(latent, tmp_path, overwrite=True)
    for given, out in ((path, tmp_path), (tmp_path, tmp_path / "out")):
        words = ["convert", given, "--data", text, "--out", out, "--overwrite"]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code != 0 and "apart from what it is made from" in done.stderr
    save(latent, tmp_path / "beside")  # of the file alone its folder is no part
    assert path.is_file()


def test_another_environment_finds_the_original_plain(make_gguf, tmp_path, gguf_original):
    """The study of eviction hands checkpoints to an older transformers."""
    from kvlatent_lab.study import eviction

    path = make_gguf()
    subject = SimpleNamespace(source=SimpleNamespace(model=path), model=load_model(path))
    subject.folder = SimpleNamespace(work=tmp_path / "work")
    subject.remembered = lambda name, make: make()
    (tmp_path / "work").mkdir()
    plain = AutoModelForCausalLM.from_pretrained(eviction._original(subject))
    assert torch.equal(logits(plain, tokens()), logits(gguf_original, tokens()))
    subject.source.model = "owner/name"
    assert eviction._original(subject) == "owner/name"


def test_lineage_is_what_the_file_says(make_gguf, tmp_path):
    said = [
        ("add_license", ("apache-2.0",)),
        ("add_languages", (["en"],)),
        ("add_source_repo_url", ("https://huggingface.co/owner/tiny",)),
    ]
    assert lineage(make_gguf(settings=said)) == {
        "base_model": "owner/tiny",
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert lineage(make_gguf("plain.gguf")) == {}
