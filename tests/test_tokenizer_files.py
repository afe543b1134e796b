"""Tokenizers travel as they are: the same files, the same ids, no question about code; and what is refused, and when."""

import copy
import io
import json
import os
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from typer.testing import CliRunner

from conftest import SENTENCES
from kvlatent import evaluate
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.remote_code import NEEDS, remote_code
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer, write_tokenizer
from kvlatent.evaluation.standard import standard_evaluation
from kvlatent.text.corpus import prepare
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.generate import generate_continuation
from kvlatent_cli.main import app
from tiny import tiny_model

HARD = (
    "the cat <eos> the dog",
    "  two spaces  and\n\na tab\t.",
    "naïve café 東京 🙂",
    "<s> </s> <pad> 12345",
    "",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return trained(backend, pre_tokenizers.ByteLevel.alphabet())


def metaspace():
    """As Llama 2's: a space becomes a letter, one is put before the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    return trained(backend, ["▁"])


def trained(backend, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<eos>", "<unk>", "<s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def checkpoint(folder, family, backend, tokenizer_class, **settings):
    """A tiny model with a tokenizer's files as other people's tools leave them."""
    tiny_model(family, vocab_size=304).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", **settings}
    if tokenizer_class is not None:
        settings["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))  # not as we would indent it
    (folder / "special_tokens_map.json").write_text('{"eos_token":"<eos>"}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n\n")
    return folder


def tokenizer_files(folder):
    names = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "added_tokens")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.startswith(names)}


def ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return [tokenizer(text)["input_ids"] for text in HARD]


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_files_are_copied_verbatim(tmp_path, family):
    own = "Qwen2TokenizerFast" if family == "qwen2" else "PreTrainedTokenizerFast"
    source = checkpoint(tmp_path / "m", family, byte_level(), own)
    convert_checkpoint(source, tmp_path / "out", kv=0.5, preset="own-frequency")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(source)
    assert ids(tmp_path / "out") == ids(source)


FRESH = """
import builtins, json, sys
def asked(*_):
    print("ASKED"); raise EOFError
builtins.input = asked
from transformers import AutoTokenizer
from typer.testing import CliRunner
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    print(json.dumps([tokenizer(text)["input_ids"] for text in json.loads(sys.stdin.readline())]))
assert "kvlatent" not in sys.modules
"""


@pytest.mark.parametrize("backend", [byte_level, metaspace])
def test_the_saved_tokenizer_makes_the_source_s_ids_in_a_fresh_process(tmp_path, backend):
    """Upstream chooses the class by the tokenizer's config and the model's type, and ours is another model type."""
    wanted = {}
    for family in FAMILIES:
        for name in (None, "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast", "GPT2TokenizerFast"):
            source = checkpoint(tmp_path / f"{family}-{name}", family, backend(), name)
            wanted[tmp_path / f"{family}-{name}-out"] = ids(source)
            tokenizer = load_tokenizer(source, tiny_model(family, vocab_size=304).config)
            save(small(family), tmp_path / f"{family}-{name}-out", tokenizer=tokenizer)
            settings = json.loads((tmp_path / f"{family}-{name}-out" / "tokenizer_config.json").read_text())
            assert settings["tokenizer_class"] != "TokenizersBackend"
    result = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, wanted)],
        input=(json.dumps(HARD) + "\n") * len(wanted),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for folder, found in zip(wanted, lines, strict=True):
        assert found == wanted[folder], folder.name


def small(family):
    from kvlatent.conversion.convert_model import convert

    return convert(tiny_model(family, vocab_size=304), d_qk=16, preset="paper")


def test_a_changed_tokenizer_is_saved_as_changed(tmp_path):
    source = checkpoint(tmp_path / "m", "llama", byte_level(), "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(source, tiny_model("llama", vocab_size=304).config)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    save(small("llama"), tmp_path / "out", tokenizer=tokenizer)
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert found.chat_template == tokenizer.chat_template
    assert found("the <new> cat")["input_ids"] == tokenizer("the <new> cat")["input_ids"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.x does not know TokenizersBackend


def test_what_a_call_leaves_behind_is_no_change(tmp_path):
    source = checkpoint(tmp_path / "m", "llama", byte_level(), "PreTrainedTokenizerFast", pad_token="<eos>")
    tokenizer = load_tokenizer(source, tiny_model("llama", vocab_size=304).config)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    save(small("llama"), tmp_path / "out", tokenizer=tokenizer)
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(source)


def test_a_tokenizer_with_code_of_its_own_leaves_no_question(tmp_path):
    """The source names remote code for its tokenizer and a class of transformers' beside it."""
    code = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    source = checkpoint(tmp_path / "m", "qwen2", byte_level(), "Qwen2TokenizerFast", auto_map=code)
    tokenizer = load_tokenizer(source, tiny_model("qwen2", vocab_size=304).config)
    save(small("qwen2"), tmp_path / "out", tokenizer=tokenizer)
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_a_tokenizer_that_does_not_survive_saving_is_refused(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "m", "llama", byte_level(), "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(source, tiny_model("llama", vocab_size=304).config)
    monkeypatch.setattr("kvlatent.checkpoints.tokenizer_files._encodes_alike", lambda *_: False)
    with pytest.raises(ValueError, match="gives other ids once saved"):
        save(small("llama"), tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


# --- a sentencepiece model alone -------------------------------------------------------------------------------------


def sentencepiece_model():
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=file,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_tokenizer_model_only(tmp_path, family, settings):
    source = tmp_path / "m"
    tiny_model(family, vocab_size=304).save_pretrained(source)
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(source, tiny_model(family, vocab_size=304).config)
    save(small(family), tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert ids(tmp_path / "out") == ids(source)
    if settings is not None and family == "llama":  # upstream takes another class for the others' own types
        assert tokenizer_files(tmp_path / "out") == tokenizer_files(source)


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        (
            ("sentencepiece", "google.protobuf"),
            "sentencepiece and protobuf are not installed; pip install sentencepiece",
        ),
        (("google.protobuf",), "and protobuf is not installed; pip install protobuf"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, lacking, sentence):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    monkeypatch.setattr(
        "kvlatent.checkpoints.tokenizer_files.find_spec",
        lambda name: None if name in lacking else find_spec(name),
    )

    def refuses(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr("kvlatent.checkpoints.tokenizer_files.AutoTokenizer.from_pretrained", refuses)
    with pytest.raises(FileNotFoundError, match=sentence):
        load_tokenizer(tmp_path, tiny_model("llama").config)


# --- ids that the embedding lacks ------------------------------------------------------------------------------------


@pytest.fixture
def padded(tmp_path, tiny_tokenizer, corpus_file):
    """A checkpoint to whose tokenizer somebody added a pad token, one above the embedding; the text has none."""
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "m")
    tokenizer = copy.deepcopy(tiny_tokenizer)  # which all tests share
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def loaded(folder):
    model = load_model(folder)
    with pytest.warns(UserWarning, match="knows 301 tokens and the embedding has 300 rows"):
        return model, load_tokenizer(folder, model.config)


def test_a_token_above_the_embedding_is_a_warning(padded, corpus_file, tmp_path):
    with pytest.warns(UserWarning, match="a text that makes one of the others will be refused"):
        convert_checkpoint(padded, tmp_path / "out", data=corpus_file, kv=0.5, preset="own-frequency")
    model, tokenizer = loaded(tmp_path / "out")
    assert tokenizer("<added>")["input_ids"] == [300]
    assert generate_continuation(model, tokenizer, "the cat", 4)


def test_the_command_line_says_it(padded, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(padded), "--out", str(tmp_path / "out"), "--kv", "1"])
    assert result.exit_code == 0, result.output
    assert "warning: the tokenizer knows 301 tokens and the embedding has 300 rows" in result.stderr


REFUSED = r"the text has a token that the model lacks: id 300 \('<added>'\), the embedding has 300 rows"


def test_every_reader_of_text_refuses_the_id(padded, tmp_path, corpus_file):
    model, tokenizer = loaded(padded)
    text = tmp_path / "bad.txt"
    text.write_text(corpus_file.read_text() + " the cat <added> ran")
    options = {"block_size": 32, "cache_dir": tmp_path / "cache", "vocab_size": 300}
    for _ in range(2):  # built, and found again
        with pytest.raises(ValueError, match=REFUSED):
            prepare(text, tokenizer, **options)
    with pytest.raises(ValueError, match=REFUSED):
        evaluate(model, text, tokenizer=tokenizer, block_size=32)
    with pytest.raises(ValueError, match=REFUSED):
        generate_continuation(model, tokenizer, "the <added> cat")
    for check in ("perplexity", "order", "needle"):
        with pytest.raises(ValueError, match="id 300"):
            standard_evaluation(
                model, bad_only(tmp_path), tokenizer=tokenizer, checks=[check], **needle_options(check)
            )


def bad_only(folder):
    (folder / "all_bad.txt").write_text("the cat <added> ran. " * 600)
    return folder / "all_bad.txt"


def needle_options(check):
    return {"contexts": [128]} if check == "needle" else {"block_size": 128}


def test_needles_are_made_of_tokens_that_the_model_has(padded, corpus_file):
    model, tokenizer = loaded(padded)
    tokenizer.add_tokens([f"word{number}" for number in range(200)])
    document = standard_evaluation(model, corpus_file, tokenizer=tokenizer, checks=["needle"], contexts=[128])
    assert document["figures"]["latent"]["needle"]["contexts"] == [128]


# --- the modelling file in an old release ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fits"), [("4.57.3", False), ("5.0.0", False), ("5.1.0", True), ("5.24.0.dev0", True)]
)
def test_the_modelling_file_says_which_release_it_needs(monkeypatch, tmp_path, version, fits):
    """Before it imports anything else, which an old release may lack."""
    (tmp_path / "modeling_of_test.py").write_text(remote_code("llama"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "modeling_of_test", raising=False)
    monkeypatch.setattr("transformers.__version__", version)
    if fits:
        assert import_module("modeling_of_test").KVLatentLlamaConfig
        return
    monkeypatch.setattr("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", None)
    with pytest.raises(ImportError, match=f"needs {NEEDS}: found {version}; pip install --upgrade"):
        import_module("modeling_of_test")


def test_a_tokenizer_that_fits_gives_no_warning(tmp_path):
    source = checkpoint(tmp_path / "m", "llama", byte_level(), "PreTrainedTokenizerFast")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(source, tiny_model("llama", vocab_size=304).config)
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out")
    assert torch.tensor(tokenizer("the cat")["input_ids"]).max() < 304
