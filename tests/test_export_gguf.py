"""A GGUF file computes what the latent checkpoint does, in llama.cpp itself, and splits text as its tokenizer does."""

import re
import subprocess
import sys
import unicodedata

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import SENTENCES
from export_setup import (
    difference,
    formula_bytes,
    latent_directory,
    latent_toy,
    llama_cpp_cache_bytes,
    untrained_tokenizer,
)
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import HARD_STRINGS
from kvlatent.engines import gguf_export, gguf_tokens, llama_cpp_reading
from kvlatent.engines.export_options import ExportOptions
from tiny import tokens

pytest.importorskip("xllamacpp")
VOCAB = {"vocab_size": 300}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
FAMILIES = [
    "llama",
    "llama-mha",
    "llama-yarn",
    "llama-tied",
    "mistral",
    "qwen2",
    "phi3",
    "phi3-longrope",
    "phi3-window",
]


@pytest.fixture(scope="module")
def chatting(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = None


@pytest.fixture
def source(tmp_path, chatting):
    """A directory with a tokenizer and nothing else."""
    chatting.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    """xllamacpp, which every environment has, whatever else is installed."""
    monkeypatch.setattr(llama_cpp_reading, "_PACKAGES", {"xllamacpp": "xllamacpp"})


def fields(out):
    reader = gguf.GGUFReader(next(out.glob("*.gguf")))
    return {name: field.contents() for name, field in reader.fields.items()}, {
        t.name: t for t in reader.tensors
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name, tmp_path, source, compatibility):
    latent = latent_toy(name, **VOCAB)
    facts, off, _ = difference(gguf_export, latent, source, tmp_path / "out", tokens(), dtype="f32")
    assert off < 1e-4
    said, held = fields(tmp_path / "out")
    assert said["general.architecture"] == facts["architecture"] == "llama"
    assert said["llama.attention.key_length"] == said["llama.attention.value_length"] == 16
    assert said["llama.context_length"] == facts["context"]
    assert held["rope_freqs.weight"].shape.tolist() == [8]
    record(compatibility, latent, name, facts, off, tmp_path / "out", "--dtype f32")


def record(compatibility, latent, name, facts, off, out, options, weights="f32"):
    """Keep it for the page, once the cache is as large as is said."""
    said, by_formula = llama_cpp_cache_bytes(out), formula_bytes(facts)
    assert said == pytest.approx(by_formula, rel=0.002)
    compatibility.computed(
        latent,
        name,
        engine=facts["engine"],
        command=f"kvlatent export DIR --to gguf {options} --out OUT",
        difference=off,
        compared="log-probabilities",
        weights=weights,
        said_bytes=said,
        formula_bytes=by_formula,
    )


@pytest.mark.refused_by("llama.cpp (--to gguf)")
@pytest.mark.parametrize(("d_qk", "d_vo"), [(8, 16), (16, 8)])
def test_unequal_widths_padded_or_apart(d_qk, d_vo, tmp_path, source, compatibility):
    latent = latent_toy("qwen2", d_qk, d_vo, **VOCAB)
    with pytest.raises(
        ValueError, match=f"got d_qk={d_qk} and d_vo={d_vo}; .*--engine llama.cpp.*--pad.*--experimental"
    ):
        gguf_export.check_exportable(latent, ExportOptions())
    padded, off, _ = difference(gguf_export, latent, source, tmp_path / "padded", tokens(), pad=True)
    assert off < 1e-4
    record(compatibility, latent, "qwen2", padded, off, tmp_path / "padded", "--pad")
    apart, off, _ = difference(gguf_export, latent, source, tmp_path / "apart", tokens(), experimental=True)
    assert off < 1e-4
    record(compatibility, latent, "qwen2", apart, off, tmp_path / "apart", "--experimental")
    assert (padded["architecture"], apart["architecture"]) == ("llama", "step35")
    assert "experimental" in apart["changes"][-1]
    assert padded["cache_bytes_per_token"] == 2 * 16 * 3 * 2 * 2
    assert apart["cache_bytes_per_token"] == (8 + 16) * 3 * 2 * 2


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_of_every_type(dtype, tmp_path, source, compatibility):
    latent = latent_toy("llama", 16, 16, hidden_size=64, intermediate_size=80, **VOCAB)
    facts, off, ours = difference(gguf_export, latent, source, tmp_path / "out", tokens(), dtype=dtype)
    assert 1e-6 < off < 0.1 * float(ours.std())
    said, held = fields(tmp_path / "out")
    assert held["token_embd.weight"].tensor_type.name.lower() == dtype
    assert held["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert said["general.file_type"] == gguf_export._TYPES[dtype][1]
    # Rows of 80 entries are no whole blocks of 32.
    expected = "F16" if dtype == "q8_0" else dtype.upper()
    assert held["blk.0.ffn_down.weight"].tensor_type.name == expected
    assert ("3 matrices are f16" in " ".join(facts["changes"])) == (dtype == "q8_0")
    record(compatibility, latent, "llama", facts, off, tmp_path / "out", f"--dtype {dtype}", weights=dtype)


def test_without_the_factors_it_is_another_model(tmp_path, source, monkeypatch):
    latent = latent_toy("llama", **VOCAB)
    _, off, ours = difference(gguf_export, latent, source, tmp_path / "out", tokens())
    monkeypatch.setattr(gguf_export, "frequency_factors", lambda frequencies: [1.0] * len(frequencies))
    _, without, _ = difference(gguf_export, latent, source, tmp_path / "without", tokens())
    assert off < 1e-4 < 0.05 * float(ours.std()) < without


def test_queries_left_in_halves_are_another_model(tmp_path, source, monkeypatch):
    latent = latent_toy("llama", **VOCAB)
    monkeypatch.setattr(gguf_export, "_interleaved", lambda name, tensor, config: tensor)
    _, off, ours = difference(gguf_export, latent, source, tmp_path / "out", tokens())
    assert off > 0.05 * float(ours.std())


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_qwen3_is_refused():
    with pytest.raises(
        ValueError, match="keys of a qwen3 model by its own table and takes no other; export with --to stock"
    ):
        gguf_export.check_exportable(latent_toy("qwen3"), ExportOptions())


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(llama_cpp_reading, "_PACKAGES", {"no_such_engine": "no-such-engine"})
    with pytest.raises(ValueError, match="no_such_engine is not installed; pip install xllamacpp"):
        gguf_export.check_exportable(latent_toy("llama"), ExportOptions())


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_biases_without_a_place_are_refused():
    latent = latent_toy("llama", 8, 16, mlp_bias=True)
    with pytest.raises(
        ValueError, match="got 12 others, e.g. .*_proj.bias; use --pad instead of --experimental"
    ):
        gguf_export.check_exportable(latent, ExportOptions(experimental=True))


def test_all_biases_go_out(tmp_path, source):
    latent = latent_toy("llama", mlp_bias=True, **VOCAB)
    assert difference(gguf_export, latent, source, tmp_path / "out", tokens())[1] < 1e-4


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="has the activation silu: got 'gelu'; export with --to stock"):
        gguf_export.check_exportable(latent_toy("llama", hidden_act="gelu"), ExportOptions())


def byte_pairs(splitting, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitting
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def sentencepiece():
    """As Llama 2's: spaces are marks, unknown letters are bytes, a text begins with <s>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for text in SENTENCES for letter in text.replace(" ", "\u2581")})
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")]
    vocabulary = {
        piece: i for i, piece in enumerate([*pieces, *letters, *("".join(pair) for pair in merges)])
    }
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def split(pattern):
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "gpt-2": lambda: byte_pairs(BYTES),
    "smollm": lambda: byte_pairs(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
    ),
    "qwen2": lambda: byte_pairs(split(gguf_tokens._WORDS % ""), normalizers.NFC()),
    "llama-bpe": lambda: byte_pairs(split(gguf_tokens._WORDS % "{1,3}")),
    "default": sentencepiece,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_make_the_same_ids(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    latent_directory(tmp_path / "source", tokenizer, vocab_size=320)
    latent = load_model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    facts = gguf_export.write_export(latent, tmp_path / "source", tmp_path / "out", ExportOptions())
    assert facts["tokenizer"].endswith(f"split as {name}")
    composes = name == "qwen2"
    assert ("not composed (NFC)" in " ".join(facts["changes"])) == composes
    texts = [unicodedata.normalize("NFC", text) if composes else text for text in HARD_STRINGS[:4]]
    found = gguf_export.read_token_ids(tmp_path / "out", list(texts))
    assert found == [tokenizer(text)["input_ids"] for text in texts]
    said, _ = fields(tmp_path / "out")
    assert len(said["tokenizer.ggml.tokens"]) == 320
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_an_untrained_tokenizer_is_refused(tmp_path):
    latent_directory(tmp_path / "source", untrained_tokenizer())
    with pytest.raises(ValueError, match="was never trained: it has 256 tokens and 0 merges"):
        gguf_tokens.read_vocabulary(tmp_path / "source", load_model(tmp_path / "source").config)


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_a_tokenizer_of_words_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"merge pairs \(BPE\): the one of .* is a WordLevel; export with --to stock"
    ):
        gguf_tokens.read_vocabulary(tmp_path, latent_toy("llama").config)


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_a_splitting_without_a_name_is_refused(tmp_path):
    byte_pairs(split(r"\w+")).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"splits text in a way \(Split \+ ByteLevel\) that has no name in llama.cpp"
    ):
        gguf_tokens.read_vocabulary(tmp_path, latent_toy("llama", **VOCAB).config)


@pytest.mark.refused_by("llama.cpp (--to gguf)")
def test_no_tokenizer_and_too_many_tokens_are_refused(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="carries its tokenizer, and .* has none"):
        gguf_tokens.read_vocabulary(tmp_path / "empty", latent_toy("llama").config)
    with (
        pytest.raises(ValueError, match="got 300 tokens and 128 rows"),
        pytest.warns(UserWarning, match="300 tokens"),
    ):
        gguf_tokens.read_vocabulary(source, latent_toy("llama").config)


def test_the_chat_template_goes_along(tmp_path, source):
    difference(gguf_export, latent_toy("llama", **VOCAB), source, tmp_path / "out", tokens())
    said, _ = fields(tmp_path / "out")
    assert said["tokenizer.chat_template"] == TEMPLATE
    assert said["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL


SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = sys.argv[1], 8192, 1, 4
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F16
params.warmup, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = False, 1, 1
server = xllamacpp.Server(params)
server.handle_completions({"prompt": [5, 6], "max_tokens": 1})  # one that is closed before it has started never ends
"""


@pytest.mark.parametrize(("d_qk", "d_vo"), [(16, 16), (32, 16)])
def test_the_engine_spends_the_bytes_of_the_formula(d_qk, d_vo, tmp_path, source):
    latent = latent_toy("qwen2", d_qk, d_vo, max_position_embeddings=8192, **VOCAB)
    facts, *_ = difference(gguf_export, latent, source, tmp_path / "out", tokens(), experimental=True)
    file = next((tmp_path / "out").glob("*.gguf"))
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(file)], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.findall(r"llama_kv_cache: size = +([0-9.]+) MiB \( *(\d+) cells, +(\d+) layers", done.stderr)
    assert len([row for row in found if row[2] != "0"]) == 1
    size, cells, layers = next(row for row in found if row[2] != "0")
    assert (int(cells), int(layers)) == (8192, 3)
    assert float(size) * 2**20 == pytest.approx(8192 * facts["cache_bytes_per_token"], abs=0.005 * 2**20)
    assert np.isclose(facts["cache_bytes_per_token"], (d_qk + d_vo) * 3 * 2 * 2)
